"""The commands: each file reads one command line and calls the package. `maedistill/cli.py` lists them."""

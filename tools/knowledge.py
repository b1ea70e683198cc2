"""`maedistill knowledge`, from a checkout."""

from maedistill.cli import run

if __name__ == "__main__":
    run("knowledge")

"""The parts of tools/make_docs.py: one file for each page that is generated, and the hook of the site."""

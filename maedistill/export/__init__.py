"""A network handed over as a folder that timm opens, with its model card."""

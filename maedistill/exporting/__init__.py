"""Export a network as a folder that timm opens, with its model card."""

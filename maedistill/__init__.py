"""maedistill: small Vision Transformers distilled from large masked autoencoders."""

__version__ = "0.1.0"

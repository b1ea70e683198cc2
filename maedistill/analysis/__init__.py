"""What networks know of an image: quantified knowledge after Cheng et al. (2020)."""

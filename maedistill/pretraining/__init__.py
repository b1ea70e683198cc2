"""Pre-training: from a config to a trained student."""

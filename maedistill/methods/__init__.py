"""What one pre-training step computes: images, a patch split and teacher features in, named losses out."""

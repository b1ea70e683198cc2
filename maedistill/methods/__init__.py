"""Pre-training methods: images, a patch split and teacher features in, the named losses of one step out."""

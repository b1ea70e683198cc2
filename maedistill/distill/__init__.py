"""What a fine-tuning step adds: frozen teachers, what is seen of them, and the terms by which a student imitates it."""

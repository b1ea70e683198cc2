"""A run: its plan, its loop state, and its files on disk."""

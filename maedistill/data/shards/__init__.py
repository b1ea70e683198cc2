"""Shards and their index: written, scanned, checked, read."""

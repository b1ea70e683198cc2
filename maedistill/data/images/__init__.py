"""Decode, crop and augment images for the network."""

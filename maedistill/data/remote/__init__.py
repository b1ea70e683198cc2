"""Shards behind URLs: download and cache."""

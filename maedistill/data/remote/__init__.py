"""Download and cache remote shards."""

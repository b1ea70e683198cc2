"""Write, scan, check and read shards and their index."""

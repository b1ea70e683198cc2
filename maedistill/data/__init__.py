"""Images in: shards and their index, the order of samples, crops, the loader."""

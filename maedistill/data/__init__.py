"""Input pipeline: shards and their index, sample order, crops and the data loader."""

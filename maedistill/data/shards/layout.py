"""Names and sizes of what `maedistill shards` writes, importable without what writes it."""

REPORT_FILE = "make_shards.json"
IMAGES_PER_SHARD = 1000  # 110 MB of ImageNet: large enough for fast disk reads, small enough to cache a dozen
QUALITY = 90  # of re-encoded JPEGs

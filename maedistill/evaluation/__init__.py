"""How good a network is, and how fast: a classifier's scorecard, kNN and linear probes on frozen features, latency."""

"""How good a network is, and how fast: accuracy on labels, kNN as a trend, latency."""

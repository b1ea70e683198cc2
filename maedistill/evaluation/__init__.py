"""Measure a network: a classifier's scorecard, kNN and linear probes on frozen features, latency."""

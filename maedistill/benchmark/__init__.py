"""Benchmarks of this machine: alternatives are measured in interleaved rounds, and FLOPs and bytes are counted."""

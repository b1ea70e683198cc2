"""The processes of a run: ranks, heartbeats, diagnosis of failures, signals, and the death of a parent."""

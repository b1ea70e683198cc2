"""How a run is trained: processes, DeepSpeed engine, optimizer and schedule, checkpoints, metrics."""

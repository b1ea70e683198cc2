"""Training mechanics: DeepSpeed engine, optimizer and schedule, micro-batch fitting, non-finite updates."""

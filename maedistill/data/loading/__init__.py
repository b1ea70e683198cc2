"""Order samples, load them in worker processes and copy batches to the device."""

"""The parts of `tools/gpu_check.py`: each is a module with a function `run(check)`, run in a process of its own."""

"""The parts of `tools/gpu_check.py`: each is a module with a function `run(check)`, run in a process of its own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the checkout, where maedistill is

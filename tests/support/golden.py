"""The folder of the reference numbers, tests/golden; `MAEDISTILL_GOLDEN=DIR pytest ...` compares with those of DIR."""

import os
from pathlib import Path

GOLDEN = Path(os.environ.get("MAEDISTILL_GOLDEN") or Path(__file__).parents[1] / "golden")

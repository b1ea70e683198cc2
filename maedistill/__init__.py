"""maedistill: small Vision Transformers distilled from large masked autoencoders."""

import sys

__version__ = "0.1.0"

# `python -m maedistill.X` imports this file while argv[0] is still "-m". A module that only defines things would then
# end with exit code 0 and nothing done, which a launcher takes for a finished training.
if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
    _module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if _module.startswith("maedistill."):
        raise SystemExit(f"{_module} is no command: `python -m maedistill` lists the commands")

"""maedistill: small Vision Transformers distilled from large masked autoencoders.

The names below are imported from their modules when they are first used: `import maedistill` itself imports nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maedistill.api import evaluate, export, finetune, load_backbone, make_shards, pretrain, read_metrics
    from maedistill.data.loading.dataset import ImageDataset
    from maedistill.errors import ConfigError, DataError, NumericsError, PeerError, Preempted, UserError
    from maedistill.methods.amd import AMD
    from maedistill.methods.dmae import DMAE
    from maedistill.methods.mae import MAE
    from maedistill.methods.tinymim import TinyMIM
    from maedistill.models.encoder import Encoder
    from maedistill.runs.callback import Callback

__version__ = "0.1.0"
__all__ = [
    "AMD",
    "DMAE",
    "MAE",
    "Callback",
    "ConfigError",
    "DataError",
    "Encoder",
    "ImageDataset",
    "NumericsError",
    "PeerError",
    "Preempted",
    "TinyMIM",
    "UserError",
    "evaluate",
    "export",
    "finetune",
    "load_backbone",
    "make_shards",
    "pretrain",
    "read_metrics",
]

_MODULES = {
    "api": ("evaluate", "export", "finetune", "load_backbone", "make_shards", "pretrain", "read_metrics"),
    "data.loading.dataset": ("ImageDataset",),
    "errors": ("ConfigError", "DataError", "NumericsError", "PeerError", "Preempted", "UserError"),
    "methods.amd": ("AMD",),
    "methods.dmae": ("DMAE",),
    "methods.mae": ("MAE",),
    "methods.tinymim": ("TinyMIM",),
    "models.encoder": ("Encoder",),
    "runs.callback": ("Callback",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'maedistill' has no attribute {name!r}")
    return getattr(import_module(f"maedistill.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

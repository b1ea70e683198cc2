"""Print the memory table of docs/performance.md: a model of how many images fit in a GPU. Takes minutes of one core.

    python tools/docs_parts/memory.py imagenet/dmae_vit_b imagenet/amd_vit_b

The true step runs on tensors without data, at two batch sizes, and the largest sum of the bytes of its live tensors is
taken: a line through both gives fixed bytes and bytes per image, as training/memory_fit.py takes it on a GPU.
"""

import sys
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maedistill.benchmark.training_step import SyntheticTraining
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig

GPUS = (8, 16, 24, 40, 80)  # GB
BATCHES = (64, 128)
PER_PARAMETER = 4 + 4 + 8 + 4  # weight, gradient, two moments, the buffer that gradients are exchanged in
USABLE = 0.92  # as in training/memory_fit.py


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that are made inside it and still live. peak: the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._live | inputs:
                    self._live.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, storage: int, count: int) -> None:
        self.now -= count
        self._live.discard(storage)


def memory(name: str) -> tuple[float, float]:
    """Return the fixed bytes of a config in bf16, and the bytes per image."""
    config = load_config(name, root=PretrainConfig, to_run=False).config
    bf16 = {"precision": "bf16"}
    sections = {"teacher": config.teacher.model_copy(update=bf16), "engine": config.engine.model_copy(update=bf16)}
    training = SyntheticTraining(config.model_copy(update=sections), torch.device("cpu"))
    step, peaks = training.bare_step(), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for batch in (8, *BATCHES):  # the first makes the gradients
            training.set_batch_size(batch)
            with LiveBytes() as live:
                deque(step.gradients(), maxlen=0)
            peaks.append(live.peak)
    each = (peaks[2] - peaks[1]) / (BATCHES[1] - BATCHES[0])
    frozen = training.teacher.parameters() if training.teacher is not None else ()
    teacher = sum(weight.numel() * weight.element_size() for weight in frozen)
    return PER_PARAMETER * training.num_parameters + teacher + peaks[1] - BATCHES[0] * each, each


def main() -> None:
    """Print one row per config of the command line."""
    for name in sys.argv[1:]:
        fixed, each = memory(name)
        most = [f"{int((USABLE * gpu * 1e9 - fixed) / each) // 8 * 8:,}" for gpu in GPUS]
        print(f"| `{name}` | {fixed / 1e9:.1f} GB | {each / 1e6:.0f} MB | {' | '.join(most)} |", flush=True)


if __name__ == "__main__":
    main()

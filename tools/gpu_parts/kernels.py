"""The GPU time of one step by kind of kernel, from torch's profiler."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.check import Check
from maedistill.benchmark.training_step import TrainingStep

# A kernel belongs to the first kind with a word in the kernel's name. Triton comes first: its kernels are named after
# the operations that they fuse, and would match other kinds as well.
KINDS = {
    "fused by the compiler": ("triton",),
    "attention": ("flash", "fmha", "sdpa", "attention", "cudnn_generated"),
    "products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "addmm", "bmm", "::mm"),
    "layer norm": ("layer_norm", "gammabeta"),
    "AdamW and lists": ("multi_tensor", "adam", "foreach"),
    "copies and casts": ("copy", "cat", "memcpy", "memset", "fill"),
}
OTHERS = "elementwise and reductions"


@dataclass(frozen=True)
class Kernels:
    """The kernels of one step: number of launches, and milliseconds by kind."""

    launches: int
    milliseconds: Counter[str]

    def __str__(self) -> str:
        words = ", ".join(f"{kind} {spent:.1f}" for kind, spent in self.milliseconds.most_common())
        return f"{self.launches} launches, {self.milliseconds.total():.1f} ms: {words}"


def kernels_of(check: Check, step: TrainingStep, *, log: str) -> Kernels:
    """Profile one step and write the profiler's table to a log. On a CPU, operators are counted instead of kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_card else [])]
    check.wait()
    with profile(activities=activities) as profiler:
        step()
        check.wait()
    events = profiler.key_averages()
    kind_of_time = "self_device_time_total" if check.on_card else "self_cpu_time_total"
    text = events.table(sort_by=kind_of_time, row_limit=60, max_name_column_width=100)
    check.log(log).write_text(text)
    device = torch.autograd.DeviceType.CUDA if check.on_card else torch.autograd.DeviceType.CPU
    spent, launches = Counter(), 0
    for event in events:
        # An annotation of torch's own, as of an optimizer's step, spans kernels that are counted by themselves.
        is_kernel = event.device_type == device and not event.is_user_annotation
        if is_kernel and (microseconds := getattr(event, kind_of_time)) > 0:
            spent[kind_of(event.key)] += microseconds / 1e3
            launches += event.count
    return Kernels(launches, spent)


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), OTHERS)

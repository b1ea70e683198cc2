"""Properties of the machine: number formats, CPU cores, memory and GPUs."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp16"]
JOBS_VARIABLE, GPU_JOBS_VARIABLE = "MAEDISTILL_JOBS", "MAEDISTILL_GPU_JOBS"  # in the environment of a study's jobs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")  # most bytes of a control group, bytes that it uses
_CGROUP_V2 = ("memory.max", "memory.current")
_BF16_CAPABILITY = (8, 0)  # Ampere is the first with bf16 units; older cards convert around every operation


def resolve_precision(setting: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on a GPU, fp16 if the card only emulates bf16, fp32 on a CPU."""
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY else "fp16"


def emulates_bf16() -> bool:
    """Tell whether this CPU has no instructions for bf16, not even the integer ones of AVX-512 that stand in for them.

    PyTorch then takes its own loops in the place of oneDNN's: on an AMD EPYC with AVX2, a product of 2,048 x 192 and
    192 x 768 took 5.6 times as long as in fp32.
    """
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast of a number format; it does nothing in fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Disable autocast for operations that need fp32. Does nothing for meta tensors, which have no autocast."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def named_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """Read CUDA_VISIBLE_DEVICES: numbers, "GPU-..." or "MIG-..."; return None if it is not set.

    As in CUDA, the first empty or negative entry ends the list.
    """
    if "CUDA_VISIBLE_DEVICES" not in environ:
        return None
    entries = (entry.strip() for entry in environ["CUDA_VISIBLE_DEVICES"].split(","))
    return list(takewhile(lambda entry: entry and not entry.startswith("-"), entries))


def visible_gpus() -> list[str]:
    """List the GPUs of this process, each as the CUDA_VISIBLE_DEVICES value that gives a process only that GPU."""
    count, named = torch.cuda.device_count(), named_gpus(os.environ)
    if named is None:
        return [str(number) for number in range(count)]
    # CUDA shows a process only one MIG slice, even if several are named; other processes can use the rest.
    return [gpu for number, gpu in enumerate(named) if number < count or (count and gpu.startswith("MIG-"))]


def cpu_name() -> str:
    """Return the kind of this machine's processor, "" where Linux does not name it, as on ARM."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else ""


def concurrent_runs() -> int:
    """Return the number of runs that share the machine's memory: the jobs of a study, which says so, else 1."""
    return _jobs(JOBS_VARIABLE)


def runs_on_gpu() -> int:
    """Return the number of runs that may share this process's GPU: jobs of a study, which says so, else 1."""
    return _jobs(GPU_JOBS_VARIABLE)


def _jobs(variable: str) -> int:
    jobs = os.environ.get(variable, "")
    return max(1, int(jobs)) if jobs.isdecimal() else 1


def cpu_share(local_ranks: int) -> int:
    """Return the number of CPU cores per rank, at an equal share of the machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))


def loader_workers(setting: int | None, cores: int) -> int:
    """Return the number of loader processes of a rank with so many cores: one per core, at most 8, unless it is set."""
    return min(8, cores) if setting is None else setting


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still take: of the machine, and below the limits of its control groups."""
    meminfo = (root / "proc/meminfo").read_text().split()
    free = [1024 * int(meminfo[meminfo.index("MemAvailable:") + 1])]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, names = ("memory", _CGROUP_V1) if controllers else ("", _CGROUP_V2)
        group = root / "sys/fs/cgroup" / mount / path.lstrip("/")
        # in a container the path is often the host's, and its mount shows the container's own group at the top
        for folder in (group, *group.parents[: len(Path(path).parts) - 1]):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                stat = (folder / "memory.stat").read_text().split()
            except OSError:
                continue
            if limit != "max":
                cached = int(stat[stat.index("inactive_file") + 1])  # the kernel drops it when memory is short
                free.append(int(limit) - int(used) + cached)
    return max(0, min(free))

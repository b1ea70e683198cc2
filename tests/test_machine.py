"""What a machine offers, on pretended cards: the number format that `auto` means, and the GPUs that runs can share."""

import pytest
import torch

from maedistill.machine import free_memory, resolve_precision, visible_gpus

CARDS = {"V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0)}


@pytest.mark.parametrize("card", CARDS)
def test_auto_is_bf16_only_where_the_card_computes_in_it(monkeypatch, card):
    """torch says that every card can: below compute capability 8.0 it converts around each operation."""
    gpu, asked = torch.device("cuda", 3), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or CARDS[card])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert resolve_precision("auto", gpu) == ("fp16" if card in ("V100", "T4") else "bf16")
    assert asked == [gpu], "of this rank's card"
    assert [resolve_precision(name, gpu) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    ("variable", "count", "names"),
    [
        (None, 0, []),
        (None, 3, ["0", "1", "2"]),
        ("5,2", 2, ["5", "2"]),
        ("GPU-3f1c, GPU-90ab", 2, ["GPU-3f1c", "GPU-90ab"]),
        ("0,7", 1, ["0"]),  # there is no number 7
        ("1,-1,0", 1, ["1"]),
        ("MIG-1,MIG-2,MIG-3", 1, ["MIG-1", "MIG-2", "MIG-3"]),  # CUDA shows one slice to one process
        ("MIG-1", 0, []),
        ("", 0, []),
    ],
)
def test_gpus_are_named_so_that_another_process_finds_them(monkeypatch, variable, count, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_gpus() == names


GB = 2**30
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")
# lines of /proc/self/cgroup; of each control group its folder, file names, limit, use and cached files; what is free
GROUPS = {
    "none": (["0::/"], {}, 20 * GB),
    "v2, of the parent": (
        ["0::/jobs/7"],
        {"jobs/7": (V2, "max", GB, 0), "jobs": (V2, str(8 * GB), 5 * GB, 2 * GB)},
        5 * GB,
    ),
    "v2, its own": (["0::/jobs/7"], {"jobs/7": (V2, str(3 * GB), GB, 0), "jobs": (V2, str(8 * GB), GB, 0)}, 2 * GB),
    "v2, a container": (["0::/../../docker/abc"], {"": (V2, str(4 * GB), GB, GB)}, 4 * GB),
    "v1, SLURM": (
        ["3:cpu:/", "2:memory,hugetlb:/slurm/job_7", "0::/"],
        {"memory/slurm/job_7": (V1, str(6 * GB), GB, 0), "memory": (V1, str(2**63 - 4096), 30 * GB, 0)},
        5 * GB,
    ),
    "v1, a container": (["2:memory:/docker/abc"], {"memory": (V1, str(4 * GB), 5 * GB, 0)}, 0),
}


@pytest.mark.parametrize("name", GROUPS)
def test_free_memory_is_that_of_the_machine_and_of_its_control_groups(tmp_path, name):
    lines, groups, free = GROUPS[name]
    (tmp_path / "proc/self").mkdir(parents=True)
    meminfo = f"MemTotal: {40 * 2**20} kB\nMemFree: {2**20} kB\nMemAvailable: {20 * 2**20} kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    (tmp_path / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    for folder, (names, limit, used, cached) in groups.items():
        place = tmp_path / "sys/fs/cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        for file, text in (
            *zip(names, (limit, used), strict=True),
            ("memory.stat", f"anon 1\ninactive_file {cached}\n"),
        ):
            (place / file).write_text(f"{text}\n")
    assert free_memory(tmp_path) == free


def test_free_memory_of_this_machine():
    assert 2**20 < free_memory() < 2**50

"""What a machine offers, on pretended cards: the number format that `auto` means, and the GPUs that runs can share."""

import pytest
import torch

from maedistill.machine import precision, visible_gpus

CARDS = {"V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0)}


@pytest.mark.parametrize("card", CARDS)
def test_auto_is_bf16_only_where_the_card_computes_in_it(monkeypatch, card):
    """torch says that every card can: below compute capability 8.0 it converts around each operation."""
    gpu, asked = torch.device("cuda", 3), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or CARDS[card])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert precision("auto", gpu) == ("fp16" if card in ("V100", "T4") else "bf16")
    assert asked == [gpu], "of this rank's card"
    assert [precision(name, gpu) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert precision("auto", torch.device("cpu")) == "fp32"


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

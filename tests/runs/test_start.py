"""The number format of a run: one for all ranks, and the same after a restart on another device."""

import json
from types import SimpleNamespace

import pytest
import torch

from maedistill.errors import ConfigError
from maedistill.runs import start
from maedistill.runs.folder import RunFolder

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def number_format(tmp_path, monkeypatch):
    """`_number_format` for a setting, a device and the capability of its card. begun: what the run began with."""

    def resolve(setting, device, capability=(9, 0), *, begun=None, fresh=False):
        (tmp_path / "run.json").write_text(json.dumps({"starts": [{"precision": begun}]}))
        monkeypatch.setattr(start, "checkpoint_steps", lambda folder: [8] if begun else [])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        config = SimpleNamespace(engine=SimpleNamespace(precision=setting))
        return start._number_format(config, RunFolder(tmp_path), device, fresh=fresh)

    return resolve


def test_auto_is_what_the_device_suits_and_then_what_the_run_began_with(number_format):
    for device, capability, expected in ((CPU, (9, 0), "fp32"), (GPU, (9, 0), "bf16"), (GPU, (7, 0), "fp16")):
        assert number_format("auto", device, capability) == expected
        assert number_format("auto", device, capability, begun="bf16") == "bf16"
        assert number_format("auto", device, capability, begun="bf16", fresh=True) == expected
        assert number_format("fp32", device, capability, begun="bf16") == "fp32"  # which the folder refuses


def test_ranks_on_different_cards_do_not_begin_in_two_formats(number_format, monkeypatch):
    monkeypatch.setattr(start.distributed, "gather_objects", lambda value: [value, "fp16"])
    assert number_format("auto", GPU, (7, 0)) == "fp16"
    with pytest.raises(ConfigError, match=r"engine\.precision"):
        number_format("auto", GPU, (9, 0))

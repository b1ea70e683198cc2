"""What stands for `auto` in a run: one number format for all ranks, and the same values after a restart."""

import pytest
import torch

from maedistill.config.auto import FORMAT
from maedistill.config.keys import differing_keys
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.runs import resolve_auto
from maedistill.runs.resolve_auto import with_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def format_of(monkeypatch):
    """The resolved format of a setting, on a device and a card of a capability. began: that of the folder's run."""

    def resolved(setting, device, capability=(9, 0), *, began=None, fresh=False) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(resolve_auto, "_values_of_run", lambda config, keys: {FORMAT: began} if began else {})
        overrides = ["run=r", "data.train=x.tar", f"{FORMAT}={setting}"]
        config = load_config("quickstart/mae", overrides, root=PretrainConfig).config
        after = with_precision(config, device, fresh=fresh)
        assert {key for key, *_ in differing_keys(config, after)} <= {FORMAT}
        return after.engine.precision

    return resolved


def test_auto_is_what_the_device_suits_and_then_what_the_run_began_with(format_of):
    for device, capability, expected in ((CPU, (9, 0), "fp32"), (GPU, (9, 0), "bf16"), (GPU, (7, 0), "fp16")):
        assert format_of("auto", device, capability) == expected
        assert format_of("auto", device, capability, began="auto") == expected  # a run that did not record it
        assert format_of("auto", device, capability, began="bf16") == "bf16"
        assert format_of("auto", device, capability, began="bf16", fresh=True) == expected
        assert format_of("fp32", device, capability, began="bf16") == "fp32"  # which the folder refuses
    with pytest.raises(ConfigError, match="began in fp16"):
        format_of("auto", CPU, began="fp16")


def test_a_run_keeps_its_numbers_and_a_fresh_one_gets_its_own(monkeypatch):
    monkeypatch.setattr(resolve_auto, "_values_of_run", lambda config, keys: {"optim.warmup_epochs": 0.005})
    given = ["run=r", "data.train=x.tar", "optim.epochs=0.2", "optim.warmup_epochs=auto"]
    config = load_config("quickstart/mae", given, root=PretrainConfig).config
    for fresh, expected in ((False, 0.005), (True, 0.01)):
        after, [line] = resolve_auto.resolve_auto(config, 1_000, world_size=1, fresh=fresh)
        assert after.optim.warmup_epochs == expected and ("as this run began" in line) == (not fresh)


def test_ranks_on_different_cards_do_not_begin_in_two_formats(format_of, monkeypatch):
    monkeypatch.setattr(resolve_auto.distributed, "gather_objects", lambda value: [value, "fp16"])
    assert format_of("auto", GPU, (7, 0)) == "fp16"
    with pytest.raises(ConfigError, match=r"engine\.precision"):
        format_of("auto", GPU, (9, 0))


def test_a_cpu_without_bf16_warns_of_each_setting_that_asks_for_it(monkeypatch, capsys):
    given = ["run=r", "data.train=x.tar", "teacher.source=run:t", "teacher.precision=bf16", "engine.precision=bf16"]
    config = load_config("quickstart/dmae", given, root=PretrainConfig).config
    both = {"engine.precision", "teacher.precision"}
    for emulates, device, expected in ((True, CPU, both), (False, CPU, set()), (True, GPU, set())):
        monkeypatch.setattr(resolve_auto, "emulates_bf16", lambda emulates=emulates: emulates)
        with_precision(config, device, fresh=False)
        keys = {line.split("=")[0].split()[-1] for line in capsys.readouterr().err.splitlines()}
        assert keys == expected

"""When a run is compiled, and that compiling changes its speed only."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.pretraining.build import build_encoder, build_method, step_inputs
from maedistill.training import compilation
from maedistill.training.compilation import compile_function, compile_module, should_compile

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("works", [True, False])
def test_left_open_it_is_for_gpus_with_a_compiler_below_zero_3(works, monkeypatch):
    monkeypatch.setattr(compilation, "_compiler_failure", lambda device: None if works else "no compiler")
    assert [should_compile(None, GPU, zero=zero) for zero in range(4)] == [works, works, works, False]
    assert not should_compile(None, CPU, zero=0)
    assert not should_compile(False, GPU, zero=0)
    if works:
        assert should_compile(True, CPU, zero=0)
    else:
        with pytest.raises(ConfigError, match="no compiler"):
            should_compile(True, CPU, zero=0)


def test_a_machine_without_a_compiler_runs_without_one(monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    failure = compilation._compiler_failure.__wrapped__(CPU)
    assert failure == "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
    monkeypatch.setattr(compilation, "_compiler_failure", lambda device: failure)
    assert not should_compile(None, GPU, zero=0)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "Failed to find C compiler" in said[0]


def test_the_compiler_here_works():
    assert compilation._compiler_failure.__wrapped__(CPU) is None


@torch.no_grad()
def test_compiled_inputs_and_drop_path_draw_what_eager_mode_draws(tmp_path):
    (tmp_path / "tiny.yaml").write_text("method: mae\n")
    shape = [
        "student.width=32",
        "student.depth=2",
        "student.num_heads=2",
        "student.patch_size=8",
        "student.drop_path=0.5",
    ]
    more = ["data.train=x", "run=x", "data.image_size=32", "decoder.width=16", "decoder.depth=1", "decoder.num_heads=2"]
    model = "student.model=vit_tiny_patch16_224"
    config = load_config(tmp_path / "tiny.yaml", [model, *shape, *more], root=PretrainConfig).config
    encoder = build_encoder(config)
    method = build_method(config, encoder, None)
    prepare = partial(step_inputs, config, num_patches=encoder.grid**2)
    pixels = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16) + 10**11

    def losses() -> list[float]:
        torch.manual_seed(3)
        return [method(*prepare(pixels, positions))["loss"].item() for _ in range(4)]

    eager, split = losses(), prepare(pixels, positions)[1]
    graphs = counters["stats"]["unique_graphs"]
    prepare = compile_function(prepare)
    compile_module(method)
    assert torch.equal(prepare(pixels, positions)[1].order, split.order)
    compiled = losses()
    assert counters["stats"]["unique_graphs"] >= graphs + 2, "both were compiled"
    assert len(set(eager)) == 4  # other paths are dropped each time
    assert compiled == pytest.approx(eager, rel=1e-5)
    torch.compiler.reset()

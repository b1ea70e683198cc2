"""Several teachers in one pre-training run: what they add up to, what they cost, a kill, and those that are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.exporting.folder import export
from maedistill.pretraining.flops import count_flops
from maedistill.pretraining.setup import Pretraining, open_pretraining
from tests.faults.notes import same_result

VIT = "teacher.source=random:vit_tiny_patch16_224 teacher.width=48 teacher.depth=2 teacher.num_heads=2"
VIT += " teacher.patch_size=8"
DMAE = ["method=dmae", *VIT.split(), "align.student=[1]", "align.teacher=[1]"]
AMD = [*DMAE, "method=amd", "masks.teacher_keep_ratio=0.5", "generate.by=decoder"]
AMD += ["decoder.attention=cross"]
MAP = "teacher.source=random:test_resnet teacher.image_size=64 align.teacher=[3] align.student=[0] align.weight=0.5"


@pytest.fixture
def opened(pretraining):
    """Opens the parts of a run with further teachers."""

    def open_parts(settings: list[str], *more: str) -> Pretraining:
        given = [*settings, f"more_teachers={json.dumps(more)}"]
        config = load_config(pretraining.config, given, root=PretrainConfig, to_run=False).config
        return open_pretraining(config, world_size=1, device=torch.device("cpu"))

    return open_parts


def step(parts: Pretraining) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of one micro-batch."""
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    losses = parts.module(*parts.module_inputs(pixels, torch.arange(3)))
    losses["loss"].backward()
    return losses, {name: parameter.grad for name, parameter in parts.module.named_parameters()}


@pytest.mark.parametrize("settings", [DMAE, AMD], ids=["dmae", "amd"])
def test_two_equal_teachers_of_half_the_weight_are_one(opened, settings):
    one, two = opened(settings), opened([*settings, "align.weight=0.5"], f"{VIT} 'align.student=[ 1 ]'")
    weights = one.module.state_dict()
    again = {name.replace("projections.0", "projections.1"): value for name, value in weights.items()}
    two.module.load_state_dict(again | weights)
    (losses, gradients), (both, halves) = step(one), step(two)
    assert both["align/1"] == both["align/teacher2/1"] == losses["align/1"] > 0
    torch.testing.assert_close(both["loss"], losses["loss"])
    for name, gradient in gradients.items():
        of_half = name.startswith("projections.")
        torch.testing.assert_close(halves[name], gradient / 2 if of_half else gradient)
        if of_half:
            assert torch.equal(halves[name.replace(".0.", ".1.")], halves[name])


def test_each_has_its_own_head_precision_view_license_and_cost(opened):
    more = [f"{MAP} align.projector=mlp teacher.precision=bf16 teacher.license=cc-by-4.0"]
    more.append(f"{VIT} teacher.image_size=64 align.output=mlp align.teacher=[0]")
    parts = opened([*DMAE, "align.bias=false"], *more)
    losses, gradients = step(parts)
    assert losses.keys() == {"loss", "pixels", "align/1", "align/teacher2/0", "align/teacher3/1"}
    expected = losses["pixels"] + losses["align/1"] + losses["align/teacher2/0"] / 2 + losses["align/teacher3/1"]
    torch.testing.assert_close(losses["loss"], expected)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert [one.teacher.dtype for one in parts.teachers] == [torch.float32, torch.bfloat16, torch.float32]
    assert "projections.1.3.weight" in gradients and "projections.0.bias" not in gradients
    said = "\n".join(parts.summary_lines)
    assert said.count("\nteacher  random:") == 3 and ", 8 x 8 patches, the mean of 4 for one" in said
    assert "sees     the whole image at 64 px, maps of side 4 resampled to 4" in said
    assert parts.metadata["license"] == "cc-by-4.0"
    assert len({*parts.metadata["teacher_weights"]}) == 2, "the first and the third are of the same weights"
    images, split = parts.inputs(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.arange(1))
    with FlopCounterMode(display=False) as counter:
        parts.teachers[1].teacher(images, split)
    flops = count_flops(parts.module, *(one.teacher for one in parts.teachers), num_student=4, num_teacher=4)
    assert flops["teacher2"] == pytest.approx(counter.get_total_flops() / 1e9)
    assert 0 < flops["teacher"] < flops["teacher3"]
    assert flops["total"] == pytest.approx(sum(value for name, value in flops.items() if name != "total"))


@pytest.mark.faults
def test_a_killed_run_of_a_vit_and_a_resnet_goes_on_bit_by_bit(pretraining, tmp_path):
    """What was measured of the second teacher is not complete, and in the checkpoint alone."""
    more = [*DMAE, f"more_teachers=['{MAP} align.normalize=stored align.stored_steps=20']", "optim.ema=0.9"]
    whole = pretraining("two-teachers", *more)
    pretraining("two-teachers-killed", *more, witness=True, code=-9, WITNESS_KILL="21")
    again = pretraining("two-teachers-killed", *more)
    assert "continues at step 16 of 24" in again.out
    same_result(again.run, whole.run)
    statistics = whole.last_checkpoint() / "statistics2.safetensors"
    assert load_file(statistics)["sums"][0].unique().tolist() == [20 * 12 * 4]
    card = (export(whole.run, tmp_path / "export") / "README.md").read_text()
    assert f"`{MAP} align.normalize=stored" in card and card.count("random:test") > 1
    other = [setting.replace("0.5 ", "0.4 ") for setting in more]
    assert "more_teachers" in pretraining("two-teachers", *other, code=2).err


def test_a_map_beside_a_mean_of_blocks_leaves_it_out(opened):
    settings = [*DMAE, "align.last_blocks=1"]
    with pytest.raises(ConfigError, match=r"align\.last_blocks") as refusal:
        opened(settings, MAP)
    remedy = refusal.value.remedy.removeprefix("set ")
    assert opened(settings, f"{MAP} {remedy}").teachers[1].config.align.last_blocks is None


@pytest.mark.parametrize(
    ("more", "cause", "remedy"),
    [
        ("align.teacher=[0]", "method=dmae needs a teacher", "teacher.source="),
        ("teacher.source=ema", "can only be the first", "name others"),
        ("teacher.source=python:a.B", "can only be the first", "name others"),
        (f"{VIT} student.width=64", "it sets student.width", "teacher.* and align.*"),
        (f"{VIT} align.warmup_share=0.1", "it sets align.warmup_share", "not warmup_share"),
        (f"{VIT} masks.teacher_keep_ratio=1.0", "it sets masks.teacher_keep_ratio", "teacher.* and align.*"),
        (f"{VIT} method=dmae", "it sets method", "teacher.* and align.*"),  # the run's own value
        (f"{VIT} method=mae", "method=mae", "use method=dmae"),
        (f"{VIT} align.teacher=[2]", "block 2 does not exist", "use 0 to 1"),
        (f"{VIT} align.student=[5]", "block 5 does not exist, the student has 2", "use 0 to 1"),
        (f"{VIT} align.output=ffn", "one of block, mlp", "write block or mlp"),
        (f"{MAP} align.output=mlp", "align.output: ", "align.output=block"),
        (f"{VIT} 'align.weight=1", "cannot be split into settings", "close its quotes"),
    ],
)
def test_what_cannot_be_a_further_teacher_is_refused(opened, more, cause, remedy):
    with pytest.raises(ConfigError) as error:
        opened(DMAE, more)
    assert error.value.cause.startswith(f"more_teachers: {more!r}: ")
    assert cause in error.value.cause and remedy in error.value.remedy

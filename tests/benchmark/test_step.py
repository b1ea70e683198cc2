"""The plain step is the same mathematics, and what is counted and measured around both is what it is said to be."""

import json

import pytest
import torch

from maedistill.benchmark.plain_step import StepComparison
from maedistill.benchmark.step import peak_memory
from maedistill.benchmark.training_step import SyntheticTraining, without_download
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig, Teacher
from maedistill.errors import ConfigError

TINY = """
method: {method}
data: {{image_size: 32}}
student: {{model: vit_tiny_patch16_224, width: 32, depth: 3, num_heads: 2, patch_size: 4}}
decoder: {{width: 16, depth: 2, num_heads: 2}}
"""
TEACHER = "teacher: {source: 'random:vit_tiny_patch16_224', width: 48, depth: 4, num_heads: 4, patch_size: 8}\n"
PAIRS = {
    "mae": "",
    "dmae": "align: {student: [1], teacher: [2]}\n",
    "amd": "align: {student: [0, 2], teacher: [1, 3]}\n",
    "tinymim": "align: {student: [1], teacher: [2]}\n",
}


@pytest.fixture
def comparison(tmp_path, request) -> StepComparison:
    method, *overrides = request.param.split()
    text = TINY.format(method=method) + PAIRS[method]
    text += TEACHER if method != "mae" else ""
    text += "masks: {teacher_keep_ratio: 0.5}\n" if method == "amd" else ""
    (tmp_path / "tiny.yaml").write_text(text)
    config = load_config(tmp_path / "tiny.yaml", overrides, root=PretrainConfig, to_run=False).config
    comparison = StepComparison(config, torch.device("cpu"))
    comparison.set_batch_size(5)
    return comparison


CASES = ["mae", "dmae", "amd", "dmae decoder.attention=cross", "amd decoder.predict_ratio=0.3", "mae pixels.target=raw"]
CASES += ["tinymim", "amd decoder.attention=cross generate.by=decoder align.last_blocks=2 align.teacher=[1,2]"]
CASES += ["amd teacher.source=ema align.teacher=[0,2] align.projector=mlp align.distance=cosine_smooth_l1"]
CASES += [
    "dmae pixels.weight=0 masks.student_keep_ratio=1 align.student=[2]",
    "dmae student.register_tokens=2",
    "mae decoder.attention=cross decoder.predict_ratio=0.5",
]


def test_a_teacher_of_whole_images_has_no_plain_version(tmp_path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.format(method="dmae") + PAIRS["dmae"])
    overrides = ["teacher.source=random:test_convnext", "teacher.image_size=64"]
    config = load_config(tmp_path / "tiny.yaml", overrides, root=PretrainConfig, to_run=False).config
    with pytest.raises(ConfigError, match="benchmark step"):
        StepComparison(config, torch.device("cpu"))


@pytest.mark.parametrize("comparison", CASES, indirect=True)
def test_plain_and_ours_have_the_same_losses_and_gradients(comparison: StepComparison) -> None:
    for parameter in comparison.method.parameters():  # away from zeros and ones
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    ours, plain, found = comparison.bare_step(), comparison.plain_step(), []
    images, split = ours.draw()
    for step in (ours, plain):
        target = step.teacher(images, split) if step.teacher is not None else None
        losses = step.losses(images, split, target)
        step.backward(losses["loss"])
        gradients = {name: p.grad.clone() for name, p in comparison.method.named_parameters() if p.grad is not None}
        without = {name for name, p in comparison.method.named_parameters() if p.grad is None}
        assert without <= {"encoder.vit.norm.weight", "encoder.vit.norm.bias"}, "no loss reads them without a decoder"
        comparison.method.zero_grad()
        found.append((target, losses, gradients))
    (target, losses, gradients), (plain_target, plain_losses, plain_gradients) = found
    torch.testing.assert_close(plain_target, target, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain_losses, losses, rtol=1e-5, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        error = (plain_gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-5, (name, float(error))


def test_memory_is_what_lives_at_once() -> None:
    """1,000 floats at a time: views, changes in place and what was there before take none; what dies gives it back."""
    before = torch.ones(1000)

    def work() -> torch.Tensor:
        first = before * 2  # 1
        second = first.view(10, 100).t() + 0  # 2
        first.add_(1)
        del first  # 1
        before.mul_(1)
        third = second * 2  # 2
        # 3: flattening copies what is transposed; the result has 2,000 floats, so 5 at once
        return torch.cat([third.flatten(), before])

    assert peak_memory(work, torch.device("cpu")) == 5 * 4000
    x = torch.ones(1000, requires_grad=True)
    x.grad = torch.zeros(1000)
    # exp's result is kept for its gradient, beside which there are at most that of the sum and the one that is added
    assert 2 * 4000 <= peak_memory(lambda: x.exp().sum().backward(), torch.device("cpu")) <= 3 * 4000


def test_a_report_of_a_tiny_pair(launcher, tmp_path) -> None:
    """The whole tool in a process of its own: DeepSpeed's group is not for ours."""
    (tmp_path / "tiny.yaml").write_text(TINY.format(method="dmae") + PAIRS["dmae"] + TEACHER)
    words = ["tools/benchmark.py", "step", tmp_path / "tiny.yaml", "--batch", 3, "--rounds", 1]
    launcher.start(tmp_path, [*words, "--json", tmp_path / "out.json"]).finish()
    tables = json.loads((tmp_path / "out.json").read_text())["tables"]
    speed, flops, shares, memory, checkpoint = tables.values()
    assert [row["step"] for row in speed] == ["plain", "ours", "ours, DeepSpeed engine"]
    assert all(row["images/s"]["median"] > 0 and 0 < row["MFU"]["median"] < 1 for row in speed)
    plain, ours, engine = ({name: value["median"] for name, value in row.items() if name != "step"} for row in speed)
    assert plain["x plain"] == ours["x ours"] == 1
    assert engine["x ours"] == pytest.approx(engine["images/s"] / ours["images/s"])
    assert ours["x plain"] == pytest.approx(ours["images/s"] / plain["images/s"])
    assert {row["part"] for row in flops} == {"teacher", "encoder", "decoder", "projections", "backward", "total"}
    assert all(0 < row["ours"] <= row["plain"] for row in flops)
    for name in ("plain", "ours"):
        assert sum(row[name] for row in shares) == pytest.approx(1)
    assert 0 < memory[0]["ours"] < memory[0]["plain"]
    assert checkpoint[0]["GB"] > 0 and checkpoint[0]["stalls for seconds"]["median"] > 0


def test_nothing_is_downloaded(root) -> None:
    for name, expected in (("dmae_vit_b", "random:vit_large_patch16_224.mae"), ("mae_vit_b", None)):
        config = load_config(root / f"configs/imagenet/{name}.yaml", [], root=PretrainConfig, to_run=False).config
        assert without_download(config).teacher.source == expected
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"source": "run:runs/mine"})})
    assert without_download(config) is config


VALUES = {
    "source": "file:teacher.pth",
    "decay": "[0.5, 0.6]",
    "model": "vit_tiny_patch16_224",
    "weights": "ema",
    "width": "48",
    "depth": "4",
    "num_heads": "4",
    "patch_size": "8",
    "pos_embed": "sincos1d",
    "image_size": "64",
    "mean": "[0.1, 0.2, 0.3]",
    "std": "[1, 1, 1]",
    "license": "mit",
    "sha256": 64 * "0",
    "precision": "fp32",
}


def test_the_random_copy_of_a_teacher_opens_whatever_its_section_says(tmp_path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.format(method="dmae") + PAIRS["dmae"])
    assert list(VALUES) == list(Teacher.model_fields)
    settings = [f"teacher.{key}={value}" for key, value in VALUES.items() if key != "decay"]  # decay: of ema alone
    config = load_config(tmp_path / "tiny.yaml", settings, root=PretrainConfig, to_run=False).config
    assert SyntheticTraining(config, torch.device("cpu")).source.encoder.width == 48

"""Token relations against a plain computation from what timm's attention is given, and as a real run."""

import pytest
import torch
from torch.nn import functional as F

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.models.masking import PatchSplit
from maedistill.pretraining.build import build_encoder, build_method, build_teacher, build_teacher_source
from maedistill.pretraining.flops import count_flops

TINY = """
method: tinymim
data: {image_size: 32}
student: {model: vit_tiny_patch16_224, width: 32, depth: 3, num_heads: 2, patch_size: 8}
teacher: {source: "random:vit_tiny_patch16_224", width: 48, depth: 4, num_heads: 4, patch_size: 8}
align: {student: [0, 2], teacher: [1, 3]}
decoder: {width: 16, depth: 1, num_heads: 2}
"""
CPU = torch.device("cpu")


def build(tmp_path, *overrides):
    """Method and teacher of the config above, nothing in them special."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = load_config(tmp_path / "tiny.yaml", overrides, root=PretrainConfig, to_run=False).config
    encoder = build_encoder(config)
    source = build_teacher_source(config, grid=encoder.grid)
    method = build_method(config, encoder, source)
    draws = torch.Generator().manual_seed(0)
    for parameter in (*method.parameters(), *source.encoder.parameters()):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draws)
    return method, build_teacher(config, source, CPU)


def relation(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """softmax(A B' / sqrt d) of 4 heads cut out of the whole width: [B, H, M, d] -> [B, 4, M, M], in float64."""
    rows, columns = (part.double().transpose(1, 2).flatten(2).unflatten(2, (4, -1)).transpose(1, 2)
                     for part in (rows, columns))  # fmt: skip
    return (rows @ columns.mT / rows.shape[-1] ** 0.5).softmax(-1)


@torch.no_grad()
def test_the_relations_are_those_of_both_networks_own_attention(tmp_path, monkeypatch):
    method, teacher = build(tmp_path)
    images, order = torch.rand(3, 3, 32, 32), torch.stack([torch.randperm(16) for _ in range(3)])
    split = PatchSplit(order, 6, 6)
    calls, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or attend(*a, **k))
    losses = method(images, split, teacher(images, split))
    assert len(calls) == 3 + 3 + 1, "the teacher's last block, whose input is enough, does not run; one of the decoder"
    calls.clear()
    teacher.encoder(teacher.prepare(images), split.teacher)
    method.encoder((images - method.mean) / method.std, split.student)
    theirs, ours = calls[:4], calls[4:7]
    for s, t in ((0, 1), (2, 3)):
        (query, key, value), (query_t, key_t, value_t) = (
            [part[:, :, 1:] for part in side] for side in (ours[s], theirs[t])
        )
        for name, rows, expected in (
            ("qk", (query, key), (query_t, key_t)),
            ("vv", (value, value), (value_t, value_t)),
        ):
            found, target = relation(*rows), relation(*expected)
            divergence = (target * (target / found).log()).sum(-1).mean()
            assert losses[f"align/{s}/{name}"].item() == pytest.approx(divergence.item(), rel=1e-4)


def test_heads_that_the_student_cannot_be_cut_into_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"student\.width: 32 cannot be split into the teacher's 3 heads") as raised:
        build(tmp_path, "teacher.num_heads=3")
    assert "student.width=36" in raised.value.remedy


def test_its_flops_are_counted(tmp_path):
    counts = count_flops(*build(tmp_path), num_student=6, num_teacher=6)
    assert min(counts[part] for part in ("teacher", "encoder", "decoder", "backward")) > 0


def test_without_pixels_the_plan_names_what_stays_untrained(pretraining, settings, mae):
    ended = pretraining("tinymim-dry", *settings["dmae"], "method=tinymim", "pixels.weight=0", "--dry-run")
    assert "warning  with method=tinymim and pixels.weight=0" in ended.out


def test_a_run_imitates_token_relations(pretraining, settings, mae):
    ended = pretraining("tinymim", *settings["dmae"], "method=tinymim")
    steps = ended.metrics()
    for step in steps:
        assert step["loss"] == pytest.approx(step["pixels"] + step["align/1/qk"] + step["align/1/vv"], rel=1e-5)
    assert steps[-1]["align/1/vv"] < steps[0]["align/1/vv"]
    assert "nothing trains" not in ended.out
    assert "method   tinymim: student sees 4 of 16 patches, teacher the same" in ended.out

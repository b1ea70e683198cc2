"""The model of a step: its FLOPs against torch's own count, its bytes and times against arithmetic by hand."""

import pytest
import torch

from maedistill.benchmark.step_model import BANDWIDTH, LAUNCH_SECONDS, PEAK_FLOPS, PRODUCT_SHARE, Kind, model_step
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.pretraining.build import build_encoder, build_method, build_teacher, build_teacher_source, mask_sizes
from maedistill.pretraining.flops import count_flops

SMALL = ["student.model=vit_tiny_patch16_224", "student.depth=2", "decoder.depth=1", "align.student=[1]"]
SMALL += ["teacher.source=random:vit_tiny_patch16_224", "teacher.depth=3", "align.teacher=[2]", "data.image_size=64"]


@pytest.fixture
def config():
    return load_config("imagenet/dmae_vit_s", ["data.train=x", "run=x", *SMALL], root=PretrainConfig).config


def test_flops_are_those_that_torch_counts(config):
    kinds = model_step(config, batch=8)
    encoder = build_encoder(config)
    source = build_teacher_source(config, grid=encoder.grid)
    method, teacher = build_method(config, encoder, source), build_teacher(config, source, torch.device("cpu"))
    student, seen = mask_sizes(config, encoder.grid**2)
    counted = count_flops(method, teacher, num_student=student, num_teacher=seen)["total"]
    total = sum(kinds.values(), Kind())
    assert total.flops == pytest.approx(8 * counted * 1e9, rel=0.01)
    assert kinds["products"].flops + kinds["attention"].flops == total.flops


def test_a_large_step_is_bound_by_flops_and_bytes_and_a_small_one_by_launches(config):
    small, large = (model_step(config, batch=batch) for batch in (1, 4096))
    for kind in large.values():
        assert 1.000001 * kind.seconds >= max(kind.bytes / BANDWIDTH, kind.kernels * LAUNCH_SECONDS)
    products = large["products"]
    assert 1.000001 * products.seconds >= products.flops / (PRODUCT_SHARE * PEAK_FLOPS[torch.bfloat16])
    whole = sum(small.values(), Kind())
    assert whole.seconds == pytest.approx(whole.kernels * LAUNCH_SECONDS, rel=0.1)
    # AdamW reads four numbers per parameter and writes three, whatever the batch.
    assert small["AdamW"] == large["AdamW"]
    assert large["GELU"].bytes == pytest.approx(4096 * small["GELU"].bytes, rel=1e-6)

"""What only a GPU can show: the same draws as on the CPU, compiled or not, and a step without a host sync."""

import time
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch.nn import functional as F

from maedistill.config.distill import ContrastiveConfig, DKDConfig, HintsConfig, LogitsConfig, TermConfig
from maedistill.config.loader import load_config
from maedistill.config.plan import BatchPlan, Plan
from maedistill.config.pretrain import PretrainConfig
from maedistill.finetuning.objective import Distilled
from maedistill.finetuning.outputs import RequestedOutputs, feature_info
from maedistill.finetuning.teacher import OutputTeacher
from maedistill.finetuning.term_weights import TermWeights
from maedistill.finetuning.terms import EMBEDDING_LOSSES, TERMS
from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import PixelSpec
from maedistill.methods.teacher import Teacher
from maedistill.models.decoder import CrossDecoder, TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.masking import random_split
from maedistill.models.vits import build_vit
from maedistill.pretraining.build import step_inputs
from maedistill.randomness import Stream, bits, uniform
from maedistill.runs.clock import Clock
from maedistill.training.compilation import compile_function
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.network import Network
from maedistill.weights.open_network import open_network

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; written on a machine without one, not yet run on any"
)


def test_draws_are_those_of_the_cpu():
    positions = torch.arange(10_000) + 10**11
    for draw in (bits, uniform):
        assert torch.equal(draw(3, positions, Stream.MASK, n=7), draw(3, positions.cuda(), Stream.MASK, n=7).cpu())
    cuts = {"seed": 0, "num_patches": 196, "num_student": 49, "num_teacher": 98}
    assert torch.equal(random_split(positions, **cuts).order, random_split(positions.cuda(), **cuts).order.cpu())


@pytest.mark.parametrize("kind", [TokenDecoder, CrossDecoder])
def test_a_step_never_waits_for_the_gpu(kind: type[TokenDecoder]):
    encoder = MaskedEncoder(build_vit("vit_tiny_patch16_224", image_size=64, pos_embed="sincos2d", depth=2))
    decoder = kind(192, width=32, depth=1, num_heads=2, grid=4, patch_size=16, num_prefix=1)
    teacher = Teacher(
        open_network("random:vit_tiny_patch16_224", "encoder", grid=4, spec=EncoderSpec(depth=3)),
        taps=(2,),
        dtype=torch.bfloat16,
    )
    align = AlignmentSpec(student_taps=(1,), teacher_taps=(2,), teacher_width=192, teacher_prefix=1, class_token=True)
    pixels = PixelSpec(mean=(0.5,) * 3, std=(0.5,) * 3, predict_ratio=0.5)
    method = DMAE(encoder, decoder, pixels=pixels, align=align)
    initialize(method, seed=0)
    method, teacher = method.cuda(), teacher.cuda()
    images, positions = torch.rand(4, 3, 64, 64, device="cuda"), torch.arange(4, device="cuda")

    def step() -> None:
        split = random_split(positions, seed=0, num_patches=16, num_student=4, num_teacher=4)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            method(images, split, teacher(images, split))["loss"].backward()

    assert_never_waits(step)


def test_a_step_that_distils_never_waits_for_the_gpu():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5)
    network, size = timm.create_model("resnet10t", num_classes=9), 96
    sections = {
        "logits": LogitsConfig(temperature=2.0, standardize=True),
        "dkd": DKDConfig(),
        "hints": HintsConfig(student=(1,), teacher=(4,)),
        "contrastive": ContrastiveConfig(),
        **{name: TermConfig() for name in EMBEDDING_LOSSES},
    }
    student, teacher = (feature_info(one, name="x", image_size=s) for one, s in ((vit, 64), (network, size)))
    terms = {name: TERMS[name](name, section, student, [teacher]) for name, section in sections.items()}
    seen = RequestedOutputs(logits=True, embedding=True, features=(1,))
    module = Distilled(vit, terms, requested=seen, label_weight=1.0).cuda()
    teacher = OutputTeacher(
        Network(network, "run:x", size, "mit", num_classes=9, mean=(0.4,) * 3, std=(0.3,) * 3),
        requested=RequestedOutputs(logits=True, embedding=True, features=(4,)),
        student_mean=(0.5,) * 3,
        student_std=(0.5,) * 3,
        student_grid=4,
        classes=(3, 1, 8, 0, 2),
        dtype=torch.bfloat16,
    ).cuda()
    schedules, device = [TermConfig(weight=1.0, warmup_epochs=3.0) for _ in terms], torch.device("cuda")
    weights = TermWeights(schedules, Plan(BatchPlan(4, 1), 1, images=4, steps=4, warmup_steps=0), device)
    images = torch.randn(4, 3, 64, 64, device=device)
    targets = F.one_hot(torch.arange(4, device=device), 5).float()
    count = iter(range(1, 4))

    def step() -> None:
        outputs = [teacher(images)]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            module(images, targets, outputs, weights[next(count)])["loss"].backward()

    assert_never_waits(step)


def test_compiled_inputs_are_those_of_eager_mode():
    """Triton computes the 64-bit hash, too: a range plus a large constant once became 32-bit indices."""
    config = load_config("configs/imagenet/mae_vit_b.yaml", ["data.train=x", "run=x"], root=PretrainConfig).config
    prepare = partial(step_inputs, config, num_patches=196)
    pixels = torch.randint(256, (8, 3, 224, 224), dtype=torch.uint8, device="cuda")
    positions = torch.arange(8, device="cuda") + 10**11
    images, split = prepare(pixels, positions)
    compiled_images, compiled_split = compile_function(prepare)(pixels, positions)
    assert torch.equal(split.order, compiled_split.order)
    torch.testing.assert_close(compiled_images, images, rtol=1e-6, atol=1e-7)


def test_a_clock_counts_only_the_time_in_which_the_gpu_is_idle():
    clock, matrix = Clock(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        for _ in range(200):
            matrix = (matrix @ matrix).tanh()
        with clock.waiting():
            time.sleep(0.01)  # the queue is far longer
    torch.cuda.synchronize()
    assert clock.read()[1] < 0.02
    for _ in range(5):
        with clock.waiting():
            time.sleep(0.01)
        torch.cuda.synchronize()
    assert clock.read()[1] > 0.8


def assert_never_waits(step: Callable[[], None]) -> None:
    """The second step, as the first one may load libraries."""
    step()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # the switch itself warns
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

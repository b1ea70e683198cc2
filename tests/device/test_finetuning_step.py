"""A fine-tuning step on the pretend card, all twelve terms of distillation: no wait, one device, and the CPU's bits.

The step is the loop's: inputs with erasing and mixing, teacher outputs, losses under autocast in bf16, backward.
"""

import dataclasses
from typing import Any

import pytest
import timm
import torch

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.data.images.augment import Mixing, seed_generators
from maedistill.data.loading.batch import Batch
from maedistill.finetuning import build_distillation
from maedistill.finetuning.objective import Distilled
from maedistill.finetuning.past import Past
from maedistill.finetuning.setup import Finetuning, open_finetuning
from maedistill.finetuning.term_weights import TermWeights
from maedistill.weights.network import Network
from tests.device.pretend_card import CARD, Card, value_of

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32}
STUDENT = ["student.model=vit_tiny_patch16_224", "student.width=32", "student.depth=3", "student.num_heads=2"]
STUDENT += ["student.patch_size=8", "augment.rand_augment=null"]
ONLY_VITS = {
    "attention": "{weight: 2, student: [1, 2], teacher: [1, 2]}",
    "token_relations": "{weight: 2, student: [0, 2], teacher: [0, 2], num_heads: 4}",
}
TERMS = {
    "logits": "{weight: 2, temperature: 2, standardize: true}",
    "dkd": "{weight: 2, alpha: 1.5, beta: 0.5}",
    "hard_label": "{weight: 1, token: true}",
    "hints": "{weight: 3, student: [0, 1], teacher: [1, 2], projector: mlp, normalize: whiten}",
    "attention_transfer": "{weight: 2, student: [0, 2], teacher: [0, 2]}",
    "rkd_distance": "{weight: 2, start_epoch: 0.5, warmup_epochs: 1}",
    "rkd_angle": "{weight: 2}",
    "similarity_preserving": "{weight: 2}",
    "pkt": "{weight: 2}",
    "contrastive": "{weight: 2, temperature: 0.2, width: 24}",
}
ALL = [f"distill.{name}={value}" for name, value in (TERMS | ONLY_VITS).items()]
OTHERS = [f"distill.{name}={value}" for name, value in TERMS.items()]
REGISTER = ["student.register_tokens=1"]
LATER = [
    "distill.contrastive={weight: 1, start_epoch: 1}",
    "distill.hard_label={weight: 1, token: true, start_epoch: 1}",
]
LATER += ["distill.hints={weight: 1, student: [0], teacher: [0], start_epoch: 1}", "distill.label_weight=0.5"]
OWN = ["distill.exits={weight: 1, trunk_gradients: false}", "distill.self_attention={weight: 0.1, blocks: [0,1,2]}"]
PAST = ["distill.label_weight=0", "distill.past.weight=1"]
CASES = {  # settings, teachers
    "labels alone": (["augment.mixup=0", "augment.cutmix=0"], []),
    "labels alone, pooled, cutmix": (["student.global_pool=avg", "augment.mixup=0"], []),
    "all terms, two teachers": ([*ALL, *REGISTER], ["vit", "vit with registers"]),
    "terms of another network, other classes": ([*OTHERS, *REGISTER], ["resnet"]),
    "no labels": (["distill.label_weight=0", "distill.logits={weight: 1}"], ["vit"]),
    "no teacher": (["student.exits=[0,1]", *OWN], []),
    "mutual": (['distill.mutual={weight: 1, students: ["", "student.width=48"]}'], []),
    "the past's predictions, to be stored": (
        [*PAST, "distill.past.source=predictions", "augment.mixup=0", "augment.cutmix=0"],
        [],
    ),
    "the past's weights": (["optim.global_batch=24", *PAST], []),  # step 4 is the first of epoch 1
    "exits and a teacher": (["student.exits=[0]", "distill.exits={weight: 1}", "distill.logits={weight: 1}"], ["vit"]),
    "no term counts yet": ([*LATER, *REGISTER], ["vit"]),
}


def teacher(name: str) -> Network:
    """A teacher as it is opened. The classes of `resnet` are the student's in another order, and one more."""
    torch.manual_seed(0)
    classes, size = (), 32
    if name == "resnet":
        classes, size = ("c", "x", "a", "b"), 64
        built = timm.create_model("test_resnet", num_classes=4)
    else:
        registers = {"reg_tokens": 2, "qk_norm": True} if "registers" in name else {}
        built = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY, **registers)
    words = {"name": f"run:{name}", "interpolation": "bicubic", "crop_mode": "center", "license": "mit"}
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop": 1.0, "size": size}
    return Network(built.eval(), **words, **statistics, num_classes=built.num_classes, classes=classes)


@pytest.fixture
def opened(finetuning, monkeypatch):
    """Opens the parts of a run with these settings and teachers on the CPU."""
    monkeypatch.setattr(build_distillation, "open_network", lambda source, *_, **__: teacher(source.partition(":")[2]))

    def open_parts(settings: list[str], teachers: list[str]) -> Finetuning:
        named = [f"distill.teachers={[f'run:{name}' for name in teachers]}", "distill.precision=bf16"]
        given = [*STUDENT, *(named if teachers else []), *settings]
        config = load_config(finetuning.config, given, root=FinetuneConfig, to_run=False).config
        return open_finetuning(config, world_size=1, device=torch.device("cpu"))

    return open_parts


def on_card(parts: Finetuning) -> Finetuning:
    """The same parts on the card."""
    parts.module.zero_grad()
    frozen, terms = [one.to(CARD) for one in parts.frozen], tuple(parts.config.distill.terms.values())
    moved = {"frozen": frozen, "weights": TermWeights(terms, parts.plan, CARD) if terms else None, "device": CARD}
    past = parts.past.to(CARD) if isinstance(parts.past, Past) else parts.past
    parts = dataclasses.replace(parts, module=parts.module.to(CARD), past=past, **moved)
    parts.inputs(batch().to(CARD))  # mean and deviation are copied at first need, once in a run
    return parts


def batch() -> Batch:
    """A micro-batch as the loader hands it over; one image has no label."""
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(6) * 10**10, labels=torch.tensor([0, 1, 2, 2, 1, -1]), samples=torch.arange(6))


def take_step(parts: Finetuning, given: Batch, *, seed: int = 3, step: int = 4) -> dict[str, Any]:
    """What a step computes from a micro-batch: its inputs, losses and gradients."""
    seed_generators(seed)
    images, targets = parts.inputs(given)
    teacher_outputs = parts.teacher_outputs(images, step, given)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        losses = parts.module(images, targets, *teacher_outputs)
    losses["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in parts.module.named_parameters()}
    return {"images": images, "targets": targets, **losses, **gradients}


@pytest.mark.parametrize("case", CASES)
def test_a_step_never_waits_for_the_card_and_computes_the_same_bits(opened, case):
    parts = opened(*CASES[case])
    expected = value_of(take_step(parts, batch()))
    with Card() as card:
        moved, given = on_card(parts), batch().to(CARD)
        with card.step():
            found = take_step(moved, given)
        assert {value.device for value in found.values()} == {CARD}
    found = value_of(found)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert found.keys() == expected.keys() and found["loss"].isfinite()
    assert ("past" in case) == ("past" in found)
    if "all terms" in case:
        terms = set(parts.module.terms)
        assert isinstance(parts.module, Distilled) and terms == TERMS.keys() | ONLY_VITS.keys() and len(terms) == 12
        assert {name.partition("/")[0] for name in found} >= terms | {"weight", "cross_entropy"}


def test_what_mixing_draws_makes_no_difference():
    """Mixup, cutmix, erased or not: whatever the draws are, nothing waits."""
    keywords = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5}
    seen = set()
    for seed in range(12):
        results = []
        for device in (torch.device("cpu"), CARD):
            with Card() as card:
                mixing, given = Mixing(3, **keywords, smoothing=0.1, device=device), batch()
                images, labels = given.images.float().to(device), given.labels.clamp(min=0).to(device)
                seed_generators(seed)
                with card.step():
                    results.append(value_of(mixing(images, labels)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        seen.add(float(results[0][0].sum()))
    assert len(seen) == 12

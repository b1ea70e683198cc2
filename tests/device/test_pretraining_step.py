"""A pre-training step of each method on the pretend card: no wait, one device, and the CPU's bits.

The step is the loop's: inputs from a micro-batch of the loader, teacher, losses under autocast in bf16, backward.
"""

from typing import Any

import pytest
import torch

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.loading.batch import Batch
from maedistill.pretraining.setup import Pretraining, open_pretraining
from tests.device.pretend_card import CARD, Card, value_of

TEACHER = ["teacher.source=random:vit_tiny_patch16_224", "teacher.width=48", "teacher.depth=3", "teacher.num_heads=2"]
TEACHER += ["teacher.patch_size=8", "teacher.precision=bf16", "student.class_token=true"]
ONE, TWO = (["align.student=[1]", "align.teacher=[2]"], ["align.student=[0,1]", "align.teacher=[0,2]"])
CROSS = ["decoder.attention=cross", "decoder.predict_ratio=0.5"]
AMD = [
    "method=amd",
    *TEACHER,
    *TWO,
    "masks.teacher_keep_ratio=0.5",
    "pixels.target=norm_patch_channel",
    "generate.num_heads=2",
]
WHOLE = ["teacher.source=random:test_convnext", "teacher.image_size=64", "generate.num_heads=null"]
WHOLE += [f"teacher.{name}=null" for name in ("width", "depth", "num_heads", "patch_size")]
CASES = {
    "mae": ["method=mae"],
    "mae, raw pixels, learned positions": ["method=mae", "pixels.target=raw", "student.pos_embed=learned"],
    "mae, cross, drop path": ["method=mae", *CROSS, "student.drop_path=0.3"],
    "dmae, class token of the teacher alone": ["method=dmae", *TEACHER, *ONE, "student.class_token=false"],
    "dmae, two pairs, cross": ["method=dmae", *TEACHER, *TWO, *CROSS],
    "dmae, larger patches of the teacher": ["method=dmae", *TEACHER, *ONE, "teacher.patch_size=12"],
    "dmae, activations again": ["method=dmae", *TEACHER, *ONE, "engine.activation_checkpointing=true"],
    "amd": AMD,
    "amd, cross, whitened": [*AMD, *CROSS, "align.distance=mse", "align.normalize=whiten", "align.bias=false"],
    "amd, a teacher of whole images": [*AMD, *WHOLE, *ONE, "masks.teacher_keep_ratio=1"],
    "amd by the decoder, several blocks, mlp": [
        *("method=amd", *TEACHER, *TWO, "masks.teacher_keep_ratio=1", *CROSS, "generate.by=decoder"),
        *("align.last_blocks=1", "align.projector=mlp", "align.distance=cosine_smooth_l1", "align.normalize=stored"),
    ],
    "amd of the average": [
        *("method=amd", "teacher.source=ema", "masks.teacher_keep_ratio=1", "decoder.attention=cross"),
        *("generate.by=decoder", "align.student=[1]", "align.teacher=[1]", "align.last_blocks=2"),
    ],
    "amd of branches, with a second teacher": [
        *(*AMD, "align.output=mlp", "align.normalize=stored"),
        "more_teachers=['teacher.source=random:test_convnext align.student=[1] align.teacher=[3] align.output=block']",
    ],
    "tinymim": ["method=tinymim", *TEACHER, *TWO],
}
# each distance and each normalisation once: no code depends on both
DISTANCES = {"l1": "l2", "mse": "none", "smooth_l1": "whiten"}
CASES |= {
    f"dmae, {distance}, {normalize}": [
        *("method=dmae", *TEACHER, *ONE, f"align.distance={distance}", f"align.normalize={normalize}")
    ]
    for distance, normalize in DISTANCES.items()
}


def batch() -> Batch:
    """A micro-batch as the loader hands it over."""
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([3, 10**11, 7, 8])
    return Batch(images, positions, labels=positions % 3, samples=positions)


def take_step(parts: Pretraining, given: Batch) -> dict[str, Any]:
    """What a step computes from a micro-batch: its inputs, losses and gradients."""
    torch.manual_seed(1)
    images, split = parts.inputs(given.images, given.positions)
    parts.begin_step(1)
    parts.module.ramp.fill_(1)  # as if the step before had been measured
    targets, notes = parts.teach(images, split, 1)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        losses = parts.module(images, split, *targets)
    losses["loss"].backward()
    parts.end_step(1)
    gradients = {name: parameter.grad for name, parameter in parts.module.named_parameters()}
    return {"images": images, "order": split.order, **losses, **notes, **gradients}


@pytest.mark.parametrize("case", CASES)
def test_a_step_never_waits_for_the_card_and_computes_the_same_bits(pretraining, case):
    config = load_config(pretraining.config, CASES[case], root=PretrainConfig, to_run=False).config
    parts = open_pretraining(config, world_size=1, device=torch.device("cpu"))
    expected = value_of(take_step(parts, batch()))
    with Card() as card:
        parts.module.zero_grad()
        parts.module.to(CARD)
        for one in parts.teachers:
            one.teacher.to(CARD)
            if one.statistics is not None:
                one.statistics.sums.zero_()
                one.statistics.to(CARD)
        given = batch().to(CARD)
        with card.step():
            found = take_step(parts, given)
        assert {value.device for value in found.values()} == {CARD}
    found = value_of(found)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert found.keys() == expected.keys() and found["loss"].isfinite() and found["loss"] > 0


def test_a_run_is_opened_on_the_card(pretraining):
    """All parameters, buffers and the teacher are there; nothing is read on the way."""
    config = load_config(pretraining.config, CASES["amd"], root=PretrainConfig, to_run=False).config
    with Card() as card:
        parts = open_pretraining(config, world_size=1, device=CARD)
        held = [*parts.module.parameters(), *parts.module.buffers()]
        held += [tensor for one in parts.teachers for tensor in (*one.teacher.parameters(), *one.teacher.buffers())]
        assert {tensor.device for tensor in held} == {CARD}
    assert {operation for _, operation in card.waits} == {"_to_copy"} and len(card.waits) == len(held)

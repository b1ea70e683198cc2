"""Rules between the keys of a fine-tuning run: start, student and mixing, in addition to the rules of any stage.

The rules of its teachers and terms are in `distill_rules.py`.
"""

import re
from collections.abc import Iterator

from maedistill.config import distill_rules, shared_rules
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.problem import Problem

# timm's notation: magnitude m, its ceiling mmax and deviation mstd, n operations per image, each with probability p,
# inc1: operations whose strength grows with the magnitude.
_RAND_AUGMENT = re.compile(r"^rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?)*$")


def _validation(c: FinetuneConfig) -> Iterator[Problem]:
    if not c.data.val:
        yield Problem("data.val", "no labelled shards to evaluate on are named", "add data.val=DIR/val-*.tar")


def _images(c: FinetuneConfig) -> Iterator[Problem]:
    yield from shared_rules.deviations("data.std", c.data.std)
    yield from shared_rules.mean_with_std("data", mean=c.data.mean, std=c.data.std)
    yield from shared_rules.crops(c)


def _init(c: FinetuneConfig) -> Iterator[Problem]:
    i = c.init
    if i.source is None:
        for key in ("pos_embed", "sha256", "license"):
            if getattr(i, key) is not None:
                yield Problem(f"init.{key}", "nothing is loaded without init.source", "remove it, or add init.source")
        if c.student.model is None:
            remedy = "add init.source=run:runs/NAME, or student.model=vit_small_patch16_224 to start from scratch"
            yield Problem("init.source", "neither weights nor student.model are named", remedy)
        return
    wrong_kind = list(shared_rules.kind_of_source("init.source", i.source, kinds=(*shared_rules.NETWORK_KINDS, "file")))
    if wrong_kind:
        yield from wrong_kind
        return
    kind = i.source.partition(":")[0]
    if kind == "file" and c.student.model is None:
        remedy = "add e.g. student.model=vit_small_patch16_224"
        yield Problem("student.model", "a file: source needs its model's name", remedy)
    yield from shared_rules.checksum("init", i.sha256, kind=kind, noun="source")
    if kind != "file" and i.pos_embed is not None:
        yield Problem("init.pos_embed", f"a {kind}: source has its own position table", "remove it")


def _student(c: FinetuneConfig) -> Iterator[Problem]:
    kind, _, name = (c.init.source or "").partition(":")
    yield from shared_rules.family("student.model", c.student.model)
    if kind == "timm":
        yield from shared_rules.family("init.source", name)
    if c.student.global_pool == "token" and c.student.class_token is False:
        cause = "there is no class token to read with student.class_token=false"
        yield Problem("student.global_pool", cause, "use student.global_pool=avg")
    arch = c.student_architecture
    yield from shared_rules.whole_patches(c, arch)
    if arch is not None:
        yield from shared_rules.tower("student", width=arch.width, num_heads=arch.num_heads)


def _augment(c: FinetuneConfig) -> Iterator[Problem]:
    a = c.augment
    if a.rand_augment is not None and not _RAND_AUGMENT.match(a.rand_augment):
        cause = f"{a.rand_augment!r} is not timm's notation of RandAugment"
        yield Problem("augment.rand_augment", cause, "write e.g. rand-m9-mstd0.5-inc1, or null for none")
    # mixup and cutmix pair an image with one of the same micro-batch. This checks what holds for any number of ranks.
    if a.mixes and c.optim.global_batch % 2:
        cause = f"{c.optim.global_batch} images cannot be mixed in pairs"
        remedy = "use an even one, or augment.mixup=0 augment.cutmix=0"
        yield Problem("optim.global_batch", cause, remedy)
    elif a.mixes and c.engine.micro_batch == 1:
        remedy = "use 2 or more, or augment.mixup=0 augment.cutmix=0"
        yield Problem("engine.micro_batch", "1 image cannot be mixed with another", remedy)


TO_RUN = (shared_rules.paths, _validation)
RULES = (_images, shared_rules.schedule, shared_rules.engine, _init, _student, _augment, *distill_rules.RULES)

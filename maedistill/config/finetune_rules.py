"""Rules between the keys of a fine-tuning run: start, student and mixing. `distill_rules.py` has those of teachers."""

import re
from collections.abc import Iterator

from maedistill.config import distill_rules, shared_rules
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.schema import AUTO
from maedistill.config.shared_rules import Problem
from maedistill.config.sources import NETWORK_KINDS

# timm's notation of RandAugment: magnitude m, its ceiling mmax and deviation mstd, n operations per image, each with
# probability p; inc1: operations whose strength grows with the magnitude; tweights: timm's weights of its 15
# operations, of which n are then drawn without replacement. timm silently ignores a section that it does not know,
# e.g. `inc` without its number. Its sets t3a and t3aw are excluded: they are 3-Augment, which is incomplete without
# colour jitter.
_MANY = r"(?=.*-tweights).*-n0*(1[6-9]|[2-9]\d|[1-9]\d\d)"
_RAND_AUGMENT = re.compile(rf"rand(?!{_MANY})(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?|tweights))*")  # of the whole text


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
        for key in ("weights", "pos_embed", "sha256", "license"):
            if getattr(i, key) is not None:
                cause, replaced = "nothing is loaded without init.source", (f"init.{key}", "init.source")
                yield Problem(f"init.{key}", cause, "remove it, or add init.source", (replaced,))
        if c.student.model is None:
            remedy = "add init.source=run:runs/NAME, or student.model=vit_small_patch16_224 to start from scratch"
            yield Problem("init.source", "neither weights nor student.model are named", remedy)
        return
    kinds = (*NETWORK_KINDS, "file")
    if problems := list(shared_rules.kind_of_source("init.source", i.source, kinds=kinds)):
        yield from problems
        return
    kind = i.source.partition(":")[0]
    yield from shared_rules.checksum("init", i.sha256, kind=kind, noun="source")
    yield from shared_rules.several_weights("init.weights", i.weights, source=i.source, source_key="init.source")
    if kind != "file" and i.pos_embed is not None:
        cause, replaced = f"a {kind}: source has its own position table", ("init.pos_embed", "init.source")
        yield Problem("init.pos_embed", cause, "remove it", (replaced,))


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
    if a.rand_augment is not None and not _RAND_AUGMENT.fullmatch(a.rand_augment):
        cause = f"{a.rand_augment!r} is not timm's notation of RandAugment"
        yield Problem("augment.rand_augment", cause, "write e.g. rand-m9-mstd0.5-inc1, or null for none")
    # mixup and cutmix pair an image with one of the same micro-batch. This checks what holds for any number of ranks.
    if a.mixes and c.optim.global_batch != AUTO and c.optim.global_batch % 2:
        cause = f"{c.optim.global_batch} images cannot be mixed in pairs"
        remedy = "use an even one, or augment.mixup=0 augment.cutmix=0"
        yield Problem("optim.global_batch", cause, remedy)
    elif a.mixes and c.engine.micro_batch == 1:
        remedy = "use 2 or more, or augment.mixup=0 augment.cutmix=0"
        yield Problem("engine.micro_batch", "1 image cannot be mixed with another", remedy)


TO_RUN = (shared_rules.paths, shared_rules.trackers, _validation)
RULES = (
    _images,
    shared_rules.schedule,
    shared_rules.engine,
    _init,
    _student,
    _augment,
    *distill_rules.RULES,
)

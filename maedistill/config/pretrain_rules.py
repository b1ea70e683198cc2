"""Rules between the keys of a pre-training run: masks, teacher and taps, in addition to the rules of any stage."""

from collections.abc import Iterator

from maedistill.config import shared_rules
from maedistill.config.pretrain import UNUSED_SECTIONS, PretrainConfig
from maedistill.config.schema import AUTO
from maedistill.config.shared_rules import Problem
from maedistill.config.sources import EMA, SOURCE_KINDS


def _images(c: PretrainConfig) -> Iterator[Problem]:
    yield from shared_rules.deviations("data.std", c.data.std)
    yield from shared_rules.deviations("teacher.std", c.teacher.std)
    yield from shared_rules.crops(c)


def _views(c: PretrainConfig) -> Iterator[Problem]:
    if c.optim.global_batch != AUTO and c.optim.global_batch % c.data.views_per_image:
        yield Problem(
            "data.views_per_image",
            f"{c.data.views_per_image} does not divide global_batch={c.optim.global_batch}",
            "choose a divisor, so that no step splits the views of an image",
        )


def _visible_shares(c: PretrainConfig) -> Iterator[Problem]:
    key, student, teacher = "masks.teacher_keep_ratio", c.masks.student_keep_ratio, c.masks.teacher_keep_ratio
    if student == 1.0 and (c.needs_decoder or c.method == "amd"):
        remedy = "use a share below 1, 0.25 in the papers, or imitate the teacher alone: method=dmae pixels.weight=0"
        yield Problem("masks.student_keep_ratio", "1.0 leaves nothing to predict", remedy)
    if c.method == "mae" and teacher is not None:
        yield Problem(key, "method=mae has no teacher", "remove it, or use method=dmae or amd", ((key, "method"),))
    same = (None, student, 1.0) if c.method == "dmae" else (None, student)  # 1: the whole image
    if c.method in ("dmae", "tinymim") and teacher not in same:
        cause = f"{teacher:g} differs from student_keep_ratio={student:g}, which {c.method} does not allow"
        remedy = "remove it (the teacher sees what the student sees), or use method=amd"
        yield Problem(key, cause, remedy, ((key, "method"), (key, "masks.student_keep_ratio")))
    if c.method == "amd" and (teacher is None or teacher <= student):
        cause = "missing" if teacher is None else f"{teacher:g} is not above student_keep_ratio={student:g}"
        remedy = "method=amd needs a teacher that sees more; 0.5 with 0.25 in the paper, 1 if it sees whole images"
        yield Problem(key, cause, remedy)


def _teacher(c: PretrainConfig) -> Iterator[Problem]:
    t = c.teacher
    if c.method == "mae":
        return
    if t.source is None:
        remedy = "add e.g. teacher.source=timm:vit_large_patch16_224.mae"
        yield Problem("teacher.source", f"method={c.method} needs a teacher", remedy)
        return
    if t.source == EMA:
        yield from _average(c)
        return
    if "decay" in t.model_dump(exclude_defaults=True):
        cause, remedy = "only teacher.source=ema is a moving average", "remove it, or use teacher.source=ema"
        yield Problem("teacher.decay", cause, remedy, (("teacher.decay", "teacher.source"),))
    if problems := list(shared_rules.kind_of_source("teacher.source", t.source, kinds=SOURCE_KINDS)):
        yield from problems
        return
    kind = t.source.partition(":")[0]
    if kind != "file" and t.model is not None:
        cause = f"a {kind}: teacher names its model itself"
        yield Problem("teacher.model", cause, "remove it", (("teacher.model", "teacher.source"),))
    yield from shared_rules.checksum("teacher", t.sha256, kind=kind, noun="teacher")
    key, source_key = "teacher.weights", "teacher.source"
    yield from shared_rules.several_weights(key, t.weights, source=t.source, source_key=source_key)
    for key in ("width", "depth", "num_heads", "patch_size", "pos_embed"):
        if kind not in ("file", "random") and getattr(t, key) is not None:
            cause, replaced = f"a {kind}: teacher has its own {key}", (f"teacher.{key}", "teacher.source")
            yield Problem(f"teacher.{key}", cause, "remove it", (replaced,))
    yield from shared_rules.mean_with_std("teacher", mean=t.mean, std=t.std)


def _more_teachers(c: PretrainConfig) -> Iterator[Problem]:
    """Yield a problem for further teachers beside a method that compares no features."""
    if c.more_teachers and c.method not in ("dmae", "amd"):
        cause = "has no teacher" if c.method == "mae" else "compares the token relations of one teacher"
        remedy, replaced = "remove it, or use method=dmae or amd", (("more_teachers", "method"),)
        yield Problem("more_teachers", f"method={c.method} {cause}", remedy, replaced)


def _average(c: PretrainConfig) -> Iterator[Problem]:
    """Yield problems for a teacher that is the student's moving average."""
    if c.method != "amd":
        cause = f"method={c.method} shows the teacher only what the student sees, and an average must see more"
        yield Problem("teacher.source", cause, "use method=amd with masks.teacher_keep_ratio=1")
    if c.engine.zero == 3:
        cause = "a moving average needs whole weights, and ZeRO 3 partitions them"
        yield Problem("teacher.source", cause, "use engine.zero=2")
    if c.align.normalize == "stored":
        cause = "statistics of the first steps do not hold for a teacher that changes in every step"
        yield Problem("align.normalize", cause, "use align.normalize=whiten", (("align.normalize", "teacher.source"),))
    for key in c.teacher.model_dump(exclude={"source", "decay", "precision"}, exclude_defaults=True):
        replaced = (f"teacher.{key}", "teacher.source")
        yield Problem(f"teacher.{key}", "the teacher is the student's own average", "remove it", (replaced,))


def _families(c: PretrainConfig) -> Iterator[Problem]:
    yield from shared_rules.family("student.model", c.student.model)
    yield from shared_rules.family("teacher.model", c.teacher.model)


def _taps(c: PretrainConfig) -> Iterator[Problem]:
    student, teacher = c.align.student, c.align.teacher
    if c.method == "mae":
        return
    if not student or len(student) != len(teacher):
        yield Problem(
            "align.student",
            f"{len(student)} student blocks for {len(teacher)} teacher blocks",
            "pair them one to one, e.g. align.student=[8] align.teacher=[17] (DMAE, ViT-B from ViT-L)",
        )
    for who, taps, arch in (("student", student, c.student_architecture), ("teacher", teacher, c.teacher_architecture)):
        if len(set(taps)) != len(taps):
            yield Problem(f"align.{who}", f"a block is named twice in {list(taps)}", "name each block once")
        yield from shared_rules.blocks(f"align.{who}", taps, arch=arch, who=who)


def _unused(c: PretrainConfig) -> Iterator[Problem]:
    """Yield problems for settings of sections that the method does not use."""
    what = {"align": "aligns nothing", "generate": "generates no features", "teacher": "has no teacher"}
    for section in UNUSED_SECTIONS.get(c.method, ()):
        for name in getattr(c, section).model_dump(exclude_defaults=True):
            key, cause = f"{section}.{name}", f"method={c.method} {what[section]}"
            remedy = f"remove it, or use method={'amd' if section == 'generate' else 'dmae or amd'}"
            yield Problem(key, cause, remedy, ((key, "method"),))


def _relations(c: PretrainConfig) -> Iterator[Problem]:
    """Yield problems for feature settings with tinymim, which compares token relations without a projection."""
    if c.method == "tinymim":
        features = {"distance", "normalize", "stored_steps", "output", "last_blocks", "projector", "bias"}
        for key in c.align.model_dump(include=features, exclude_defaults=True):
            cause = "method=tinymim compares token relations, not features"
            yield Problem(f"align.{key}", cause, "remove it, or use method=dmae or amd", ((f"align.{key}", "method"),))


def _targets(c: PretrainConfig) -> Iterator[Problem]:
    """Yield problems for what features are compared with, and for what predicts them."""
    if c.align.last_blocks is not None and c.align.teacher and c.align.last_blocks > min(c.align.teacher) + 1:
        cause = f"{c.align.last_blocks} blocks cannot end at block {min(c.align.teacher)}, the first being 0"
        yield Problem("align.last_blocks", cause, f"use at most {min(c.align.teacher) + 1}")
    if c.align.normalize != "stored" and "stored_steps" in c.align.model_dump(exclude_defaults=True):
        cause, remedy = "only align.normalize=stored measures a teacher", "remove it, or use align.normalize=stored"
        yield Problem("align.stored_steps", cause, remedy, (("align.stored_steps", "align.normalize"),))
    if c.method != "mae" and not c.pixels.weight and c.log.pictures_every_epochs is not None:
        cause, remedy = "without predicted pixels there are no pictures", "remove it"
        yield Problem("log.pictures_every_epochs", cause, remedy, of_command_line=True)
    if c.method != "mae" and not c.pixels.weight:
        of_pixels = {"predict_ratio"} if c.needs_decoder else set(type(c.decoder).model_fields)
        unused = [f"decoder.{key}" for key in c.decoder.model_dump(include=of_pixels, exclude_defaults=True)]
        unused += [f"pixels.{key}" for key in c.pixels.model_dump(include={"target"}, exclude_defaults=True)]
        for key in unused:
            cause, gives_way = "no pixels are predicted, since pixels.weight=0", ((key, "pixels.weight"),)
            yield Problem(key, cause, "remove it, or set pixels.weight above 0", gives_way)
    if c.generates_by_decoder:
        if c.decoder.attention != "cross":
            cause = "the decoder can generate features only by cross-attention"
            yield Problem("generate.by", cause, "add decoder.attention=cross, or use generate.by=own")
        for key in c.generate.model_dump(include={"depth", "num_heads"}, exclude_defaults=True):
            replaced = (f"generate.{key}", "generate.by")
            yield Problem(f"generate.{key}", "generate.by=decoder has no generators", "remove it", (replaced,))


def _grid(c: PretrainConfig) -> Iterator[Problem]:
    arch, size = c.student_architecture, c.data.image_size
    yield from shared_rules.whole_patches(c, arch)
    if arch is None or size % arch.patch_size:
        return
    patches = (size // arch.patch_size) ** 2
    student = round(c.masks.student_keep_ratio * patches)
    teacher = round((c.masks.teacher_keep_ratio or c.masks.student_keep_ratio) * patches)
    if not 1 <= student < patches + (not c.needs_decoder):
        cause = f"of {patches} patches the student sees {student}"
        yield Problem("masks.student_keep_ratio", cause, "leave at least one to see and one to predict")
    elif c.method == "amd" and teacher <= student:
        cause = f"of {patches} patches the teacher sees {teacher}, the student {student}"
        yield Problem("masks.teacher_keep_ratio", cause, "let the teacher see at least one more")
    hidden = patches - student
    if hidden > 0 and c.needs_decoder and not round(c.decoder.predict_ratio * hidden):
        cause = f"{c.decoder.predict_ratio:g} of {hidden} hidden patches is less than one"
        yield Problem("decoder.predict_ratio", cause, f"predict at least one of them, {1 / hidden:.2g} or more")


def _widths(c: PretrainConfig) -> Iterator[Problem]:
    student, teacher = c.student_architecture, c.teacher_architecture
    yield from shared_rules.tower("decoder", width=c.decoder.width, num_heads=c.decoder.num_heads)
    for who, arch in (("student", student), ("teacher", None if c.teacher.source == EMA else teacher)):
        if arch is not None:
            yield from shared_rules.tower(who, width=arch.width, num_heads=arch.num_heads)
    num_heads = c.generate.num_heads
    if c.method == "amd" and num_heads is not None and teacher is not None and teacher.width % num_heads:
        cause = f"{num_heads} heads do not divide the teacher's width {teacher.width}"
        yield Problem("generate.num_heads", cause, f"use a divisor, {max(1, teacher.width // 64)} in AMD")


def _probe(c: PretrainConfig) -> Iterator[Problem]:
    if c.log.probe_every_epochs is not None and c.data.val is None:
        yield Problem("log.probe_every_epochs", "no labelled shards to probe on", "add data.val=DIR/val-*.tar")
    if c.data.val is None:
        for key in ("knn_every_epochs", "knn_images"):
            if getattr(c.log, key) is not None:
                remedy = "add data.val=DIR/val-*.tar, or remove it"
                yield Problem(f"log.{key}", "no labelled shards to score kNN on", remedy, of_command_line=True)
    if c.log.probe_every_epochs is not None and c.log.knn_images < 2:
        yield Problem("log.knn_images", "a linear probe cannot learn from one image", "use 2 or more, 10000 by default")


TO_RUN = (shared_rules.paths, shared_rules.trackers, _probe)
RULES = (
    _images,
    shared_rules.schedule,
    _views,
    shared_rules.engine,
    _visible_shares,
    _teacher,
    _more_teachers,
    _families,
    _unused,
    _taps,
    _relations,
    _targets,
    _grid,
    _widths,
)

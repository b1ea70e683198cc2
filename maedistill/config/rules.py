"""What must hold between keys: each rule looks at a config whose values are valid one by one and yields its problems.

Only what the config itself can show is judged here. What needs the shards, the teacher's file or timm is judged where
those are opened, with errors of the same form.
"""

from collections.abc import Iterator

from maedistill.config.problem import Problem
from maedistill.config.schema import PretrainConfig

# How timm's names of plain VisionTransformers begin; models/encoder.py refuses the others of these families by class.
FAMILIES = ("vit_", "deit", "flexivit_", "aimv2_", "beit3_", "eva_", "test_vit")
SOURCES = ("timm", "hf-hub", "local-dir", "file", "run", "random")


def broken_rules(config: PretrainConfig, *, to_run: bool = True) -> list[Problem]:
    """Everything that is wrong between the keys of `config`; empty for a config that can be used.

    to_run: whether shards and run folder must be named, as for a run; to look at a recipe they need not.
    """
    rules = (_paths, *RULES) if to_run else RULES
    return [problem for rule in rules for problem in rule(config)]


def _paths(c: PretrainConfig) -> Iterator[Problem]:
    if not c.data.train:
        remedy = "add data.train=DIR/train-*.tar (tools/make_shards.py writes shards)"
        yield Problem("data.train", "no training shards are named", remedy)
    if not c.run:
        yield Problem("run", "no run folder is named", "add run=runs/NAME")


def _images(c: PretrainConfig) -> Iterator[Problem]:
    for section, std in (("data", c.data.std), ("teacher", c.teacher.std)):
        if std is not None and min(std) <= 0:
            yield Problem(f"{section}.std", f"{list(std)} is not above 0", "use the deviations of pixels in [0, 1]")
    for key, (low, high) in (("crop_scale", c.data.crop_scale), ("crop_ratio", c.data.crop_ratio)):
        if not 0 < low <= high:
            cause = f"[{low:g}, {high:g}] is not an increasing pair above 0"
            yield Problem(f"data.{key}", cause, "put the smaller value first")


def _optimizer(c: PretrainConfig) -> Iterator[Problem]:
    o = c.optim
    if o.lr is not None and o.base_lr is not None:
        scaled = o.base_lr * o.global_batch / 256
        yield Problem(
            "optim.lr",
            f"both lr={o.lr:g} and base_lr={o.base_lr:g} are given",
            f"keep one and set the other to null; base_lr={o.base_lr:g} means lr={scaled:g} at this batch",
        )
    elif o.min_lr > o.peak_lr:
        cause = f"{o.min_lr:g}, where the cosine ends, is above lr={o.peak_lr:g}, where it starts"
        yield Problem("optim.min_lr", cause, "use a smaller one; 0 in the papers")
    if o.warmup_epochs >= o.epochs:
        yield Problem(
            "optim.warmup_epochs",
            f"{o.warmup_epochs:g} is not below epochs={o.epochs:g}",
            f"shorten the warm-up (5 % of the epochs is MAE's choice: {o.epochs * 0.05:g})",
        )
    if o.global_batch % c.data.views_per_image:
        yield Problem(
            "data.views_per_image",
            f"{c.data.views_per_image} does not divide global_batch={o.global_batch}",
            "choose a divisor, so that no step splits the views of an image",
        )


def _engine(c: PretrainConfig) -> Iterator[Problem]:
    if c.engine.zero == 3 and c.optim.ema is not None:
        cause = "a moving average needs whole weights, which ZeRO 3 cuts up"
        yield Problem("optim.ema", cause, "use engine.zero=2, or optim.ema=null")
    if c.engine.zero == 3 and c.engine.compile:
        cause = "a compiled student reads whole weights, which ZeRO 3 cuts up"
        yield Problem("engine.compile", cause, "use engine.zero=2, or engine.compile=false")


def _visible_shares(c: PretrainConfig) -> Iterator[Problem]:
    key, student, teacher = "masks.teacher_visible", c.masks.student_visible, c.masks.teacher_visible
    if student == 1.0:
        yield Problem(
            "masks.student_visible", "1.0 leaves nothing to predict", "use a share below 1, 0.25 in the papers"
        )
    if c.method == "mae" and teacher is not None:
        yield Problem(key, "method=mae has no teacher", "remove it, or use method=dmae or amd")
    if c.method == "dmae" and teacher not in (None, student):
        cause = f"{teacher:g} differs from student_visible={student:g}, which dmae does not allow"
        yield Problem(key, cause, "remove it (the teacher sees what the student sees), or use method=amd")
    if c.method == "amd" and (teacher is None or teacher <= student):
        cause = "missing" if teacher is None else f"{teacher:g} is not above student_visible={student:g}"
        yield Problem(key, cause, "method=amd needs a teacher that sees more; 0.5 beside 0.25 in the paper")


def _teacher(c: PretrainConfig) -> Iterator[Problem]:
    t = c.teacher
    if c.method == "mae":
        if t.source is not None:
            yield Problem("teacher.source", "method=mae has no teacher", "remove it, or use method=dmae or amd")
        return
    if t.source is None:
        remedy = "add e.g. teacher.source=timm:vit_large_patch16_224.mae"
        yield Problem("teacher.source", f"method={c.method} needs a teacher", remedy)
        return
    kind, _, name = t.source.partition(":")
    if kind not in SOURCES or not name:
        yield Problem("teacher.source", f"{t.source!r} is not KIND:NAME", f"kinds are {', '.join(SOURCES)}")
        return
    if kind == "file" and t.model is None:
        remedy = "add e.g. teacher.model=vit_large_patch16_224"
        yield Problem("teacher.model", "a file: teacher needs its model's name", remedy)
    if kind != "file" and t.model is not None:
        yield Problem("teacher.model", f"a {kind}: teacher names its model itself", "remove it")
    if kind != "file" and t.sha256 is not None:
        yield Problem(
            "teacher.sha256", f"only a file: teacher is checked against it, not a {kind}: teacher", "remove it"
        )
    for key in ("width", "depth", "heads", "patch_size", "positions"):
        if kind not in ("file", "random") and getattr(t, key) is not None:
            yield Problem(f"teacher.{key}", f"a {kind}: teacher brings its own {key}", "remove it")
    if (t.mean is None) != (t.std is None):
        given = "std" if t.mean is None else "mean"
        yield Problem(f"teacher.{given}", "mean and std go together", "give both or none")


def _families(c: PretrainConfig) -> Iterator[Problem]:
    kind, _, name = (c.teacher.source or "").partition(":")
    models = [("student.model", c.student.model), ("teacher.model", c.teacher.model)]
    if kind in ("timm", "random"):
        models.append(("teacher.source", name))
    for key, model in models:
        if model is not None and not model.startswith(FAMILIES):
            remedy = "use a vit_* or deit* name, e.g. vit_small_patch16_224"
            yield Problem(key, f"{model!r} is no VisionTransformer of timm's", remedy)


def _taps(c: PretrainConfig) -> Iterator[Problem]:
    student, teacher = c.align.student, c.align.teacher
    if c.method == "mae":
        for key, taps in (("student", student), ("teacher", teacher)):
            if taps:
                yield Problem(f"align.{key}", "method=mae aligns nothing", "remove it, or use method=dmae or amd")
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
        if taps and arch is not None and max(taps) >= arch.depth:
            cause = f"block {max(taps)} does not exist, the {who} has {arch.depth}"
            yield Problem(f"align.{who}", cause, f"use 0 to {arch.depth - 1}")


def _grid(c: PretrainConfig) -> Iterator[Problem]:
    arch, size = c.student_architecture, c.data.image_size
    if arch is None:
        return
    if size % arch.patch_size:
        near = max(1, round(size / arch.patch_size)) * arch.patch_size
        cause = f"patch size {arch.patch_size} does not divide {size}"
        yield Problem("data.image_size", cause, f"use {near}, or another student.patch_size")
        return
    patches = (size // arch.patch_size) ** 2
    student = round(c.masks.student_visible * patches)
    teacher = round((c.masks.teacher_visible or c.masks.student_visible) * patches)
    if not 1 <= student < patches:
        cause = f"of {patches} patches the student sees {student}"
        yield Problem("masks.student_visible", cause, "leave at least one to see and one to predict")
    elif c.method == "amd" and teacher <= student:
        cause = f"of {patches} patches the teacher sees {teacher}, the student {student}"
        yield Problem("masks.teacher_visible", cause, "let the teacher see at least one more")


def _widths(c: PretrainConfig) -> Iterator[Problem]:
    student, teacher = c.student_architecture, c.teacher_architecture
    towers = [("decoder", c.decoder.width, c.decoder.heads)]
    towers += [(who, a.width, a.heads) for who, a in (("student", student), ("teacher", teacher)) if a is not None]
    for who, width, heads in towers:
        if width % heads:
            cause = f"{heads} heads do not divide width {width}"
            yield Problem(f"{who}.heads", cause, f"use a divisor of {width}")
        if width % 4:
            cause = f"{width} is not a multiple of 4, as sin-cos positions need"
            yield Problem(f"{who}.width", cause, f"use {width + 4 - width % 4}")
    heads = c.generate.heads
    if c.method == "amd" and heads is not None and teacher is not None and teacher.width % heads:
        cause = f"{heads} heads do not divide the teacher's width {teacher.width}"
        yield Problem("generate.heads", cause, f"use a divisor, {max(1, teacher.width // 64)} in AMD")


RULES = (_images, _optimizer, _engine, _visible_shares, _teacher, _families, _taps, _grid, _widths)

"""Every config that we ship: it loads, its header says what a person needs, and its networks fit together."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.sources import EMA
from maedistill.finetuning.setup import dry_run as finetune_dry_run
from maedistill.methods.mae import MAE
from maedistill.methods.teacher import Teacher
from maedistill.models.meta import meta_device
from maedistill.pretraining.build import (
    build_average,
    build_encoder,
    build_method,
    build_teacher,
    build_teacher_source,
    mask_sizes,
)
from maedistill.pretraining.flops import count_flops
from maedistill.pretraining.setup import dry_run as pretrain_dry_run
from maedistill.study.file import load_study
from tests.support.launch import ROOT

SHIPPED = [path for path in sorted(ROOT.glob("configs/*/*.yaml")) if not path.stem.startswith(("base", "study"))]
FINETUNE = [path for path in SHIPPED if path.parent.name == "finetune" or path.stem == "finetune"]
CONFIGS = [path for path in SHIPPED if path not in FINETUNE]
NEEDED = ["data.train=x.tar", "run=runs/x"]


def without_weights(path: Path) -> list[str]:
    """Return overrides that put random weights of the same model in the place of a config's teacher."""
    text = path.read_text()
    if found := re.search(r"timm:(\w+)\.(mae|sa1b|lvd1689m)", text):
        return [f"teacher.source=random:{found[1]}"]
    if re.search(r"run:\S+/teacher", text):
        shape = load_config(path.with_name("teacher.yaml"), NEEDED, root=PretrainConfig).config.student
        sizes = [f"teacher.{key}={getattr(shape, key)}" for key in ("width", "depth", "num_heads", "patch_size")]
        return [f"teacher.source=random:{shape.model}", *sizes]
    return []


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def built(config: PretrainConfig) -> tuple[MAE, Teacher | None]:
    """The method of a config and its teacher, on the meta device."""
    with meta_device():
        encoder = build_encoder(config)
        source = build_teacher_source(config, grid=encoder.grid)
        method = build_method(config, encoder, source)
        teacher = build_teacher(config, source, torch.device("meta")) if source is not None else None
        if config.teacher.source == EMA:
            teacher = build_average(config, encoder, torch.device("meta"), steps=1)
    return method, teacher


def counted(config: PretrainConfig, method: MAE, teacher: Teacher | None) -> dict[str, float]:
    """The GFLOP per image of its parts."""
    student, visible = mask_sizes(config, method.encoder.grid**2)
    return count_flops(method, *filter(None, [teacher]), num_student=student, num_teacher=visible)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_builds_and_its_header_is_true(path: Path):
    config = load_config(path, NEEDED + without_weights(path), root=PretrainConfig).config
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert re.search(rf"maedistill pretrain {name_of(path)}\s", header)
    method, teacher = built(config)
    kind = EMA if config.teacher.source == EMA else config.method
    assert type(method).__name__.lower() == config.method
    assert name_of(path).split("/")[1].startswith((kind, "teacher", "sam", "dinov3"))
    assert "@" not in header, "a figure is missing"
    if path.parent.name == "imagenet":
        assert "Expected:" in header and "CVPR" in header and "8 GPUs" in header
        total = f"{counted(config, method, teacher)['total']:.1f}"
        assert f"{total} GFLOP per image" in header
        assert {re.match(r"[\d.]+", cell)[0] for cell in gflop_cells(name_of(path))} == {total}


def gflop_cells(name: str) -> Iterator[str]:
    """The cells of a config in the columns `GFLOP per image` of the tables."""
    column = 0
    for page in ("README.md", "docs/choosing.md"):
        for line in (ROOT / page).read_text().splitlines():
            cells = line.split("|")
            if " GFLOP per image " in cells:
                column = cells.index(" GFLOP per image ")
            elif line.startswith(f"| `{name}`"):
                yield cells[column].strip()


def test_the_table_of_teachers_says_what_they_cost():
    """docs/performance.md: a row of either kind, with DMAE's view and with that of all patches.

    methods/test_map_teachers.py and models/test_families.py count what a teacher of any family takes.
    """
    row = r"^\| `(\w+)`.* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
    table = re.findall(row, (ROOT / "docs/performance.md").read_text(), re.MULTILINE)
    told = {name: [depth, *figures] for name, depth, *figures in table}
    for name in ("vit_large_patch14_reg4_dinov2", "resnet50"):
        depth, *figures = told[name]
        found = []
        for recipe in ("dmae_vit_s", "dinov3_vit_s"):
            given = [f"teacher.source=random:{name}", "align.student=[11]", f"align.teacher=[{depth}]"]
            config = load_config(f"imagenet/{recipe}", NEEDED + given, root=PretrainConfig).config
            flops = counted(config, *built(config))
            found += [flops["teacher"], flops["total"]]
        assert figures == [f"{found[i]:.1f}" for i in (0, 2, 3)], (name, found)


@pytest.mark.parametrize("name", ["mae", "dmae", "finetune"])
def test_own_configs_dry_run_on_a_few_images(shards, tmp_path, capsys, name):
    """A tiny network in the place of theirs; the lengths are those of 96 images."""
    small = ["width=32", "depth=9", "num_heads=2", "patch_size=8"]
    root = FinetuneConfig if name == "finetune" else PretrainConfig
    overrides = [f"data.train={shards}", f"data.val={shards}", f"run={tmp_path}/r", "data.image_size=32"]
    overrides += ["engine.micro_batch=4", "data.workers=0", *(f"student.{each}" for each in small)]
    if name == "dmae":
        overrides += ["teacher.source=random:vit_tiny_patch16_224", *(f"teacher.{each}" for each in small)]
    if name == "finetune":
        overrides += ["student.model=vit_tiny_patch16_224"]
    config = load_config(f"own/{name}", overrides, root=root).config
    (finetune_dry_run if name == "finetune" else pretrain_dry_run)(config)
    assert not (tmp_path / "r").exists()
    out = capsys.readouterr().out
    steps = {"finetune": "900 = floor(300 epochs x 96 / 32), 45 of them"}
    assert steps.get(name, "2,400 = floor(1600 epochs x 96 / 64), 120 of them warm-up") in out
    assert "\nauto     batch" in out and "for 96 images" in out and "warning" not in out
    assert re.search(r"\ndisk     2 checkpoints \(log\.keep\) of [\d.]+ MB", out)


@pytest.mark.parametrize(
    ("recipe", "teacher", "depth"),
    [
        ("sam_vit_s", "samvit_base_patch16", 12),
        ("dinov3_vit_s", "vit_small_patch16_dinov3", 11),
        ("ema_vit_s", None, 11),
    ],
)
def test_teachers_that_see_everything_dry_run_on_a_few_images(
    shards, tmp_path, capsys, recipe: str, teacher: str | None, depth: int
):
    """The smallest of the family with random weights, in the place of the largest, and images of 64 px."""
    overrides = [f"data.train={shards}", f"run={tmp_path}/r", "data.image_size=64", "data.workers=0"]
    overrides += ["student.width=32", "student.num_heads=2", "optim.global_batch=8", "engine.micro_batch=2"]
    if teacher is not None:
        overrides += [f"teacher.source=random:{teacher}", "teacher.image_size=64", f"align.teacher=[{depth}]"]
    pretrain_dry_run(load_config(f"imagenet/{recipe}", overrides, root=PretrainConfig).config)
    out = capsys.readouterr().out
    sees = "the whole image at 64 px, maps of side 4 resampled to 4" if recipe == "sam_vit_s" else "16"
    assert f"student sees 4 of 16 patches, teacher {sees}" in out
    assert re.search(r"flops    teacher \d", out) and "\nmemory " in out


def test_imagenette_minutes_follow_from_the_rates():
    """`about M minutes on one CPU core, at R images per CPU second`, for the epochs of the config."""
    found = 0
    for path in ROOT.glob("configs/imagenette/*.yaml"):
        if cost := re.search(r"about (\d+) minutes on one CPU core, at (\d+) images per CPU second", path.read_text()):
            given = ["init.source=run:runs/x"] if path in FINETUNE else without_weights(path)
            root = FinetuneConfig if path in FINETUNE else PretrainConfig
            config = load_config(path, NEEDED + given, root=root).config
            assert int(cost[1]) == round(config.optim.epochs * 9469 / int(cost[2]) / 60), path
            found += 1
    assert found == 7


def test_the_study_of_lengths_compares_equal_epochs_and_equal_minutes():
    study = load_study("imagenette/study_lengths")
    given = [*NEEDED, "init.source=run:runs/x"]
    tuning = load_config(study.finetune.config, given, root=FinetuneConfig).config.optim.epochs
    lengths, rates = {}, {}
    for name, student in study.students.items():
        if student.config:
            settings = [setting.replace("{teacher.teacher.finetuned}", "run:runs/x") for setting in student.set]
            optim = load_config(student.config, [*NEEDED, *settings], root=PretrainConfig).config.optim
            assert name.endswith(f"_{optim.epochs:g}") and optim.warmup_epochs == optim.epochs / 10
            lengths.setdefault(name.rpartition("_")[0], []).append(optim.epochs)
    methods = ("mae", "dmae", "dmae_tuned", "amd_tuned", "tinymim_tuned")
    assert lengths == {method: [3, 10, 30, 100] for method in methods} | {"ema": [30, 100]}
    scratch = study.students["scratch"].finetune_axes["optim.epochs"]
    assert {tuning + epochs for epochs in lengths["mae"]} <= set(scratch)
    for method in ("dmae", "finetune"):
        text = (ROOT / f"configs/imagenette/{method}.yaml").read_text()
        rates[method] = int(re.search(r"at (\d+) images per CPU second", text)[1])
    for epochs in lengths["dmae"]:
        equal = tuning + epochs * rates["finetune"] / rates["dmae"]
        assert min(abs(equal / each - 1) for each in scratch) < 0.1, (epochs, equal)


def test_imagenet_configs_are_the_papers_recipes():
    """The numbers that the papers state: with another one it is another recipe."""
    recipes = {
        "mae_vit_b": ("mae", 800, 40, (512, 8, 16), "norm_patch", (), (), None),
        "dmae_vit_b": ("dmae", 100, 20, (512, 8, 16), "raw", (8,), (17,), None),
        "dmae_vit_s": ("dmae", 100, 20, (512, 8, 16), "raw", (8,), (8,), None),
        "amd_vit_b": ("amd", 800, 40, (384, 4, 6), "norm_patch_channel", (5, 11), (11, 23), 0.5),
        "amd_vit_s": ("amd", 800, 40, (192, 4, 3), "norm_patch_channel", (5, 11), (11, 23), 0.5),
        "dinov3_vit_s": ("amd", 300, 15, (384, 4, 6), "norm_patch", (11,), (23,), 1.0),
        "dinov3_vit_t": ("amd", 300, 15, (384, 4, 6), "norm_patch", (11,), (23,), 1.0),
        "ema_vit_s": ("amd", 300, 15, (384, 4, 6), "norm_patch", (11,), (11,), 1.0),
        "sam_vit_s": ("amd", 400, 40, (512, 8, 16), "norm_patch", (11,), (32,), 1.0),
    }
    for name, expected in recipes.items():
        c = load_config(ROOT / f"configs/imagenet/{name}.yaml", NEEDED, root=PretrainConfig).config
        decoder = (c.decoder.width, c.decoder.depth, c.decoder.num_heads)
        taps = (c.align.student, c.align.teacher)
        found = (
            c.method,
            c.optim.epochs,
            c.optim.warmup_epochs,
            decoder,
            c.pixels.target,
            *taps,
            c.masks.teacher_keep_ratio,
        )
        assert found == expected, name
        assert (c.optim.peak_lr, c.optim.global_batch, c.optim.betas) == (pytest.approx(2.4e-3), 4096, (0.9, 0.95))
        assert (c.optim.weight_decay, c.masks.student_keep_ratio, c.data.crop_scale) == (0.05, 0.25, (0.2, 1.0))


def test_the_losses_of_teachers_that_see_everything():
    """EUPE's loss and head, SAMI's, and the target of data2vec."""
    eupe = ("cosine_smooth_l1", "stored", "mlp", False, 0.25, "decoder", 0.75, "cross", None, 0.0, 1.0)
    losses = {
        "dinov3_vit_t": eupe,
        "dinov3_vit_s": eupe,
        "sam_vit_s": ("mse", "none", "linear", True, 0.25, "decoder", 0.75, "cross", None, 0.0, 0.0),
        "ema_vit_s": ("smooth_l1", "none", "linear", True, 1.0, "decoder", 1.0, "cross", 6, 0.25, 1.0),
    }
    for name, expected in losses.items():
        c = load_config(ROOT / f"configs/imagenet/{name}.yaml", NEEDED, root=PretrainConfig).config
        a, g = c.align, c.generate
        found = (a.distance, a.normalize, a.projector, a.bias, a.weight, g.by, g.weight, c.decoder.attention)
        assert (*found, a.last_blocks, a.warmup_share, c.pixels.weight) == expected, name
    assert c.teacher.decay == (0.999, 0.9999)


@pytest.mark.parametrize("path", FINETUNE, ids=name_of)
def test_fine_tuning_config_loads_and_its_header_is_true(path: Path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    command = re.search(rf"maedistill finetune {name_of(path)} (.*)", header)
    assert command, "no command"
    overrides = shlex.split(command[1].replace("...", "x.tar"))
    config = load_config(path, overrides, root=FinetuneConfig).config
    assert config.init.source and config.data.val
    model = config.student.model
    if path.stem.startswith("vit_"):
        assert model == f"{path.stem}_patch16_224" and ("Expected:" in header and "%" in header)
        assert load_config(path, [*overrides, "init.source=null"], root=FinetuneConfig).config.student_architecture
        assert ("[unverified]" in header) == (path.stem == "vit_small")
    else:
        assert model is None, "any source of that size"
        assert "Expected:" not in header and "No published recipe" in header


def test_fine_tuning_configs_are_the_papers_recipes():
    recipes = {  # epochs, base lr, layer decay, drop path, (mixup, cutmix, erasing, smoothing), RandAugment's magnitude
        "vit_tiny": (300, 1e-3, 0.85, 0.0, (0.2, 0.0, 0.0, 0.0), 10),
        "vit_small": (200, 1e-3, 0.75, 0.1, (0.8, 1.0, 0.25, 0.1), 9),
        "vit_base": (100, 5e-4, 0.65, 0.1, (0.8, 1.0, 0.25, 0.1), 9),
        "vit_large": (50, 1e-3, 0.75, 0.2, (0.8, 1.0, 0.25, 0.1), 9),
    }
    for name, expected in recipes.items():
        c = load_config(ROOT / f"configs/finetune/{name}.yaml", root=FinetuneConfig, to_run=False).config
        o, a = c.optim, c.augment
        mixing = (a.mixup, a.cutmix, a.erasing, a.smoothing)
        magnitude = int(re.fullmatch(r"rand-m(\d+)-mstd0\.5-inc1", a.rand_augment)[1])
        assert (o.epochs, o.base_lr, o.layer_decay, c.student.drop_path, mixing, magnitude) == expected, name
        assert (o.global_batch, o.warmup_epochs, o.min_lr, o.betas) == (1024, 5.0, 1e-6, (0.9, 0.999))
        assert (o.weight_decay, c.student.global_pool, c.data.crop_scale) == (0.05, "avg", (0.08, 1.0))

"""The schema of a fine-tuning run: every key, its type, range, default, and what the papers used.

`FinetuneConfig` is the root; its sections extend those in `schema.py`, which pre-training extends as well. The
defaults are MAE's recipe for ViT-B (He et al., CVPR 2022); `configs/finetune/` has one recipe per size.
"""

from typing import Annotated, Literal

from pydantic import Field

from maedistill.config.architectures import Architecture, architecture_of
from maedistill.config.distill import DistillConfig
from maedistill.config.schema import (
    Above0,
    AutoBatch,
    AutoWarmup,
    BackboneConfig,
    Count,
    Crop,
    EngineConfig,
    Fraction,
    ImagesConfig,
    LogConfig,
    Mean,
    Optimization,
    OwnSide,
    Positions,
    Probability,
    Rate,
    RunConfig,
    Section,
    Triple,
    Weight,
    result,
    runtime,
)


class Init(Section):
    """The weights that fine-tuning starts from; from scratch without them."""

    source: str | None = result(
        None,
        "where the weights are: the path of a run, an export or a weights file, or timm:NAME, hf-hub:ID, run:PATH, "
        "local-dir:PATH, file:PATH; null: none, the student starts from scratch",
    )
    weights: str | None = result(
        None,
        "which weights, if there are several: ema, the average of a run or checkpoint, or the name of a file's entry; "
        "null: the usual ones",
    )
    pos_embed: Positions | None = result(None, "position table that a file: source was trained with but does not store")
    sha256: str | None = runtime(None, "refuse a file: source with another checksum", pattern="^[0-9a-f]{64}$")
    license: str | None = runtime(None, "license of the weights, for the student's card, where the source names none")


class Student(BackboneConfig):
    """The Vision Transformer that is fine-tuned; what init.source says about itself need not be repeated here."""

    model: str | None = result(
        None,
        "a plain ViT of timm, with absolute or rotary positions; required from scratch; otherwise the model that "
        "init.source holds, and checked against it",
    )
    drop_path: Rate = result(0.1, "stochastic depth rate; 0.1 for ViT-B and 0.2 for ViT-L in MAE, 0 in MAE-Lite")
    global_pool: Literal["avg", "token"] = result(
        "avg",
        "what the head reads: avg: the mean of the patch tokens through a new fc_norm, as in MAE's fine-tuning; "
        "token: the class token after the encoder's own norm",
    )
    exits: tuple[Count, ...] = result(
        (), "0-based blocks after which the network has a classifier too, each usable alone; trained by distill.exits"
    )


class Data(ImagesConfig):
    """Labelled images: shards, crops, normalisation, label subsets and the loader's processes."""

    val: str | None = runtime(None, "labelled shards that are evaluated, every image exactly once")
    image_size: OwnSide = result(
        None,
        "side of the square training crop and of the evaluation, in pixels; null: that of init.source, or 224 from "
        "scratch; 224 in MAE, 384 or 448 at a higher resolution",
    )
    mean: Mean | None = result(
        None, "per-channel mean of the normalisation, pixels in [0, 1]; null: init.source's, or ImageNet's from scratch"
    )
    std: Triple | None = result(None, "per-channel deviation of the normalisation, above 0; set it with data.mean")
    crop_scale: tuple[Fraction, Fraction] = result(
        (0.08, 1.0), "area of RandomResizedCrop as a share of the image; (0.08, 1) in MAE"
    )
    flip: bool = result(True, "mirror half of the crops; MAE does")
    eval_crop: Crop = result(
        0.875, "share of the shorter side that evaluation looks at; 0.875 (224 of 256) in MAE, 1 for 32 px images"
    )
    label_fraction: Fraction = result(
        1.0,
        "share of each class's labelled images that is trained on, chosen by the seed; 0.01 and 0.1 are the usual ones",
    )
    num_classes: Annotated[int, Field(ge=2)] | None = result(
        None, "outputs of the head; null: as many as the training labels have"
    )


class Augment(Section):
    """What is done to training images and labels beyond crop and flip; evaluation sees none of it."""

    rand_augment: str | None = result(
        "rand-m9-mstd0.5-inc1", "timm's RandAugment, in its notation; rand-m9-mstd0.5-inc1 in MAE; null: none"
    )
    mixup: Weight = result(
        0.8,
        "alpha of mixup's Beta distribution; 0.8 in MAE, 0.2 in MAE-Lite; 0: no mixup; every micro-batch is mixed; if "
        "cutmix is on, too, one of the two is drawn for it",
    )
    cutmix: Weight = result(1.0, "alpha of cutmix's Beta distribution; 1 in MAE, 0 in MAE-Lite; 0: no cutmix")
    erasing: Probability = result(0.25, "how often a random rectangle is erased; 0.25 in MAE, 0 in MAE-Lite")
    smoothing: Rate = result(0.1, "label smoothing; 0.1 in MAE, 0 in MAE-Lite")

    @property
    def mixes(self) -> bool:
        """Return whether images are ever mixed in pairs."""
        return max(self.mixup, self.cutmix) > 0


class Optim(Optimization):
    """Length of the training, batch, AdamW, its layer-wise rates and cosine schedule."""

    default_base_lr = 5e-4

    warmup_epochs: AutoWarmup = result(
        5.0, "linear warm-up of the learning rate; 5 in MAE and MAE-Lite; auto: 5 % of the epochs"
    )
    global_batch: AutoBatch = result(
        1024,
        "images per optimizer step over all ranks; 1024 in MAE and MAE-Lite; auto: the largest power of two that is at "
        "most a 50th of the images, 32 to 1024",
    )
    base_lr: Above0 | None = result(
        None,
        "learning rate per 256 images: lr = base_lr * global_batch / 256; 5e-4 for ViT-B in MAE and by default, 1e-3 "
        "for its ViT-L and for MAE-Lite's ViT-Ti",
    )
    min_lr: Weight = result(1e-6, "learning rate at the end of the cosine, before layer_decay; 1e-6 in MAE")
    betas: tuple[Rate, Rate] = result((0.9, 0.999), "decay of AdamW's first and second moment; (0.9, 0.999) in MAE")
    layer_decay: Fraction = result(
        0.65,
        "factor of the learning rate from each block to the one below; 0.65 for ViT-B and 0.75 for ViT-L in MAE, 0.85 "
        "for ViT-Ti in MAE-Lite; 1: none",
    )


class Log(LogConfig):
    """How often progress, evaluations and checkpoints are written."""

    eval_every_epochs: Above0 | None = runtime(1.0, "epochs between evaluations on data.val; null: only at the end")


class FinetuneConfig(RunConfig):
    """One fine-tuning run; `finetune_rules.py` says what must hold between its keys."""

    stage, title = "finetune", "fine-tuning"

    seed: Count = result(
        0, "seeds the sample order, label subset, augmentations, drop path and initial weights", le=2**63 - 1
    )
    init: Init = Init()
    student: Student = Student()
    data: Data = Data()
    augment: Augment = Augment()
    distill: DistillConfig = DistillConfig()
    optim: Optim = Optim()
    engine: EngineConfig = EngineConfig()
    log: Log = Log()

    @property
    def group(self) -> int:
        """Return 2 if mixup or cutmix mix each image with another one of its micro-batch."""
        return 2 if self.augment.mixes else 1

    @property
    def student_architecture(self) -> Architecture | None:
        """Return the student's dimensions, or None if only init.source or timm knows them."""
        kind, _, name = (self.init.source or "").partition(":")
        if kind in ("run", "hf-hub", "local-dir"):
            return None
        model = name if kind == "timm" else self.student.model
        return architecture_of(model, self.student) if model else None

"""Shared parts of all stages' schemas: how a key is declared, value types, and the sections that each stage extends.

A key is `result` if it changes the numbers that a run produces, and `runtime` if it only changes speed, place or
logging. A run folder may be continued with other `runtime` keys; a changed `result` key is rejected.

`config/pretrain.py` and `config/finetune.py` hold one root each, a `RunConfig`, with every key of its stage: type,
range, default, and what the papers used; `config/distill.py` has the sections of distillation. The schema checks every
value by itself. Rules between keys are in `shared_rules.py`, `pretrain_rules.py`, `finetune_rules.py` and
`distill_rules.py`; `loader.py` fills a schema from YAML and the command line. Neither torch nor timm is imported, so
that whatever is known to be wrong is reported at once.

Relative paths (shards, weights, run folder) are relative to the working directory, not to the file that names them. `~`
is expanded where a path is used, so that a run's `config.yaml` keeps what the user wrote.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=16384)]  # of a network; the widest ViTs have about 6,000
Side = Annotated[int, Field(ge=1, le=8192)]  # of an image, in pixels
Weight = Annotated[float, Field(ge=0.0)]
Above0 = Annotated[float, Field(gt=0.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]  # of decay, drop or smoothing
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Triple = tuple[float, float, float]
Mean = tuple[Probability, Probability, Probability]  # of pixels in [0, 1]
Crop = Annotated[float, Field(ge=0.1, le=1.0)]  # share of a side; images are resized to size / crop
FieldNames = Annotated[str, Field(pattern=r"^[^\s.;]\S*$")]  # of a sample in a shard
Positions = Literal["sincos2d", "sincos1d", "learned"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
MAX_BAD_FRACTION = 0.001  # of the samples, where nobody says otherwise
AUTO = "auto"  # the value of a key that is left to the size of the training set

if TYPE_CHECKING:  # what runs reads numbers: runs/resolve_auto.py has replaced `auto` and null by then
    AutoEpochs: TypeAlias = float
    AutoWarmup: TypeAlias = float
    AutoBatch: TypeAlias = int
    OwnSide: TypeAlias = int
else:
    AutoEpochs = Above0 | Literal["auto"]
    AutoWarmup = Weight | Literal["auto"]
    AutoBatch = Positive | Literal["auto"]
    OwnSide = Side | None


def result(default: Any, doc: str, **limits: Any) -> Any:
    """Declare a key that changes the numbers."""
    return Field(default, description=doc, json_schema_extra={"kind": "result"}, **limits)


def runtime(default: Any, doc: str, **limits: Any) -> Any:
    """Declare a key that changes speed, place or logging, never the numbers beyond rounding."""
    return Field(default, description=doc, json_schema_extra={"kind": "runtime"}, **limits)


class Section(BaseModel):
    """Frozen, strict (no silent conversion), no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ImagesConfig(Section):
    """Labelled or unlabelled images: shards, crops, normalisation and the loader's processes."""

    train: str = runtime(
        "",
        "training shards: DIR/train-{000000..000008}.tar, DIR/train-*.tar or one .tar; a run may find them elsewhere "
        "when it is continued, if they hold the same samples",
    )
    val: str | None  # annotated only: each stage declares it with its own default and description
    index: str | None = runtime(None, "index file of data.train, if it is not in the folder of the shards")
    image_size: OwnSide  # annotated only, like the others without a value
    mean: Mean | None
    std: Triple | None
    crop_scale: tuple[Fraction, Fraction]
    crop_ratio: tuple[float, float] = result((0.75, 4 / 3), "aspect ratios of RandomResizedCrop, width / height")
    flip: bool
    shuffle_window: Positive | None = result(None, "shuffle inside windows of this many shards; null: the whole set")
    eval_crop: Crop
    workers: Count | None = runtime(
        None, "loader processes per rank, 0: load in the training process; null: one per core of the rank, at most 8"
    )
    keep_decoded: bool | Literal["auto"] = runtime(
        AUTO,
        "keep decoded training images in memory that the ranks of a machine share, so that each is decoded once; auto: "
        "if all fit in a quarter of the free memory; true: if they fit in half of it, else the run does not start",
    )
    max_bad_fraction: Probability = runtime(
        MAX_BAD_FRACTION,
        "stop when a larger share of the samples seen, or of those of an evaluation, could not be decoded; in training "
        "each one is replaced and listed, an evaluation leaves it out and says so",
    )
    image_key: FieldNames | None = result(
        None,
        "member of a sample that is its image, if it has several: the part of its name after the first dot, e.g. "
        "input.jpg; with names separated by `;`, the first that a sample has; null: jpg, jpeg, png or webp",
    )
    label_key: FieldNames | None = result(None, "member of a sample that is its label, e.g. output.cls; null: cls")
    exif: Literal["ignore", "apply"] = result(
        "ignore",
        "EXIF orientation of photographs; ignore: pixels as they are stored, as is customary with ImageNet; apply: "
        "turned upright, in training, validation and evaluation",
    )


class BackboneConfig(Section):
    """The Vision Transformer that is trained: a timm model and what is changed about it."""

    model: str | None
    width: Width | None = result(None, "embedding dimension, where it differs from the model's")
    depth: Positive | None = result(None, "number of blocks, where it differs from the model's")
    num_heads: Positive | None = result(
        None, "attention heads, where they differ from the model's; MAE-Lite gives ViT-Ti 12"
    )
    patch_size: Positive | None = result(None, "patch side in pixels, where it differs from the model's")
    class_token: bool | None = result(
        None, "whether there is a class token, where it differs from the model's; MAE and DMAE have one, AMD has none"
    )
    register_tokens: Count | None = result(None, "extra learned tokens, where their number differs from the model's")
    drop_path: Rate


# The keys that change the shape of a model. All of them null: the model's own.
SHAPE = ("width", "depth", "num_heads", "patch_size", "class_token", "register_tokens")


class Optimization(Section):
    """Length of the training, batch, AdamW and its cosine schedule."""

    default_base_lr: ClassVar[float]

    epochs: AutoEpochs = result(
        100.0,
        "length of the run: total steps = floor(epochs * images / global_batch); auto: by the number of images, for "
        "20,000 updates in 100 to 1,600 epochs, in fine-tuning 5,000 in 50 to 300",
    )
    warmup_epochs: AutoWarmup
    global_batch: AutoBatch
    base_lr: Above0 | None
    lr: Above0 | None = result(None, "peak learning rate itself, instead of base_lr")
    min_lr: Weight
    betas: tuple[Rate, Rate]
    weight_decay: Weight = result(
        0.05, "of AdamW; 0 on norms, biases and other 1-D parameters, and on tokens and positions"
    )
    clip: Above0 | None = result(None, "largest gradient norm; none in MAE, 0.02 in AMD's video code")
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = result(
        None, "decay of a moving average of the weights; null: none is kept"
    )

    @property
    def peak_lr(self) -> float:
        """Return the learning rate at the end of the warm-up."""
        return self.lr if self.lr is not None else (self.base_lr or self.default_base_lr) * self.global_batch / 256


class EngineConfig(Section):
    """How the step runs: micro-batch, number format, ZeRO, compilation."""

    micro_batch: Positive | None = runtime(
        None,
        "largest number of samples that a rank processes at once; accumulation follows from it; null: 256, or in "
        "pre-training on a GPU as many as fit in its memory",
    )
    precision: Precision = result(
        "auto",
        "autocast format of the student's step; auto: bf16 on a GPU (fp16 below compute capability 8.0), fp32 on a CPU",
    )
    zero: Count = runtime(0, "DeepSpeed ZeRO stage: what is sharded across the ranks to save memory", le=3)
    compile: bool | None = runtime(
        None,
        "torch.compile the step: student, teachers, images and masks; null: on a GPU where a compiler works, below "
        "ZeRO 3",
    )
    deterministic: bool = runtime(
        False,
        "repeat every bit on a GPU, where attention and gather otherwise add in the order in which blocks finish; "
        "slower; the micro-batch is then never fitted to the memory; a CPU always repeats every bit",
    )
    activation_checkpointing: bool = runtime(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    timeout_seconds: Positive = runtime(
        600,
        "how long a rank waits for another before the run ends; one whose process is gone, or whose whole machine has "
        "been silent for a minute, is not waited for; a loader process that is stuck at a sample for half of this time "
        "ends the run, too; fetching a remote shard has time limits of its own",
    )
    max_nonfinite: Count = runtime(
        5,
        "most updates in a row whose loss or gradient is not finite; they are never applied; one more ends the run, "
        "exit 4",
    )

    @property
    def loader_seconds(self) -> float:
        """Return how long loader processes may be stuck: less than other ranks wait, so the error names samples."""
        return self.timeout_seconds / 2

    @property
    def micro_batch_limit(self) -> int:
        """Return the largest micro-batch that the settings allow."""
        return self.micro_batch or 256


class LogConfig(Section):
    """How often progress and checkpoints are written."""

    every_steps: Positive = runtime(20, "steps between lines of metrics.jsonl and of progress")
    save_every_epochs: Above0 = runtime(1.0, "epochs between checkpoints")
    keep: Positive = runtime(2, "newest checkpoints that are kept")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = runtime(
        ("tensorboard",), "what else gets metrics and pictures; tensorboard only where it is installed"
    )
    report: bool = runtime(
        False, "write report.html at the first evaluation; without it, an existing page is still updated after each one"
    )


class RunConfig(Section):
    """One run of any stage. Derived numbers are properties, never mutations."""

    stage: ClassVar[str]  # the command, and its name in run.json
    title: ClassVar[str]  # in sentences

    run: str = runtime("", "run folder; starting the same command again continues the run")
    seed: Count
    threads: Positive | None = runtime(
        None, "CPU threads per rank; by default OMP_NUM_THREADS, or else the cores shared by the local ranks"
    )

    @property
    def group(self) -> int:
        """Return how many consecutive samples must stay in one micro-batch."""
        return 1

    if TYPE_CHECKING:  # every stage declares these itself, so that its sections come in its own order
        data: ImagesConfig
        student: BackboneConfig
        optim: Optimization
        engine: EngineConfig
        log: LogConfig

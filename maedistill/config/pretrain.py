"""The schema of a pre-training run: every key, its type, range, default, and what the papers used.

`PretrainConfig` is the root; the sections that it shares with fine-tuning are in `schema.py`.
"""

from typing import Literal

from maedistill.config.architectures import Architecture, architecture_of
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
    Positions,
    Positive,
    Precision,
    Probability,
    Rate,
    RunConfig,
    Section,
    Side,
    Triple,
    Weight,
    Width,
    result,
    runtime,
)
from maedistill.config.sources import EMA

UNUSED_SECTIONS = {  # by method: their settings have no effect, and are refused
    "mae": ("teacher", "align", "generate"),
    "dmae": ("generate",),
    "tinymim": ("generate",),
}


class Data(ImagesConfig):
    """Training images: shards, crops, normalisation and the loader's processes."""

    val: str | None = runtime(None, "shards for pictures and, where they have labels, kNN; null: no kNN")
    image_size: Side = result(224, "side of the square training crop, in pixels; 224 in MAE, DMAE and AMD")
    # mean and deviation of ImageNet
    mean: Mean = result((0.485, 0.456, 0.406), "per-channel mean of the student's normalisation, pixels in [0, 1]")
    std: Triple = result(
        (0.229, 0.224, 0.225), "per-channel standard deviation of the student's normalisation, above 0"
    )
    crop_scale: tuple[Fraction, Fraction] = result(
        (0.2, 1.0), "area of RandomResizedCrop as a share of the image; (0.2, 1) in MAE, DMAE and AMD"
    )
    flip: bool = result(True, "mirror half of the crops; MAE, DMAE and AMD do")
    views_per_image: Positive = result(1, "crops taken from one decoded image; each counts as a sample of the epoch")
    eval_crop: Crop = runtime(0.875, "share of the shorter side that kNN and pictures look at; 1 for 32 px images")


class Student(BackboneConfig):
    """The small Vision Transformer that is trained."""

    model: str = result("vit_small_patch16_224", "a plain ViT of timm, with absolute or rotary positions")
    pos_embed: Positions = result(
        "sincos2d",
        "position table: fixed 2-D sin-cos in MAE and DMAE, fixed interleaved 1-D in AMD, or learned; a model with "
        "only rotary positions has none",
    )
    drop_path: Rate = result(0.0, "stochastic depth rate; none in the papers' pre-training")

    @property
    def title(self) -> str:
        """Return the model's name with its changed dimensions: `vit_tiny_patch16_224 (width 96, depth 4)`."""
        shape = {name: getattr(self, name) for name in ("width", "depth", "num_heads", "patch_size")}
        changed = ", ".join(f"{name} {value}" for name, value in shape.items() if value is not None)
        return f"{self.model} ({changed})" if changed else self.model


class Teacher(Section):
    """The frozen network whose features the student imitates; none with method=mae."""

    source: str | None = result(
        None,
        "where the weights are: the path of a run, an export or a weights file, or timm:NAME, hf-hub:ID, "
        "local-dir:PATH, file:PATH, run:PATH, random:NAME (tests and benchmarks); ema: no weights, the teacher is the "
        "moving average of the student itself",
    )
    decay: tuple[Probability, Probability] = result(
        (0.999, 0.9999),
        "with source=ema: decay of the average per step, at the first and at the last step, with a cosine between; "
        "0.999 to 0.9999 in BootMAE's first 100 epochs",
    )
    model: str | None = result(
        None, "timm model that a file: source holds, e.g. vit_large_patch16_224; null: read from its shapes"
    )
    weights: str | None = result(
        None,
        "which weights, if there are several: ema, the moving average of a run or checkpoint, or the name of a file's "
        "entry, e.g. state_dict_ema; null: the usual ones (model, state_dict; for DINO the teacher)",
    )
    width: Width | None = result(None, "embedding dimension of a file: or random: teacher, where it differs")
    depth: Positive | None = result(None, "number of blocks of a file: or random: teacher, where it differs")
    num_heads: Positive | None = result(None, "attention heads of a file: or random: teacher, where they differ")
    patch_size: Positive | None = result(None, "patch side of a file: or random: teacher, where it differs")
    pos_embed: Positions | None = result(None, "fixed table for a file: teacher that stores none; AMD's is sincos1d")
    image_size: Side | None = result(
        None,
        "side of the teacher's images in pixels; for a plain ViT: k x the student's patches along a side x the "
        "teacher's patch size, and k x k features are averaged; null: k = 1, for other networks their own size",
    )
    mean: Triple | None = result(None, "per-channel mean of the teacher's input; by default what its source says")
    std: Triple | None = result(None, "per-channel deviation of the teacher's input; set it with teacher.mean")
    license: str | None = runtime(None, "license of the weights, for the student's card, where the source names none")
    sha256: str | None = runtime(None, "refuse a file: source with another checksum", pattern="^[0-9a-f]{64}$")
    precision: Precision = result(
        "auto", "number format of the teacher; auto: bf16 on a GPU (fp16 below compute capability 8.0), fp32 on a CPU"
    )


class Masks(Section):
    """How many patches the student and the teacher see."""

    student_keep_ratio: Fraction = result(
        0.25, "share of patches the student sees; 0.25 in MAE, DMAE and AMD; 1 only with pixels.weight=0"
    )
    teacher_keep_ratio: Fraction | None = result(
        None,
        "share the teacher sees: the same by default (DMAE); 0.5 in AMD, whose sets are nested; a teacher that is not "
        "a plain ViT sees the whole image: null with dmae, 1 with amd",
    )


class Decoder(Section):
    """The light decoder that predicts the pixels of hidden patches from the student's tokens."""

    width: Width = result(384, "embedding dimension; 512 in MAE and DMAE; AMD: 192 for ViT-S, 384 for B, 512 for L")
    depth: Positive = result(4, "number of blocks; 8 in MAE and DMAE, 4 in AMD")
    num_heads: Positive = result(6, "attention heads; 16 in MAE and DMAE; AMD: 3 for ViT-S, 6 for B, 8 for L")
    bias: bool = result(True, "bias of the encoder-to-decoder map; AMD has none")
    attention: Literal["self", "cross"] = result(
        "self",
        "self: all tokens attend to each other (MAE, DMAE, AMD); cross: tokens of hidden patches attend to the visible "
        "tokens only, which costs less (CrossMAE)",
    )
    predict_ratio: Fraction = result(
        1.0,
        "share of the hidden patches that is predicted, drawn for each image; the others cost nothing; 1 in MAE, DMAE, "
        "AMD; CrossMAE predicts a part",
    )


class Pixels(Section):
    """The loss on predicted pixels."""

    target: Literal["norm_patch", "raw", "norm_patch_channel"] = result(
        "norm_patch",
        "what is predicted: pixels normalised per patch (MAE), raw (DMAE), or normalised per patch and channel (AMD)",
    )
    weight: Weight = result(
        1.0,
        "weight of the pixel loss; 1 in the papers; 0: no pixels are predicted, and the student may see all patches",
    )


class Align(Section):
    """Direct alignment: imitate the teacher's features (dmae, amd) or token relations (tinymim) where both see."""

    student: tuple[Count, ...] = result((), "0-based student blocks; [8] of 12 in DMAE, [5, 11] of 12 in AMD")
    teacher: tuple[Count, ...] = result(
        (),
        "0-based teacher blocks, one per student block; [17] of 24 in DMAE, [11, 23] of 24 in AMD; for a teacher that "
        "is not a plain ViT, timm's depths: stages, or SAM's blocks and then its neck",
    )
    distance: Literal["l1", "mse", "smooth_l1", "cosine_smooth_l1"] = result(
        "l1",
        "distance between aligned features; l1 in DMAE, mse in AMD; smooth_l1 with beta 2 in G2SD; "
        "cosine_smooth_l1: 0.9 (1 - cosine) + 0.1 smooth_l1 with beta 1 (Theia, EUPE)",
    )
    normalize: Literal["none", "l2", "whiten", "stored"] = result(
        "l2",
        "applied before the distance; l2: L2-normalise the tokens of both (DMAE's code); "
        "whiten: LayerNorm without affine of the teacher's; none (AMD); "
        "stored: z-score the teacher's by mean and deviation per channel, measured in the first steps (Theia, EUPE)",
    )
    stored_steps: Positive = result(
        500,
        "number of first steps over which normalize=stored measures; each step uses what the steps before it measured, "
        "so in the very first step the terms of the teacher have weight 0, and the log counts them with raw targets",
    )
    output: Literal["block", "mlp"] = result(
        "block",
        "what of a teacher block is the target; block: its output tokens (DMAE, AMD); mlp: what its MLP adds to them "
        "(data2vec), for plain ViTs of timm",
    )
    last_blocks: Positive | None = result(
        None,
        "target of a pair: LayerNorm of the mean of the layer-normed outputs of this many teacher blocks, up to the "
        "named one (data2vec: 10 of 12); null: the output of the named block itself (DMAE, AMD)",
    )
    warmup_share: Probability = result(
        0.0,
        "share of the run in which the weights of direct and generated alignment rise linearly from 0; 0.25 in BootMAE",
    )
    projector: Literal["linear", "mlp"] = result(
        "linear",
        "map from student to teacher width; linear: one layer (DMAE, AMD); mlp: two, LayerNorm and GELU between (EUPE)",
    )
    bias: bool = result(True, "bias of the projection; DMAE has one, AMD none")
    weight: Weight = result(
        1.0, "weight of the direct alignment, mean over pairs; 1 in DMAE and AMD; of QK + VV in tinymim, 1 in TinyMIM"
    )


class Generate(Section):
    """Generated alignment: teacher features are predicted at patches that only the teacher sees (amd)."""

    by: Literal["own", "decoder"] = result(
        "own",
        "what predicts them; own: generators of teacher width (AMD); decoder: the pixel decoder, through one linear "
        "map per pair, which costs little more than dmae (needs decoder.attention=cross)",
    )
    depth: Positive = result(2, "blocks of each generator; 2 in AMD")
    num_heads: Positive | None = result(None, "attention heads of a generator; by default teacher width / 64 as in AMD")
    weight: Weight = result(1.0, "weight of the generated alignment, mean over pairs; 1 in AMD; 0: no generation")


class Optim(Optimization):
    """Length of the training, batch, AdamW and its cosine schedule."""

    default_base_lr = 1.5e-4

    warmup_epochs: AutoWarmup = result(
        20.0, "linear warm-up of the learning rate; 40 of 800 in MAE, 20 of 100 in DMAE; auto: 5 % of the epochs"
    )
    global_batch: AutoBatch = result(
        4096,
        "samples per optimizer step over all ranks; 4096 in the papers; auto: the largest power of two that is at most "
        "a 50th of the images, 64 to 4096",
    )
    base_lr: Above0 | None = result(
        None, "learning rate per 256 samples: lr = base_lr * global_batch / 256; 1.5e-4 in MAE, DMAE and by default"
    )
    min_lr: Weight = result(0.0, "learning rate at the end of the cosine")
    betas: tuple[Rate, Rate] = result((0.9, 0.95), "decay of AdamW's first and second moment; papers: (0.9, 0.95)")


class Log(LogConfig):
    """How often progress, pictures, kNN, linear probes and checkpoints are written."""

    pictures_every_epochs: Above0 | None = runtime(10.0, "epochs between reconstruction pictures; null: never")
    knn_every_epochs: Above0 | None = runtime(10.0, "epochs between kNN scores, which need data.val; null: never")
    probe_every_epochs: Above0 | None = runtime(None, "epochs between linear probes, which need data.val; null: never")
    knn_images: Positive = runtime(
        10000, "most training images, and most validation images, that kNN and the linear probe use"
    )


class PretrainConfig(RunConfig):
    """One pre-training run; `pretrain_rules.py` says what must hold between its keys."""

    stage, title = "pretrain", "pre-training"

    method: Literal["mae", "dmae", "amd", "tinymim"] = result(
        "dmae",
        "mae: no teacher; dmae: the teacher sees the student's patches; amd: it sees more patches; tinymim: dmae with "
        "token relations in place of features (TinyMIM itself: masks.student_keep_ratio=1 pixels.weight=0)",
    )
    seed: Count = result(0, "seeds the sample order, crops, flips, masks and initial weights", le=2**63 - 1)
    more_teachers: tuple[str, ...] = result(
        (),
        "further teachers of dmae or amd, aligned at the student's patches; each entry is a string of settings, as "
        '"teacher.source=timm:resnet50.a1_in1k align.teacher=[4] align.weight=0.5"; other align.* keys and '
        "teacher.precision are those of the first teacher, other teacher.* keys have their defaults; an entry cannot "
        "set align.warmup_share; quote a value that contains spaces",
    )
    data: Data = Data()
    student: Student = Student()
    teacher: Teacher = Teacher()
    masks: Masks = Masks()
    decoder: Decoder = Decoder()
    pixels: Pixels = Pixels()
    align: Align = Align()
    generate: Generate = Generate()
    optim: Optim = Optim()
    engine: EngineConfig = EngineConfig()
    log: Log = Log()

    @property
    def group(self) -> int:
        """Return the views of an image, which must stay in one micro-batch."""
        return self.data.views_per_image

    @property
    def needs_decoder(self) -> bool:
        """Return whether anything is predicted from the student's tokens: pixels, or features of hidden patches."""
        return self.method == "mae" or self.pixels.weight > 0 or self.generates_by_decoder

    @property
    def generates_by_decoder(self) -> bool:
        """Return whether the pixel decoder predicts the teacher's features too."""
        return self.method == "amd" and self.generate.by == "decoder" and self.generate.weight > 0

    @property
    def student_architecture(self) -> Architecture | None:
        """Return the student's dimensions, or None if only timm knows them."""
        return architecture_of(self.student.model, self.student)

    @property
    def teacher_architecture(self) -> Architecture | None:
        """Return the teacher's dimensions, or None if only its source knows them."""
        if self.teacher.source == EMA:
            return self.student_architecture
        kind, _, name = (self.teacher.source or "").partition(":")
        model = self.teacher.model or (name if kind in ("timm", "random") else None)
        return architecture_of(model, self.teacher) if model else None

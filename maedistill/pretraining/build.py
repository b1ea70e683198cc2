"""Builds the objects of a pre-training run from its config. Only this file unpacks it; others get plain arguments."""

from math import lcm

import torch

from maedistill.config.pretrain import PretrainConfig
from maedistill.data.images.transforms import random_flip, to_float01
from maedistill.data.loading.loader import RandomCrops
from maedistill.data.loading.order import SampleOrder
from maedistill.data.shards.index import ShardIndex
from maedistill.errors import ConfigError
from maedistill.machine import DTYPES, precision
from maedistill.methods.amd import AMD
from maedistill.methods.dmae import DMAE
from maedistill.methods.mae import MAE
from maedistill.methods.teacher import Teacher
from maedistill.methods.tinymim import TinyMIM
from maedistill.models.attention import has_plain_attention
from maedistill.models.decoder import CrossDecoder, TokenDecoder
from maedistill.models.encoder import MaskedEncoder, build_vit
from maedistill.models.initialize import initialize
from maedistill.models.masking import PatchSplit, num_visible, random_split
from maedistill.weights.source import Source, open_source

METHODS: dict[str, type[MAE]] = {"mae": MAE, "dmae": DMAE, "amd": AMD, "tinymim": TinyMIM}
DECODERS: dict[str, type[TokenDecoder]] = {"self": TokenDecoder, "cross": CrossDecoder}


def build_encoder(config: PretrainConfig) -> MaskedEncoder:
    """Build the student's encoder, uninitialised."""
    return MaskedEncoder(build_vit(image_size=config.data.image_size, **config.student.model_dump()))


def build_teacher_source(config: PretrainConfig, *, grid: int) -> Source | None:
    """Open the teacher's source; return None for a method without a teacher."""
    if config.teacher.source is None:
        return None
    keywords = config.teacher.model_dump(exclude={"precision"})
    return open_source(grid=grid, **keywords)


def build_teacher(config: PretrainConfig, source: Source, device: torch.device) -> Teacher:
    """Build the frozen teacher on `device`, without the blocks after its last tap."""
    dtype = DTYPES[precision(config.teacher.precision, device)]
    return Teacher(source, taps=config.align.teacher, relations=config.method == "tinymim", dtype=dtype).to(device)


def build_method(config: PretrainConfig, encoder: MaskedEncoder, source: Source | None) -> MAE:
    """Build the module to train: encoder, decoder, heads and generators, initialised from the seed."""
    if config.method != "mae" and max(config.align.student) >= encoder.depth:
        raise ConfigError(
            f"align.student: block {max(config.align.student)} does not exist, the student has {encoder.depth}",
            f"use 0 to {encoder.depth - 1}",
        )
    # The decoder and the generators use fixed tables even if the student learns its positions.
    table = "sincos2d" if config.student.pos_embed == "learned" else config.student.pos_embed
    decoder = DECODERS[config.decoder.attention](
        encoder.width,
        grid=encoder.grid,
        patch_size=encoder.patch_size,
        num_prefix=encoder.num_prefix,
        pos_embed=table,
        **config.decoder.model_dump(exclude={"attention", "predict_ratio"}),
    )
    keywords: dict[str, object] = {
        "mean": config.data.mean,
        "std": config.data.std,
        "pixel_kind": config.pixels.target,
        "pixel_weight": config.pixels.weight,
        "predict_ratio": config.decoder.predict_ratio,
    }
    if config.method == "tinymim":
        keywords |= _relation_keywords(config, encoder, source)
    elif source is not None:
        align = config.align.model_dump(exclude={"student", "teacher", "weight"})
        keywords |= align | {
            "student_taps": config.align.student,
            "teacher_taps": config.align.teacher,
            "align_weight": config.align.weight,
            "teacher_width": source.encoder.width,
            "teacher_prefix": source.encoder.num_prefix,
        }
    if config.method == "amd":
        generate, width = config.generate, source.encoder.width
        num_heads = generate.num_heads or max(1, width // 64)
        if width % num_heads:
            raise ConfigError(
                f"generate.num_heads: {num_heads} heads do not divide the teacher's width {width}",
                f"set generate.num_heads to a divisor of {width}",
            )
        keywords |= {
            "generator_depth": generate.depth,
            "generator_heads": num_heads,
            "generate_weight": generate.weight,
            "pos_embed": table,
        }
    method = METHODS[config.method](encoder, decoder, **keywords)
    initialize(method, seed=config.seed)
    if config.engine.activation_checkpointing:
        encoder.vit.set_grad_checkpointing(True)
    return method


def _relation_keywords(config: PretrainConfig, encoder: MaskedEncoder, source: Source) -> dict[str, object]:
    """Return the arguments for token relations. Raises ConfigError if the networks have no comparable relations."""
    teacher, align = source.encoder, config.align
    for who, blocks, taps in (
        ("student", encoder.vit.blocks, align.student),
        ("teacher", teacher.vit.blocks, align.teacher),
    ):
        if max(taps) < len(blocks) and not all(has_plain_attention(blocks[tap]) for tap in taps):
            raise ConfigError(
                f"align.{who}: the {who}'s blocks have no queries, keys and values that can be compared",
                "use a plain ViT, e.g. vit_small_patch16_224, or method=dmae",
            )
    num_heads = [teacher.vit.blocks[tap].attn.num_heads for tap in align.teacher if tap < teacher.depth]
    if uneven := [number for number in num_heads if encoder.width % number]:
        step = lcm(uneven[0], 4)  # sin-cos positions need a multiple of 4
        raise ConfigError(
            f"student.width: {encoder.width} cannot be cut into the teacher's {uneven[0]} heads",
            f"use a multiple of {uneven[0]}, e.g. student.width={-(-encoder.width // step) * step}",
        )
    return {
        "student_taps": align.student,
        "teacher_taps": align.teacher,
        "teacher_prefix": teacher.num_prefix,
        "num_heads": num_heads,
        "align_weight": align.weight,
    }


def build_crops(config: PretrainConfig, index: ShardIndex) -> RandomCrops:
    """Build the data set of training crops, indexed by position."""
    data = config.data
    order = SampleOrder(index.starts, seed=config.seed, views=data.views_per_image, window=data.shuffle_window)
    return RandomCrops(
        index,
        order,
        seed=config.seed,
        size=data.image_size,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
    )


def mask_sizes(config: PretrainConfig, num_patches: int) -> tuple[int, int]:
    """Return the numbers of patches that student and teacher see: S and T."""
    student = num_visible(config.masks.student_keep_ratio, num_patches)
    return student, num_visible(config.masks.teacher_keep_ratio or config.masks.student_keep_ratio, num_patches)


def step_inputs(
    config: PretrainConfig, images: torch.Tensor, positions: torch.Tensor, *, num_patches: int
) -> tuple[torch.Tensor, PatchSplit]:
    """Make the input of a step from a micro-batch of the loader, on the device.

    images: uint8 [m, 3, s, s]; positions: int64 [m]. Returns images in [0, 1], half of them mirrored if `data.flip` is
    set, and their patch split. Both are functions of (seed, position).
    """
    pixels = to_float01(images)
    if config.data.flip:
        pixels = random_flip(pixels, positions, seed=config.seed)
    return pixels, split_of(config, positions, num_patches)


def split_of(config: PretrainConfig, positions: torch.Tensor, num_patches: int) -> PatchSplit:
    """Draw the patch split of the samples at `positions`, int64 [B]."""
    student, teacher = mask_sizes(config, num_patches)
    return random_split(positions, seed=config.seed, num_patches=num_patches, num_student=student, num_teacher=teacher)

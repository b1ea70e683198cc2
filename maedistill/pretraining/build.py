"""Builds the objects of a pre-training run from its config. Only this file unpacks it; others get plain arguments."""

from copy import deepcopy
from dataclasses import replace
from math import lcm
from typing import Any

import torch

from maedistill.config.pretrain import UNUSED_SECTIONS, PretrainConfig
from maedistill.config.sources import EMA
from maedistill.data.images.transforms import random_flip, to_float01
from maedistill.data.loading.loader import RandomCrops
from maedistill.data.loading.order import SampleOrder
from maedistill.data.shards.index import ShardIndex
from maedistill.errors import ConfigError
from maedistill.machine import DTYPES, resolve_precision
from maedistill.methods.amd import AMD, GeneratorSpec
from maedistill.methods.average import AverageTeacher
from maedistill.methods.dmae import DMAE, AlignmentSpec
from maedistill.methods.mae import MAE, PixelSpec
from maedistill.methods.teacher import Teacher
from maedistill.methods.tinymim import RelationSpec, TinyMIM
from maedistill.models.blocks import has_plain_attention
from maedistill.models.decoder import CrossDecoder, TokenDecoder
from maedistill.models.encoder import Encoder, MaskedEncoder, as_encoder, can_mask, has_class_token
from maedistill.models.initialize import initialize
from maedistill.models.maps import MapEncoder
from maedistill.models.masking import PatchSplit, num_visible, random_split
from maedistill.models.vits import TimmModel, build_vit
from maedistill.pretraining.given_method import build_given
from maedistill.runs.objects import NOTHING, Objects, require_object
from maedistill.weights.from_file import SPEC_FIELDS, EncoderSpec
from maedistill.weights.license import NO_OTHERS, completed_license
from maedistill.weights.network import Network
from maedistill.weights.open_network import given_network, open_network

METHODS: dict[str, type[MAE]] = {"mae": MAE, "dmae": DMAE, "amd": AMD, "tinymim": TinyMIM}


def build_encoder(config: PretrainConfig, objects: Objects = NOTHING) -> Encoder:
    """Return the student's encoder: uninitialised, or the caller's with the weights that it has."""
    require_object("student.model", config.student.model, objects.student, argument="student")
    if objects.student is None:
        return MaskedEncoder(build_vit(image_size=config.data.image_size, **config.student.model_dump()))
    encoder = as_encoder(objects.student, config.student.model)
    if encoder.grid * encoder.patch_size != config.data.image_size:
        size = encoder.grid * encoder.patch_size
        raise ConfigError(
            f"data.image_size: the student takes images of {size} pixels, not of {config.data.image_size}",
            f"set data.image_size={size}, or build the student for images of {config.data.image_size}",
        )
    return encoder


def build_teacher_source(config: PretrainConfig, *, grid: int, objects: Objects = NOTHING) -> Network | None:
    """Open the teacher's network, or describe the caller's; return None without a teacher, or for the average."""
    teacher = config.teacher
    if teacher.source in (None, EMA):
        return None
    assert teacher.source is not None
    if objects.teachers:
        size = teacher.image_size or config.data.image_size
        network = given_network(objects.teachers[0], teacher.source, image_size=size)
        if can_mask(network.module) and network.encoder.grid % grid:
            raise ConfigError(
                f"teacher.source: the teacher has {network.encoder.grid} patches along a side, the student {grid}",
                "build one of them for an image size that gives as many patches, or the teacher for a multiple of them",
            )
        if can_mask(network.module) and teacher.image_size not in (None, network.size):
            raise ConfigError(
                f"teacher.image_size: {teacher.image_size}, but the teacher takes images of {network.size} pixels",
                "leave it out, or make the teacher for that size",
            )
    else:
        require_object("teacher.source", teacher.source, None, argument="teacher")
        spec = EncoderSpec(**teacher.model_dump(include=SPEC_FIELDS))
        network = open_network(
            teacher.source,
            "teacher",
            grid=grid,
            image_size=teacher.image_size,
            spec=spec,
            section="teacher",
            size_key="teacher.image_size",
            weights=teacher.weights or "model",
        )
    share = config.masks.teacher_keep_ratio
    if not can_mask(network.module):
        network = _sees_all(config, replace(network, size=teacher.image_size or network.size), grid=grid)
    elif config.method == "dmae" and share not in (None, config.masks.student_keep_ratio):
        raise ConfigError(
            f"masks.teacher_keep_ratio: {share:g}, but with method=dmae {network.name} sees what the student sees, "
            "since its patches can be left out",
            "remove it, or use method=amd, with generate.weight=0 for alignment where both see",
        )
    given = teacher.model_dump(include={"mean", "std"}, exclude_none=True)
    given["license"] = completed_license(network.license, teacher.license, "teacher.license")
    return replace(network, **given, normalization_known=network.normalization_known or "mean" in given)


def _sees_all(config: PretrainConfig, network: Network, *, grid: int) -> Network:
    """Return a teacher that cannot leave out patches as an encoder, whose maps are resampled to the student's grid.

    Raises ConfigError where the config has the teacher see a part of the image.
    """
    if config.masks.teacher_keep_ratio not in (None, 1.0):
        raise ConfigError(
            f"masks.teacher_keep_ratio: {config.masks.teacher_keep_ratio:g}, but {network.name} sees the whole image, "
            f"since the patches of a {type(network.module).__name__} cannot be left out",
            "set masks.teacher_keep_ratio=1" if config.method == "amd" else "remove it",
        )
    if config.align.last_blocks is not None:
        cause = f"{network.name} gives maps of stages, whose outputs are not averaged"
        raise ConfigError(f"align.last_blocks: {cause}", "set align.last_blocks=null")
    taps, size = config.align.teacher, network.size
    encoder = MapEncoder(network.module, name=network.name, taps=taps, grid=grid, image_size=size)
    return replace(network, module=encoder)


def build_teacher(config: PretrainConfig, source: Network, device: torch.device) -> Teacher:
    """Build the frozen teacher on `device`, without the blocks after its last tap."""
    dtype, align = DTYPES[resolve_precision(config.teacher.precision, device)], config.align
    return Teacher(
        source,
        taps=align.teacher,
        last=align.last_blocks,
        output=align.output,
        relations=config.method == "tinymim",
        dtype=dtype,
    ).to(device)


def build_average(config: PretrainConfig, student: Encoder, device: torch.device, *, steps: int) -> AverageTeacher:
    """Build the teacher of `teacher.source=ema` from the student's initial weights. steps: of the run."""
    data, align = config.data, config.align
    source = Network(deepcopy(student), EMA, data.image_size, NO_OTHERS, mean=data.mean, std=data.std)
    precision, decay = resolve_precision(config.teacher.precision, device), config.teacher.decay
    return AverageTeacher(
        source,
        taps=align.teacher,
        last=align.last_blocks,
        output=align.output,
        decay=decay,
        steps=steps,
        precision=precision,
    ).to(device)


def build_method(
    config: PretrainConfig,
    encoder: Encoder,
    source: Network | None,
    objects: Objects = NOTHING,
    more: tuple[AlignmentSpec, ...] = (),
) -> MAE:
    """Build the module to train: encoder, decoder, heads and generators, initialised from the seed.

    There is no decoder where nothing needs it (`pixels.weight=0`).

    more: the alignment with further teachers.
    objects: a student of the caller's keeps its weights, and a method of the caller's is built in place of the class
    that `config.method` names, with the same arguments.
    """
    expected = METHODS[config.method]
    # Decoder and generators have fixed positions even if the student learns its own.
    pos_embed = "sincos2d" if config.student.pos_embed == "learned" else config.student.pos_embed
    decoder = _decoder(config, encoder, pos_embed) if config.needs_decoder else None
    data, predict_ratio = config.data, config.decoder.predict_ratio
    pixels = PixelSpec(data.mean, data.std, predict_ratio=predict_ratio, **config.pixels.model_dump())
    specs: dict[str, Any] = {"pixels": pixels}
    if config.method != "mae":
        # Without a source the teacher is the student's average.
        teacher = encoder if source is None else source.encoder
        specs |= _distillation_specs(config, encoder, teacher, pos_embed)
        specs |= {"align": replace(specs["align"], more=more)} if more else {}
        _require_trained_blocks(config, encoder, more)
    if objects.method is None:
        _require_weight(config, more)
        method = expected(encoder, decoder, **specs)
    else:
        torch.manual_seed(config.seed)  # for parameters that only this method has
        targets = 0 if config.method == "mae" else 1 + len(more)
        method = build_given(objects.method, expected, (encoder, decoder), specs, targets=targets)
    own = encoder if objects.student is not None else None
    initialize(method, seed=config.seed, keep=own, strict=objects.method is None)
    if config.engine.activation_checkpointing:
        if not isinstance(encoder, MaskedEncoder):
            raise ConfigError(
                "engine.activation_checkpointing: the student is not a ViT of timm",
                "leave it out: your module does that",
            )
        encoder.vit.set_grad_checkpointing(True)
    return method


def _require_trained_blocks(config: PretrainConfig, encoder: Encoder, more: tuple[AlignmentSpec, ...]) -> None:
    """Raise ConfigError if no loss trains the student's last blocks: the pixel loss does, features of others do not."""
    last = encoder.depth - 1
    aligned = max([*config.align.student, *(tap for spec in more for tap in spec.student_taps)])
    if not config.needs_decoder and aligned < last:
        cause = f"with pixels.weight=0 nothing trains the blocks after {aligned}"
        raise ConfigError(f"align.student: {cause}", f"align the student's last block, {last}, or set pixels.weight=1")


def _decoder(config: PretrainConfig, encoder: Encoder, pos_embed: str) -> TokenDecoder:
    kind = {"self": TokenDecoder, "cross": CrossDecoder}[config.decoder.attention]
    return kind(
        encoder.width,
        grid=encoder.grid,
        patch_size=encoder.patch_size,
        num_prefix=encoder.num_prefix,
        pos_embed=pos_embed,
        **config.decoder.model_dump(include={"width", "depth", "num_heads", "bias"}),
    )


def _require_weight(config: PretrainConfig, more: tuple[AlignmentSpec, ...]) -> None:
    """Raise ConfigError if the weight of every loss is 0. A method of the caller's may have losses of its own."""
    unused = UNUSED_SECTIONS.get(config.method, ())
    sections = [section for section in ("pixels", "align", "generate") if section not in unused]
    if not any([*(getattr(config, section).weight for section in sections), *(spec.weight for spec in more)]):
        keys = [f"{section}.weight" for section in sections]
        cause = f"{keys[0]}: every loss has the weight 0, so nothing would be trained"
        raise ConfigError(cause, f"set {' or '.join(keys)} above 0, 1 in the papers")


def _distillation_specs(config: PretrainConfig, encoder: Encoder, teacher: Encoder, pos_embed: str) -> dict[str, Any]:
    """Return the arguments of a method with a teacher, besides encoder, decoder and pixels.

    Raises ConfigError where student and teacher do not fit each other.
    """
    generate, width = config.generate, teacher.width
    spec = alignment_spec(config, encoder, teacher)
    if config.method == "tinymim":
        return {"relations": _relations(config, encoder, teacher)}
    if config.method == "dmae":
        return {"align": spec}
    num_heads = generate.num_heads or max(1, width // 64)
    if generate.by == "own" and width % num_heads:
        raise ConfigError(
            f"generate.num_heads: {num_heads} heads do not divide the teacher's width {width}",
            f"set generate.num_heads to a divisor of {width}",
        )
    shape = generate.model_dump(include={"depth", "weight", "by"})
    return {"align": spec, "generate": GeneratorSpec(num_heads, pos_embed=pos_embed, **shape)}


def alignment_spec(config: PretrainConfig, encoder: Encoder, teacher: Encoder, *, name: str = "align") -> AlignmentSpec:
    """Return the alignment of a student with a teacher. Raises ConfigError if the student lacks a block."""
    align = config.align
    if max(align.student) >= encoder.depth:
        raise ConfigError(
            f"align.student: block {max(align.student)} does not exist, the student has {encoder.depth}",
            f"use 0 to {encoder.depth - 1}",
        )
    terms = align.model_dump(include={"distance", "normalize", "projector", "bias", "weight"})
    # Stored statistics are those of patches, and would give a class token some other scale.
    class_token = has_class_token(encoder) and has_class_token(teacher) and align.normalize != "stored"
    return AlignmentSpec(
        align.student, align.teacher, teacher.width, teacher.num_prefix, class_token=class_token, **terms, name=name
    )


def _relations(config: PretrainConfig, encoder: Encoder, teacher: Encoder) -> RelationSpec:
    """Return the token relations. Raises ConfigError if the networks have none that can be compared."""
    align = config.align
    if not isinstance(encoder, MaskedEncoder) or not isinstance(teacher, MaskedEncoder):
        raise ConfigError(
            "method: tinymim compares queries, keys and values, which only a ViT of timm exposes", "use method=dmae"
        )
    for side, vit, taps in (("student", encoder.vit, align.student), ("teacher", teacher.vit, align.teacher)):
        if max(taps) < len(vit.blocks) and not all(has_plain_attention(vit.blocks[tap]) for tap in taps):
            raise ConfigError(
                f"align.{side}: the {side}'s blocks have no queries, keys and values that can be compared",
                "use e.g. vit_small_patch16_224, or method=dmae",
            )
    blocks: TimmModel = teacher.vit.blocks
    num_heads = tuple(blocks[tap].attn.num_heads for tap in align.teacher if tap < teacher.depth)
    if uneven := [number for number in num_heads if encoder.width % number]:
        step = lcm(uneven[0], 4)  # sin-cos positions need a multiple of 4
        raise ConfigError(
            f"student.width: {encoder.width} cannot be split into the teacher's {uneven[0]} heads",
            f"use a multiple of {uneven[0]}, e.g. student.width={-(-encoder.width // step) * step}",
        )
    return RelationSpec(align.student, align.teacher, teacher.num_prefix, num_heads, weight=align.weight)


def build_crops(config: PretrainConfig, index: ShardIndex) -> RandomCrops:
    """Build the data set of training crops, indexed by position."""
    data = config.data
    order = SampleOrder(index.starts, seed=config.seed, views=data.views_per_image, window=data.shuffle_window)
    return RandomCrops(
        index, order, seed=config.seed, size=data.image_size, scale=data.crop_scale, ratio=data.crop_ratio
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

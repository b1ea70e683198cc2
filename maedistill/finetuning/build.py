"""Builds the objects of a fine-tuning run from its config. Code outside the builders takes plain arguments."""

from dataclasses import replace

import timm
import torch
from torch import Tensor, nn

from maedistill.config.architectures import architecture_of
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.schema import Triple
from maedistill.data.images.augment import Mixing, RandAugment
from maedistill.data.loading.loader import RandomCrops
from maedistill.data.loading.order import SampleOrder
from maedistill.data.shards.index import ShardIndex
from maedistill.errors import ConfigError
from maedistill.models.initialize import initialize
from maedistill.models.meta import meta_device
from maedistill.models.vits import PlainViT, TimmModel, build_vit, pooled_norm, require_plain_vit, vit_positions
from maedistill.runs.objects import NOTHING, Objects, require_object
from maedistill.weights.from_file import SPEC_FIELDS, EncoderSpec
from maedistill.weights.from_run import describe_network
from maedistill.weights.license import completed_license
from maedistill.weights.network import Network
from maedistill.weights.open_network import given_network, open_network


def build_init_source(
    config: FinetuneConfig, objects: Objects = NOTHING, *, num_classes: int | None = None
) -> Network | None:
    """Open the weights that fine-tuning starts from, positions resampled to its image size; None from scratch.

    A student of the caller's is described instead; it must give `num_classes` logits.
    """
    init, student, image_size = config.init, config.student, config.data.image_size
    if init.source is None:
        return None
    require_object("init.source", init.source, objects.student, argument="student")
    if objects.student is not None:
        network = given_network(objects.student, init.source, image_size=image_size, trained=True)
        network = replace(network, size=image_size or network.size)
        shape = tuple(network.output(size_key="data.image_size").shape)
        if num_classes is not None and shape != (1, num_classes):
            raise ConfigError(
                f"student: it gives {shape} for one image, but the data has {num_classes} classes",
                f"give it a head with {num_classes} outputs",
            )
        return replace(network, license=completed_license(network.license, init.license, "init.license"))
    described = student.model_dump(include=SPEC_FIELDS)
    spec = EncoderSpec(**described, pos_embed=init.pos_embed, sha256=init.sha256)
    network = open_network(
        init.source,
        "encoder",
        image_size=image_size,
        spec=spec,
        section="init",
        size_key="data.image_size",
        weights=init.weights or "model",
    )
    return replace(network, license=completed_license(network.license, init.license, "init.license"))


def build_classifier(config: FinetuneConfig, source: Network | None, *, num_classes: int) -> PlainViT:
    """Build the network with a fresh head, on the source's weights or initialised from the seed. Positions are trained.

    The head starts near 0, as in MAE. Standardised logits are divided by their spread, so there the head starts with
    timm's larger std: with MAE's, the first gradients would be hundreds of times the later ones, and AdamW would
    remember them. With pooling `avg`, a fresh `fc_norm` after pooling replaces the last norm (He et al., 2022).
    """
    vit = _from_scratch(config, num_classes) if source is None else _from_source(config, source, num_classes)
    std = 0.02 if config.distill.standardizes else 2e-5  # timm's or MAE's
    assert isinstance(vit.head, nn.Linear)
    nn.init.trunc_normal_(vit.head.weight, std=std, generator=torch.Generator().manual_seed(config.seed))
    nn.init.zeros_(vit.head.bias)
    if config.engine.activation_checkpointing:
        vit.set_grad_checkpointing(True)
    return vit


def build_labelled_crops(config: FinetuneConfig, index: ShardIndex, samples: Tensor, *, mean: Triple) -> RandomCrops:
    """Build training crops with labels, by position, with RandAugment. samples: ids of the label subset."""
    data, seed = config.data, config.seed
    subset = samples if data.label_fraction < 1 else None
    order = SampleOrder(index.starts, seed=seed, window=data.shuffle_window, subset=subset)
    spec = config.augment.rand_augment
    augment = RandAugment(spec, size=data.image_size, mean=mean, seed=seed) if spec is not None else None
    return RandomCrops(
        index,
        order,
        seed=seed,
        size=data.image_size,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        augment=augment,
    )


def build_mixing(config: FinetuneConfig, *, num_classes: int, device: torch.device) -> Mixing:
    """Build erasing, mixup, cutmix and label smoothing on the device."""
    return Mixing(num_classes=num_classes, device=device, **config.augment.model_dump(exclude={"rand_augment"}))


def _from_scratch(config: FinetuneConfig, num_classes: int) -> PlainViT:
    """Build the student that the config describes, initialised from the seed, with positions from MAE's table."""
    size, global_pool = config.data.image_size, config.student.global_pool
    shape = config.student.model_dump(exclude={"global_pool", "exits"}) | {"image_size": size}
    with meta_device():
        _require_class_token(config, build_vit(**shape))
    vit = build_vit(num_classes=num_classes, global_pool=global_pool, **shape)
    initialize(vit, seed=config.seed)
    if vit.pos_embed is not None:
        vit.pos_embed.data.copy_(vit_positions(vit, "sincos2d"))
    return vit


def _from_source(config: FinetuneConfig, source: Network, num_classes: int) -> PlainViT:
    """Build a network with the source's weights but a fresh classifier; parameters without weights keep timm's init."""
    student, module = config.student, require_plain_vit(source.module, source.name)
    _require_same_shape(config, module)
    _require_class_token(config, module)
    network = describe_network(module)
    changes = {"num_classes": num_classes, "global_pool": student.global_pool, "drop_path_rate": student.drop_path}
    changes |= pooled_norm(module, student.global_pool == "avg")
    vit: TimmModel = timm.create_model(network["name"], **network["arguments"] | changes)
    fresh = ("head.", "fc_norm.", *(() if student.global_pool == "token" else ("norm.",)))
    weights = {name: value for name, value in module.state_dict().items() if not name.startswith(fresh)}
    missing, unexpected = vit.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(("head.", "fc_norm.", "norm.")) for name in missing), missing
    return vit


def _require_class_token(config: FinetuneConfig, vit: PlainViT) -> None:
    """Raise ConfigError if the head needs a class token and there is none; often only the source knows."""
    if config.student.global_pool == "token" and vit.cls_token is None:
        raise ConfigError(
            f"student.global_pool: {config.init.source or config.student.model} has no class token to read",
            "use student.global_pool=avg",
        )


def _require_same_shape(config: FinetuneConfig, vit: PlainViT) -> None:
    """Raise ConfigError unless the config's student matches the source's network: a recipe fits one size."""
    names = {"num_heads", "patch_size", "class_token", "register_tokens", "width", "depth"}
    expected = config.student.model_dump(include=names, exclude_none=True)
    if config.student.model is not None:
        architecture = architecture_of(config.student.model, config.student)
        if architecture is not None:
            expected |= {"width": architecture.width, "depth": architecture.depth}
    actual = {
        "width": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": getattr(getattr(vit.blocks[0], "attn", None), "num_heads", None),
        "patch_size": vit.patch_embed.patch_size[0],
        "class_token": vit.cls_token is not None,
        "register_tokens": 0 if vit.reg_token is None else vit.reg_token.shape[1],
    }
    for name, value in expected.items():
        if actual[name] != value:
            raise ConfigError(
                f"init.source: {config.init.source} has {name} {actual[name]}, student.{name} or the recipe's "
                f"student.model says {value}",
                f"use the recipe of the source's size, or the source's own: student.model=null student.{name}=null",
            )

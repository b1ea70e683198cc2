"""The step as published training loops write it, around the same weights and images: the baseline of `benchmark step`.

It has the same parameters (the same tensors), inputs and losses as ours; a test compares losses and gradients. In the
plain version:

- all patches are embedded, then the hidden ones are dropped;
- the whole teacher runs, then its decoder, whose output is not used;
- decoders restore raster order, compute every row in every block and predict every patch, although the loss needs only
  the hidden ones; generators compute every row as well (a cross-attention decoder has only hidden rows by design);
- attention is written out as softmax(QK')V;
- torch chooses the AdamW loop, and every step reads its loss.

    B batch   R rows   S, T patches visible to student and teacher   H predicted   P prefix tokens   W decoder width
    s image side
"""

import copy
import itertools
from dataclasses import replace
from operator import attrgetter
from typing import TypeVar

import torch
from einops import rearrange
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maedistill.benchmark.training_step import SyntheticTraining, TrainingStep
from maedistill.config.pretrain import Decoder, PretrainConfig
from maedistill.data.images.transforms import to_float01
from maedistill.errors import ConfigError
from maedistill.machine import autocast
from maedistill.methods.mae import MAE, BlockFeatures
from maedistill.methods.teacher import Teacher
from maedistill.models.blocks import CrossBlock, TransformerBlock
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.maps import MapEncoder
from maedistill.models.masking import PatchSplit
from maedistill.models.patches import gather_rows
from maedistill.pretraining import build
from maedistill.training.optim import parameter_groups

PUBLISHED_DECODER = Decoder(width=512, depth=8, num_heads=16)  # of MAE ViT-B, L and H (He et al., 2022), and of DMAE
_LARGE = 768  # the width of ViT-B
_size_of = attrgetter("width", "depth", "num_heads")
Module = TypeVar("Module", bound=nn.Module)


class StepComparison(SyntheticTraining):
    """The networks of a config, ours and plain, and their steps on the same images."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        super().__init__(config, device)
        if self.source is not None and isinstance(self.source.encoder, MapEncoder):
            raise ConfigError(
                "teacher.source: published loops, which benchmark step compares with, have plain ViTs as teachers",
                "use one, e.g. teacher.source=random:vit_base_patch16_224; --dry-run times a step with yours",
            )
        self.plain_method = plain_version(self.method)
        self.plain_precision = self.precision
        if device.type == "cuda" and self.precision != "fp32":
            self.plain_precision = "fp16"  # as published, with a loss scale
        self.plain_teacher = self._plain_teacher(self.teacher) if self.teacher is not None else None

    def plain_step(self, method: MAE | None = None) -> TrainingStep:
        """Return the step of `plain_method`, or of another plain method."""
        method, optim = method or self.plain_method, self.config.optim
        groups = parameter_groups(method, optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas)
        # As published, the teacher runs in the student's format, but in fp32 if ours does.
        is_half = self.teacher is not None and self.teacher.dtype != torch.float32
        run_teacher = autocast(self.device, self.plain_precision if is_half else "fp32")
        teacher = self.plain_teacher and run_teacher(self.plain_teacher)
        step = self.torch_step(self.plain_draw, teacher, method, optimizer, number=self.plain_precision)

        def backward(loss: Tensor) -> None:
            loss.item()  # waits for the device, as published loops do
            step.backward(loss)

        return replace(step, backward=backward)

    def set_batch_size(self, batch: int) -> None:
        """Draw `batch` images, and convert them for the plain step, whose loader does that."""
        super().set_batch_size(batch)
        self._float_images = to_float01(self.images)  # [B, 3, s, s]

    def plain_draw(self) -> tuple[Tensor, PatchSplit]:
        """Return the converted images and a patch order from sorting noise."""
        noise = torch.rand(self.batch, self.num_patches, device=self.device)
        return self._float_images, PatchSplit(noise.argsort(dim=1), *build.mask_sizes(self.config, self.num_patches))

    def published_method(self) -> MAE | None:
        """Build the plain method with the published decoder of MAE and DMAE, if the config's decoder differs.

        Returns None if it is the same or there is none, for AMD, whose decoders are light, and for teachers narrower
        than ViT-B or none.
        """
        config = self.config
        is_large = self.teacher is not None and self.teacher.width >= _LARGE
        if config.method == "amd" or not config.needs_decoder or not is_large:
            return None
        if _size_of(config.decoder) == _size_of(PUBLISHED_DECODER):
            return None
        changed = config.model_copy(update={"decoder": PUBLISHED_DECODER})
        return plain_version(build.build_method(changed, build.build_encoder(changed), self.source).to(self.device))

    def _plain_teacher(self, teacher: Teacher) -> "PlainTeacher":
        """Build the fp32 version of the teacher, with its published decoder or, if narrower than ViT-B, with ours.

        Without a decoder of the student's the teacher has none either.
        """
        encoder, config = teacher.encoder, self.config
        if teacher.dtype != torch.float32:
            changed = config.model_copy(update={"teacher": config.teacher.model_copy(update={"precision": "fp32"})})
            source = build.build_teacher_source(changed, grid=encoder.grid)
            assert source is not None
            teacher = build.build_teacher(changed, source, self.device)
        size = PUBLISHED_DECODER if encoder.width >= _LARGE else config.decoder
        return PlainTeacher(teacher, size if config.needs_decoder else None).to(self.device)


def plain_version(module: Module) -> Module:
    """Return a copy of the module that shares its tensors, with its parts replaced by the plain ones below."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    plain = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for part in plain.modules():
        part.__class__ = _PLAIN.get(type(part), type(part))
        if isinstance(part, Attention):
            part.fused_attn = False  # type: ignore[misc] # declared final for TorchScript
    return plain


class PlainTeacher(nn.Module):
    """The whole `teacher`, then a decoder of `size` on its output, as published loops run a complete MAE."""

    def __init__(self, teacher: Teacher, size: Decoder | None) -> None:
        super().__init__()
        encoder = teacher.encoder
        self.teacher, self.decoder = plain_version(teacher), None
        if size is None:
            return
        decoder = TokenDecoder(
            encoder.width,
            width=size.width,
            depth=size.depth,
            num_heads=size.num_heads,
            grid=encoder.grid,
            patch_size=encoder.patch_size,
            num_prefix=encoder.num_prefix,
        )
        self.decoder = plain_version(decoder).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, split: PatchSplit) -> BlockFeatures:
        """Return the same as `Teacher.forward`."""
        own = self.teacher.own_split(split)
        tokens, tapped = self.teacher.encoder(self.teacher.prepare(images), own.teacher, **self.teacher.tapped)
        if self.decoder is not None:
            self.decoder(tokens, PatchSplit(own.order, own.num_teacher, own.num_teacher))
        return self.teacher.targets(self.teacher.merge(tapped, own.num_teacher // split.num_teacher))


class _PlainEncoder(MaskedEncoder):
    """An encoder that embeds all patches by a convolution, then selects the visible ones."""

    def embed_patches(self, images: Tensor, ids: Tensor | None) -> Tensor:
        x = self.add_positions(self.vit.patch_embed(images).flatten(1, -2), None)  # [B, N, D]
        return x if ids is None else gather_rows(x, ids)


class _PlainDecoder(TokenDecoder):
    """A decoder that restores raster order and predicts every row."""

    def forward(self, tokens: Tensor, split: PatchSplit, hidden: Tensor | None = None) -> Tensor:
        prefix, hidden = self.num_prefix, split.hidden if hidden is None else hidden
        order = torch.cat([split.student, hidden], dim=1)  # [B, R], without gaps if all hidden patches are predicted
        restore = order.argsort(dim=1)  # position in `order` of each patch of the raster
        x = self.embed(tokens)  # [B, P + S, W]
        masks = self.mask_token.repeat(len(x), hidden.shape[1], 1).to(x.dtype)  # [B, H, W]
        rows = gather_rows(torch.cat([x[:, prefix:], masks], dim=1), restore)  # [B, R, W]
        positions = self.pos_embed[:, prefix:]
        if order.shape[1] < split.order.shape[1]:
            positions = gather_rows(positions, order.gather(1, restore))
        x = torch.cat([x[:, :prefix], rows + positions], dim=1)  # [B, P + R, W]
        for block in self.blocks:
            x = block(x)
        predicted = self.head(self.norm(x))[:, prefix:]  # [B, R, p*p*3]
        return gather_rows(predicted, restore.argsort(dim=1)[:, split.num_student :])  # [B, H, p*p*3]


class _PlainBlock(TransformerBlock):
    """A block of a decoder or generator that computes every row."""

    def forward(self, x: Tensor, *, first: int = 0) -> Tensor:  # type: ignore[override] # as in TransformerBlock
        return Block.forward(self, x)[:, first:]


class _PlainCrossBlock(CrossBlock):
    """A cross-attention block with its attention written out."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = rearrange(self.query(self.norm1(x)), "b q (h d) -> b h q d", h=self.num_heads)
        key_value = self.key_value(self.norm_context(context))
        k, v = rearrange(key_value, "b c (two h d) -> two b h c d", two=2, h=self.num_heads)
        attention = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, heads, H, P + S]
        x = x + self.proj(rearrange(attention @ v, "b h q d -> b q (h d)"))
        return x + self.mlp(self.norm2(x))


_PLAIN = {MaskedEncoder: _PlainEncoder, TokenDecoder: _PlainDecoder}
_PLAIN |= {TransformerBlock: _PlainBlock, CrossBlock: _PlainCrossBlock}

"""A plain version of a method and its teacher, as in published training loops: the baseline of `benchmark step`.

It shares weights (the same tensors), inputs and losses with ours; a test compares losses and gradients. In the plain
version:

- all patches are embedded, then the hidden ones are dropped;
- the whole teacher runs, then its decoder, whose output is not used;
- decoders restore raster order, compute every row in every block and predict every patch, although the loss needs only
  the hidden ones; generators compute every row as well;
- attention is written out as softmax(QK')V.

A cross-attention decoder predicts only hidden patches by design, so its plain version does too, with attention written
out.

    B batch   R rows   S, T patches visible to student and teacher   H predicted   P prefix tokens   W decoder width
"""

import copy
import itertools
from typing import TypeVar

import torch
from einops import rearrange
from timm.layers import Attention
from torch import Tensor, nn

from maedistill.methods.amd import AMD
from maedistill.methods.mae import MAE, Target
from maedistill.methods.teacher import Teacher
from maedistill.models.blocks import CrossBlock
from maedistill.models.decoder import CrossDecoder, TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.heads import Generator
from maedistill.models.masking import PatchSplit, gather_rows

Module = TypeVar("Module", bound=nn.Module)


def plain_method(method: MAE) -> MAE:
    """Return the plain version of `method`. Both train the same parameters."""
    plain = _twin(method)
    plain.encoder = PlainEncoder(plain.encoder.vit)
    kind = PlainCrossDecoder if isinstance(plain.decoder, CrossDecoder) else PlainDecoder
    plain.decoder = kind(plain.decoder)
    if isinstance(plain, AMD):
        plain.generators = nn.ModuleList(PlainGenerator(generator) for generator in plain.generators)
    return plain


class PlainTeacher(nn.Module):
    """The whole `teacher` followed by `decoder` on its output, as published loops run a complete MAE."""

    def __init__(self, teacher: Teacher, decoder: TokenDecoder) -> None:
        super().__init__()
        self.teacher = _twin(teacher)
        self.teacher.encoder = PlainEncoder(self.teacher.encoder.vit)
        self.decoder = PlainDecoder(_twin(decoder)).requires_grad_(False)
        width, blocks = decoder.norm.normalized_shape[0], decoder.blocks
        self.title = f"its decoder, {width} wide, {len(blocks)} blocks, {blocks[0].attn.num_heads} heads"

    @torch.no_grad()
    def forward(self, images: Tensor, split: PatchSplit) -> Target:
        """Return the same as `Teacher.forward`."""
        tokens, tapped = self.teacher.encoder(self.teacher.prepare(images), split.teacher, **self.teacher.tapped)
        self.decoder(tokens, PatchSplit(split.order, split.num_teacher, split.num_teacher))
        return tapped


class PlainEncoder(MaskedEncoder):
    """An encoder that embeds all patches by a convolution, then selects the visible ones."""

    def embed_patches(self, images: Tensor, ids: Tensor | None) -> Tensor:
        """Return the same as `MaskedEncoder.embed_patches`."""
        x = self.vit.patch_embed(images) + self.vit.pos_embed[:, -(self.grid**2) :]  # [B, N, D]
        return x if ids is None else gather_rows(x, ids)


class PlainDecoder(nn.Module):
    """A decoder that restores raster order and predicts every row."""

    def __init__(self, decoder: TokenDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, split: PatchSplit, hidden: Tensor | None = None) -> Tensor:
        """Return the same as `TokenDecoder.forward`."""
        decoder, prefix = self.decoder, self.decoder.num_prefix
        hidden = split.hidden if hidden is None else hidden
        order = torch.cat([split.student, hidden], dim=1)  # [B, R], without gaps if all hidden patches are predicted
        restore = order.argsort(dim=1)  # position in `order` of each patch of the raster
        x = decoder.embed(tokens)  # [B, P + S, W]
        masks = decoder.mask_token.repeat(len(x), hidden.shape[1], 1).to(x.dtype)  # [B, H, W]
        rows = gather_rows(torch.cat([x[:, prefix:], masks], dim=1), restore)  # [B, R, W]
        positions = decoder.pos_embed[:, prefix:]
        if order.shape[1] < split.order.shape[1]:
            positions = gather_rows(positions, order.gather(1, restore))
        x = torch.cat([x[:, :prefix], rows + positions], dim=1)  # [B, P + R, W]
        for block in decoder.blocks:
            x = block(x)
        predicted = decoder.head(decoder.norm(x))[:, prefix:]  # [B, R, p*p*3]
        return gather_rows(predicted, restore.argsort(dim=1)[:, split.num_student :])  # [B, H, p*p*3]


class PlainCrossDecoder(PlainDecoder):
    """A decoder whose hidden rows attend to the visible ones."""

    def forward(self, tokens: Tensor, split: PatchSplit, hidden: Tensor | None = None) -> Tensor:
        """Return the same as `CrossDecoder.forward`."""
        known, rows = self.decoder.inputs(tokens, split, hidden)
        for block in self.decoder.blocks:
            rows = _cross(block, rows, known)  # [B, H, W]
        return self.decoder.head(self.decoder.norm(rows))


class PlainGenerator(nn.Module):
    """A generator that computes every row in every block."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, projected: Tensor, split: PatchSplit) -> Tensor:
        """Return the same as `Generator.forward`."""
        missing = split.num_teacher - split.num_student
        masks = self.generator.mask_token.repeat(len(projected), missing, 1).to(projected.dtype)
        x = torch.cat([projected, masks], dim=1) + gather_rows(self.generator.pos_embed, split.teacher)  # [B, T, D_t]
        for block in self.generator.blocks:
            x = block(x)
        return x[:, split.num_student :]


def _cross(block: CrossBlock, x: Tensor, context: Tensor) -> Tensor:
    """Apply `block` with its attention written out."""
    q = rearrange(block.query(block.norm1(x)), "b q (h d) -> b h q d", h=block.num_heads)
    key_value = block.key_value(block.norm_context(context))
    k, v = rearrange(key_value, "b c (two h d) -> two b h c d", two=2, h=block.num_heads)
    attention = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, heads, H, P + S]
    x = x + block.proj(rearrange(attention @ v, "b h q d -> b q (h d)"))
    return x + block.mlp(block.norm2(x))


def _twin(module: Module) -> Module:
    """Return a copy of the module that shares its tensors, with timm's attention written out."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for part in twin.modules():
        if isinstance(part, Attention):
            part.fused_attn = False
    return twin

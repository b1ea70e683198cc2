"""A plain ViT of timm that runs on selected patches and returns the outputs of tapped blocks.

Only the selected patches are embedded. On all patches the result equals timm's `forward_features`. Blocks are counted
from 0 and tapped at their output, before the final norm. Once positions are added, or their rotations given to each
block, a ViT does not depend on the order of its rows, so the rows keep the order in which patches were selected.

    B batch   N patches   M selected patches   P prefix tokens (class, registers)   D width   H heads   d their width
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maedistill.errors import ConfigError
from maedistill.models.blocks import attention_and_mlp, queries_keys_values
from maedistill.models.patches import gather_rows, learns_rope, patchify, rope_rows, rope_table
from maedistill.models.vits import PlainViT, TimmModel, is_plain, require_plain_vit, require_square_patches

# The keyword of a block that holds the rotations of its queries and keys, by block; none without rotary positions.
Rotations: TypeAlias = Callable[[int], dict[str, Tensor]]


class Encoder(nn.Module):
    """An encoder of selected patches: what a method trains, and what it learns from.

    A module of your own is one if it has these attributes and this `forward`; it need not be a subclass. Row P + j of
    an output belongs to patch `ids[:, j]`. Patches are numbered row by row from the top left.
    """

    width: int  # D
    depth: int  # blocks that may be tapped: 0 to depth - 1
    num_prefix: int  # P; of a module of your own, the first one is taken for a class token
    patch_size: int  # side of a patch in pixels
    grid: int  # patches along a side of the image: N = grid * grid

    def forward(
        self, images: Tensor, ids: Tensor | None = None, *, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Encode the patches `ids`, int64 [B, M], of normalised images [B, 3, s, s]; None for all patches in order.

        Returns the last tokens [B, P + M, D] and the outputs [B, P + M, D] of the blocks `taps`, by block.
        """
        raise NotImplementedError


class MaskedEncoder(Encoder):
    """Runs `vit` on selected patches. `vit` keeps timm's parameter names, so that an export is a strict load."""

    rope: Tensor | None

    def __init__(self, vit: PlainViT) -> None:
        super().__init__()
        self.vit = vit
        self.width = vit.embed_dim
        self.depth = len(vit.blocks)
        self.num_prefix = vit.num_prefix_tokens
        self.patch_size = vit.patch_embed.patch_size[0]
        self.grid = vit.patch_embed.grid_size[0]
        # timm would compute a fixed table at every step, on the CPU.
        self.register_buffer("rope", None if learns_rope(vit) else rope_table(vit), persistent=False)

    @property
    def borrowed(self) -> list[nn.Parameter]:
        """Return the parameters that it reads without calling their module, of which ZeRO 3 has to be told."""
        vit: TimmModel = self.vit
        rope = vit.rope.parameters() if learns_rope(vit) else ()
        return [*vit.parameters(recurse=False), *vit.patch_embed.proj.parameters(), *rope]

    def embed(self, images: Tensor, ids: Tensor | None) -> Tensor:
        """Embed the selected patches, add positions, put the prefix first: [B, 3, s, s], [B, M] -> [B, P + M, D]."""
        vit = self.vit
        x = self.embed_patches(images, ids)  # [B, M, D]
        prefix: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if prefix:
            head = torch.cat(prefix, dim=1)  # [1, P, D]
            if vit.pos_embed is not None and not vit.no_embed_class:
                head = head + vit.pos_embed[:, : self.num_prefix]
            x = torch.cat([head.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # [B, P + M, D]
        return vit.norm_pre(vit.pos_drop(x))

    def embed_patches(self, images: Tensor, ids: Tensor | None) -> Tensor:
        """Embed only the selected patches and add their positions: [B, 3, s, s], [B, M] -> [B, M, D]."""
        embed, patches = self.vit.patch_embed, patchify(images, self.patch_size)  # [B, N, p*p*3]
        if ids is not None:
            patches = gather_rows(patches, ids)  # [B, M, p*p*3]
        weight = rearrange(embed.proj.weight, "d c p q -> d (p q c)")
        return self.add_positions(embed.norm(F.linear(patches, weight, embed.proj.bias)), ids)

    def add_positions(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """Add the absolute positions, if there are any, of the selected patches: [B, M, D] -> [B, M, D]."""
        if self.vit.pos_embed is None:
            return x
        rows = self.vit.pos_embed[:, -(self.grid**2) :]  # [1, N, D]
        return x + (rows if ids is None else gather_rows(rows, ids))

    def rotations(self, ids: Tensor | None) -> Rotations:
        """Return the rotations of the selected patches by block, see `Rotations`."""
        if learns_rope(self.vit):
            tables = rope_table(self.vit)
            assert tables is not None
            return lambda block: {"rope": rope_rows(tables[block], ids)}
        keyword = {} if self.rope is None else {"rope": rope_rows(self.rope, ids)}
        return lambda block: keyword

    def forward(
        self,
        images: Tensor,
        ids: Tensor | None = None,
        *,
        taps: Sequence[int] = (),
        branches: Sequence[int] = (),
        relations: Sequence[int] = (),
        to_last_tap: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the blocks on the patches `ids`, or on all patches.

        images: normalised, [B, 3, s, s]. ids: int64 [B, M]. Returns the last tokens [B, P + M, D] and, by block, the
        outputs [B, P + M, D] of `taps`, what the MLPs of `branches` add to their rows, likewise, and the queries, keys
        and values [3, B, H, P + M, d] of `relations`. With `to_last_tap`, the final norm and all blocks that these do
        not need are skipped.
        """
        assert not {*taps} & {*relations}
        x = self.embed(images, ids)
        named: dict[str, Any] = {"taps": taps, "branches": branches, "relations": relations}
        x, outputs, qkv = run_blocks(self.vit, x, **named, to_last_tap=to_last_tap, rotations=self.rotations(ids))
        return x, outputs | {i: torch.stack(parts) for i, parts in qkv.items()}


def as_encoder(module: TimmModel, name: str) -> Encoder:
    """Return `module` as an encoder of selected patches: a plain ViT of timm, or a module that has `Encoder`'s parts.

    Raises ConfigError for any other module, and for an encoder whose output for every other patch has a wrong shape.
    """
    if not _has_attributes(module):
        return MaskedEncoder(require_square_patches(require_plain_vit(module, name), name))
    if not isinstance(module, MaskedEncoder):
        _require_rows(module, name)
    return module


def has_class_token(encoder: Encoder) -> bool:
    """Return whether row 0 of the outputs is a class token. For a module of your own, the first prefix token is one."""
    return encoder.vit.cls_token is not None if isinstance(encoder, MaskedEncoder) else encoder.num_prefix > 0


def can_mask(module: TimmModel) -> bool:
    """Return whether `as_encoder` takes `module`. Other networks see whole images, see `models/maps.py`."""
    return _has_attributes(module) or is_plain(module)


def _has_attributes(module: TimmModel) -> bool:
    """Return whether `module` has the attributes of an `Encoder`."""
    return all(isinstance(getattr(module, name, None), int) for name in Encoder.__annotations__)


@torch.no_grad()
def _require_rows(encoder: Encoder, name: str) -> None:
    """Raise ConfigError unless the encoder gives a row for each prefix token and each selected patch of an image."""
    side, own = encoder.grid * encoder.patch_size, next(encoder.parameters())
    ids = torch.arange(0, encoder.grid**2, 2, device=own.device)[None]  # [1, M]
    training = encoder.training
    tokens, outputs = encoder.eval()(own.new_zeros(1, 3, side, side), ids, taps=(0,))
    encoder.train(training)
    expected = (1, encoder.num_prefix + ids.shape[1], encoder.width)
    for what, rows in (("tokens", tokens), ("outputs of block 0", outputs.get(0))):
        shape = None if rows is None else tuple(rows.shape)
        if shape != expected:
            raise ConfigError(
                f"{name}: the {what} for {ids.shape[1]} patches of an image have the shape {shape}, not {expected}",
                "give one row of `width` numbers for each prefix token and each patch, see maedistill.Encoder",
            )


def run_blocks(
    vit: PlainViT,
    x: Tensor,
    *,
    taps: Sequence[int],
    relations: Sequence[int],
    to_last_tap: bool,
    branches: Sequence[int] = (),
    rotations: Rotations = lambda block: {},
) -> tuple[Tensor, dict[int, Tensor], dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """Run the blocks of `vit` on embedded tokens x, [B, P + M, D]; with `to_last_tap`, no more than these need.

    Returns the last tokens, after the final norm unless `to_last_tap`; and by block the outputs [B, P + M, D] of
    `taps`, or of `branches` what their MLPs add, and the queries, keys and values [B, H, P + M, d] of `relations`,
    which need only the input of their block.
    """
    outputs: dict[int, Tensor] = {}
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    needed = max((-1, *taps, *branches, *(i - 1 for i in relations))) + 1 if to_last_tap else len(vit.blocks)
    for i, block in enumerate(vit.blocks):
        if i in relations:
            qkv[i] = queries_keys_values(block, x)
        if i == needed:
            break
        if i in branches:
            attended, outputs[i] = attention_and_mlp(block, x, **rotations(i))
            x = attended + outputs[i]
            continue
        recompute = vit.grad_checkpointing and torch.is_grad_enabled()
        run = partial(block, **rotations(i))
        x = checkpoint(run, x, use_reentrant=False) if recompute else run(x)  # [B, P + M, D]
        if i in taps:
            outputs[i] = x
    return (x if to_last_tap else vit.norm(x)), outputs, qkv

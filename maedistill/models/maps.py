"""A network that cannot leave out patches, as an encoder: it sees whole images, and its maps become rows of patches.

    image -> forward_intermediates of timm -> map of each depth -> mean over each patch of the student -> selected rows

Depths are numbered as timm does: blocks of a ViT, stages of Swin, ConvNeXt and Hiera, stem and stages of ResNet. The
neck of SAM's encoder is one depth more. Images are square and never padded, so no row stands for padding.

    B batch   M selected patches   D width   g side of the student's grid   h side of a map   k points
"""

from collections.abc import Sequence
from math import ceil

import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor

from maedistill.errors import ConfigError
from maedistill.models.encoder import Encoder
from maedistill.models.flops import on_meta
from maedistill.models.patches import gather_rows
from maedistill.models.vits import TimmModel, require_colour


class MapEncoder(Encoder):
    """Runs `network` on whole images of `image_size` pixels, as deep as `taps`, and gives rows of a grid x grid.

    name: of the network, for errors. Raises ConfigError unless it has maps of colour images at all taps, equally wide.
    """

    def __init__(self, network: TimmModel, *, name: str, taps: Sequence[int], grid: int, image_size: int) -> None:
        super().__init__()
        require_colour(network, name)
        shapes = map_shapes(network, name=f"teacher.source: {name}", image_size=image_size)
        if max(taps) >= len(shapes):
            raise ConfigError(
                f"align.teacher: depth {max(taps)} does not exist, {name} has {len(shapes)}",
                f"use 0 to {len(shapes) - 1}",
            )
        if grid > 1 and (single := [tap for tap in taps if shapes[tap][1] == 1]):
            larger = max((depth for depth, (_, side) in enumerate(shapes) if side > 1), default=None)
            shallower = f"name depths up to {larger}, or " if larger is not None else ""
            raise ConfigError(
                f"align.teacher: at depth {single[0]} {name} gives one cell for an image of {image_size} pixels, "
                "so all patches would have the same target",
                f"{shallower}set a larger teacher.image_size",
            )
        widths = [shapes[tap][0] for tap in taps]
        if len({*widths}) > 1:
            raise ConfigError(
                f"align.teacher: the depths {list(taps)} of {name} have {', '.join(map(str, widths))} channels",
                f"name depths of equal width, or one depth with one block of the student: align.teacher=[{max(taps)}]",
            )
        self.network, self.depth, self.width = network, len(shapes), widths[0]
        self.num_prefix, self.grid, self.patch_size = 0, grid, ceil(image_size / grid)
        sides = ", ".join(str(shapes[tap][1]) for tap in taps)
        self.view = f"the whole image at {image_size} px, maps of side {sides} resampled to {grid}"

    def forward(
        self, images: Tensor, ids: Tensor | None = None, *, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the rows of the deepest tap and of all taps, [B, M, D]; see `Encoder.forward`."""
        rows: dict[int, Tensor] = {}
        for tap, maps in feature_maps(self.network, images, taps).items():
            every = resample(maps, self.grid).flatten(2).mT  # [B, g*g, D]
            rows[tap] = every if ids is None else gather_rows(every, ids)
        return rows[max(taps)], rows


def resample(maps: Tensor, grid: int) -> Tensor:
    """Resample maps [B, D, h, h] to [B, D, g, g]: cell i is the mean of the interpolated map over patch i.

    The map is interpolated linearly between the centres of its cells, and goes on as a straight line between the
    outermost centres and the border. So a linear ramp stays one, up to the border, where bilinear resampling would
    flatten it. A growing map is sampled at the centre of each patch, a shrinking one at k x k points evenly spread.
    """
    if maps.shape[-1] == grid:
        return maps
    weights = _resampling(maps.shape[-1], grid, maps.device)
    rows = maps.float() @ weights.mT  # [B, D, h, g]
    return (rows.mT @ weights.mT).mT.to(maps.dtype)


def _resampling(side: int, grid: int, device: torch.device) -> Tensor:
    """Return the weights of a map's cells in each cell of the grid, along one axis: [g, h]."""
    points = ceil(side / grid)  # k: no cell of the map is skipped
    at = (torch.arange(grid * points, device=device) + 0.5) * (side / (grid * points)) - 0.5  # in cells, [g*k]
    left = at.floor().clamp(0, max(side - 2, 0))
    share = (at - left)[:, None]  # of the right neighbour; below 0 or above 1 at the border
    cells = torch.arange(side, device=device)
    is_left, is_right = cells == left[:, None], cells == (left[:, None] + 1).clamp(max=side - 1)  # [g*k, h]
    return (is_left * (1 - share) + is_right * share).unflatten(0, (grid, points)).mean(1)


def feature_maps(
    network: TimmModel, images: Tensor, taps: Sequence[int] | None, *, norm: bool = False
) -> dict[int, Tensor]:
    """Return the maps [B, D, h, w] of `taps`, None for all depths, by depth. Nothing deeper runs.

    norm: after the final norm of a ViT.
    """
    neck_depth = len(network.blocks) if isinstance(network, VisionTransformerSAM) else None
    depths = taps and sorted({tap - 1 if tap == neck_depth else tap for tap in taps})
    found = network.forward_intermediates(
        images, indices=depths, norm=norm, output_fmt="NCHW", stop_early=True, intermediates_only=True
    )
    maps = dict(zip(depths or range(len(found)), found, strict=True))
    if neck_depth is not None and (taps is None or neck_depth in taps):
        maps[neck_depth] = network.neck(maps[neck_depth - 1])
    return {tap: maps[tap] for tap in taps or maps}


def map_shapes(network: TimmModel, *, name: str, image_size: int) -> list[tuple[int, int]]:
    """Return width and side of the map of each depth, without running the network. name: for errors.

    Raises ConfigError for a network without square maps.
    """
    own = getattr(network, "pretrained_cfg", {}).get("input_size", [image_size])[-1]
    remedy = f"leave the image size out, which is then {own}, or " if own != image_size else ""
    remedy += "use a network of timm that has one, e.g. convnext_tiny, or a maedistill.Encoder"
    cause = f"{name} gives no square feature map for images of {image_size} pixels"
    if not hasattr(network, "forward_intermediates"):
        raise ConfigError(f"{cause} (it has no forward_intermediates)", remedy)
    try:
        with torch.no_grad():
            image = torch.empty(1, 3, image_size, image_size, device="meta")
            maps = feature_maps(on_meta(network).eval(), image, None)
    except (AssertionError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"{cause} ({type(error).__name__}: {str(error)[:100]})", remedy) from error
    shapes = [tuple(features.shape[1:]) for features in maps.values()]
    if any(len(shape) != 3 or shape[1] != shape[2] for shape in shapes):
        raise ConfigError(cause, remedy)
    return [(shape[0], shape[1]) for shape in shapes]

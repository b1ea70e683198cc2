"""Linear segmentation of frozen patch features: one linear layer per learning rate, all in one pass, scored by mIoU.

    photographs, squashed to the network's size -> maps, computed once -> BatchNorm -> a linear layer per learning rate
    -> logits, up-sampled bilinearly -> cross-entropy with the mask at the network's size (nearest), AdamW
    -> the best rate by the mIoU of held-out training images -> that rate on all training images -> validation images

Scores count every pixel of the masks as they are stored. The learning rates and the validation images are divided
among the processes. Each process computes all maps of the training images, and holds them: 4 n h w D bytes.

n images   b batch   D width   h, w a map's sides   s image side   H, W a mask's sides   C classes
"""

import colorsys
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as vision

from maedistill.errors import ConfigError, NumericsError, join_first
from maedistill.evaluation.context import EvalContext, finish, metadata, print_main, print_network
from maedistill.evaluation.features import require_finite_rows
from maedistill.evaluation.full_pass import Predictor, evaluation_mode
from maedistill.evaluation.linear_probe import LinearHeads, ProbeRecipe, fit_heads
from maedistill.evaluation.masks import Pair, find_pairs, read_ahead, read_pair
from maedistill.processes import distributed
from maedistill.randomness import Stream, key, permute
from maedistill.report.formatting import percent
from maedistill.report.sheet import tile
from maedistill.runs.records import write_errors
from maedistill.weights.backbone import open_dense
from maedistill.weights.network import Network

_HELD_OUT = 10  # one of so many training images chooses the learning rate
_DRAWN = 6  # images of the picture
_SHOWN = 20  # classes whose IoU is printed; the result file has all
_STRIP = 2**24  # logits at once where predictions are made at a mask's own size: 64 MB
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class SegmentSpec:
    """Which network, and folders of images and masks. classes: at most 256, None for the largest in the masks + 1.

    ignore: the number in a mask that is no class. blocks: None for the end of the network.
    """

    model: str
    images: Path
    masks: Path
    val_images: Path | None = None
    val_masks: Path | None = None
    blocks: Sequence[int] | None = None
    classes: int | None = None
    ignore: int = 255
    weights: str = "model"
    image_size: int | None = None


@dataclass(frozen=True, eq=False)
class SegmentationScore:
    """Pixels by true and predicted class, int64 [C, C]."""

    confusion: Tensor

    @property
    def ious(self) -> dict[int, float]:
        """Return the intersection over union of each class that occurs in the masks or in the predictions."""
        both = self.confusion.diag()  # [C]
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        return {c: int(both[c]) / int(either[c]) for c in either.nonzero().flatten().tolist()}

    @property
    def miou(self) -> float:
        """Return the mean of `ious`."""
        return math.fsum(self.ious.values()) / len(self.ious)

    def metrics(self) -> dict[str, Any]:
        """Return the entries for a result file: fractions, and the counts of pixels that they come from."""
        right, pixels = int(self.confusion.trace()), int(self.confusion.sum())
        counts = {"pixel_accuracy": right / pixels, "pixels_correct": right, "pixels": pixels}
        return {"miou": self.miou, **counts, "ious": self.ious}

    def line(self) -> str:
        """Format the score as one line."""
        right = percent(int(self.confusion.trace()), int(self.confusion.sum()))
        return f"mIoU {100 * self.miou:.2f} % of {len(self.ious)} classes, pixels {right}"


def score_segmentation(
    spec: SegmentSpec,
    context: EvalContext,
    recipe: ProbeRecipe,
    *,
    rates: Sequence[float],
    picture: Path | None = None,
    file: Path | None = None,
) -> dict[str, Any]:
    """Print and return the mIoU of a linear layer on frozen maps. Collective.

    Without validation images, the score is of the held-out training images. recipe.batch is an upper limit. picture,
    file: for predictions beside masks, and the result as JSON. Raises subclasses of UserError.
    """
    network = distributed.main_first(
        partial(open_dense, spec.model, weights=spec.weights, image_size=spec.image_size, blocks=spec.blocks)
    )
    held, train, val = find_parts(spec)
    num_classes = distributed.on_main(lambda: count_classes(held + train + val, spec, context))
    probe = Segmenter(replace(network, crop=1.0, crop_mode="squash"), context, num_classes, ignore=spec.ignore)
    print_network("model", probe.network)
    counts = f"{len(train):,} images to train on, {len(held):,} held out, {len(val):,} to validate on"
    print_main("data", f"{counts}, {num_classes} classes, {spec.ignore} is not a class")
    with evaluation_mode(network.module):
        maps, masks = probe.training_set(held + train)
        scores = probe.score_rates(held, maps[len(held) :], masks[len(held) :], recipe, rates)
        best = max(scores, key=lambda rate: (scores[rate].miou, -rate))
        first, scored = (0, val) if val else (len(held), held)
        heads = probe.fit(maps[first:], masks[first:], recipe, [best])
        if not _is_finite(heads):
            raise NumericsError(f"the probe diverged at lr {best:g} on all images", "name smaller rates with --lr")
        batches = [scored[i : i + context.batch] for i in range(0, len(scored), context.batch)]
        share = itertools.chain(*batches[distributed.rank() :: distributed.world_size()])
        score = SegmentationScore(torch.stack(distributed.gather_objects(*probe.score([*share], heads))).sum(0))
        if picture is not None:
            distributed.on_main(lambda: probe.draw(scored[:_DRAWN], heads, picture, title=score.line()))
    largest = " (the largest: try larger ones, too)" if len(rates) > 1 and best == max(rates) else ""
    where = "validation images" if val else "held-out images, which also chose the rate"
    print_main("result", f"{score.line()} of {len(scored):,} {where}, at lr {best:g}{largest}")
    print_main("IoU", join_first((f"{c}: {100 * iou:.1f} %" for c, iou in score.ious.items()), _SHOWN))
    result = metadata(probe.network, context) | {"features": network.module.describe(), "classes": num_classes}
    result |= {"ignore": spec.ignore, "train_images": len(train), "held_out_images": len(held)}
    result |= {"val_images": len(val), "probe": asdict(recipe), "lr": best, **score.metrics()}
    return finish(result | {"rates": [{"lr": rate, **one.metrics()} for rate, one in scores.items()]}, file)


def find_parts(spec: SegmentSpec) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Return the held-out and the other training images, in a fixed random order, and the validation images."""
    pairs, val = find_pairs(spec.images, spec.masks), []
    if spec.val_images and spec.val_masks:
        val = find_pairs(spec.val_images, spec.val_masks, prefix="val-")
    pairs = [pairs[i] for i in permute(torch.arange(len(pairs)), len(pairs), key(0, Stream.SUBSET)).tolist()]
    held = max(1, len(pairs) // _HELD_OUT)
    if len(pairs) - held < 2:
        cause = f"{len(pairs)} images are too few to train on and to choose the learning rate"
        raise ConfigError(cause, "give 3 or more to --images")
    return pairs[:held], pairs[held:], val


def count_classes(pairs: Sequence[Pair], spec: SegmentSpec, context: EvalContext) -> int:
    """Read every file and return the number of classes. Raises DataError for the first that cannot be used."""

    def largest(pair: Pair) -> int:  # all that is kept of the files
        _, mask = read_pair(pair, num_classes=spec.classes, ignore=spec.ignore)
        return int(mask[mask != spec.ignore].max())

    numbers = list(read_ahead(largest, pairs, threads=context.workers))
    return spec.classes or max(numbers) + 1


class Segmenter:
    """Frozen maps of photographs, and the predictions of linear layers on them."""

    def __init__(self, network: Network, context: EvalContext, num_classes: int, *, ignore: int) -> None:
        self.network, self.context, self.num_classes, self.ignore = network, context, num_classes, ignore
        self.shape = network.output().shape[1:]  # [h, w, D]
        self.predictor = Predictor(network.module, context, mean=network.mean, std=network.std)
        self.view = network.transform()

    def training_set(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Return maps [n, h, w, D], and masks uint8 [n, s, s] at the size of the network's images, on the CPU."""
        maps = torch.empty(len(pairs), *self.shape)
        shape, gigabytes = " x ".join(map(str, self.shape)), f"{maps.nbytes / 1e9:.1f} GB in each process"
        print_main("features", f"{self.network.module.describe()}, {shape}, {gigabytes}")
        masks = torch.empty(len(pairs), self.network.size, self.network.size, dtype=torch.uint8)
        for i, (_, found, mask) in enumerate(self._maps(pairs)):
            maps[i], masks[i] = found.cpu(), self._shrink(mask)
        require_finite_rows(maps)
        return maps, masks

    def score_rates(
        self, held: Sequence[Pair], maps: Tensor, masks: Tensor, recipe: ProbeRecipe, rates: Sequence[float]
    ) -> dict[float, SegmentationScore]:
        """Print and return the score of the held-out images at each rate that does not diverge. Collective."""
        recipe_text = f"{recipe.optimizer}, {recipe.epochs} epochs, batch {recipe.fit_batch(len(maps)).batch}"
        print_main("probe", recipe_text)
        mine: dict[float, Tensor] = {}
        if rank_rates := list(rates)[distributed.rank() :: distributed.world_size()]:
            heads = self.fit(maps, masks, recipe, rank_rates)
            for rate, head, found in zip(rank_rates, heads.heads, self.score(held, heads), strict=True):
                if _is_finite(head):
                    mine[rate] = found
        gathered = distributed.gather_objects(mine)
        scores = {rate: SegmentationScore(one[rate]) for rate in sorted(rates) for one in gathered if rate in one}
        for rate in sorted(rates):
            print_main(f"lr {rate:g}", f"held out: {scores[rate].line()}" if rate in scores else "diverged")
        if not scores:
            raise NumericsError("the probe diverged at every learning rate", "name smaller ones with --lr")
        return scores

    def fit(self, maps: Tensor, masks: Tensor, recipe: ProbeRecipe, rates: Sequence[float]) -> LinearHeads:
        """Train a linear layer for each rate."""
        loss, recipe = partial(pixel_loss, ignore=self.ignore), recipe.fit_batch(len(maps))
        device, classes = self.context.device, self.num_classes
        return fit_heads(maps, masks, recipe, rates=rates, num_classes=classes, device=device, loss=loss, home=_CPU)

    def score(self, pairs: Sequence[Pair], heads: LinearHeads) -> list[Tensor]:
        """Return the pixels by true and predicted class, int64 [C, C], of each head."""
        counts = [torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64) for _ in heads.rates]
        for _, found, mask in self._maps(pairs):
            for count, classes in zip(counts, self._classify(found, heads, mask.shape), strict=True):
                count += confusion(mask, classes, self.num_classes, ignore=self.ignore)
        return counts

    def draw(self, pairs: Sequence[Pair], heads: LinearHeads, file: Path, *, title: str) -> None:
        """Draw images, masks and predictions of the first head side by side."""
        rows = []
        for image, found, mask in self._maps(pairs):
            (classes,) = self._classify(found, heads, image.shape[1:])
            painted = (colours(one, ignore=self.ignore) for one in (self._shrink(mask), classes))
            rows.append((image / 255, *painted))
        columns = zip(("image", "mask", "prediction"), map(torch.stack, zip(*rows, strict=True)), strict=True)
        with write_errors(file):
            tile([dict(columns)], title=title).save(file, format="PNG")

    @torch.no_grad()
    def _maps(self, pairs: Sequence[Pair]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what the network sees, uint8 [3, s, s], its map [h, w, D] on the device, and the mask [H, W]."""
        loaded = read_ahead(self._read, pairs, threads=self.context.workers)
        while batch := list(itertools.islice(loaded, self.context.batch)):
            views, masks = zip(*batch, strict=True)
            images = torch.stack(views)  # [b, 3, s, s]
            maps = self.predictor(images.to(self.context.device))  # [b, h, w, D]
            yield from zip(images, maps, masks, strict=True)

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return what the network sees and the mask, not the photograph, which may be large."""
        pixels, mask = read_pair(pair, num_classes=self.num_classes, ignore=self.ignore)
        return self.view(vision.to_pil_image(pixels)), mask

    @torch.no_grad()
    def _classify(self, found: Tensor, heads: LinearHeads, size: Sequence[int]) -> Iterator[Tensor]:
        """Yield each head's best class of each pixel, uint8 [H, W] on the CPU, of a map [h, w, D].

        In strips of rows: all logits of a photograph of 24 million pixels and 150 classes would take 14 GB.
        """
        rows, columns = bilinear(found.shape[:2], size, device=found.device)
        lines = max(1, _STRIP // (size[1] * self.num_classes))
        for logits in heads(found[None]):  # [1, h, w, C]
            strips = []
            for some in rows.split(lines, dim=1):  # [h, y]
                pixels = blend(logits, some, columns)[0]  # [y, W, C]
                pixels[..., self.ignore : self.ignore + 1] = -torch.inf  # never the number that is no class
                strips.append(pixels.argmax(-1).to(torch.uint8).cpu())
            yield torch.cat(strips)

    def _shrink(self, mask: Tensor) -> Tensor:
        size = [self.network.size] * 2
        return vision.resize(mask[None], size, interpolation=vision.InterpolationMode.NEAREST_EXACT)[0]


def pixel_loss(logits: Tensor, masks: Tensor, *, ignore: int) -> Tensor:
    """Return the mean cross-entropy of the pixels that have a class: logits [b, h, w, C], masks uint8 [b, H, W]."""
    truth = masks.flatten().long()
    pixels = upsample(logits, masks.shape[1:]).flatten(0, 2)  # [b*H*W, C]
    total = F.cross_entropy(pixels, truth, ignore_index=ignore, reduction="sum")
    return total / (truth != ignore).sum().clamp(min=1)


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resample bilinearly: [b, h, w, C] -> [b, H, W, C].

    As `F.interpolate`, by products of matrices, whose gradient is the same each time on a GPU too.
    """
    return blend(logits, *bilinear(logits.shape[1:3], size, device=logits.device))


def bilinear(sides: Sequence[int], size: Sequence[int], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the weights of a map's rows and columns in those of a mask: [h, H], [w, W]."""
    rows, columns = (
        F.interpolate(torch.eye(side, device=device)[None], size=wanted, mode="linear")[0]
        for side, wanted in zip(sides, size, strict=True)
    )
    return rows, columns


def blend(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Weigh logits [b, h, w, C] by rows [h, y] and columns [w, x]: [b, y, x, C]."""
    return torch.einsum("bhwc,hy,wx->byxc", logits, rows, columns)


def confusion(truth: Tensor, found: Tensor, num_classes: int, *, ignore: int) -> Tensor:
    """Count pixels by true and predicted class: masks and predictions uint8 [H, W] -> int64 [C, C], C at most 256."""
    seen = truth != ignore
    pairs = truth[seen].int() * num_classes + found[seen]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def _is_finite(module: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def colours(classes: Tensor, *, ignore: int) -> Tensor:
    """Paint class numbers [H, W] in colours that differ most for close numbers, ignored pixels black: [3, H, W]."""
    palette = torch.tensor([colorsys.hsv_to_rgb(0.618034 * c % 1, 0.75, 1 - 0.15 * (c % 4)) for c in range(256)])
    palette[ignore] = 0
    return palette[classes.long()].permute(2, 0, 1)

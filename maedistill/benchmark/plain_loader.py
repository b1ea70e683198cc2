"""The common loader: an image folder, Pillow, torchvision's transforms to float32, a DataLoader.

It has the same steps as the loaders of DMAE and MAE, and is the baseline for ours.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomHorizontalFlip, ToTensor
from torchvision.transforms import RandomResizedCrop as Crop

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_folder(folder: Path, files: Iterable[bytes]) -> None:
    """Write the encoded images as files of one class, in order."""
    (folder / "class").mkdir()
    for number, data in enumerate(files):
        (folder / "class" / f"{number:06d}.jpg").write_bytes(data)


def plain_batches(
    folder: Path, order: list[int], *, size: int, scale: tuple[float, float], batch: int, workers: int
) -> Iterator[list[Tensor]]:
    """Return an iterator over batches: images float32 [b, 3, s, s] and labels int64 [b].

    folder: the folder that `write_folder` wrote. order: numbers of its files, in the order in which they are loaded.
    """
    crop = Crop(size, scale=scale, interpolation=InterpolationMode.BICUBIC)
    transform = Compose([crop, RandomHorizontalFlip(), ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    images = Subset(ImageFolder(str(folder), transform), order)
    context = "fork" if workers else None
    return iter(DataLoader(images, batch_size=batch, num_workers=workers, multiprocessing_context=context))

"""Open a classifier from any source: a network that returns one logit per class for an image.

open_classifier("runs/ft_s")                        -> Network, from RUN/run.json and its newest checkpoint
open_classifier("timm:resnet18.a1_in1k")            -> Network, with size, crop and normalisation from timm
"""

import torch

from maedistill.errors import ConfigError
from maedistill.weights.from_run import Weights
from maedistill.weights.network import Network, open_network
from maedistill.weights.weights_file import why_unreadable


def open_classifier(
    source: str,
    *,
    weights: Weights = "model",
    image_size: int | None = None,
    headless: bool = False,
    size_key: str = "--image-size",
) -> Network:
    """Open a classifier with `open_network` and check its output.

    headless: also accept an encoder without a classifier, which has 0 classes. size_key: the option that sets
    image_size, for errors. Raises ConfigError for an unknown kind of source, a missing classifier, or an unsupported
    image size; DataError for weights that cannot be loaded.
    """
    keywords = {"weights": weights, "image_size": image_size, "size_key": size_key}
    opened = open_network(source, needs_classes=not headless, **keywords)
    _require_fit(opened, size_key)
    return opened


@torch.no_grad()
def _require_fit(classifier: Network, size_key: str) -> None:
    """Run one forward pass on a black image, so that an unsupported image size fails before the loader starts."""
    size = classifier.size
    try:
        logits = classifier.module(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{classifier.name} cannot look at images of {size} pixels ({why_unreadable(error)})",
            f"name a size that it takes ({size_key}), for a ViT a multiple of its patch size, or leave it out",
        ) from error
    if classifier.num_classes and logits.shape != (1, classifier.num_classes):
        raise ConfigError(
            f"{classifier.name} gives {tuple(logits.shape)} for one image, not {classifier.num_classes} logits",
            "use a model that classifies images",
        )

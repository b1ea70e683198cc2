"""A classifier from wherever it is: a network whose outputs for an image are one logit per class.

open_classifier("runs/ft_s")                        -> Network, from RUN/run.json and its newest checkpoint
open_classifier("timm:resnet18.a1_in1k")            -> Network, size, crop and normalisation as timm knows them
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
    """The classifier that `open_network` opens.

    headless: also take an encoder alone, which has 0 classes. size_key: where image_size is set, for errors.
    Raises ConfigError for a name of no kind, no classifier, or a size that does not fit; DataError for weights that
    cannot be had.
    """
    keywords = {"weights": weights, "image_size": image_size, "size_key": size_key}
    opened = open_network(source, needs_classes=not headless, **keywords)
    _require_fit(opened, size_key)
    return opened


@torch.no_grad()
def _require_fit(classifier: Network, size_key: str) -> None:
    """Shows the network one black image: said now, a size that it cannot take costs no loader and no waiting."""
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

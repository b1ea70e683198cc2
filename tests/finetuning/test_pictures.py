"""The picture of the input: pixels as they were before normalisation, and the target's shares beside each image."""

import numpy as np
import torch
from PIL import Image

from maedistill.finetuning import pictures

HEADER, GAP = 52, 4  # pixels, of report/sheet.py


def test_images_are_shown_as_they_were_and_named_by_their_targets(monkeypatch):
    """Captions name classes by share, the largest first, without label smoothing; at most eight images are drawn."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    images = torch.rand(9, 3, 192, 192)
    targets = torch.tensor([[0.7, 0.28, 0.02], [0.01, 0.01, 0.98], *[[0, 1, 0]] * 7], dtype=torch.float32)
    given = {}
    monkeypatch.setattr(pictures, "tile", lambda groups, title: given.update(groups=groups, title=title))
    pictures.input_sheet((images - mean) / std, targets, channels=(mean, std), classes=("cat", "dog", "eel"), title="x")
    captions = [caption for group in given["groups"] for caption in group]
    assert captions == ["cat 0.7, dog 0.28", "eel 0.98", *["dog 1"] * 6] and given["title"] == "x"
    shown = torch.cat([column for group in given["groups"] for column in group.values()])
    torch.testing.assert_close(shown, images[:8])


def test_without_labels_and_names_a_sheet_is_drawn():
    channels = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    images = torch.linspace(0, 1, 192).expand(2, 3, 192, 192)
    labelled, unlabelled = (
        pictures.input_sheet(images, targets, channels=channels, classes=(), title="")
        for targets in (torch.eye(2), None)
    )
    assert isinstance(labelled, Image.Image) and labelled.size == unlabelled.size
    one, other = np.asarray(labelled), np.asarray(unlabelled)
    assert (one[HEADER:] == other[HEADER:]).all() and (one[:HEADER] != other[:HEADER]).any(), (
        "they differ in the captions alone"
    )
    assert (one[HEADER, GAP : GAP + 192, 0] == np.round(np.linspace(0, 1, 192, dtype=np.float32) * 255)).all()

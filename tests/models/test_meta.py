"""Networks without numbers: the shapes alone."""

import pytest
import timm
import torch

from maedistill.models.meta import meta_device


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "resnet18", "convnext_atto"])
def test_the_meta_device_gives_the_shapes_alone(name):
    with meta_device():
        empty = timm.create_model(name, pretrained=False)
        assert torch.ones(3).add_(1).is_meta
    real = timm.create_model(name, pretrained=False)
    shapes = [{key: (value.shape, value.dtype) for key, value in one.state_dict().items()} for one in (empty, real)]
    assert shapes[0] == shapes[1] and all(value.is_meta for value in empty.state_dict().values())
    assert torch.ones(3).add_(1).tolist() == [2, 2, 2]

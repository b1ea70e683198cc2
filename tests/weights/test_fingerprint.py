"""What a teacher's weights are known by."""

import timm
import torch

from maedistill.weights.state_dict import weights_fingerprint

ARGUMENTS = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


def vit(**changed):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS | changed)


def test_every_weight_and_buffer_counts_but_for_positions():
    network, before = timm.create_model("resnet10t", num_classes=3), []
    for part in (vit(), network):
        for name, value in part.state_dict().items():
            before.append(weights_fingerprint(part))
            with torch.no_grad():
                value += 1
            assert (weights_fingerprint(part) == before[-1]) == (name == "pos_embed"), name
    assert len({*before}) == len(before) - 1


def test_equal_weights_have_one_fingerprint_whatever_the_image_size_but_not_in_another_type():
    small, large = vit(), vit(img_size=32)
    large.load_state_dict({k: v for k, v in small.state_dict().items() if k != "pos_embed"}, strict=False)
    assert weights_fingerprint(small) == weights_fingerprint(large) == weights_fingerprint(small.eval())
    assert weights_fingerprint(small) != weights_fingerprint(vit().bfloat16())

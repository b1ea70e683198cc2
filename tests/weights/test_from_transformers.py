"""ViT and ViTMAE of transformers, from files and folders: the outputs are those of its published formulas."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from maedistill.errors import UserError
from maedistill.weights import from_transformers
from maedistill.weights.from_file import EncoderSpec
from maedistill.weights.open_network import open_network

CONFIG = {"model_type": "vit", "num_attention_heads": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
PROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": True}
SPEC = EncoderSpec(num_heads=2)
# Names of a layer's parts: in a file, and in memory since version 5.
PARTS = {
    "file": (
        "encoder.layer.", "attention.attention.query", "attention.attention.key", "attention.attention.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    ),
    "memory": (
        "layers.", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2",
    ),
}  # fmt: skip


def weights(names="file", *, prefix=""):
    """Random weights of a ViT of 2 blocks for 4 x 4 patches of 8 pixels, small enough for eps to count."""
    (stem, *parts), D, std = PARTS[names], 32, 0.05
    shapes = {"embeddings.cls_token": (1, 1, D), "embeddings.position_embeddings": (1, 17, D), "layernorm": (D,)}
    shapes |= {"embeddings.patch_embeddings.projection": (D, 3, 8, 8)}
    for i in range(2):
        sides = [(D, D)] * 4 + [(4 * D, D), (D, 4 * D)]
        shapes |= {f"{stem}{i}.{part}": shape for part, shape in zip(parts, sides, strict=True)}
        shapes |= {f"{stem}{i}.layernorm_{where}": (D,) for where in ("before", "after")}
    draws, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        token = name.endswith(("cls_token", "embeddings.position_embeddings"))
        scale = 1e-3 if name.startswith("embeddings.") else std
        state[prefix + name + ("" if token else ".weight")] = scale * torch.randn(shape, generator=draws)
        if not token:
            state[prefix + name + ".bias"] = scale * torch.randn(shape[0], generator=draws)
    return state


def forward(state, images, ids, *, eps, names="file"):
    """The last tokens of transformers' ViT on the patches `ids`, written from its formulas: [B, 1 + M, D]."""
    stem, q, k, v, out, up, down = PARTS[names]

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    kernel = [state[f"embeddings.patch_embeddings.projection.{part}"] for part in ("weight", "bias")]
    positions = state["embeddings.position_embeddings"]
    x = F.conv2d(images, *kernel, stride=8).flatten(2).transpose(1, 2) + positions[:, 1:]  # [B, N, D]
    x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))  # [B, M, D]
    token = state["embeddings.cls_token"] + positions[:, :1]
    x = torch.cat([token.expand(len(x), -1, -1), x], 1)
    for i in range(2):
        layer = f"{stem}{i}."
        h = norm(layer + "layernorm_before", x)
        heads = [linear(layer + name, h).unflatten(-1, (2, -1)).transpose(1, 2) for name in (q, k, v)]
        scores = (heads[0] @ heads[1].transpose(-1, -2) / heads[0].shape[-1] ** 0.5).softmax(-1)
        x = x + linear(layer + out, (scores @ heads[2]).transpose(1, 2).flatten(2))
        x = x + linear(layer + down, F.gelu(linear(layer + up, norm(layer + "layernorm_after", x))))
    return norm("layernorm", x)


def save_folder(folder, state, *, config=None, processor=None):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"local-dir:{folder}"


@pytest.mark.parametrize(("kind", "names"), [("file", "memory"), ("folder", "file")])
@torch.no_grad()
def test_the_masked_walk_is_the_formulas(tmp_path, names, kind):
    more = {"decoder.decoder_embed.weight": torch.zeros(16, 32), "decoder.mask_token": torch.zeros(1, 1, 16)}
    state = weights(names, prefix="vit.") | more | {"classifier.weight": torch.zeros(3, 32)}
    source, images = save_folder(tmp_path / "a", state, config={"layer_norm_eps": 1e-9}), torch.randn(2, 3, 32, 32)
    source = source if kind == "folder" else f"file:{tmp_path}/a/model.safetensors"
    opened = open_network(source, "encoder", grid=4, spec=SPEC)
    ids = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    tokens, _ = opened.encoder.eval()(images, ids)
    plain, eps = weights(names), {"folder": 1e-9, "file": 1e-12}[kind]
    torch.testing.assert_close(tokens, forward(plain, images, ids, eps=eps, names=names))
    assert (tokens - forward(plain, images, ids, eps=1e-6, names=names)).abs().max() > 1e-4
    assert f"norm eps {eps:g}" in opened.audit and "unused (classifier, decoder)" in opened.audit


@pytest.mark.parametrize(("of_hub", "states"), [(True, True), (False, False)])
def test_a_folders_mean_and_std_are_taken(tmp_path, monkeypatch, of_hub, states):
    state = weights() | {"pooler.dense.weight": torch.zeros(32, 32)}
    source = save_folder(tmp_path / "a", state, processor=PROCESSOR if states else None)
    if of_hub:
        asked = []
        monkeypatch.setattr(
            from_transformers,
            "hf_hub_download",
            lambda filename, **where: asked.append(where) or tmp_path / "a" / filename,
        )
        monkeypatch.setattr(
            from_transformers,
            "snapshot_download",
            lambda allow_patterns, **where: asked.append(where) or tmp_path / "a",
        )
        source = "hf-hub:google/vit@v2"
    opened = open_network(source, "encoder")
    assert opened.normalization_known is states and (opened.mean == (0.5, 0.5, 0.5)) is states
    assert opened.name == source and opened.license == "not stated" and opened.size == 32
    if of_hub:
        assert asked and all(where == {"repo_id": "google/vit", "revision": "v2"} for where in asked)


@pytest.mark.parametrize(
    ("config", "processor", "cause"),
    [
        ({"model_type": "dinov2"}, None, "model_type"),
        ({"model_type": ["vit"]}, None, "model_type"),
        ({"num_attention_heads": "2"}, None, "num_attention_heads"),
        ({"num_attention_heads": 5}, None, "5 heads"),
        ({"layer_norm_eps": 0}, None, "layer_norm_eps"),
        ({"hidden_act": "gelu_new"}, None, "hidden_act"),
        ({}, PROCESSOR | {"image_mean": [0.5]}, "image_mean"),
        ({}, PROCESSOR | {"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({}, PROCESSOR | {"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({}, PROCESSOR | {"do_normalize": False}, "do_normalize"),
        ({}, [3], "object"),
    ],
)
def test_configs_of_other_networks_and_untrue_ones_are_refused(tmp_path, config, processor, cause):
    source = save_folder(tmp_path / "a", weights(), config=config, processor=processor)
    with pytest.raises(UserError) as refused:
        open_network(source, "encoder")
    assert cause in refused.value.cause and "\n" not in refused.value.cause and refused.value.remedy


def test_a_folder_without_weights_or_of_grey_images_is_refused(tmp_path):
    grey = weights() | {"embeddings.patch_embeddings.projection.weight": torch.zeros(32, 1, 8, 8)}
    with pytest.raises(UserError, match="1 channels"):
        open_network(save_folder(tmp_path / "a", grey, config={"num_channels": 1}), "encoder")
    (tmp_path / "a/model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        open_network(f"local-dir:{tmp_path}/a", "encoder")


@pytest.mark.parametrize("kind", ["file", "folder"])
@torch.no_grad()
def test_a_classifier_is_used_where_one_is_wanted(tmp_path, kind):
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    names = {"0": "ant", "1": "bee", "2": "cat"}
    folder = save_folder(tmp_path / "a", weights(prefix="vit.") | head, config={"id2label": names})
    source, images = {"folder": folder, "file": f"file:{tmp_path}/a/model.safetensors"}[kind], torch.randn(2, 3, 32, 32)
    tokens = forward(weights(), images, torch.arange(16).expand(2, -1), eps=1e-12)
    expected = F.linear(tokens[:, 0], head["classifier.weight"], head["classifier.bias"])
    for use in ("outputs", "classifier", "any"):  # distill.teachers, evaluate, and its kNN
        opened = open_network(source, use, spec=None if kind == "folder" else SPEC)
        torch.testing.assert_close(opened.module.eval()(images), expected)
        assert opened.num_classes == 3 and opened.classes == (tuple(names.values()) if kind == "folder" else ())
        assert "unused" not in opened.audit
    encoder = open_network(source, "encoder", spec=SPEC)
    assert (encoder.num_classes, encoder.module.num_classes) == (0, 0) and "2 unused (classifier)" in encoder.audit


@pytest.mark.parametrize(
    ("head", "cause"),
    [
        ({"weight": torch.zeros(3, 31), "bias": torch.zeros(3)}, "(3, 31)"),
        ({"weight": torch.zeros(3, 32), "bias": torch.zeros(2)}, "(3, 32)"),
        ({"weight": torch.zeros(3), "bias": torch.zeros(())}, "(3,)"),
        ({"weight": torch.zeros(3, 32), "bias": torch.full((3,), torch.nan)}, "bias"),
        ({"weight": torch.zeros(3, 32)}, "has no classifier"),
        ({}, "has no classifier"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(tmp_path, head, cause):
    state = weights(prefix="vit.") | {f"classifier.{name}": value for name, value in head.items()}
    with pytest.raises(UserError) as refused:
        open_network(save_folder(tmp_path / "a", state), "classifier")
    assert cause in refused.value.cause and refused.value.remedy

"""Give a ViT's weights timm's names where they have those of transformers, DINOv2 or BEiT.

encoder.layer.0.attention.attention.query.weight, ...key..., ...value... -> blocks.0.attn.qkv.weight
"""

import re

import torch

from maedistill.errors import DataError
from maedistill.weights.entries import StateDict, quoted

# Patterns of other names of a ViT's parts, each replaced by timm's, one after another: first those of transformers.
_TIMM_NAMES = {
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.": "",
    r"^(encoder\.layer|layers)\.(?=\d)": "blocks.",
    r"^layernorm\.": "norm.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.": r".attn.\1.",
    r"\.attention\.(?:output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    # DINOv2 may cut its blocks into chunks.
    r"^blocks\.\d+\.(?=\d+\.)": "blocks.",
}
TRANSFORMERS_EPS = 1e-12  # of the norms of its ViTs, unless their config says otherwise


def with_timm_names(state: StateDict, name: str) -> StateDict:
    """Give the weights of one network timm's names, where they have those of another code base."""
    for pattern, new in _TIMM_NAMES.items():
        state = {re.sub(pattern, new, key): value for key, value in state.items()}
    if "register_tokens" in state:  # DINOv2 adds positions to the class token, timm to the patches alone
        state["reg_token"] = state.pop("register_tokens")
        positions, token = state.get("pos_embed"), state.get("cls_token")
        if positions is not None and token is not None and positions[:, :1].shape == token.shape:
            state |= {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}
    return merge_qkv(state, name)


def merge_qkv(state: StateDict, name: str) -> StateDict:
    """Merge queries, keys and values to timm's qkv. BEiT-style blocks have no bias of keys: cat(q, 0, v)."""
    merged: StateDict = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*attn\.)[qkv]([._])(weight|bias)", key)
        if match is None or (q := state.get(f"{match[1]}q{match[2]}{match[3]}")) is None:
            merged[key] = value
        elif (new := f"{match[1]}qkv.{match[3]}") not in merged:
            nothing = q.new_empty(0)
            k = state.get(f"{match[1]}k{match[2]}{match[3]}", torch.zeros_like(q) if match[3] == "bias" else nothing)
            v = state.get(f"{match[1]}v{match[2]}{match[3]}", nothing)
            if any(not part.ndim or part.dtype != q.dtype or part.shape[1:] != q.shape[1:] for part in (q, k, v)):
                raise DataError(f"{name}: the parts of {quoted([new])} do not fit", "use the state dict of a model")
            merged[new] = torch.cat([q, k, v])
    return merged

"""Initial weights as in MAE (He et al., 2022, appendix A.1), set here for every trainable parameter of a method.

Linear layers, and the patch embedding viewed as one, have Xavier-uniform weights and zero biases. Norms start as the
identity. Class, register and mask tokens and learned positions are normal with mean 0 and standard deviation 0.02.
Layer scales and rotary frequencies start as in timm.
"""

from typing import Any

import torch
from timm.layers import LayerScale, RmsNorm, RotaryEmbeddingMixed
from timm.layers.pos_embed_sincos import init_random_2d_freqs
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from torch import nn

_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")
_SCALES = ("gamma", "gamma_1", "gamma_2")


@torch.no_grad()
def initialize(module: nn.Module, *, seed: int, keep: nn.Module | None = None, strict: bool = True) -> None:
    """Initialise all parameters of `module` in place, as a function of `seed` alone. Buffers are left as they are.

    keep: a part that is left as it is. strict: assert that every parameter is of a kind that MAE has; otherwise the
    others, which only a caller's own method has, are left as they are.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return  # meta tensors have shapes only
    generator = torch.Generator().manual_seed(seed)
    kept = {*keep.modules()} if keep is not None else set()
    child: Any
    for child in module.modules():
        if child in kept:
            continue
        for name, parameter in child.named_parameters(recurse=False):
            if name in _TOKENS:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name == "weight" and isinstance(child, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)  # a view: [out, in]
            elif name == "weight" and isinstance(child, nn.LayerNorm | RmsNorm):
                parameter.fill_(1.0)
            elif name in _SCALES and isinstance(child, LayerScale | EvaBlock | EvaBlockPostNorm):
                parameter.fill_(child.init_values)
            elif name in ("bias", "q_bias", "v_bias"):
                parameter.zero_()
            elif name == "freqs" and isinstance(child, RotaryEmbeddingMixed):
                with torch.random.fork_rng(devices=[]):  # timm draws from torch's own generator
                    torch.manual_seed(seed)
                    width = child.dim // child.num_heads
                    drawn = init_random_2d_freqs(width, child.depth, child.num_heads, temperature=child.temperature)
                    parameter.copy_(drawn)
            elif strict:
                raise AssertionError(f"no initial value is defined for {name} of {type(child).__name__}")

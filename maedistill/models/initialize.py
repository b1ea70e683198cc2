"""Initial weights as in MAE (He et al., 2022, appendix A.1), set here for every trainable parameter of a method.

Linear layers, and the patch embedding viewed as one, have Xavier-uniform weights and zero biases. Norms start as the
identity. Class, register and mask tokens and learned positions are normal with mean 0 and standard deviation 0.02.
"""

import torch
from timm.layers import LayerScale
from torch import nn

_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")


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
    for child in module.modules():
        if child in kept:
            continue
        for name, parameter in child.named_parameters(recurse=False):
            if name in _TOKENS:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name == "weight" and isinstance(child, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)  # a view: [out, in]
            elif name == "weight" and isinstance(child, nn.LayerNorm):
                parameter.fill_(1.0)
            elif name == "gamma" and isinstance(child, LayerScale):
                parameter.fill_(child.init_values)
            elif name == "bias":
                parameter.zero_()
            elif strict:
                raise AssertionError(f"no initial value is defined for {name} of {type(child).__name__}")

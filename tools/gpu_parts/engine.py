"""The engine against plain torch on the same device: every ZeRO stage, number format and accumulation.

Two more checks: an update that is not finite must be skipped, and an fp16 loss scale that starts far too large must
recover. The small, deliberately awkward module and its batches come from the engine's own tests.
"""

import itertools
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpu_parts.check import ROOT, Check
from maedistill.training import engine as engine_file
from maedistill.training.engine import Engine, initialize_distributed
from maedistill.training.optim import build_optimizer, parameter_groups

sys.path.append(str(ROOT / "tests" / "training"))
import scenarios

STAGES, ACCUMULATIONS, STEPS = range(4), (1, 3), 4
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BETAS = (0.9, 0.95)


def run(check: Check) -> None:
    """Compare all combinations, then check skipped updates and the loss scale."""
    engine_file.PERSISTENCE_THRESHOLD = 0  # so that stage 3 really shards this small module
    engine_file.FP16_DEVICES.add("cpu")  # slow there, but correct
    initialize_distributed(60)
    for precision, accumulation in itertools.product(PRECISIONS, ACCUMULATIONS):
        with check.guarded(f"zero 0 to 3, {precision}, accumulation {accumulation}"):
            _compare(check, precision, accumulation)
    for zero in STAGES:
        with check.guarded(name := f"zero {zero}: a NaN is left out"):
            engine, norms = _train(check, zero, "bf16", 3, spoiled={2})
            good = [math.isfinite(norm) for norm in norms] == [True, True, False, True] and _updates(engine) == 3
            check.verdict(name, good, f"norms {_words(norms)}, {_updates(engine)} updates")
    for zero in STAGES:
        with check.guarded(name := f"zero {zero}: fp16 finds its scale"):
            engine, norms = _train(check, zero, "fp16", 1, scale=2.0**17, steps=6)
            finite, scale = sum(map(math.isfinite, norms)), engine.loss_scale.scale
            good = 0 < finite < len(norms) and scale < 2**17 and _updates(engine) == finite
            check.verdict(name, good, f"norms {_words(norms)}, scale {scale:g}")


def _compare(check: Check, precision: str, accumulation: int) -> None:
    """Train at every stage and in plain torch, and record the largest difference."""
    expected, norms = _reference(check, PRECISIONS[precision], accumulation)
    weights_apart, norms_apart = [], []
    for zero in STAGES:
        engine, found = _train(check, zero, precision, accumulation)
        weights = engine.state().weights
        apart = [float((weights[name] - value).abs().max()) for name, value in expected.items()]
        weights_apart.append(max(apart) if all(map(math.isfinite, apart)) else math.inf)
        norms_apart.append(max(abs(one / other - 1) for one, other in zip(found, norms, strict=True)))
    figure = f"weights within {max(weights_apart):.1e} of torch's, norms within {max(norms_apart):.1e}"
    good = max(weights_apart) < 1e-5 and max(norms_apart) < 1e-4
    check.verdict(f"zero 0 to 3, {precision}, accumulation {accumulation}", good, figure)


def _reference(check: Check, dtype: torch.dtype | None, parts: int) -> tuple[dict[str, Tensor], list[float]]:
    """Train in plain torch; return weights and gradient norms."""
    module, norms = scenarios.toy().to(check.device), []
    optimizer = torch.optim.AdamW(parameter_groups(module, scenarios.DECAY), lr=scenarios.PEAK, betas=BETAS)
    for step in range(STEPS):
        for inputs in _batches(check, step, parts):
            with torch.autocast(check.device.type, dtype=dtype, enabled=dtype is not None):
                loss = module(*inputs)["loss"]
            (loss / parts).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), scenarios.CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}, norms


def _train(
    check: Check,
    zero: int,
    precision: str,
    parts: int,
    *,
    spoiled: Sequence[int] = (),
    scale: float = 1024.0,
    steps: int = STEPS,
) -> tuple[Engine, list[float]]:
    """Train through the engine. The loss is NaN in `spoiled` steps; `scale` is the initial loss scale of fp16."""
    module, norms = scenarios.toy().to(check.device), []
    optimizer = build_optimizer(parameter_groups(module, scenarios.DECAY), lr=scenarios.PEAK, betas=BETAS)
    batch = {"micro_batch": scenarios.BATCH // parts, "accumulation": parts}
    engine = Engine(module, optimizer, zero=zero, precision=precision, clip=scenarios.CLIP, **batch)
    if engine.loss_scale is not None:
        engine.loss_scale.scale = scale  # 1024 never overflows here, so torch without a scale is a reference
    for step in range(steps):
        for inputs in _batches(check, step, parts):
            loss = engine(*inputs)["loss"]
            engine.backward(loss * math.nan if step in spoiled else loss)
            engine.step()
        norms.append(float(engine.grad_norm))
    return engine, norms


def _batches(check: Check, step: int, parts: int) -> list[tuple]:
    """Split the batch of a step into the inputs of its micro-batches, on the device."""
    micro = zip(*(tensor.to(check.device).chunk(parts) for tensor in scenarios.samples(step)), strict=True)
    return [(x, scenarios.Split(order), {4: a, 7: b}) for x, order, a, b in micro]


def _updates(engine: Engine) -> float:
    """Return the number of updates that were applied."""
    return engine.state().scalars["updates"]


def _words(norms: Sequence[float]) -> str:
    return ", ".join(f"{norm:.3g}" for norm in norms)

"""The training engine: DeepSpeed behind six methods. Only this file imports DeepSpeed and builds its config dict.

    inputs -> engine(...) -> {"loss": ..., terms} -> engine.backward(loss) -> engine.step() -> engine.grad_norm

Guarantees at every ZeRO stage, number format, rank count and accumulation:
- parameters, gradients, their reduction and Adam's moments are fp32; bf16 and fp16 are autocast in the forward pass;
- one update per `accumulation` micro-batches, from the mean gradient over micro-batches and ranks, clipped by its norm;
- an update is skipped, moments included, if its gradient or the loss of any rank is not finite. `grad_norm` is then
  inf or nan, and `update_skipped` is true, except for an fp16 overflow that only lowers the loss scale
  (runs/nonfinite.py counts skipped updates and ends the run);
- `state()` and `load_state()` do not depend on rank count or stage, so any checkpoint loads into any layout.

Host syncs within a step: none at stage 0 in fp32 and bf16. In fp16 the loss scale reads one flag per update. Stages 1
to 3 sync several times per update inside DeepSpeed (norm, overflow check, partitions).

Gradients are averaged over ranks in buckets. At stage 0, gradient_reduction.py does it while the backward pass still
runs (a compiled step delivers all gradients at its end). At stages 1 to 3, DeepSpeed does it.

DeepSpeed's own `torch_autocast` is not used: at stages 1 to 3 it reduces the gradients of Linear layers in half
precision, so the result would depend on the stage. In fp16 its scaler (0.19.8) does not lower the scale after an
overflow, so every later update is skipped, and clipping sees scaled gradients. Hence `LossScale`.
"""

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from maedistill.errors import ConfigError, DataError
from maedistill.machine import Precision, autocast
from maedistill.processes.distributed import (
    broadcast_in_place,
    broadcast_object,
    broadcast_tensor,
    copy_to_main,
    device,
    is_main,
    open_group,
    rank,
    set_collective_timeout,
    world_size,
)
from maedistill.training.gradient_reduction import GradientReduction

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names them
FP16_DEVICES = {"cuda"}
REDUCE_BUCKET_SIZE = 25_000_000  # elements reduced at once: 100 MB, a quarter of ViT-B; DeepSpeed's default takes 2 GB
PERSISTENCE_THRESHOLD = 100_000  # stage 3 leaves smaller parameters whole on every rank


def initialize_distributed(timeout_seconds: int) -> None:
    """Open the process group (see `distributed.open_group`) and let DeepSpeed join it."""
    open_group(timeout_seconds)
    if device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # not at the top: it reads the environment and takes 0.5 s
    import deepspeed.ops

    for handler in deepspeed.utils.logger.handlers:  # it logs to stdout by default, which is for our output
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    if device().type == "cpu":
        # Without this, the first start compiles an op that training never uses: 42 s, a compiler, ninja, and a lock
        # file that hangs every later start if the compile is killed.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(dist.get_backend(), timeout=timedelta(seconds=timeout_seconds), verbose=False)


def shutdown_distributed() -> None:
    """Leave the process group after a success. After a failure just exit: the other ranks notice it sooner."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass
class TrainingState:
    """Unpartitioned CPU tensors by name, independent of the number of ranks and the ZeRO stage."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # parameters and persistent buffers
    moments: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {moment: {} for moment in MOMENTS})
    scalars: dict[str, float] = field(default_factory=dict)  # number of Adam updates; fp16's loss scale


@dataclass
class LossScale:
    """The factor on the loss in fp16: large enough to keep small gradients, halved when large ones overflow."""

    scale: float = 2.0**16
    finite_updates: int = 0  # since the scale last changed
    growth_interval: int = 2000

    def update(self, *, finite: bool) -> None:
        """Halve the scale after an overflow, double it after `growth_interval` updates without one."""
        if not finite:
            self.scale, self.finite_updates = self.scale / 2, 0
        elif self.finite_updates + 1 == self.growth_interval:
            self.scale, self.finite_updates = self.scale * 2, 0
        else:
            self.finite_updates += 1


class Engine:
    """A module under training. Build it on every rank with equal weights, on this rank's device or on the CPU.

    After each update every rank has rank 0's running statistics, as of BatchNorm: a checkpoint keeps those, and so
    whatever is computed with them is the same on all ranks and after a restart.

    optimizer: fused AdamW over all parameters of `module`. Set its learning rates in `optimizer.param_groups`.
    micro_batch: samples per rank and forward pass; accumulation: micro-batches per update.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: AdamW,
        *,
        zero: int,
        precision: Precision,
        clip: float | None,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        if precision == "fp16" and device().type not in FP16_DEVICES:
            raise ConfigError("engine.precision=fp16 needs a GPU", "set engine.precision to fp32, bf16 or auto")
        assert optimizer.defaults["fused"], "stage 0 skips an update through the fused kernel's found_inf"
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        assert not frozen, f"fixed tensors must be buffers: {frozen}"
        import deepspeed

        if device().type == "cpu":
            # On a CPU in bf16, torch's fused attention takes 2 to 7 times as long as the unfused one (17 to 65 tokens;
            # equal at 197). The switch is global: activation checkpointing must recompute with the same kernel.
            torch.backends.cuda.enable_flash_sdp(precision != "bf16")
        self.module, self.optimizer = module, optimizer
        self.zero, self.clip = zero, clip
        self.loss_scale = LossScale() if precision == "fp16" else None
        self.grad_norm = torch.zeros((), device=device())  # of the last update, over all ranks, before clipping
        self.update_skipped = torch.zeros((), dtype=torch.bool, device=device())  # whether it was skipped as non-finite
        self._parameters = dict(module.named_parameters())
        config = {  # DeepSpeed silently ignores unknown top-level keys, so a test checks that all were read
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch * accumulation * world_size(),
            "gradient_clipping": clip if clip is not None and zero else 0.0,  # at stage 0 we clip: it hides the norm
            "zero_optimization": {
                "stage": zero,
                "reduce_bucket_size": REDUCE_BUCKET_SIZE,
                "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            },
            "timers": {"throughput": {"enabled": False}},  # it would sync with the device at every step
        }
        for name, parameter in self._parameters.items():
            self._prepare(name, parameter)
        model = _Autocast(module, precision)
        self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for part in module.modules() if zero == 3 else ():
            for parameter in getattr(part, "borrowed", ()):  # DeepSpeed finds them itself, but only in the first pass
                deepspeed.zero.register_external_parameter(part, parameter)
        self._deepspeed.enable_backward_allreduce = bool(zero)
        self._reduction: GradientReduction | None = None
        if not zero and world_size() > 1:
            self._reduction = GradientReduction(list(self._parameters.values()), bucket_elements=REDUCE_BUCKET_SIZE)
        set_collective_timeout()  # DeepSpeed opens its own groups with the backend's default
        self._create_moments()
        self._running = [
            (part, name)
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
            if buffer.is_floating_point() and name not in part._non_persistent_buffers_set
            if name != "pos_embed"  # a fixed table
        ]

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Return the module's named losses for one micro-batch. The forward pass runs under autocast."""
        return self._deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss; DeepSpeed divides by `accumulation`."""
        loss = loss * (1 + 0 * loss.detach())  # times 1 or nan; nan spreads to all gradients of all ranks
        if self.loss_scale and self.zero:
            self._deepspeed.optimizer.override_loss_scale(self.loss_scale.scale)
        elif self.loss_scale:
            loss = loss * self.loss_scale.scale
        last = self._deepspeed.is_gradient_accumulation_boundary()
        if self._reduction and last:
            self._reduction.begin()
        self._deepspeed.backward(loss)
        if self._reduction and last:
            self._reduction.finish()

    def step(self) -> None:
        """End a micro-batch. After the last one of an update, change the weights and set `grad_norm`."""
        last = self._deepspeed.is_gradient_accumulation_boundary()
        if last and not self.zero:
            self._clip_gradients()
        self._deepspeed.step()
        if last and self.zero:
            self.grad_norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=device())
        if last:
            self.update_skipped = ~self.grad_norm.isfinite()
            broadcast_in_place([getattr(part, name) for part, name in self._running])
        if last and self.loss_scale:
            finite = not self.update_skipped
            self.update_skipped &= self.loss_scale.scale <= 1  # above 1, an overflow only lowers the scale
            self.loss_scale.update(finite=finite)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the unpartitioned shapes of all parameters and persistent buffers by name."""
        parameters = {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()}
        buffers = {name: buffer.shape for name, buffer in self._buffers().items()}
        return {name: tuple(shape) for name, shape in (parameters | buffers).items()}

    def state(self) -> TrainingState | None:
        """Gather on rank 0 everything that training changes; return None on the others. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = TrainingState(scalars=self._scalars())
        for name, parameter in self._parameters.items():
            copy_to_main(state.weights, name, safe_get_full_fp32_param(parameter) if self.zero == 3 else parameter)
            for moment in MOMENTS:
                if self.zero:
                    whole = safe_get_full_optimizer_state(parameter, moment)
                else:
                    whole = self.optimizer.state[parameter][moment]
                copy_to_main(state.moments[moment], name, whole)
        for name, buffer in self._buffers().items():
            copy_to_main(state.weights, name, buffer)
        return state if is_main() else None

    @torch.no_grad()
    def load_state(self, state: TrainingState | None) -> None:
        """Load rank 0's `state` (None on the others) on every rank, whatever layout it came from. Collective."""
        import deepspeed

        state = state or TrainingState()
        shapes = self.shapes()
        for name, parameter in self._parameters.items():
            weight = broadcast_tensor(state.weights.get(name), shapes[name])
            # At stage 3 the context gathers, takes rank 0's value and partitions again; else it does nothing.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero == 3):
                parameter.data.copy_(weight)
            for moment in MOMENTS:
                self._set_moment(parameter, moment, broadcast_tensor(state.moments[moment].get(name), shapes[name]))
        for name, buffer in self._buffers().items():
            buffer.copy_(broadcast_tensor(state.weights.get(name), shapes[name], dtype=buffer.dtype))
        if self.zero:
            self._deepspeed.optimizer.refresh_fp32_params()  # the flat copies that AdamW updates
        self._set_scalars(state.scalars)

    @torch.no_grad()
    def _prepare(self, name: str, parameter: nn.Parameter) -> None:
        """Make a parameter one that DeepSpeed (0.19.8) can send as bytes: whole in memory, and with a dimension."""
        if parameter.ndim and not (parameter.is_contiguous() and parameter.stride(-1) == 1):  # e.g. channels_last
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        if parameter.ndim:
            return
        if self.zero == 3:
            raise ConfigError(
                f"engine.zero: 3 partitions parameters, but {name} is a number without a dimension",
                "use engine.zero=2 or less, or give it the shape [1]",
            )
        parameter.copy_(broadcast_tensor(parameter.data, (), dtype=parameter.dtype))
        parameter.ds_optim_param = True  # type: ignore[attr-defined]  # which DeepSpeed does not send

    # -- stage 0: gradients are whole on every rank --

    def _clip_gradients(self) -> None:
        """Clip by the global norm; set `found_inf`, so that fused AdamW skips a non-finite update without a sync."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if self.loss_scale:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.scale)
        self.grad_norm = nn.utils.get_total_norm(gradients)
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters.values(), self.clip, self.grad_norm)
        self.optimizer.found_inf = (~self.grad_norm.isfinite()).float()  # type: ignore[attr-defined]

    # -- the layout of each stage: 0 whole, 1 and 2 partition the moments, 3 the weights as well --

    def _adam_parameters(self) -> Iterator[Tensor]:
        """Yield the tensors AdamW updates: the parameters, or from stage 1 on their flat partitions on this rank."""
        if self.zero == 3:
            return iter(self._deepspeed.optimizer.fp32_partitioned_groups_flat)
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _create_moments(self) -> None:
        """Create AdamW's moments before the first update: memory is then known, and saving and loading work at once."""
        for parameter in self._adam_parameters():
            zeros = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        if self.zero in (1, 2):
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()  # what `safe_get_*` reads

    def _set_moment(self, parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero == 0:
            self.optimizer.state[parameter][moment].copy_(whole)
        elif self.zero < 3:
            safe_set_full_optimizer_state(parameter, whole, moment)
        else:  # the `full` setter fails if the number of ranks does not divide the size (0.19.8)
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(whole.flatten(), (0, size * world_size() - whole.numel()))
            safe_set_local_optimizer_state(parameter, padded[rank() * size :][:size], moment)

    def _buffers(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.module.state_dict().items() if name not in self._parameters}

    def _scalars(self) -> dict[str, float]:
        scalars = {"updates": float(self.optimizer.state[next(self._adam_parameters())]["step"])}
        if self.loss_scale is not None:
            scalars |= {"scale": self.loss_scale.scale, "finite_updates": self.loss_scale.finite_updates}
        return scalars

    def _set_scalars(self, scalars: dict[str, float]) -> None:
        scalars = broadcast_object(scalars)
        missing = sorted(self._scalars().keys() - scalars.keys())
        if missing:
            raise DataError(
                f"the checkpoint lacks {', '.join(missing)} of the engine",
                "continue with the settings the run began with",
            )
        for parameter in self._adam_parameters():
            self.optimizer.state[parameter]["step"].fill_(scalars["updates"])
        if self.loss_scale is not None:
            self.loss_scale.scale = scalars["scale"]
            self.loss_scale.finite_updates = int(scalars["finite_updates"])


class _Autocast(nn.Module):
    """Wrapper that DeepSpeed trains: the same parameters, with the forward pass in the chosen number format."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.module, self.autocast = module, autocast(device(), precision)

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        with self.autocast:
            return self.module(*inputs)

"""DeepSpeed behind six methods: the only file that imports it, and the only place where its dict is made.

    inputs -> engine(...) -> {"loss": ..., terms} -> engine.backward(loss) -> engine.step() -> engine.grad_norm

What it promises at every ZeRO stage, number format, rank count and accumulation:
- parameters, gradients, their reduction and Adam's moments are fp32; bf16 and fp16 are autocast in the forward pass;
- one update per `accumulation` micro-batches, from the mean gradient over micro-batches and ranks, clipped by its norm;
- an update whose gradient, or the loss of any rank, is not finite is skipped, moments included; `grad_norm` then is
  inf or nan, and `broken` says so unless fp16's loss scale is what it teaches;
- `state()` and `load_state()` know neither rank count nor stage, so any checkpoint loads anywhere.

Host waits for the device within a step: none at stage 0 in fp32 and bf16. fp16's loss scale reads one verdict per
update. Stages 1 to 3 wait several times per update inside DeepSpeed (norm, overflow check, partitions).

Gradients of several ranks are averaged in buckets: at stage 0 by gradient_reduction.py, while the backward pass still
runs (a compiled step hands them over together, at its end); at stages 1 to 3 by DeepSpeed.

DeepSpeed's own `torch_autocast` is not used: at stages 1 to 3 it reduces the gradients of Linear layers in half
precision, so that the stage would change the result, and its fp16 loss scale never falls (see loss_scale.py).
"""

import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from maedistill.errors import ConfigError, DataError
from maedistill.processes.ranks import (
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
from maedistill.training.loss_scale import LossScale
from maedistill.training.state import MOMENTS, TrainingState

Precision = Literal["fp32", "bf16", "fp16"]

FP16_DEVICES = {"cuda"}
REDUCE_BUCKET_SIZE = 25_000_000  # elements reduced at once: 100 MB, a quarter of ViT-B; DeepSpeed's default takes 2 GB
PERSISTENCE_THRESHOLD = 100_000  # stage 3 leaves smaller parameters whole on every rank


def initialize_distributed(timeout_seconds: int) -> None:
    """Opens the process group (see `distributed.open_group`) and lets DeepSpeed join it. Once per process."""
    open_group(timeout_seconds)
    if device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # not at the top: it reads the environment, and costs half a second
    import deepspeed.ops

    for handler in deepspeed.utils.logger.handlers:  # warnings and worse; its default is stdout, which is ours
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    if device().type == "cpu":
        # Without this, the first start compiles an op that training never uses: 42 s, a compiler, ninja, and a lock
        # file that hangs every later start if the compile is killed.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(dist.get_backend(), timeout=timedelta(seconds=timeout_seconds), verbose=False)


def shutdown_distributed() -> None:
    """Leaves the group at the end of a run that went well. After a failure just exit: the others notice sooner."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A module under training. Build it on every rank with equal weights, on this rank's device or the CPU.

    optimizer: fused AdamW over all parameters of `module`. Drive its rates through `optimizer.param_groups`.
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
            # In bf16 torch's fused attention takes a CPU 2 to 7 times as long as written out (17 to 65 tokens; with 197
            # as long). For the whole process: what is computed again in the backward pass must be the same.
            torch.backends.cuda.enable_flash_sdp(precision != "bf16")
        self.module, self.optimizer = module, optimizer
        self.zero, self.clip = zero, clip
        self.loss_scale = LossScale() if precision == "fp16" else None
        self.grad_norm = torch.zeros((), device=device())  # of the last update, over all ranks, before clipping
        self.broken = torch.zeros((), dtype=torch.bool, device=device())  # whether it was left out for its numbers
        self._parameters = dict(module.named_parameters())
        self._deepspeed, *_ = deepspeed.initialize(
            model=_Autocast(module, precision),
            optimizer=optimizer,
            config=_deepspeed_config(zero, clip, micro_batch=micro_batch, accumulation=accumulation),
        )
        self._deepspeed.enable_backward_allreduce = bool(zero)
        self._reduction: GradientReduction | None = None
        if not zero and world_size() > 1:
            self._reduction = GradientReduction(list(self._parameters.values()), bucket_elements=REDUCE_BUCKET_SIZE)
        set_collective_timeout()  # DeepSpeed made groups of its own, with the backend's default
        self._create_moments()

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """The module's named losses for one micro-batch, its forward pass under autocast."""
        return self._deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's mean loss; DeepSpeed divides by `accumulation`."""
        loss = loss * (1 + 0 * loss.detach())  # times 1, or nan: then all gradients are, on all ranks
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

    def step(self) -> bool:
        """Ends a micro-batch. After the last one of an update: changes the weights, sets `grad_norm`, says True."""
        last = self._deepspeed.is_gradient_accumulation_boundary()
        if last and not self.zero:
            self._clip_gradients()
        self._deepspeed.step()
        if last and self.zero:
            self.grad_norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=device())
        if last:
            self.broken = ~self.grad_norm.isfinite()
        if last and self.loss_scale:
            finite = not self.broken
            self.broken &= self.loss_scale.scale <= 1  # above 1, an overflow is how the scale finds its place
            self.loss_scale.update(finite=finite)
        return last

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of all parameters and persistent buffers by name."""
        parameters = {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()}
        buffers = {name: buffer.shape for name, buffer in self._buffers().items()}
        return {name: tuple(shape) for name, shape in (parameters | buffers).items()}

    def state(self) -> TrainingState | None:
        """Collective. Gathers everything that training changes on rank 0; None on the others."""
        state = TrainingState(scalars=self._scalars())
        for name, parameter in self._parameters.items():
            copy_to_main(state.weights, name, self._whole_weight(parameter))
            for moment in MOMENTS:
                copy_to_main(state.moments[moment], name, self._whole_moment(parameter, moment))
        for name, buffer in self._buffers().items():
            copy_to_main(state.weights, name, buffer)
        return state if is_main() else None

    @torch.no_grad()
    def load_state(self, state: TrainingState | None) -> None:
        """Collective. Puts rank 0's `state` (None on the others) into every rank, whatever layout it came from."""
        state = state or TrainingState()
        shapes = self.shapes()
        for name, parameter in self._parameters.items():
            self._set_weight(parameter, broadcast_tensor(state.weights.get(name), shapes[name]))
            for moment in MOMENTS:
                self._set_moment(parameter, moment, broadcast_tensor(state.moments[moment].get(name), shapes[name]))
        for name, buffer in self._buffers().items():
            buffer.copy_(broadcast_tensor(state.weights.get(name), shapes[name], dtype=buffer.dtype))
        if self.zero:
            self._deepspeed.optimizer.refresh_fp32_params()  # the flat copies that AdamW updates
        self._set_scalars(state.scalars)

    # -- stage 0: gradients are whole on every rank --

    def _clip_gradients(self) -> None:
        """Global norm, clipping, and the verdict that makes fused AdamW skip a non-finite update without a sync."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if self.loss_scale:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.scale)
        self.grad_norm = nn.utils.get_total_norm(gradients)
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters.values(), self.clip, self.grad_norm)
        self.optimizer.grad_scale = None
        self.optimizer.found_inf = (~self.grad_norm.isfinite()).float()

    # -- the layout of each stage: 0 whole, 1 and 2 moments cut up, 3 weights as well --

    def _adam_parameters(self) -> Iterator[Tensor]:
        """The tensors that AdamW really updates: the parameters, or from stage 1 this rank's flat pieces of them."""
        if self.zero == 3:
            return iter(self._deepspeed.optimizer.fp32_partitioned_groups_flat)
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _create_moments(self) -> None:
        """What AdamW creates at its first update, now: memory is known, saving and loading need no first update."""
        for parameter in self._adam_parameters():
            zeros = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        if self.zero in (1, 2):
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()  # what `safe_get_*` reads

    def _whole_weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter) if self.zero == 3 else parameter.detach()

    def _whole_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.zero == 0:
            return self.optimizer.state[parameter][moment]
        return safe_get_full_optimizer_state(parameter, moment)

    def _set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        import deepspeed

        # Stage 3 gathers, lets rank 0 write, and cuts up again; for whole parameters the context does nothing.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero == 3):
            parameter.data.copy_(whole)

    def _set_moment(self, parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero == 0:
            self.optimizer.state[parameter][moment].copy_(whole)
        elif self.zero < 3:
            safe_set_full_optimizer_state(parameter, whole, moment)
        else:  # the `full` setter fails where the number of ranks does not divide the size (0.19.8)
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(whole.flatten(), (0, size * world_size() - whole.numel()))
            safe_set_local_optimizer_state(parameter, padded[rank() * size :][:size], moment)

    def _buffers(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.module.state_dict().items() if name not in self._parameters}

    def _scalars(self) -> dict[str, float]:
        updates = self.optimizer.state[next(self._adam_parameters())]["step"]
        if self.loss_scale is None:
            return {"updates": float(updates)}
        scale, finite_updates = self.loss_scale.scale, self.loss_scale.finite_updates
        return {"updates": float(updates), "scale": scale, "finite_updates": finite_updates}

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
    """The module as DeepSpeed sees it: the same parameters, forward pass in the chosen number format."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.module = module
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        with torch.autocast(device().type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.module(*inputs)


def _deepspeed_config(zero: int, clip: float | None, *, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's dict. Unknown top-level keys would be ignored silently: a test compares it with what it took."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size(),
        "gradient_clipping": clip if clip is not None and zero else 0.0,  # at stage 0 we clip: DeepSpeed hides the norm
        "zero_optimization": {
            "stage": zero,
            "reduce_bucket_size": REDUCE_BUCKET_SIZE,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
        },
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at every step
    }

"""What the engine tests run in real processes: `python -m tests.training.scenarios NAME FOLDER` on every rank.

Starting a process costs about 4 s (torch, DeepSpeed), so one process runs a whole scenario of many engines.
"""

import itertools
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maedistill.errors import ConfigError, DataError, PeerError
from maedistill.processes.distributed import (
    rank,
    world_size,
)
from maedistill.runs import checkpoint as checkpoint_file
from maedistill.runs.async_saver import Saver
from maedistill.runs.restore import load_latest
from maedistill.training import engine as engine_file
from maedistill.training.engine import Engine, initialize_distributed, shutdown_distributed
from maedistill.training.gradient_reduction import GradientReduction
from maedistill.training.optim import build_optimizer, build_schedule, parameter_groups

BATCH, STEPS, WIDTH = 12, 6, 5
ROUNDS = (("fp32", 1), ("fp32", 3), ("bf16", 3), ("fp16", 3))  # number format, accumulation
PEAK, CLIP, DECAY = 0.02, 0.05, 0.3


@dataclass(frozen=True)
class Split:
    """Stands for PatchSplit: a dataclass with a tensor among the inputs."""

    order: Tensor  # [B, 2]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)


class Toy(nn.Module):
    """Small, with what is awkward for ZeRO 3 and for averaging.

    Odd sizes, a token read from outside its module, activation checkpointing, a changing integer buffer, dataclass and
    dict inputs, loss terms that share a graph with the loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(WIDTH, 3, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.tensor([3.0]), persistent=False)

    def forward(self, x: Tensor, split: Split, target: dict[int, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        x = x + self.encoder.cls_token
        for layer in self.encoder.layers:
            x = x + checkpoint(layer, x, use_reentrant=False).tanh()
        y = self.head(self.encoder.norm(x)).float()
        pixels = (y.gather(1, split.order) - target[4][:, :2]).square().mean() * self.scale.squeeze()
        align = (y - target[7]).abs().mean()
        return {"loss": pixels + 0.5 * align, "pixels": pixels, "align/1": align}


def samples(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The global batch of an update: x [B, W], order [B, 2], two targets [B, 3]."""
    g = torch.Generator().manual_seed(step)
    x, a, b = (
        torch.randn(BATCH, WIDTH, generator=g),
        torch.randn(BATCH, 3, generator=g),
        torch.rand(BATCH, 3, generator=g),
    )
    return x, torch.rand(BATCH, 3, generator=g).argsort(1)[:, :2], a, b


def micro_batches(step: int, *, parts: int) -> list[tuple[Tensor, Split, dict[int, Tensor]]]:
    """The global batch cut in order into `parts` equal inputs of Toy."""
    return [(x, Split(o), {4: a, 7: b}) for x, o, a, b in zip(*(t.chunk(parts) for t in samples(step)), strict=True)]


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def build(zero: int, precision: str, accumulation: int):
    """Engine, schedule and (below stage 3) moving average around a fresh Toy."""
    module = toy()
    optimizer = build_optimizer(parameter_groups(module, DECAY), lr=PEAK, betas=(0.9, 0.95))
    schedule = build_schedule(optimizer, min_lr=0.001, warmup_steps=2, total_steps=STEPS)
    ema = ModelEmaV3(module, decay=0.8) if zero < 3 else None
    micro_batch = BATCH // (world_size() * accumulation)
    engine = Engine(
        module, optimizer, zero=zero, precision=precision, clip=CLIP, micro_batch=micro_batch, accumulation=accumulation
    )
    return engine, schedule, ema


def train(engine, schedule, ema, steps, accumulation: int, *, spoiled=()) -> list[float]:
    """Run updates; return their gradient norms. Rank 0's loss is NaN in `spoiled` steps."""
    norms = []
    for step in steps:
        schedule.step_update(step)
        mine = micro_batches(step, parts=world_size() * accumulation)[rank() * accumulation :][:accumulation]
        for i, inputs in enumerate(mine):
            loss = engine(*inputs)["loss"]
            engine.backward(loss * float("nan") if step in spoiled and rank() == 0 else loss)
            before = engine.update_skipped
            engine.step()
            assert (engine.update_skipped is not before) == (i == accumulation - 1), "only an update sets it"
        norms.append(float(engine.grad_norm))
        if ema is not None:
            ema.update(engine.module)
    return norms


def reference(precision: str, parts: int) -> tuple[dict[str, Tensor], list[float]]:
    """The same training in plain torch, every part of the batch in this process."""
    module = toy()
    optimizer = torch.optim.AdamW(parameter_groups(module, DECAY), lr=PEAK, betas=(0.9, 0.95))
    schedule = build_schedule(optimizer, min_lr=0.001, warmup_steps=2, total_steps=STEPS)
    dtype, norms = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision), []
    for step in range(STEPS):
        schedule.step_update(step)
        for inputs in micro_batches(step, parts=parts):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = module(*inputs)["loss"]
            (loss / parts).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in module.named_parameters()}, norms


def first(folder: Path) -> dict:
    """Every stage, number format and accumulation of `ROUNDS`, with its plain-torch reference; checkpoints half-way."""
    results = {}
    for precision, accumulation in ROUNDS:
        key = f"{precision}/{accumulation}"
        results[f"{key}/torch"] = reference(precision, world_size() * accumulation)
        for zero in range(4):
            engine, schedule, ema = build(zero, precision, accumulation)
            if engine.loss_scale:
                engine.loss_scale.scale = 1024.0  # does not overflow here, so that torch without one is a reference
            norms = train(engine, schedule, ema, range(STEPS // 2), accumulation)
            half = engine.state()
            with Saver(checkpoints(folder, world_size(), precision, accumulation, zero), keep=1) as saver:
                half_way = {
                    "state": {"samples": BATCH * STEPS // 2},
                    "extra_networks": beside(ema) | {"past": past(7.0)},
                }
                saver.save(step=STEPS // 2, engine=engine, **half_way)
            norms += train(engine, schedule, ema, range(STEPS // 2, STEPS), accumulation)
            results[f"{key}/{zero}"] = {"half": half, "final": engine.state(), "norms": norms, "ema": averaged(ema)}
    results["skipped"] = {zero: skip(zero) for zero in range(4)}
    results["overflow"] = {zero: overflow(zero) for zero in range(4)}
    results["settings"] = {zero: settings(zero) for zero in range(4)}
    results["time limits"] = time_limits()  # of all groups that DeepSpeed and we have opened by now
    if world_size() > 1:
        results["reduction"] = reduction()
    return results


def past(value: float) -> nn.Module:
    """A frozen network beside the trained one."""
    network = nn.Linear(2, 1).requires_grad_(False)
    nn.init.constant_(network.weight, value)
    return network


def beside(ema: ModelEmaV3 | None) -> dict[str, nn.Module]:
    return {"ema": ema.module} if ema is not None else {}


def averaged(ema: ModelEmaV3 | None) -> dict[str, Tensor] | None:
    return ema and {name: value.clone() for name, value in ema.module.state_dict().items()}


def skip(zero: int) -> tuple:
    """Gradient norms and states of a run whose update 2 is NaN on rank 0, and of one that leaves update 2 out."""
    engine, schedule, _ = build(zero, "fp32", 3)
    norms = train(engine, schedule, None, range(4), 3, spoiled={2})
    other, schedule, _ = build(zero, "fp32", 3)
    train(other, schedule, None, (0, 1, 3), 3)
    return norms, engine.state(), other.state()


def overflow(zero: int) -> tuple[list[float], dict[str, float]]:
    """Gradient norms and scalars of fp16 training that begins with a loss scale far too large."""
    engine, schedule, _ = build(zero, "fp16", 1)
    engine.loss_scale.scale, engine.loss_scale.growth_interval = 2.0**17, 2
    norms = train(engine, schedule, None, range(STEPS), 1)
    return norms, engine._scalars()


def settings(zero: int) -> dict:
    """What DeepSpeed understood of our dict: it ignores keys that it does not know."""
    engine = build(zero, "fp32", 3)[0]._deepspeed
    return {
        "stage": engine.zero_optimization_stage(),
        "batch": (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()),
        "accumulation": engine.gradient_accumulation_steps(),
        "clip": engine.gradient_clipping(),
        "bucket": engine.zero_reduce_bucket_size(),
        "waits for the device to time steps": engine.tput_timer.config.enabled,
        "reduces in": engine.communication_data_type,
    }


def time_limits() -> list[float]:
    """Return the seconds that each process group waits."""
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in dist.distributed_c10d._world.pg_map]


def reduction() -> dict:
    """Mean gradients of a few layers, in buckets of at most ten numbers, and when each bucket left."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))  # 4 x (9 + 3) numbers
    unused = nn.Parameter(torch.zeros(2))
    parameters = [unused, *layers.parameters()]
    reduce = GradientReduction(parameters, bucket_elements=10)
    events = []
    reduce._launch = lambda launch=reduce._launch: (events.append("bucket"), launch())
    layers[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("first weight"))
    for step in range(2):
        for micro in range(2):
            x = torch.full((2, 3), 1.0 + rank() + 10 * micro + 100 * step)
            for layer in layers:
                x = layer(x).tanh()
            if micro == 1:
                reduce.begin()
            x.square().mean().backward()
        reduce.finish()
        means = [p.grad.clone() for p in layers.parameters()]
        for p in layers.parameters():
            p.grad.zero_()  # the second update finds the buffers of the first
    return {"events": events, "means": means, "unused": unused.grad, "expected": expected_means(layers)}


def expected_means(layers: nn.ModuleList) -> list[Tensor]:
    """What `reduction` should come to, in plain torch: every rank computes the gradients of all ranks."""
    sums = [torch.zeros_like(p) for p in layers.parameters()]
    for number in range(world_size()):
        for micro in range(2):
            x = torch.full((2, 3), 101.0 + number + 10 * micro)
            for layer in layers:
                x = layer(x).tanh()
            for total, gradient in zip(sums, torch.autograd.grad(x.square().mean(), layers.parameters()), strict=True):
                total += gradient
    return [total / world_size() for total in sums]


def fail(error: Exception) -> None:
    raise error


def second(folder: Path) -> dict:
    """Load the checkpoints of `first`, of either number of ranks and any stage, into every stage; train on."""
    results = {}
    for ranks, (precision, accumulation), zero, target in itertools.product((1, 2), ROUNDS, range(4), range(4)):
        same = zero == target and ranks == world_size()
        if not same and (precision, accumulation) != ("fp32", 3):
            continue
        engine, schedule, ema = build(target, precision, accumulation)
        ema = ema if zero < 3 else None  # stage 3 has none to load
        kept = past(0.0)
        where = checkpoints(folder, ranks, precision, accumulation, zero)
        assert load_latest(where, engine, extra_networks=beside(ema) | {"past": kept}) == {
            "samples": BATCH * STEPS // 2
        }
        assert kept.weight.tolist() == [[7.0, 7.0]] and kept.weight.requires_grad is False, "on every rank"
        loaded = engine.state()
        norms = train(engine, schedule, ema, range(STEPS // 2, STEPS), accumulation)
        key = f"{ranks}/{precision}/{accumulation}/{zero}/{target}"
        results[key] = {"half": loaded, "final": engine.state(), "norms": norms, "ema": averaged(ema)}
    return results


def failures(folder: Path) -> list[str]:
    """Return what every rank sees of saves that fail and work, and of a load of nothing intact."""
    engine, schedule, ema = build(1, "fp32", 1)
    train(engine, schedule, ema, range(1), 1)
    folder, seen = folder / "failures", []
    real, checkpoint_file.save_file = (
        checkpoint_file.save_file,
        lambda tensors, path: fail(OSError(28, "No space left")),
    )
    saver = Saver(folder, keep=1)
    later = partial(saver.save, engine=engine, extra_networks=beside(ema), state={})
    seen += [caught(partial(later, step=step)) for step in (2, 3, 4, 5)]
    checkpoint_file.save_file = real
    saver = Saver(folder, keep=1)
    saver.save(step=1, engine=engine, extra_networks=beside(ema), state={})
    seen.append(caught(saver.close))
    checkpoint_file.write_manifest = lambda folder: fail(KeyError("a bug"))
    saver.save(step=2, engine=engine, extra_networks=beside(ema), state={})
    seen.append(caught(saver.finish_write))
    if rank() == 0:
        (folder / "step_000000001" / "COMPLETE").unlink()
    seen.append(caught(partial(load_latest, folder, engine)))
    return seen


def caught(work) -> str:
    try:
        return f"no error but {work()}"
    except (DataError, KeyError, PeerError) as error:
        return f"{type(error).__name__}: {error}"


class Given(nn.Module):
    """As callers give them: convolutions in channels_last, BatchNorm, and a learned temperature, which is a number."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        self.layers = layers if plain else layers.to(memory_format=torch.channels_last)
        self.temperature = nn.Parameter(torch.full([1] if plain else [], 0.5))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(images).mean((1, 2, 3)) * self.temperature).square().mean()}


def given(folder: Path) -> dict:
    """Two updates of a caller's module at every stage, and of one without what is odd about it; a second start."""
    results = {}
    for zero, plain in itertools.product(range(4), (True, False)):
        module = Given(plain=plain)
        optimizer = build_optimizer(parameter_groups(module, DECAY), lr=PEAK, betas=(0.9, 0.95))
        ema = ModelEmaV3(module, decay=0.8)
        try:
            engine = Engine(module, optimizer, zero=zero, precision="fp32", clip=1.0, micro_batch=2, accumulation=1)
        except ConfigError as error:
            results[zero, plain] = error.exit_code
            continue
        for step in range(2):
            images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(10 * step + rank()))
            engine.backward(engine(images.to(memory_format=torch.channels_last))["loss"])
            engine.step()
            if zero < 3:
                ema.update(module)
        own = {name: value.clone() for name, value in module.named_buffers()}
        state = engine.state()
        if zero < 3:
            with Saver(folder / f"given-{zero}-{plain}", keep=1) as saver:
                saver.save(step=2, engine=engine, extra_networks=beside(ema), state={})
            assert load_latest(folder / f"given-{zero}-{plain}", engine, extra_networks=beside(ema)) == {}
        results[zero, plain] = state, own
    initialize_distributed(50)
    return results | {"time limits": time_limits()}


def mutations(folder: Path) -> dict[str, dict[str, str]]:
    """What becomes of a run whose checkpoint lacks or changes one item; see mutations.py. fp16 has more to save."""
    from tests.training.mutations import endings  # not at the top: it takes the whole of maedistill

    return {precision: endings(folder, precision) for precision in ("fp32", "fp16")}


def checkpoints(folder: Path, *parts) -> Path:
    return folder / "-".join(map(str, parts))


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    engine_file.PERSISTENCE_THRESHOLD = 0  # so that stage 3 really cuts up this small model
    engine_file.FP16_DEVICES.add("cpu")  # autocast to fp16 works on a CPU, only slowly: enough to test the loss scale
    initialize_distributed(60)
    torch.save(globals()[name](folder), folder / f"{name}-of-{world_size()}-{rank()}.pt")
    shutdown_distributed()

"""The speed of a published config's training step, eager and compiled, against published loops.

    eager    the engine, as in a run with engine.compile=false
    bare     the same modules in a loop of plain torch, which shows the cost of the engine
    plain    the same losses as published loops compute them, on a GPU in fp16 with a loss scale
    compiled the engine, as in a run with engine.compile=true: student, teacher, images and masks
    student  the same with only the student compiled

All steps of a network run in one process, so that ratios compare them on one machine in the same state. The part
`details` adds other batch sizes, kernels, and what the engine and the compilation of each piece bring.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from gpu_parts import goals
from gpu_parts.check import MEMORY_FULL, Check
from gpu_parts.head import card
from gpu_parts.kernels import kernels_of
from gpu_parts.networks import NETWORKS, speed_config
from gpu_parts.peaks import measured_peak
from gpu_parts.steps import memory_gb, queue_seconds, rates, warm_up
from maedistill.benchmark.plain_step import StepComparison
from maedistill.benchmark.timing import ratio, spread
from maedistill.benchmark.training_step import TrainingStep
from maedistill.training.engine import initialize_distributed

EAGER, BARE, PLAIN, PUBLISHED = "eager", "bare torch loop", "plain loop", "plain loop, published decoder"
COMPILED, STUDENT = "compiled", "student compiled"
BATCH, OTHERS = 256, (512, 128, 64)
TINY_BATCH, TINY_OTHERS = 4, (8, 2)
DETAILS = "details"  # the part that measures more than the main figures
RoundRates = tuple[float, ...]  # images/s, round by round
_FIRST_COMPILE = 70.0  # expected seconds of a compilation, until one has been timed


@dataclass
class Network:
    """The network under test and its key figures. compile_seconds: duration of the last compilation."""

    check: Check
    comparison: StepComparison
    gflop: float  # per image
    peak: float  # FLOP/s
    compile_seconds: float


def run(check: Check) -> None:
    """Measure the network that `NETWORKS` has under this part's name, with the most important figures first."""
    initialize_distributed(120)
    network = _build(check)
    batch, steps, compiled = TINY_BATCH if check.tiny else BATCH, dict[str, TrainingStep](), None
    with check.guarded(EAGER):
        steps = _eager(network, batch)
    if check.tiny:
        check.skipped(COMPILED, "--tiny compiles nothing")
    else:
        with check.guarded(COMPILED):
            compiled = _compiled(network, batch, steps)
    if check.part == DETAILS:
        _details(network, batch, steps | ({COMPILED: compiled} if compiled is not None else {}))


def _details(network: Network, batch: int, steps: Mapping[str, TrainingStep]) -> None:
    """Measure what is of interest for one network only, because it takes long."""
    check, others = network.check, TINY_OTHERS if network.check.tiny else OTHERS
    if EAGER in steps:
        with check.guarded("other batch sizes"):
            for other in sorted(others):
                if not _fits(network, EAGER, steps[EAGER], other):
                    break
    network.comparison.set_batch_size(batch)
    for name in (EAGER, COMPILED):
        if name in steps:
            with check.guarded(f"{name}: kernels"):
                _note_kernels(network, name, steps[name])
    if COMPILED in steps:
        with check.guarded(f"{COMPILED}, in parts"):
            _compiled_in_parts(network, batch, steps[COMPILED])
        torch.compiler.reset()  # else torch compiles the second size for any size, which is slower
        if _has_time(network, f"{COMPILED}, batch {max(others)}"):
            with check.guarded(f"{COMPILED}, batch {max(others)}"):
                _fits(network, COMPILED, steps[COMPILED], max(others))


def _build(check: Check) -> Network:
    """Build the network and count its FLOPs."""
    batch = TINY_BATCH if check.tiny else BATCH
    comparison = StepComparison(speed_config(check, batch=batch, compiled=False), check.device)
    gflop = comparison.count_gflop(comparison.method, comparison.teacher)["total"]
    check.measured("work", f"{NETWORKS[check.part][0]}: {gflop:.4g} GFLOP per image", gflop=gflop)
    compiled = (row.values for row in check.rows.all() if row.check.startswith(f"{COMPILED}, batch"))
    earlier = [values["ready_seconds"] for values in compiled if "ready_seconds" in values]
    return Network(check, comparison, gflop, measured_peak(check), max(earlier, default=_FIRST_COMPILE))


def _eager(network: Network, batch: int) -> dict[str, TrainingStep]:
    """Measure all steps that are not compiled, in turn; return the ones that work."""
    check, comparison = network.check, network.comparison
    comparison.set_batch_size(batch)
    steps = {EAGER: comparison.engine_step(compiled=False), BARE: comparison.bare_step()}
    steps[PLAIN] = comparison.plain_step()
    if (published := comparison.published_method()) is not None:
        steps[PUBLISHED] = comparison.plain_step(published)
    ready = dict[str, float]()
    for name, step in steps.items():
        with check.guarded(name):
            ready[name] = warm_up(check, step)
    steps = {name: steps[name] for name in ready}
    found = rates(check, steps, batch=batch)
    for name in (EAGER, PLAIN, PUBLISHED):
        if name in found:
            _note(network, name, steps[name] if name == EAGER else None, found[name], batch=batch, ready=ready[name])
    if EAGER in found:
        _note_times(network, found, EAGER)
    if EAGER in found and BARE in found:
        _note_overhead(network, EAGER, found[BARE], found[EAGER])
    return steps


def _compiled(network: Network, batch: int, steps: Mapping[str, TrainingStep]) -> TrainingStep | None:
    """Measure training's compiled step in turn with eager and plain steps; return None if no time is left for it."""
    check = network.check
    if not _has_time(network, COMPILED):
        return None
    start = time.perf_counter()
    network.comparison.set_batch_size(batch)
    compiled = network.comparison.engine_step(compiled=True)
    warm_up(check, compiled)
    network.compile_seconds = time.perf_counter() - start
    rivals = {name: step for name, step in steps.items() if name in (PLAIN, PUBLISHED, EAGER)}
    found = rates(check, {COMPILED: compiled, **rivals}, batch=batch)
    _note(network, COMPILED, compiled, found[COMPILED], batch=batch, ready=network.compile_seconds)
    _note_times(network, found, COMPILED)
    return compiled


def _compiled_in_parts(network: Network, batch: int, compiled: TrainingStep) -> None:
    """Measure the compiled step without the engine, and with only the student compiled."""
    check, comparison = network.check, network.comparison
    if not _has_time(network, f"{STUDENT}, {COMPILED}: engine overhead", share=0.5):  # most is in the compile cache
        return
    comparison.set_batch_size(batch)
    start = time.perf_counter()
    draw, teacher = comparison.inputs(compiled=False)
    student = replace(compiled, draw=draw, teacher=teacher)
    steps = {COMPILED: compiled, BARE: comparison.bare_step(compiled=True), STUDENT: student}
    for step in steps.values():
        warm_up(check, step)
    ready = time.perf_counter() - start
    found = rates(check, steps, batch=batch)
    _note_overhead(network, COMPILED, found[BARE], found[COMPILED])
    _note(network, STUDENT, student, found[STUDENT], batch=batch, ready=ready)


def _fits(network: Network, name: str, step: TrainingStep, batch: int) -> bool:
    """Measure a step at another batch size; return False if it runs out of memory."""
    check = network.check
    try:
        network.comparison.set_batch_size(batch)
        ready = warm_up(check, step)
        _note(network, name, step, rates(check, {name: step}, batch=batch)[name], batch=batch, ready=ready)
    except torch.OutOfMemoryError:
        check.skipped(f"{name}, batch {batch} and more", MEMORY_FULL)
        return False
    finally:
        gc.collect()
        if check.on_card:
            torch.cuda.empty_cache()
    return True


def _note(
    network: Network, name: str, step: TrainingStep | None, found: RoundRates, *, batch: int, ready: float
) -> None:
    """Record a speed; with `step`, also the time of the host, the memory, and the share of the peak."""
    check, rate = network.check, spread(found).median
    words, goal = [f"{rate:.4g} images/s, {1e3 * batch / rate:.4g} ms a step"], ""
    values = {"images_per_second": rate, "ready_seconds": ready}
    if step is None:
        words.append(network.comparison.plain_precision)
    else:
        flops = rate * network.gflop * 1e9
        share, queued = flops / network.peak, queue_seconds(check, step)
        words += [f"{flops / 1e12:.4g} TFLOP/s", f"queued in {1e3 * queued:.3g} ms"]
        values |= {"flops": flops, "share_of_peak": share, "queue_seconds": queued}
        if check.on_card:
            words.append(f"{share:.1%} of the bf16 peak")
            memory = memory_gb(check, step, method=network.comparison.method, teacher=network.comparison.teacher)
            words, values = [*words, f"{memory:.1f} GB"], values | {"memory_gb": memory}
        goal = _goal(network, name, rate, share)
    check.measured(f"{name}, batch {batch}", ", ".join([*words, f"ready after {ready:.0f} s"]), goal=goal, **values)


def _goal(network: Network, name: str, rate: float, share: float) -> str:
    """Return the goals of the compiled step and whether they are met; empty for other steps."""
    if name != COMPILED or network.check.tiny:
        return ""
    words = [goals.at_least(goals.SHARE_OF_PEAK, share, ".0%")]
    if network.check.part == "speed":
        words.append(goals.at_least(goals.images_goal(card(), network.peak), rate, ",.0f"))
    return "; ".join(words)


def _note_times(network: Network, found: Mapping[str, RoundRates], name: str) -> None:
    """Record how many times as fast a step is as the plain loops."""
    for other in (PLAIN, PUBLISHED):
        if other in found:
            times = ratio(found[name], found[other])
            has_goal = name == COMPILED and other == PLAIN and not network.check.tiny
            goal = goals.at_least(goals.TIMES_PLAIN, times.median, "g") if has_goal else ""
            network.check.measured(f"{name} against {other}", f"{times} times as fast", goal=goal, times=times.median)


def _note_kernels(network: Network, name: str, step: TrainingStep) -> None:
    """Record the time of a step by kind of kernel."""
    check = network.check
    if check.tiny and check.on_card:
        check.skipped(f"{name}: kernels", "--tiny leaves them out on a card")
    else:
        check.measured(f"{name}: kernels", str(kernels_of(check, step, log=f"kernels_{name}.txt")))


def _note_overhead(network: Network, name: str, bare: RoundRates, engine: RoundRates) -> None:
    """Record how much longer a step through the engine takes than a bare one."""
    overhead = ratio(bare, engine).median - 1
    goal = "" if network.check.tiny else goals.below(goals.OVERHEAD, overhead, ".0%")
    network.check.measured(f"{name}: engine overhead", f"{overhead:.1%} over a {BARE}", goal=goal, share=overhead)


def _has_time(network: Network, name: str, *, share: float = 1.2) -> bool:
    """Return whether time is left for a compilation that takes `share` of the last one; record a skip if not."""
    check, needed = network.check, share * network.compile_seconds + 8
    if check.left > needed:
        return True
    check.skipped(name, f"no time: it takes about {needed:.0f} s, and {max(0, check.left):.0f} s are left")
    return False

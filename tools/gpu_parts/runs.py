"""Complete tiny runs of the tools: stopped, killed, in every number format; their losses are compared with the CPU's.

Without a GPU, the CPU's runs are compared with each other.
"""

from concurrent.futures import Future, ThreadPoolExecutor

from gpu_parts.check import TIME_UP, Check
from gpu_parts.pictures import small_shards
from gpu_parts.starts import Starts
from maedistill.errors import DataError

BITS, EXACT, ROUNDED, HALF, TERMS = 0.0, 1e-5, 1e-3, 3e-2, 1e-2  # largest relative difference of losses
_MOST_JOBS = 8


def run(check: Check) -> None:
    """Run all runs, as many at a time as there are cores, at most 8, and compare their losses."""
    starts = Starts(check, small_shards(check.work / f"{check.part}-pictures"))
    with ThreadPoolExecutor(min(_MOST_JOBS, check.cores)) as pool:
        tuned = None  # the teacher of fine-tuning
        if check.on_card:
            tuned = pool.submit(starts.whole, "tuned", "optim.epochs=1", tool="finetune", cpu=True)
        wait([pool.submit(starts.whole, "mae_cpu", "method=mae", cpu=True)])
        pretrained = pretrain(starts, pool)
        if tuned is not None:
            wait([tuned])
            wait([*finetune(starts, pool), *pretrained])
        else:
            wait(pretrained)
            check.skipped("bf16, fp16, fine-tuning with twelve terms", "no card: it would be the CPU against itself")
    judge(check, starts)


def pretrain(starts: Starts, pool: ThreadPoolExecutor) -> list[Future]:
    """Start the pre-training runs, most of which learn from `mae_cpu`."""
    dmae = ["method=dmae", f"teacher.source=run:{starts.run('mae_cpu')}", "align.student=[1]", "align.teacher=[1]"]
    exact = [*dmae, "teacher.precision=fp32"]
    runs = []
    if starts.check.on_card and not starts.check.tiny:  # first, because it takes longest
        runs.append(pool.submit(starts.whole, "dmae_compiled", *exact, "engine.compile=true"))
    runs += [
        pool.submit(starts.stopped, "dmae_stopped", *exact),
        pool.submit(starts.killed, "dmae_killed", *exact),
        pool.submit(starts.whole, "dmae", *exact),
        pool.submit(starts.whole, "dmae_zero3", *exact, "engine.zero=3"),
    ]
    if starts.check.on_card:
        runs.append(pool.submit(starts.whole, "mae", "method=mae"))
        runs.append(pool.submit(starts.whole, "dmae_cpu", *exact, cpu=True))
        half = ["engine.precision=bf16", "teacher.precision=bf16"]
        runs.append(pool.submit(starts.whole, "dmae_bf16", *dmae, *half))
        runs.append(pool.submit(starts.whole, "dmae_fp16", *exact, "engine.precision=fp16"))
        bits = [*exact, "engine.deterministic=true"]
        runs.append(pool.submit(starts.whole, "dmae_bits", *bits))
        runs.append(pool.submit(starts.killed, "dmae_bits_killed", *bits))
        runs.append(pool.submit(starts.whole, "dmae_fitted", *exact, "engine.micro_batch=null"))
    return runs


def finetune(starts: Starts, pool: ThreadPoolExecutor) -> list[Future]:
    """Start fine-tuning with every term of distillation, on the GPU and on the CPU."""
    features = "student: [1], teacher: [1]"
    terms = {
        "logits": "{weight: 1}",
        "dkd": "{weight: 1}",
        "hard_label": "{weight: 1, token: true}",
        "hints": "{weight: 1, student: [0], teacher: [1], normalize: whiten}",
        "attention_transfer": f"{{weight: 10, {features}}}",
        "attention": f"{{weight: 1, {features}}}",
        "token_relations": "{weight: 1, student: [1], teacher: [0]}",
        "rkd_distance": "{weight: 25}",
        "rkd_angle": "{weight: 50}",
        "similarity_preserving": "{weight: 30}",
        "pkt": "{weight: 30}",
        "contrastive": "{weight: 1}",
    }
    settings = [f"distill.{name}={value}" for name, value in terms.items()]
    settings += [f'distill.teachers=["run:{starts.run("tuned")}"]', "distill.precision=fp32"]
    return [
        pool.submit(starts.whole, "terms", *settings, tool="finetune"),
        pool.submit(starts.whole, "terms_cpu", *settings, tool="finetune", cpu=True),
    ]


def judge(check: Check, starts: Starts) -> None:
    """Compare the losses of pairs of runs, step by step."""
    again = ROUNDED if check.on_card else EXACT
    pairs = [("dmae_stopped", "dmae", again), ("dmae_killed", "dmae", again), ("dmae_zero3", "dmae", again)]
    if check.on_card:
        pairs = [("mae", "mae_cpu", ROUNDED), ("dmae", "dmae_cpu", ROUNDED), *pairs]
        pairs += [("dmae_bf16", "dmae", HALF), ("dmae_fp16", "dmae", HALF), ("terms", "terms_cpu", TERMS)]
        pairs += [("dmae_bits_killed", "dmae_bits", BITS), ("dmae_fitted", "dmae", ROUNDED)]
    if check.on_card and not check.tiny:
        pairs += [("dmae_compiled", "dmae", ROUNDED)]
    else:
        check.skipped("dmae_compiled", "--tiny compiles nothing")
    for name, other, bound in pairs:
        _compare(check, starts, name, other, bound=bound)


def _compare(check: Check, starts: Starts, name: str, other: str, *, bound: float) -> None:
    """Record the largest relative difference between the losses of two runs."""
    if {name, other} & starts.cut:
        check.skipped(f"{name} has the losses of {other}", TIME_UP)
        return
    try:
        found, expected = starts.losses(name), starts.losses(other)
    except DataError as error:
        check.verdict(f"{name} has the losses of {other}", False, error.cause)
        return
    apart = [abs(found[step] / expected[step] - 1) for step in found.keys() & expected.keys()]
    good = bool(apart) and found.keys() == expected.keys() and max(apart) <= bound
    figure = f"{len(found)} and {len(expected)} steps, losses within {max(apart, default=1):.1e}, bound {bound:g}"
    check.verdict(f"{name} has the losses of {other}", good, figure)


def wait(futures: list[Future]) -> None:
    """Wait for the futures in order; raise the first error among them."""
    for future in futures:
        future.result()

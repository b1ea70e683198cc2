"""The speed of the loader alone on images of a photograph's size, and the data wait of a training run that it feeds."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

from gpu_parts import goals
from gpu_parts.check import ROOT, TIME_UP, Check
from gpu_parts.networks import LIGHT
from gpu_parts.pictures import photo_shards
from maedistill.config.loader import load_config
from maedistill.config.plan import BatchPlan
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.loading.loader import BatchSampler, RandomCrops, host_batches
from maedistill.data.shards.open_index import open_index
from maedistill.pretraining.build import build_crops
from maedistill.runs.history import read_metrics

CONFIG = ROOT / "configs" / "imagenet" / "dmae_vit_b.yaml"
IMAGES, SIDE, BATCH, STEPS = 1024, (375, 500), 256, 120
TINY_IMAGES, TINY_SIDE, TINY_BATCH, TINY_STEPS = 48, (64, 64), 8, 6
TEACHER = ["teacher.source=random:vit_large_patch16_224"]
TINY = ["data.image_size=64", "student.model=vit_tiny_patch16_224", "student.depth=2", "decoder.depth=1"]
TINY += ["teacher.source=random:vit_tiny_patch16_224", "teacher.depth=2", "align.student=[1]", "align.teacher=[1]"]


def run(check: Check) -> None:
    """Measure the loader with half of the cores and with all but two, then a run."""
    count, side, batch = (TINY_IMAGES, TINY_SIDE, TINY_BATCH) if check.tiny else (IMAGES, SIDE, BATCH)
    shards = photo_shards(check.work / check.part, count, side=side)
    size = sum(file.stat().st_size for file in shards.glob("*.tar")) / count / 1e3
    check.measured("images", f"{count} JPEGs of {side[1]} x {side[0]}, {size:.0f} KB each", kilobytes=size)
    networks = TINY if check.tiny else [*LIGHT, *TEACHER]
    settings = [f"data.train={shards}/train-*.tar", f"optim.global_batch={batch}", f"engine.micro_batch={batch}"]
    settings += [f"run={check.work}/fed", *networks]
    config = load_config(CONFIG, settings, root=PretrainConfig).config
    most = max(1, check.cores - 2)
    for workers in sorted({max(1, check.cores // 2), most}):
        crops = build_crops(config, open_index(config.data.train))
        rate = _alone(crops, batch=batch, workers=workers, rounds=1 if check.tiny else 6)
        check.measured(f"alone, {workers} workers", f"{rate:.0f} images/s", images_per_second=rate)
    _feed(check, settings, count=count, batch=batch, workers=most)


def _alone(crops: RandomCrops, *, batch: int, workers: int, rounds: int) -> float:
    """Return the images per second of the loader without a consumer, after the batches prefetched at the start.

    Workers start together and take equally long, so batches come in rounds, of which only whole ones are counted.
    """
    sampler = BatchSampler(0, 10**6, plan=BatchPlan(batch, 1), rank=0, world_size=1)
    batches = host_batches(crops, sampler, workers=workers, pin_memory=False)
    for _ in itertools.islice(batches, 2 * workers):
        pass
    start = time.perf_counter()
    images = sum(len(one.images) for one in itertools.islice(batches, rounds * workers))
    return images / (time.perf_counter() - start)


def _feed(check: Check, settings: list[str], *, count: int, batch: int, workers: int) -> None:
    """Train for some steps, and record the share of the time that training waited for data after the first steps."""
    steps = TINY_STEPS if check.tiny else STEPS
    more = [f"data.workers={workers}", f"optim.epochs={steps * batch / count:g}", "optim.warmup_epochs=0"]
    more += ["log.every_steps=20" if not check.tiny else "log.every_steps=2", "log.save_every_epochs=1000"]
    more += ["log.pictures_every_epochs=null", "log.knn_every_epochs=null", "log.trackers=[]"]
    more += [f"engine.compile={str(not check.tiny).lower()}", "engine.precision=auto"]
    command = [sys.executable, "tools/pretrain.py", str(CONFIG), *settings, *more]
    with check.log("loader_fed.log").open("w") as log:
        try:
            ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(1, check.left))
            code = ended.returncode
        except subprocess.TimeoutExpired:
            code = None
    records = [record for record in read_metrics(check.work / "fed") if "data_wait" in record][2:]
    if code is None:
        check.skipped("the end of the run it feeds", TIME_UP)
    elif code != 0:
        check.verdict("a run it feeds", False, f"exit code {code}: {_last_line(check.log('loader_fed.log'))}")
    if code or not records:
        return
    rate, wait, memory = (
        sum(record[name] for record in records) / len(records)
        for name in ("images_per_second", "data_wait", "memory_gb")
    )
    figure = f"{rate:.0f} images/s, waits {wait:.1%} of the time, {memory:.1f} GB, {workers} workers"
    goal = "" if check.tiny else goals.below(goals.DATA_WAIT, wait, ".0%")
    check.measured("a run it feeds", figure, goal=goal, images_per_second=rate, data_wait=wait)


def _last_line(log: Path) -> str:
    """Return the last line of a run's log."""
    return next(iter(log.read_text(errors="replace").strip().splitlines()[-1:]), "it said nothing")[:300]

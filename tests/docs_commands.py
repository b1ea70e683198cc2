"""Run the commands of README.md and docs/ on tiny images with tiny networks: `make docs-commands`.

    python -m tests.docs_commands             all, some minutes
    python -m tests.docs_commands evaluation  those of the pages whose name has this word

Each command runs as the page has it, in a folder that has the data and the runs that pages name, with settings behind
it that make it small. `NOT_RUN` says which commands cannot run here, and why; the launchers before a command
(torchrun, srun, deepspeed) are left out: tests/test_pretrain.py and tests/faults/test_signals.py start them.
tests/test_docs.py parses all.
"""

import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from maedistill import cli
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from tests.test_docs import LINES

NOT_RUN = {  # a pattern of the command line: the reason
    r"quickstart": "some minutes; `make quickstart` runs it",
    r"shards (imagenet|cifar10)|SRC": "needs archives, or downloads them",
    r"(evaluate|against|source=)\S* ?(timm|hf-hub):": "downloads weights",
    r"benchmark (step|scale|cost)": "minutes of a quiet machine; tests/benchmark runs them at small sizes",
    r"--extend": "continues a run of hours; tests/test_pretrain.py extends a small one",
    r"--val-labels": "needs a val folder without classes; tests/data/shards/test_folders.py has one",
    r"study .*--report": "needs a study that has run; tests/test_study_tool.py reports one",
    r"log.trackers=": "needs wandb and mlflow; tests/runs/test_real_trackers.py starts runs with them",
    r"codistillation=": "waits for another run; tests/test_codistillation.py runs two",
    r"s3://|gs://|hf://|https://": "needs a store; tests/data/remote has servers of its own",
    r"--push-to-hub": "needs a hub; tests/exporting/test_hub.py has one of its own",
    r"--explain KEY|\bCONFIG\b|\bFILE\b|my_student.yaml": "stands for a file or key of the reader",
}
HEAVY = (
    "timm", "maedistill.pretraining.loop", "maedistill.finetuning.loop", "maedistill.evaluation.scorecard",
    "maedistill.evaluation.feature_eval", "maedistill.evaluation.embed", "maedistill.evaluation.segmentation",
    "maedistill.exporting.scorecards", "maedistill.study.runner", "maedistill.analysis.knowledge",
)  # fmt: skip
SIZES = ["data.image_size=32", "data.workers=0", "optim.warmup_epochs=0.1", "optim.global_batch=12"]
SIZES += ["engine.micro_batch=12"]
NETWORK = ["student.width=32", "student.num_heads=2", "student.patch_size=8"]
PRETRAIN = [*SIZES, *NETWORK, "optim.epochs=0.5", "decoder.width=16", "decoder.depth=1", "decoder.num_heads=2"]
TEACHER = ["teacher.source=random:vit_large_patch16_224", "teacher.model=null", "teacher.width=32"]
TEACHER += ["teacher.num_heads=2", "teacher.patch_size=8", "teacher.depth=24"]
CLASSIFIER = re.compile(r"finetuned|tuned|taught|classifier|_kd|scratch")


def small(words: list[str]) -> list[str]:
    """Return the command with settings that make it small, and with paths of the sandbox."""
    words = [re.sub(r"\{\d+\.\.\d+\}", "*", word).replace("=/data/", "=data/") for word in words]
    words = [re.sub(r"^/data/", "data/", word) for word in words]
    if words[0] == "study" and not {"--dry-run", "--report"} & set(words):
        words.append("--dry-run")  # the trainings take hours
    if words[0] == "knowledge":
        words += ["--count", "4", "--steps", "2", "--draws", "2"]
    if words[0] == "benchmark":
        words += ["--images", "64", "--rounds", "1"]
    if "--int8" in words:
        words += ["--max-drop", "100"]  # of 24 images
    if words[0] not in ("pretrain", "finetune") or {"--explain", "--print-config"} & set(words):
        return words
    if words[0] == "pretrain":
        is_alone = words[1].partition("/")[2].startswith(("mae", "ema", "teacher")) or "method=mae" in words
        method = ["generate.num_heads=2"] if "amd" in words[1] and "generate.by=decoder" not in words else []
        return words + PRETRAIN + method + ([] if is_alone else TEACHER)
    text = shlex.join(words)
    words = [re.sub(r"(stop_epoch|warmup_epochs): \d+", r"\1: 0.2", word) for word in words]
    words = [re.sub(r'"(timm|run):[^"]*"', '"run:runs/classifier"', word) for word in words]
    epochs = "optim.epochs=8" if "label_fraction" in text else "optim.epochs=0.5"
    network = ["student.model=null"] if "init.source" in text else NETWORK
    return [*words, *SIZES, *network, epochs, "engine.micro_batch=6", "log.eval_every_epochs=null"]


def reason_not_to_run(words: list[str]) -> str | None:
    """Return why a command cannot run here, or None."""
    line = " ".join(words)
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)), None)


def run(words: list[str], log: Path) -> int:
    """Run `maedistill WORDS` in a child process that has imported everything; return its exit code."""
    child = os.fork()
    if child == 0:
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.argv = ["maedistill", *words]
        cli.main()  # ends the process
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare() -> None:
    """Write images, shards and one run of each stage, under the names that the pages use."""
    draws = np.random.default_rng(0)
    for i in range(120):
        split, label = ("train", "val")[i >= 96], "abc"[i % 3]
        pixels = draws.uniform(0, 255, (32, 32, 3)).astype(np.uint8)
        for folder in (f"data/imagenet/{split}/{label}", f"data/photos/{label}", f"photos/{label}", f"FOLDER/{label}"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(f"{folder}/{i:03d}.png")
        for folder, array in (("images", pixels), ("annotations", pixels[..., 0] % 4)):
            place = Path("ade20k", folder, "training" if split == "train" else "validation")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"{i:03d}.png")
    make_shards(open_folder(Path("data/imagenet")), Path("shards/in1k"), images_per_shard=24)
    for name in ("shards/cifar10", "shards/imagenette", "shards/photos", "SHARDS", "SHARDS256"):
        shutil.copytree("shards/in1k", name)
    shutil.copy("shards/cifar10/val-000000.tar", "shards/cifar10/test-000000.tar")
    data = ["data.train=shards/in1k/train-*.tar", "data.val=shards/in1k/val-*.tar", "optim.ema=0.9"]
    big = "student.model=vit_large_patch16_224"
    small_ones = [
        small(["pretrain", "imagenet/mae_vit_s", *data, "run=runs/student", big]),
        small(["finetune", "finetune/vit_small", *data, "run=runs/classifier", "init.source=run:runs/student"]),
    ]
    for name, more in {
        "dmae_s_exits": ["student.exits=[2,5,8]", "distill.exits.weight=1"],
        "dmae_s_pair": ['distill.mutual={weight: 1, students: ["", ""]}'],
    }.items():
        words = ["finetune", "finetune/vit_small", *data, f"run=runs/{name}", "init.source=run:runs/student", *more]
        small_ones.append(small(words))
    for words in small_ones:
        code = run(words, Path("prepare.log"))
        assert code == 0, Path("prepare.log").read_text()
    formats = ["--format", "timm,onnx,torch_export", "--val", "shards/in1k"]
    assert run(["export", "runs/classifier", *formats], Path("prepare.log")) == 0, Path("prepare.log").read_text()
    shutil.copytree("runs", "prepared")  # commands of one page change runs that another page copies


def name_runs(words: list[str]) -> list[str]:
    """Copy the prepared runs to the names that a command reads, and give what it writes a name of its own."""
    for name in re.findall(r"runs/\w+", " ".join(word for word in words if not word.startswith("run="))):
        if not Path(name).exists():
            shutil.copytree("prepared/classifier" if CLASSIFIER.search(name) else "prepared/student", name)
    return [f"run=out/{time.monotonic_ns()}" if word.startswith("run=") else word for word in words]


def main() -> int:
    """Run every command once; return 1 if one failed."""
    pages = sys.argv[1:]
    lines = {tuple(words): page.name for page, words in LINES if not pages or any(p in page.name for p in pages)}
    failed = ran = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for module in HEAVY:  # once, not in every child
            import_module(module)
        prepare()
        for words, page in lines.items():
            reason = reason_not_to_run(list(words))
            start, code = time.monotonic(), 0
            if reason is None:
                if words[0] == "shards" and "--verify" not in words:
                    shutil.rmtree(words[2], ignore_errors=True)
                code, ran = run(name_runs(small(list(words))), Path("log")), ran + 1
            failed += code != 0
            state = f"not run: {reason}" if reason else f"exit {code}, {time.monotonic() - start:.1f} s"
            print(f"{page:<20} {shlex.join(words)[:90]:<90}  {state}", flush=True)
            if code:
                print(Path("log").read_text()[-1500:], flush=True)
        print(f"{ran} commands ran, {failed} failed, {len(lines) - ran} not run")
        os.chdir("/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

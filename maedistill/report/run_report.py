"""The report of a run: report.md with its results, curves and newest picture. comparison.py compares several.

It reads run folders only, so it can be made again at any time. Curves need matplotlib and are left out without it.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maedistill.config.pretrain import PretrainConfig
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import duration, read_metrics
from maedistill.runs.records import write_text

KNN_CAVEAT = (
    "kNN on frozen features is a trend, no forecast: masked autoencoders have been reported at 11 % kNN beside 81 % "
    "after fine-tuning."
)

PICTURE_NOTE = (
    "Where the pixel target is normalised, predicted patches are shown with the mean and contrast of the true patch, "
    "as MAE's own pictures are: they say whether structure is found, not brightness."
)


def write_run_report(folder: RunFolder) -> Path:
    """Write RUN/report.md with settings, losses, curves, newest picture and the next commands; return its path."""
    config, records = folder.load_config(), read_metrics(folder.path)
    metadata = folder.metadata()
    last = summary(records)
    curve = draw_curves({config.method: records}, folder.path / "curves.png")
    lines = [
        f"# {folder.path.name}: {config.method} pre-training of {config.student.title}",
        "",
        f"- {config.optim.epochs:g} epochs of {metadata['data']['images']:,} images, {last['step']} steps, "
        f"global batch {config.optim.global_batch}, lr {config.optim.peak_lr:.3g}",
        f"- teacher: {metadata['teacher'] or 'none'}",
        f"- license of the weights that went in: {metadata['license']}",
        f"- training time {duration(last['seconds'])} at {last['rate']:.0f} images/s per rank",
        f"- command: `{metadata['starts'][-1]['command']}`, started {len(metadata['starts'])} time(s)",
        "",
        *losses_table({folder.path.name: (config, last)}),
        "",
        KNN_CAVEAT,
        "",
        *([f"![losses]({curve.name})", ""] if curve else []),
        *last_picture(folder, folder.path),
        PICTURE_NOTE,
        "",
        "Next: fine-tune this student, or distil it into one of half the width:",
        "",
        f"    {shlex.join(finetune_command(folder, config))}",
        f"    {shlex.join(next_command(folder, config))}",
        "",
    ]
    write_text(folder.report, "\n".join(lines))
    return folder.report


def write_finetune_report(folder: RunFolder) -> Path:
    """Write RUN/report.md with accuracy, settings, curves and the next command; return its path."""
    config, records, metadata = folder.load_config(), read_metrics(folder.path), folder.metadata()
    last, scores = summary(records), [record for record in records if "top1" in record]
    score = scores[-1]
    averaged = [record for record in records if "ema_top1" in record]
    curve = draw_curves({folder.path.name: records}, folder.path / "curves.png")
    name = metadata["network"]["name"]
    lines = [
        f"# {folder.path.name}: {name} fine-tuned",
        "",
        f"**top-1 {percent(score['top1'], score['images'])}**, top-5 {percent(score['top5'], score['images'])} on "
        f"{score['images']:,} validation images, each counted once; loss {score['val_loss']:.4f}",
        "",
        *([f"- moving average: top-1 {percent(averaged[-1]['ema_top1'], score['images'])}"] if averaged else []),
        f"- start: {metadata['init'] or 'from scratch'}",
        *([f"- teacher: {metadata['teacher']}"] if metadata.get("teacher") else []),
        f"- {config.optim.epochs:g} epochs of {metadata['data']['images']:,} images, {last['step']} steps, "
        f"global batch {config.optim.global_batch}, lr {config.optim.peak_lr:.3g}, layer decay "
        f"{config.optim.layer_decay:g}, seed {config.seed}",
        f"- license of the weights that went in: {metadata['license']}",
        f"- training time {duration(last['seconds'])} at {last['rate']:.0f} images/s per rank",
        f"- command: `{metadata['starts'][-1]['command']}`, started {len(metadata['starts'])} time(s)",
        "",
        *([f"![loss and accuracy]({curve.name})", ""] if curve else []),
        "Next: hand the network over as a timm model:",
        "",
        f"    {shlex.join(['python', 'tools/export.py', str(folder.path)])}",
        "",
    ]
    write_text(folder.report, "\n".join(lines))
    return folder.report


def percent(count: int, total: int) -> str:
    """Format a share: `81.23 % (4061 of 5000)`."""
    return f"{100 * count / total:.2f} % ({count} of {total})"


def finetune_command(folder: RunFolder, config: PretrainConfig) -> list[str]:
    """Return the command that fine-tunes this run on the same data, with the recipe for its size if there is one."""
    sizes = ("vit_tiny", "vit_small", "vit_base", "vit_large")
    recipe = next((size for size in sizes if config.student.model.startswith(size)), "vit_base")
    if config.data.image_size <= 64:
        recipe = "small_images"
    overrides = [f"init.source=run:{folder.path}", f"run={folder.path}_finetuned", f"data.train={config.data.train}"]
    overrides += [f"data.val={config.data.val or 'VALIDATION_SHARDS'}", f"data.image_size={config.data.image_size}"]
    if recipe != "small_images":
        overrides += ["student.model=null"]  # the source knows its changed dimensions
    return ["python", "tools/finetune.py", f"configs/finetune/{recipe}.yaml", *overrides]


def next_command(folder: RunFolder, config: PretrainConfig) -> list[str]:
    """Return the command that distils this run by DMAE into a student of half the width, same data and schedule."""
    path, arch = str(folder.path), config.student_architecture
    overrides = ["method=dmae", f"run={path}_small", f"teacher.source=run:{path}"]
    described = config.teacher.model_dump(exclude={"source", "precision"})  # settings of this run's own teacher
    overrides += [f"teacher.{key}=null" for key, value in described.items() if value is not None]
    overrides += ["masks.teacher_keep_ratio=null"] if config.masks.teacher_keep_ratio is not None else []
    if arch is not None:
        tap = max(0, arch.depth * 3 // 4 - 1)  # DMAE's 3/4 of the depth, block 17 of 24
        overrides += [f"student.width={arch.width // 2}", f"align.student=[{tap}]", f"align.teacher=[{tap}]"]
    return ["python", "tools/pretrain.py", str(folder.config), *overrides]


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a run's last losses and kNN, its steps, training time in seconds, mean images per second and rank."""
    steps = [record for record in records if record.get("loss") is not None]  # null: no update was finite
    probes = [record["knn"] for record in records if "knn" in record]
    rates = [record["images_per_second"] for record in steps]
    last = dict(steps[-1])
    last["knn"] = probes[-1] if probes else None
    last["rate"] = len(rates) / sum(1 / rate for rate in rates)  # harmonic mean, since each rate covers as many images
    last["seconds"] = last.pop("trained_seconds")
    return last


def losses_table(rows: Mapping[str, tuple[PretrainConfig, Mapping[str, Any]]]) -> list[str]:
    """Return a Markdown table with one line per run; alignment and generation are means over pairs."""
    lines = [
        "| run | method | student | epochs | loss | pixels | align | generate | kNN | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (config, last) in rows.items():
        knn = "-" if last["knn"] is None else f"{last['knn']:.1%}"
        cells = [name, config.method, config.student.title, f"{config.optim.epochs:g}", f"{last['loss']:.4f}"]
        cells += [
            _mean_text(last, "pixels"),
            _mean_text(last, "align/"),
            _mean_text(last, "generate/"),
            knn,
            duration(last["seconds"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mean_text(values: Mapping[str, Any], prefix: str) -> str:
    found = [value for name, value in values.items() if name.startswith(prefix)]
    return f"{sum(found) / len(found):.4f}" if found else "-"


def last_picture(folder: RunFolder, relative_to: Path) -> list[str]:
    """Return the Markdown of the newest reconstruction sheet; empty if there is none."""
    pictures = sorted(folder.pictures.glob("step_*.png"))
    if not pictures:
        return []
    return [f"![what is seen, predicted and true]({os.path.relpath(pictures[-1], relative_to)})", ""]


def draw_curves(records: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path | None:
    """Draw losses, alignment, probes and accuracy over epochs, one line per run. Returns None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = [
        ("pixels", "pixel loss"),
        ("align/", "direct alignment"),
        ("generate/", "generated alignment"),
        ("knn", "kNN"),
        ("linear", "linear probe"),
        ("cross_entropy", "cross-entropy"),
        ("accuracy", "top-1"),
    ]
    shown = [(prefix, label) for prefix, label in panels if any(_series(r, prefix)[0] for r in records.values())]
    figure = Figure(figsize=(4 * len(shown), 3.2), layout="constrained")
    for axes, (prefix, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name, run in records.items():
            epochs, values = _series(run, prefix)
            if epochs:
                few = prefix in ("knn", "linear", "accuracy") or len(epochs) < 3  # too few points for a visible line
                axes.plot(epochs, values, label=name, marker="o" if few else None, markersize=3)
        axes.set(xlabel="epoch", title=label)
        axes.grid(alpha=0.3)
        axes.legend()
    FigureCanvasAgg(figure).print_png(path)
    return path


def _series(records: Sequence[Mapping[str, Any]], prefix: str) -> tuple[list[float], list[float]]:
    """Return epochs and mean values of the metrics whose names start with `prefix`."""
    epochs, values = [], []
    for record in records:
        values_of = record | ({"accuracy": record["top1"] / record["images"]} if "top1" in record else {})
        found = [value for name, value in values_of.items() if name.startswith(prefix) and value is not None]
        if found:
            epochs.append(record["epoch"])
            values.append(sum(found) / len(found))
    return epochs, values

"""The report of a run: report.md with its results, curves and newest picture.

It reads run folders only, so it can be made again at any time. Curves need matplotlib and are left out without it.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import DataError
from maedistill.escaping import code, markdown, shown
from maedistill.report.curves import draw_curves, mean_metric
from maedistill.report.formatting import KNN_CAVEAT, interval_text, markdown_table, percent, score_text
from maedistill.runs.history import duration, own_method, read_metrics
from maedistill.runs.records import write_text

if TYPE_CHECKING:  # its import takes seconds, for which report pages need not wait
    from maedistill.runs.folder import RunFolder


_OF_THE_IMAGES = {"index", "image_key", "label_key", "exif", "eval_crop"}  # keys of `data` that both stages share
PICTURE_NOTE = (
    "Where the pixel target is normalised, predicted patches are shown with the mean and contrast of the true patch, "
    "as in MAE's own pictures: they show whether structure is predicted, not brightness."
)


def write_run_report(folder: "RunFolder") -> Path:
    """Write RUN/report.md with settings, losses, curves, newest picture and the next commands; return its path."""
    config, records, metadata = folder.load_config(), read_metrics(folder.path), folder.metadata()
    assert isinstance(config, PretrainConfig)
    last, curve = summary(records, folder.path), _draw_run(folder, records, metadata)
    method = own_method(metadata) or config.method
    lines = [
        f"# {markdown(folder.path.name)}: {markdown(method)} pre-training of {markdown(config.student.title)}",
        "",
        f"- {config.optim.epochs:g} epochs of {metadata['data']['images']:,} images, {last['step']} steps, "
        f"global batch {config.optim.global_batch}, lr {config.optim.peak_lr:.3g}",
        f"- teacher: {markdown(metadata['teacher'] or 'none')}",
        f"- license of the weights used: {markdown(metadata['license'])}",
        f"- training time {duration(last['seconds'])} at {last['rate']:.0f} images/s per rank",
        f"- command: {code(metadata['starts'][-1]['command'])}, {_times(len(metadata['starts']))}",
        "",
        *_losses_table(config, method, last),
        "",
        *([KNN_CAVEAT, ""] if last["knn"] is not None else []),
        *([f"![losses]({curve.name})", ""] if curve else []),
        *(picture := _last_picture(folder)),
        *([PICTURE_NOTE, ""] if picture and config.pixels.target != "raw" else []),
        "Next: fine-tune this student:",
        "",
        *(f"    {shown(shlex.join(words))}" for words in next_commands(folder.path, config, metadata)),
        "",
    ]
    write_text(folder.report, "\n".join(lines))
    return folder.report


def write_finetune_report(folder: "RunFolder") -> Path:
    """Write RUN/report.md with accuracy, settings, curves and the next command; return its path."""
    config, records, metadata = folder.load_config(), read_metrics(folder.path), folder.metadata()
    assert isinstance(config, FinetuneConfig)
    score = [record for record in records if "top1" in record][-1]
    correct, images = score["top1_correct"], score["images"]
    averaged = [record for record in records if "ema_top1" in record]
    without = f", without {bad:,} that cannot be decoded" if (bad := score.get("bad_images", 0)) else ""
    left_out: dict[str, int] = metadata.get("left_out") or {}
    last, curve = summary(records, folder.path), _draw_run(folder, records, metadata)
    lines = [
        f"# {markdown(folder.path.name)}: {markdown(metadata['network']['name'])} fine-tuned",
        "",
        f"**top-1 {percent(correct, images)}**, 95 % interval {interval_text(correct, images)}; "
        f"top-5 {percent(score['top5_correct'], images)} on {images:,} validation images, each counted once{without}; "
        f"loss {score['val_loss']:.4f}. The interval is Wilson's; it does not cover another seed.",
        "",
        *([f"- moving average: top-1 {score_text(averaged[-1]['ema_top1_correct'], images)}"] if averaged else []),
        *(f"- {markdown(name)}: top-1 {score}" for name, score in part_scores(records, metadata).items()),
        f"- start: {markdown(metadata['init'] or 'from scratch')}",
        *([f"- teacher: {markdown(metadata['teacher'])}"] if metadata.get("teacher") else []),
        *(f"- codistilled without {markdown(peer)} from step {step} on" for peer, step in left_out.items()),
        f"- {config.optim.epochs:g} epochs of {metadata['data']['images']:,} images, {last['step']} steps, "
        f"global batch {config.optim.global_batch}, lr {config.optim.peak_lr:.3g}, layer decay "
        f"{config.optim.layer_decay:g}, seed {config.seed}",
        f"- license of the weights used: {markdown(metadata['license'])}",
        f"- training time {duration(last['seconds'])} at {last['rate']:.0f} images/s per rank",
        f"- command: {code(metadata['starts'][-1]['command'])}, {_times(len(metadata['starts']))}",
        "",
        *([f"![loss and accuracy]({curve.name})", ""] if curve else []),
        *(["![input of the first step](pictures/input.png)", ""] if (folder.pictures / "input.png").exists() else []),
        f"Next: hand the network over as a timm model{', or a part of it alone' if _part_names(metadata) else ''}:",
        "",
        *(f"    {shown(shlex.join(words))}" for words in next_commands(folder.path, config, metadata)),
        "",
    ]
    write_text(folder.report, "\n".join(lines))
    return folder.report


def _part_names(metadata: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what was trained beside the network itself, by the prefix of its metrics: the option that names it."""
    exits = {f"exit{block}_": ["--exit", str(block)] for block in metadata.get("exits") or ()}
    peers = range(1, len(metadata.get("peers") or ()) + 1)
    return exits | {f"peer{number}_": ["--peer", str(number)] for number in peers}


def part_scores(records: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the last top-1 of exits and peers, and of all students together, by name, each with its interval."""
    last = {name: value for record in records for name, value in record.items()}
    names = {prefix: " ".join(words).removeprefix("--") for prefix, words in _part_names(metadata).items()}
    names["ensemble_"] = "ensemble of all students, mean probabilities"
    return {
        name: score_text(last[f"{prefix}top1_correct"], last[f"{prefix}images"])
        for prefix, name in names.items()
        if f"{prefix}top1_correct" in last
    }


def next_commands(
    folder: Path, config: PretrainConfig | FinetuneConfig, metadata: Mapping[str, Any]
) -> list[list[str]]:
    """Return the words of the commands that follow a run: of the whole, and of its first exit or peer."""
    if isinstance(config, PretrainConfig):
        return [_finetune_command(folder, config)]
    run, val, commands = str(folder), config.data.val or "VALIDATION_SHARDS", [["export", str(folder)]]
    keys = {"--image-key": config.data.image_key, "--label-key": config.data.label_key}
    members = [word for option, key in keys.items() if key is not None for word in (option, key)]
    for words in list(_part_names(metadata).values())[:1]:
        commands += [["export", run, *words], ["evaluate", run, val, *words, *members]]
    commands += [["evaluate", "exits", run, val]] if metadata.get("exits") else []
    return [["maedistill", *words] for words in commands]


def _draw_run(folder: "RunFolder", records: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> Path | None:
    """Draw the curves of a run, with marks where it was continued."""
    restarts = [start["step"] for start in metadata["starts"][1:] if start.get("step")]
    return draw_curves(records, folder.path / "curves.png", restarts=restarts)


def _times(starts: int) -> str:
    return "one start" if starts == 1 else f"{starts} starts"


def _finetune_command(folder: Path, config: PretrainConfig) -> list[str]:
    """Return the command that fine-tunes this run on the same data, with the recipe for its size if there is one."""
    sizes = ("vit_tiny", "vit_small", "vit_base", "vit_large")
    recipe = next((size for size in sizes if config.student.model.startswith(size)), "vit_base")
    if config.data.image_size <= 64:
        recipe = "small_images"
    overrides = [f"init.source=run:{folder}", f"run={folder}_finetuned", f"data.train={config.data.train}"]
    overrides += [f"data.val={config.data.val or 'VALIDATION_SHARDS'}", f"data.image_size={config.data.image_size}"]
    changed = config.data.model_dump(include=_OF_THE_IMAGES, exclude_defaults=True)
    overrides += [f"data.{key}={value}" for key, value in changed.items()]
    if recipe != "small_images":
        overrides += ["student.model=null"]  # the source knows its changed dimensions
    return ["maedistill", "finetune", f"finetune/{recipe}", *overrides]


def summary(records: Sequence[Mapping[str, Any]], run: Path) -> dict[str, Any]:
    """Return a run's last losses and kNN, its steps, training time in seconds, mean images per second and rank.

    records: of the folder `run`. Raises DataError if they hold no losses.
    """
    steps = [record for record in records if record.get("loss") is not None]  # null: no update was finite
    probes = [record["knn"] for record in records if "knn" in record]
    if not steps:
        file = run / "metrics.jsonl"
        raise DataError(f"{file} holds no losses", "restore it from a copy, or run with --fresh")
    rates = [record["images_per_second"] for record in steps]
    last = dict(steps[-1])
    last["knn"] = probes[-1] if probes else None
    last["rate"] = len(rates) / sum(1 / rate for rate in rates)  # harmonic mean, since each rate covers as many images
    last["seconds"] = last.pop("trained_seconds")
    return last


def _losses_table(config: PretrainConfig, method: str, last: Mapping[str, Any]) -> list[str]:
    """Return a Markdown table of the last losses; generation and the first teacher's alignment are means over pairs."""
    means = [mean_metric(last, prefix) for prefix in ("pixels", "align/", "generate/")]
    losses = ["-" if value is None else f"{value:.4f}" for value in (last["loss"], *means)]
    knn = "-" if last["knn"] is None else f"{last['knn']:.1%}"
    cells = [method, config.student.title, f"{config.optim.epochs:g}", *losses, knn, duration(last["seconds"])]
    heads = ["method", "student", "epochs", "loss", "pixels", "align", "generate", "kNN", "time"]
    return markdown_table(heads, [cells])


def _last_picture(folder: "RunFolder") -> list[str]:
    """Return the Markdown of the newest reconstruction sheet; empty if there is none."""
    pictures = sorted(folder.pictures.glob("step_*.png"))
    return [f"![what is seen, predicted and true](pictures/{quote(pictures[-1].name)})", ""] if pictures else []

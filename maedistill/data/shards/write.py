"""Write a source as WebDataset tars, with their index, class names and report; `verify.py` checks them later.

    Source -> make_shards -> OUT/train-000000.tar ...        KEY.jpg|png|webp + KEY.cls
                             OUT/train.index.safetensors     where each sample lies, checksums, provenance
                             OUT/_info.json, classes.json    for timm's reader; class names
                             OUT/make_shards.json            what was converted or skipped, and why; written last

The shard of each image is fixed before anything is written: samples are sorted by the sha256 of their key (a fixed,
thorough shuffle, so any few shards are a fair sample of the classes) and cut into equal parts. Each shard is thus a
pure function of the source and settings, and a killed run resumes with the first shard that has no final name yet.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL
from webdataset import TarWriter

from maedistill.data.images.convert import Converted, bits_in_use, convert
from maedistill.data.images.decode import BadImage
from maedistill.data.remote.private import try_lock
from maedistill.data.shards.index import CLASSES_FILE, SUFFIX, index_of, save_index
from maedistill.data.shards.index_check import parse_json
from maedistill.data.shards.layout import IMAGES_PER_SHARD, QUALITY, REPORT_FILE
from maedistill.data.shards.progress_bar import ProgressBar
from maedistill.data.shards.records import Record, Source, printable
from maedistill.data.shards.scan import NO_LABEL, ShardScan, scan_shard
from maedistill.data.shards.source_depth import EIGHT_BIT_STARTS, is_said_narrow, used_depth
from maedistill.data.shards.stamps import stamp_of
from maedistill.durable import make_folder, require_local, write_durably
from maedistill.errors import ConfigError, DataError
from maedistill.escaping import warn

WORK_FOLDER = ".making"  # partial shards, and statistics of finished ones; removed at the end


@dataclass
class ConversionStats:
    """What was done with the images of one shard or split."""

    images: int = 0  # written
    lengths: list[int] = field(default_factory=list)  # images per shard
    grayscale: int = 0  # in the source, converted or not
    converted: dict[str, str] = field(default_factory=dict)  # source file -> why, e.g. "CMYK"
    skipped: dict[str, str] = field(default_factory=dict)  # source file -> reason
    turned: int = 0  # images with an EXIF orientation, which is kept and not applied
    passed_over: dict[str, int] = field(default_factory=dict)  # suffix -> files that are no images of a known format

    @property
    def found(self) -> int:
        """Return the number of files and folders that were looked at."""
        return self.images + len(self.skipped) + sum(self.passed_over.values())

    def add(self, other: "ConversionStats") -> None:
        """Add the images of another shard."""
        self.images += other.images
        self.lengths += other.lengths
        self.grayscale += other.grayscale
        self.converted |= other.converted
        self.skipped |= other.skipped
        self.turned += other.turned


def make_shards(
    source: Source,
    out: Path,
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
    shorter_side: int | None = None,
    quality: int = QUALITY,
    workers: int = 1,
) -> dict[str, ConversionStats]:
    """Write all splits of `source` into `out`. Return the conversion statistics by split.

    The same call resumes a killed one, and changes nothing if `out` is finished. `workers` threads decode images.
    Raise `ConfigError` if `out` was made with other settings, `DataError` if a split has no usable image or on an I/O
    error.
    """
    if workers < 1:
        raise ConfigError(f"--workers is {workers}", "give at least 1")
    require_local(out, "OUT")
    if printable(str(out)) != str(out):
        raise ConfigError(f"the name of {printable(str(out))!r} is not UTF-8", "use another OUT")
    bits = used_depth(source, workers)
    settings = _settings(
        source, images_per_shard=images_per_shard, shorter_side=shorter_side, quality=quality, bits=bits
    )
    try:
        if _begin(out, settings):
            shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)  # remains if the last run was killed after its report
            return read_report(out)
        with _only_writer(out):
            convert_one = functools.partial(_convert, source, shorter_side=shorter_side, quality=quality, bits=bits)
            stats = _write_splits(source, out, settings, convert_one, workers=workers)
            _finish(out, source.classes, settings, stats)
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)  # on NFS not before the lock in it is closed
        return stats
    except BrokenPipeError:  # of the progress bar, whose reader has exited
        raise
    except OSError as error:
        raise DataError(
            f"cannot write the shards {error.filename or out}: {error.strerror or error}",
            "free disk space, or check the permissions; the same command continues",
        ) from error


def _write_splits(
    source: Source,
    out: Path,
    settings: dict[str, Any],
    convert_one: Callable[[Record], Converted | str],
    *,
    workers: int,
) -> dict[str, ConversionStats]:
    """Write the shards and the index of each split. Return the conversion statistics by split."""
    count, stats = sum(map(len, source.splits.values())), {}
    with ThreadPoolExecutor(workers) as pool, ProgressBar(total=count, desc="writing shards", unit="img") as bar:
        for split, records in source.splits.items():
            stats[split], scans = ConversionStats(passed_over=dict(source.passed_over.get(split, {}))), {}
            for name, part in plan_shards(split, records, settings["images_per_shard"]):
                finished = _find_finished(out, name)
                bar.update(len(part) if finished else 0)
                shard_stats, scan = finished or _write_shard(out, name, part, pool.map(convert_one, part), bar)
                stats[split].add(shard_stats)
                scans[str(out / name)] = scan
            if not stats[split].images:
                path, reason = next(iter(stats[split].skipped.items()))
                raise DataError(
                    f"not one image of {split!r} can be used; {path}: {reason}", "check that SRC holds images"
                )
            index = index_of(list(scans), list(scans.values()), classes=source.classes, provenance=settings)
            stamps = tuple(map(stamp_of, scans))
            save_index(replace(index, shard_stamps=stamps), out / f"{split}{SUFFIX}")
    return stats


def plan_shards(split: str, records: list[Record], images_per_shard: int) -> list[tuple[str, list[Record]]]:
    """Return each shard's file name and records: sorted by the sha256 of their key, cut into equal parts (+- 1)."""
    ranked = sorted(records, key=lambda record: hashlib.sha256(record.key.encode()).digest())
    count = -(-len(ranked) // images_per_shard)
    cuts = [number * len(ranked) // count for number in range(count + 1)]
    return [(f"{split}-{number:06d}.tar", ranked[cuts[number] : cuts[number + 1]]) for number in range(count)]


def read_report(out: Path) -> dict[str, ConversionStats]:
    """Read the report of `make_shards` in `out`, by split. Raise `ConfigError` if `make_shards` did not write it."""
    try:
        return {split: ConversionStats(**stats) for split, stats in _read_json(out / REPORT_FILE)["splits"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise _foreign(out / REPORT_FILE) from error


def _settings(
    source: Source, *, images_per_shard: int, shorter_side: int | None, quality: int, bits: int = 0
) -> dict[str, Any]:
    """Return all settings that determine the shards' bytes. The index stores them; a resumed run must have the same."""
    if images_per_shard < 1:
        raise ConfigError(f"--images-per-shard is {images_per_shard}", "give at least 1")
    if shorter_side is not None and shorter_side < 16:
        raise ConfigError(f"--shorter-side is {shorter_side} pixels", "give at least 16, e.g. 256")
    if not 1 <= quality <= 100:
        raise ConfigError(f"--quality is {quality}", "give a JPEG quality from 1 to 100, e.g. 90")
    listing = hashlib.sha256()
    for split, records in source.splits.items():
        listing.update("".join(f"{split}\0{key}\0{label}\n" for key, label, _ in records).encode())
    settings = {"made_by": "make_shards", **source.provenance, "listing": listing.hexdigest()}
    settings["images_per_shard"] = images_per_shard
    if shorter_side is not None:  # JPEG bytes may differ between versions of Pillow
        settings |= {"shorter_side": shorter_side, "quality": quality, "pillow": PIL.__version__}
    if 0 < bits < 16:
        settings["bits"] = bits
    return settings


def _begin(out: Path, settings: dict[str, Any]) -> bool:
    """Prepare `out`; return True if it is finished. Raise `ConfigError` if it holds anything else."""
    begun, report = out / WORK_FOLDER / "settings.json", out / REPORT_FILE
    if report.is_file() or begun.is_file():
        before = _read_json(report).get("made") if report.is_file() else _read_json(begun)
        if not isinstance(before, dict):
            raise _foreign(report)
        if changed := sorted(key for key in before | settings if before.get(key) != settings.get(key)):
            changes = ", ".join(f"{key} was {before.get(key)}, is {settings.get(key)}" for key in changed)
            raise ConfigError(
                f"{out} was made from other images or settings: {changes}", "use another OUT, or remove it"
            )
        return report.is_file()
    try:
        if out.is_dir() and any(path.name != WORK_FOLDER for path in out.iterdir()):
            raise ConfigError(f"{out} is not empty, and was not begun by make_shards", "use a new or empty folder")
        make_folder(begun.parent)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}", "give an OUT where you may write") from error
    _write_json(begun, settings)
    return False


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Keep other processes from writing to `out` at the same time. Raise `ConfigError` if one does."""
    try:
        lock = os.open(out / WORK_FOLDER / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError as error:
        raise ConfigError(f"another process has just finished {out}", "start the same command again") from error
    try:
        is_ours = True
        with suppress(OSError):  # a disk without locks
            is_ours = try_lock(lock)
        if not is_ours:
            raise ConfigError(f"another process writes to {out}", "wait until it has ended, or use another OUT")
        yield
    finally:
        os.close(lock)


def _convert(source: Source, record: Record, *, shorter_side: int | None, quality: int, bits: int) -> Converted | str:
    """Return the converted image, or the reason for skipping it. Only an I/O error raises `DataError`."""
    is_measured = not is_said_narrow(record)
    try:
        data = source.read(record)
        depth = bits if bits and is_measured else None
        converted = convert(data, shorter_side=shorter_side, quality=quality, bits=depth)
        is_hidden = not is_measured and not data.startswith(EIGHT_BIT_STARTS) and converted.change
        if is_hidden and (own := bits_in_use(data)) > 0:
            name = printable(record.origin)
            warn(f"{name} uses {own} bits, which its suffix hides: it is scaled by these, not by its set's")
        return converted
    except BadImage as error:
        return str(error)
    except FileNotFoundError as error:
        return f"cannot be read: {error.strerror}"
    except OSError as error:
        remedy = "check its permissions and the disk, or move it away; the same command continues"
        raise DataError(f"cannot read {printable(record.origin)}: {error.strerror}", remedy) from error


def _write_shard(
    out: Path, name: str, records: list[Record], results: Iterable[Converted | str], bar: ProgressBar
) -> tuple[ConversionStats, ShardScan]:
    """Write one shard under a temporary name, scan it, save its statistics, and rename it last."""
    temporary, stats = out / WORK_FOLDER / name, ConversionStats()
    with open(temporary, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for record, result in zip(records, results, strict=True):
                bar.update()
                if isinstance(result, str):
                    stats.skipped[printable(record.origin)] = result
                    continue
                label = {} if record.label == NO_LABEL else {"cls": str(record.label).encode()}
                tar.write({"__key__": record.key, result.suffix: result.data, **label})
                stats.images += 1
                stats.grayscale += result.is_grayscale
                stats.turned += result.is_turned
                if result.change:
                    stats.converted[printable(record.origin)] = result.change
        file.flush()
        os.fsync(file.fileno())
    stats.lengths.append(stats.images)
    scan = scan_shard(str(temporary))
    _write_json(out / WORK_FOLDER / f"{name}.json", {"sha256": scan.sha256, "note": asdict(stats)})
    temporary.replace(out / name)
    return stats, scan


def _find_finished(out: Path, name: str) -> tuple[ConversionStats, ShardScan] | None:
    """Return a shard that a killed run finished; None if it is missing or does not match its saved checksum."""
    file, saved = out / name, out / WORK_FOLDER / f"{name}.json"
    if not (file.is_file() and saved.is_file()):
        return None
    stored = _read_json(saved)
    with suppress(DataError):  # a damaged shard
        scan = scan_shard(str(file))
        if scan.sha256 == stored.get("sha256"):
            return ConversionStats(**stored["note"]), scan
    return None


def _finish(out: Path, classes: tuple[str, ...], settings: dict[str, Any], stats: dict[str, ConversionStats]) -> None:
    """Write the files beside the shards. The report comes last, because it marks the folder as finished."""
    splits = {
        split: {
            "name": split,
            "filenames": [f"{split}-{number:06d}.tar" for number in range(len(part.lengths))],
            "shard_lengths": part.lengths,
            "num_samples": part.images,
        }
        for split, part in stats.items()
    }
    if classes:
        _write_json(out / CLASSES_FILE, list(classes))
    _write_json(out / "_info.json", {"splits": splits})
    report = {"made": settings, "splits": {split: asdict(part) for split, part in stats.items()}}
    _write_json(out / REPORT_FILE, report)


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)  # letters as they are, but what steers a terminal as \\u202e
    text = re.sub(r"[^ -~\n]", lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text)
    write_durably(file, f"{text}\n".encode())


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object that `_write_json` wrote. Raise `ConfigError` for anything else."""
    with suppress(ValueError):
        if isinstance(value := parse_json(file.read_bytes()), dict):
            return value
    raise _foreign(file)


def _foreign(file: Path) -> ConfigError:
    return ConfigError(f"{file} is not what make_shards writes", "use another OUT, or remove this one")

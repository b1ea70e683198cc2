"""Writing shards: the same bytes every time, killed anywhere or not; every image accounted for; readable by timm."""

import errno
import io
import json
import os
import re
import shlex
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.images.decode import decode_rgb
from maedistill.data.shards.index import save_index, why_unscorable
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.reader import ShardReader
from maedistill.data.shards.scan import Members
from maedistill.data.shards.sources import Record, open_folder
from maedistill.data.shards.verify import verify_shards
from maedistill.data.shards.write import make_shards, plan_shards, read_report
from maedistill.errors import ConfigError, DataError
from tests.data.tar_files import write_tar


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


def write_photos(folder: Path, count=14, size=(20, 16)):
    for i in range(count):
        path = folder / ("cat", "dog", "owl")[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (2, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def contents(folder: Path):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_shards_hold_the_source_files_and_nothing_of_the_machine(tmp_path):
    photos = write_photos(tmp_path / "photos")
    stats = make_shards(open_folder(photos), tmp_path / "out", images_per_shard=5)
    assert stats["train"].lengths == [4, 5, 5] and stats["train"].images == 14
    assert verify_shards(tmp_path / "out") == (3, 0)
    index = open_index(str(tmp_path / "out" / "train-{000000..000002}.tar"))
    assert index.classes == ("cat", "dog", "owl") and index.provenance["made_by"] == "make_shards"
    reader = ShardReader(index)
    for i in range(14):
        name, number = index.key(i).split("_")
        assert reader.read(i) == (photos / name / f"{number}.jpg").read_bytes()
        assert index.classes[index.labels[i]] == name
    with tarfile.open(index.shards[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o444)}
    again = make_shards(open_folder(photos), tmp_path / "out", images_per_shard=5)
    assert again == stats == read_report(tmp_path / "out")
    before = contents(tmp_path / "out")
    make_shards(open_folder(photos), tmp_path / "again", images_per_shard=5, workers=3)
    assert contents(tmp_path / "again") == before
    assert not any(str(tmp_path).encode() in data for data in before.values())


def test_the_order_is_a_thorough_shuffle_in_equal_parts():
    records = [Record(f"{label}_{i:03d}", label, "") for label in range(10) for i in range(100)]
    plan = plan_shards("train", records, 99)
    assert [name for name, _ in plan] == [f"train-{i:06d}.tar" for i in range(11)]
    assert {len(part) for _, part in plan} == {90, 91}
    assert sorted(record for _, part in plan for record in part) == sorted(records)
    assert all(len({record.label for record in part}) == 10 for _, part in plan)
    assert plan_shards("train", records[::-1], 99) == plan


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_at_any_rename_ends_with_the_same_bytes(tmp_path, monkeypatch, moment):
    source = open_folder(write_photos(tmp_path / "photos"))
    make_shards(source, tmp_path / "whole", images_per_shard=5)
    expected, replace, kills = contents(tmp_path / "whole"), os.replace, 0
    while True:
        out, calls = tmp_path / f"killed_{kills}", 0

        def replace_or_die(path, target):
            nonlocal calls
            calls += 1
            if calls == kills + 1 and moment == "before":  # noqa: B023
                raise Killed
            result = replace(path, target)
            if calls == kills + 1:  # noqa: B023
                raise Killed
            return result

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace_or_die)
            try:
                make_shards(source, out, images_per_shard=5)
                break  # there is no such rename any more
            except Killed:
                kills += 1
        finished = {
            path: path.stat().st_ino for path in out.glob("*.tar") if (out / ".making" / f"{path.name}.json").exists()
        }
        make_shards(source, out, images_per_shard=5)
        assert contents(out) == expected
        assert all(path.stat().st_ino == inode for path, inode in finished.items())
    assert kills == 11  # settings, 3 x (note, shard), index, classes, info, report


def test_a_run_killed_inside_a_shard_ends_with_the_same_bytes(tmp_path, monkeypatch):
    source = open_folder(write_photos(tmp_path / "photos"))
    make_shards(source, tmp_path / "whole", images_per_shard=5)
    sync = os.fsync

    def die_in_a_shard(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tar"):
            raise Killed
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die_in_a_shard)
        with pytest.raises(Killed):
            make_shards(source, tmp_path / "out", images_per_shard=5)
    assert not list((tmp_path / "out").glob("*.tar")) and list((tmp_path / "out" / ".making").glob("*.tar"))
    make_shards(source, tmp_path / "out", images_per_shard=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_shard_damaged_before_the_restart_is_written_again(tmp_path, monkeypatch):
    source = open_folder(write_photos(tmp_path / "photos"))
    make_shards(source, tmp_path / "whole", images_per_shard=5)
    with monkeypatch.context() as patched:
        patched.setattr("maedistill.data.shards.write.save_index", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            make_shards(source, tmp_path / "out", images_per_shard=5)
    (tmp_path / "out" / "train-000001.tar").write_bytes(b"half")
    make_shards(source, tmp_path / "out", images_per_shard=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_bad_files_are_skipped_or_converted_and_named(tmp_path):
    photos = write_photos(tmp_path / "photos", count=6)
    whole = (photos / "cat" / "0.jpg").read_bytes()
    (photos / "cat" / "cut.jpg").write_bytes(whole[:200])
    (photos / "cat" / "text.png").write_text("no image")
    (photos / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    Image.open(io.BytesIO(whole)).convert("CMYK").save(photos / "dog" / "cmyk.jpg")
    Image.open(io.BytesIO(whole)).convert("L").save(photos / "dog" / "gray.jpg")
    Image.open(io.BytesIO(whole)).save(photos / "dog" / "bitmap.bmp")
    note = make_shards(open_folder(photos), tmp_path / "out", workers=2)["train"]
    assert (note.images, note.grayscale, note.converted) == (9, 1, {"dog/cmyk.jpg": "CMYK", "dog/bitmap.bmp": "BMP"})
    assert set(note.skipped) == {"cat/cut.jpg", "cat/text.png", "cat/gone.jpg"}
    assert json.loads((tmp_path / "out" / "make_shards.json").read_text())["splits"]["train"]["skipped"] == note.skipped
    index = open_index(str(tmp_path / "out" / "train-*.tar"))
    assert all(decode_rgb(ShardReader(index).read(i)).shape == (3, 16, 20) for i in range(9))


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["TarWriter", "scan_shard", "save_index", "_write_json"])
def test_a_full_disk_is_exit_3_and_with_room_the_command_continues(tmp_path, monkeypatch, run_command, place):
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    make_shards(open_folder(photos), tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(f"maedistill.data.shards.write.{place}", full_disk)
        ended = run_command("shards", photos, out)
    assert ended.code == 3 and len(ended.err.splitlines()) == 2
    assert run_command("shards", photos, out).code == 0 and contents(out) == contents(tmp_path / "whole")


def test_one_process_at_a_time_writes_to_a_folder(tmp_path, monkeypatch):
    source, out = open_folder(write_photos(tmp_path / "photos")), tmp_path / "out"

    def other(*arguments):
        monkeypatch.undo()
        before = contents(out)
        with pytest.raises(ConfigError):
            make_shards(source, out, images_per_shard=5)
        assert contents(out) == before
        return save_index(*arguments)

    monkeypatch.setattr("maedistill.data.shards.write.save_index", other)
    make_shards(source, out, images_per_shard=5)
    assert verify_shards(out) == (3, 0)


def test_shrinking_is_recorded(tmp_path):
    make_shards(open_folder(write_photos(tmp_path / "p", size=(60, 40))), tmp_path / "out", shorter_side=20, quality=80)
    index = open_index(str(tmp_path / "out" / "train-*.tar"))
    assert (index.provenance["shorter_side"], index.provenance["quality"]) == (20, 80)
    assert decode_rgb(ShardReader(index).read(0)).shape == (3, 20, 30)


def test_a_folder_of_other_settings_or_images_is_refused(tmp_path):
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    make_shards(open_folder(photos), out)
    with pytest.raises(ConfigError, match="images_per_shard was 1000, is 7"):
        make_shards(open_folder(photos), out, images_per_shard=7)
    with pytest.raises(ConfigError, match="shorter_side was None, is 16"):
        make_shards(open_folder(photos), out, shorter_side=16)
    (photos / "cat" / "0.jpg").rename(photos / "cat" / "00.jpg")
    with pytest.raises(ConfigError, match="listing"):
        make_shards(open_folder(photos), out)
    with pytest.raises(ConfigError, match="not empty"):
        make_shards(open_folder(photos), photos)


FAULTS = {
    "checksum": lambda path: path.write_bytes(path.read_bytes().replace(b"JFIF", b"JFIG", 1)),
    "bytes instead": lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "damaged header": lambda path: path.write_bytes(path.read_bytes().replace(b".jpg\0", b".jpgx", 1)),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_the_bad_shard(tmp_path, fault):
    make_shards(open_folder(write_photos(tmp_path / "photos")), tmp_path / "out", images_per_shard=5)
    FAULTS[fault](tmp_path / "out" / "train-000001.tar")
    with pytest.raises(DataError, match=rf"1 of 3 shards are bad: .*train-000001\.tar .*{fault}"):
        verify_shards(tmp_path / "out")


def test_verify_reads_shards_without_an_index_to_their_end(tmp_path):
    make_shards(open_folder(write_photos(tmp_path / "photos")), out := tmp_path / "out", images_per_shard=5)
    (out / "train.index.safetensors").rename(index := tmp_path / "index")
    assert verify_shards(out) == (0, 3)
    FAULTS["cut"](out / "train-000001.tar")
    with pytest.raises(DataError, match=r"1 of 3 shards are bad: .*train-000001\.tar .*cut"):
        verify_shards(out)
    (out / "train-000001.tar").rename(out / "other.tar")
    index.rename(out / "train.index.safetensors")
    with pytest.raises(DataError, match=r"2 of 4 shards are bad: .*train-000001\.tar is missing; .*other\.tar .*cut"):
        verify_shards(out)


def test_verify_reads_the_members_that_were_chosen(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.small.jpg": b"a", "0.large.jpg": b"b"})
    open_index(str(tmp_path / "a.tar"), members=Members(image="large.jpg"))
    assert verify_shards(tmp_path) == (1, 0)


@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_reads_the_shards(tmp_path):
    from timm.data import create_dataset

    photos = write_photos(tmp_path / "photos")
    make_shards(open_folder(photos, val_fraction=0.3), tmp_path / "out", images_per_shard=3)
    dataset = create_dataset("wds/", root=str(tmp_path / "out"), split="val", is_training=False, batch_size=1)
    samples = [(np.asarray(image), label) for image, label in dataset]
    index = open_index(str(tmp_path / "out" / "val-*.tar"))
    assert len(dataset) == len(samples) == len(index) == 4
    for i, (image, label) in enumerate(samples):
        assert label == index.labels[i]
        assert np.array_equal(image, decode_rgb(ShardReader(index).read(i)).permute(1, 2, 0))


@pytest.mark.parametrize(("count", "labelled"), [(12, True), (6, True), (6, False)])
def test_the_next_line_works_and_every_class_is_in_train(tmp_path, run_command, count, labelled):
    photos = write_photos(tmp_path / "my photos", count)
    if not labelled:
        for file in photos.rglob("*.jpg"):
            file.rename(photos / file.name)
        for name in ("cat", "dog", "owl"):
            (photos / name).rmdir()
    out = tmp_path / "the shards"
    ended = run_command("shards", photos, out, "--val-fraction", 0.5)
    *_, last = printed = ended.out.splitlines()
    assert ended.code == 0
    assert not any("has no image of" in line for line in printed)
    _, maedistill, command, config, *overrides = shlex.split(last)
    assert (maedistill, command, overrides.pop()) == ("maedistill", "pretrain", "--dry-run")
    data = load_config(config, overrides, root=PretrainConfig).config.data
    train, val = open_index(data.train), open_index(data.val, split="val")
    assert len(train) + len(val) == count
    assert (why_unscorable(train, val) is None) == labelled


def test_the_command_line_reports_and_exits_as_documented(tmp_path, run_command):
    photos, out, run = write_photos(tmp_path / "photos"), tmp_path / "out", partial(run_command, "shards")
    ended = run(photos, out, "--images-per-shard", 5, "--verify")
    assert ended.code == 0 and "14 images" in ended.out and f"data.train={out}" in ended.out
    assert run("--verify", out).code == 0
    assert run(photos, out, "--quality", 80).code == 2
    assert run(photos).code == 2
    FAULTS["checksum"](out / "train-000002.tar")
    ended = run("--verify", out)
    assert ended.code == 3 and re.search(r"error: .*train-000002\.tar.*\n  fix: ", ended.err)

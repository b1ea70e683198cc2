"""Image folders: nothing disappears from them, and nothing is taken for what it is not."""

import hashlib
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from maedistill.data.images.decode import decode_rgb
from maedistill.data.shards.index import load_index
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.reader import ShardReader
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards, read_report
from maedistill.errors import ConfigError, DataError
from tests.data.pictures import encode, tiff
from tests.data.shards.image_folders import PICTURE, PNG, fill


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def listed(source, split="train"):
    return {record.origin: (record.key, record.label) for record in source.splits[split]}


FORMATS = {"a.jfif": "JPEG", "b.ppm": "PPM", "c.avif": "AVIF", "d.pgm": "PPM", "e.JPE": "JPEG", "f.jp2": "JPEG2000",
           "no_suffix": "WEBP", "wrong.dat": "PNG", "copy.jpg~": "JPEG"}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_an_image_is_one_by_its_content_whatever_its_suffix(tmp_path, name):
    lossless = {"AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(FORMATS[name], {})
    files = {f"cat/{name}": encode(PICTURE, FORMATS[name], **lossless), "cat/notes.txt": b"P5 is no image"}
    source = open_folder(fill(tmp_path / "photos", files))
    assert [record.origin for record in source.splits["train"]] == [f"cat/{name}"]
    stats = make_shards(source, tmp_path / "out")["train"]
    assert stats.images == 1 and stats.found == 2 and stats.passed_over == {".txt": 1}
    index = open_index(str(tmp_path / "out" / "train-000000.tar"))
    pixels = decode_rgb(ShardReader(index).read(0)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels - np.asarray(PICTURE)).mean() < (12 if FORMATS[name] in ("JPEG", "WEBP") else 3)


def test_what_is_passed_over_is_counted_and_kept_in_the_report(tmp_path, run_command):
    junk = {"cat/a.txt": b"1", "cat/b.TXT": b"2", "cat/.DS_Store": b"", "cat/README": b"", "__MACOSX/x.png": PNG}
    photos = fill(tmp_path / "photos", {"cat/1.png": PNG, "dog/1.png": PNG, "dog/cut.png": PNG[:40]} | junk)
    out = tmp_path / "out"
    for _ in range(2):  # the second time from the report
        printed = run_command("shards", photos, out)
        assert printed.code == 0 and "found 8 files, written 2, converted 0, skipped 1, passed over 5" in printed.out
        assert "classes: 2 (cat, dog)" in printed.out and "2 .txt" in printed.out
        assert re.search(r"dog/cut\.png: \w+", printed.out)
    assert read_report(out)["train"].passed_over == {".txt": 2, "hidden": 2, "no suffix": 1}


def test_a_class_folder_without_an_image_is_refused_and_says_what_it_holds(tmp_path):
    photos = fill(tmp_path, {"cat/1.png": PNG, "dog/1.heic": b"\0\0\0\x18ftypheic", "dog/2.heic": b""})
    (photos / "fox").mkdir()
    with pytest.raises(DataError) as caught:
        open_folder(photos)
    assert "dog (2 .heic)" in caught.value.cause and "fox (empty)" in caught.value.cause


def test_classes_that_lose_all_their_images_are_named_at_the_end(tmp_path, run_command):
    photos = fill(tmp_path / "p", {"train/cat/1.png": PNG, "train/dog/1.png": PNG[:40], "val/cat/1.png": PNG})
    printed = run_command("shards", photos, tmp_path / "out")
    assert printed.code == 0 and "train has no image of 1 classes: dog" in printed.out
    assert "val has no image of 1 classes: dog" in printed.out


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    photos = fill(tmp_path, ["cat/1.png", "dog/1.png"])
    scandir = os.scandir

    def broken(path="."):
        if os.fspath(path).endswith("dog"):
            raise OSError(5, "Input/output error", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(DataError, match="dog cannot be listed: Input/output error"):
        open_folder(photos)


def test_class_folders_flat_folders_and_splits(tmp_path):
    classes = touch(tmp_path / "a", "dog/1.jpg", "cat/1.JPEG", "cat/deep/2.png", "cat/notes.txt", "cat/.hidden.jpg")
    source = open_folder(classes)
    assert source.classes == ("cat", "dog")
    assert listed(source) == {
        "cat/1.JPEG": ("cat_1", 0),
        "cat/deep/2.png": ("cat_deep_2", 0),
        "dog/1.jpg": ("dog_1", 1),
    }

    flat = open_folder(touch(tmp_path / "b", "x.webp", "y.tiff"))
    assert flat.classes == () and listed(flat) == {"x.webp": ("x", -1), "y.tiff": ("y", -1)}

    split = open_folder(touch(tmp_path / "c", "train/dog/1.jpg", "train/cat/1.jpg", "val/dog/1.jpg", "test/9.jpg"))
    assert split.classes == ("cat", "dog") and set(split.splits) == {"train", "val", "test"}
    assert listed(split, "val") == {"val/dog/1.jpg": ("dog_1", 1)} and listed(split, "test") == {
        "test/9.jpg": ("9", -1)
    }


def test_keys_are_safe_unique_and_keep_imagenets_names(tmp_path):
    paths = ["n01/n01_7.JPEG", "n01/a.jpg", "n01/a.png", "n01/ü b.c.jpg", "n01/" + "x" * 200 + ".jpg", "n/01_a.jpg"]
    keys = {origin: key for origin, (key, _) in listed(open_folder(touch(tmp_path, *paths))).items()}
    assert keys["n01/n01_7.JPEG"] == "n01_7" and keys["n01/ü b.c.jpg"] == "n01___b_c" and keys["n/01_a.jpg"] == "n_01_a"
    assert len(set(keys.values())) == len(paths)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,95}", key) for key in keys.values())


def test_a_held_out_share_does_not_move_when_files_are_added(tmp_path):
    touch(tmp_path, *(f"{'ab'[i % 2]}/{i}.jpg" for i in range(50)))
    before = open_folder(tmp_path, val_fraction=0.2)
    assert len(before.splits["val"]) == 10 and len(before.splits["train"]) == 40
    touch(tmp_path, "a/new.jpg")
    after = open_folder(tmp_path, val_fraction=0.2)
    assert len(set(listed(before, "val")) ^ set(listed(after, "val"))) <= 2


def test_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        open_folder(touch(tmp_path / "a", "x.txt"))
    with pytest.raises(DataError, match=r"1 images are outside the class folders, first 'y\.jpg'"):
        open_folder(touch(tmp_path / "b", "x/x.jpg", "y.jpg"))
    with pytest.raises(DataError, match="the class 'cow', which is missing from train"):
        open_folder(touch(tmp_path / "c", "train/x/1.jpg", "val/cow/1.jpg"))
    with pytest.raises(ConfigError, match="holds the split train and also extra, which is not a split"):
        open_folder(touch(tmp_path / "d", "train/x/1.jpg", "extra/x/1.jpg"))
    with pytest.raises(ConfigError, match="val and validation: both mean the same split"):
        open_folder(touch(tmp_path / "e", "train/x/1.jpg", "val/x/1.jpg", "validation/x/1.jpg"))


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["Training", "Testing"], {"train", "test"}),
        (["TRAIN", "Valid"], {"train", "val"}),
        (["training_set", "test_set"], {"train", "test"}),
        (["train", "eval", "Test"], {"train", "val", "test"}),
        (["validation"], {"val"}),
    ],
)
def test_splits_are_known_in_any_case(tmp_path, names, splits):
    source = open_folder(fill(tmp_path, [f"{name}/{kind}/{name}{kind}.png" for name in names for kind in "ab"]))
    assert source.splits.keys() == splits and source.classes == ("a", "b")
    assert all(len(records) == 2 for records in source.splits.values())


@pytest.mark.parametrize(
    "paths",
    [
        ["seg_train/seg_train/a/1.png", "seg_test/seg_test/a/2.png", "seg_pred/3.png"],
        ["train2017/1.png", "val2017/2.png"],
        ["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"],
        ["archive/Training/cat/1.png", "archive/Testing/cat/2.png"],
        ["Train/cat/1.png", "Bus/cat/1.png"],
    ],
)
def test_layouts_that_would_mix_training_and_test_images_are_refused(tmp_path, paths):
    with pytest.raises((ConfigError, DataError)):
        open_folder(fill(tmp_path, paths))


def test_folders_below_the_classes_are_mentioned(tmp_path):
    source = open_folder(fill(tmp_path, ["animal/cat/1.png", "animal/dog/1.png", "plant/oak/1.png"]))
    assert source.classes == ("animal", "plant") and "3 folders lie below class folders" in source.notes[0]


def test_names_that_are_not_utf8_are_written_and_named(tmp_path, run_command):
    files = {b"caf\xe9/\xe9.png": PNG, b"caf\xe9/\xe8.png": PNG, b"tea/bad_\xe9.png": PNG[:40], b"tea/1.bmp": PNG,
             b"tea/\xff.tif": encode(PICTURE, "TIFF"), b"tea/\xfe.x\xe9": b"0"}  # fmt: skip
    photos, out = fill(tmp_path / "photos", files), tmp_path / "out"
    for _ in range(2):
        assert run_command("shards", photos, out).code == 0
    assert json.loads((out / "classes.json").read_text(encoding="utf-8")) == ["caf\\xe9", "tea"]
    stats = read_report(out)["train"]
    assert (stats.images, stats.skipped.keys(), stats.converted) == (
        4,
        {"tea/bad_\\xe9.png"},
        {"tea/\\xff.tif": "TIFF"},
    )
    index = load_index(out / "train.index.safetensors")
    assert len({index.key(i) for i in range(4)}) == 4 and index.classes == ("caf\\xe9", "tea")


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    for i, (train, val) in enumerate([("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")]):
        source = open_folder(fill(tmp_path / str(i), [f"train/{train}/1.png", "train/tea/1.png", f"val/{val}/2.png"]))
        assert source.splits["val"][0].label == 0 and source.classes == ("caf\u00e9", "tea")
        assert len([note for note in source.notes if "Unicode" in note and val in note]) == 1
    with pytest.raises(DataError, match="same name in different encodings"):
        open_folder(fill(tmp_path / "b", ["caf\u00e9/1.png", "cafe\u0301/2.png"]))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [[2] * 20, [1, 1, 2, 3, 50], [10, 20, 30]])
def test_each_class_gives_its_share_and_keeps_a_training_image(tmp_path, sizes, share):
    paths = [f"c{label:02d}/{i}.png" for label, count in enumerate(sizes) for i in range(count)]
    source = open_folder(fill(tmp_path, paths), val_fraction=share)
    train, val = (np.bincount([r.label for r in source.splits[s]], minlength=len(sizes)) for s in ("train", "val"))
    assert (train + val).tolist() == sizes and train.min() >= 1
    most = np.array(sizes) - 1
    assert val.sum() == min(max(1, round(share * sum(sizes))), most.sum())
    if val.sum() < most.sum() and share * min(sizes) >= 1:
        assert (np.abs(val - share * np.array(sizes)) <= 1).all()


def test_the_images_held_out_of_an_unlabelled_folder_do_not_change_between_versions(tmp_path):
    source = open_folder(fill(tmp_path, [f"{i}.png" for i in range(40)]), val_fraction=0.25)
    ranked = sorted(map(str, range(40)), key=lambda key: hashlib.sha256(f"validation/{key}".encode()).digest())
    assert [record.key for record in source.splits["val"]] == ranked[:10]
    assert [record.key for record in source.splits["train"]] == ranked[10:]


def sixteen_bits(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values.astype(np.uint16)), "PNG")


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_sixteen_bit_images_are_scaled_by_the_depth_of_their_set(tmp_path, bits):
    ramp = np.linspace(0, 2**bits - 1, 256).round()[None].repeat(4, 0)  # [4, 256]
    photos = fill(
        tmp_path / "p", {"a/light.png": sixteen_bits(ramp), "a/dark.png": sixteen_bits(ramp // 8), "b/plain.png": PNG}
    )
    stats = make_shards(open_folder(photos), tmp_path / "out")["train"]
    assert stats.converted["a/light.png"] == ("16-bit" if bits == 16 else f"16-bit with {bits} in use")
    index = open_index(str(tmp_path / "out" / "train-000000.tar"))
    pixels = {index.key(i): decode_rgb(ShardReader(index).read(i))[0].numpy() for i in range(3)}
    assert np.array_equal(pixels["a_light"][0], np.arange(256))
    assert np.abs(pixels["a_dark"][0].astype(int) - np.arange(256) / 8).max() <= 1
    assert ("bits" in index.provenance) == (bits < 16)


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_an_image_that_darkens_the_others_is_named(tmp_path, capsys, odd):
    ramp = np.linspace(0, 4095, 256)[None]
    files = {f"a/{i}.png": sixteen_bits(ramp * (16 if i < odd else 1)) for i in range(5)}
    make_shards(open_folder(fill(tmp_path / "p", files)), tmp_path / "out")
    said = [message for message in capsys.readouterr().err.splitlines() if "darker" in message]
    assert len(said) == (odd < 3)
    assert all(f"{odd} of 5 " in message and "a/0.png" in message and "16 times" in message for message in said)


def test_images_that_become_nearly_black_are_named_and_darken_no_others(tmp_path, capsys):
    dark = tiff(np.tile([4095, 4095, 4095, 65535], (8, 8, 1)), order="II", alpha=1)
    files = {"a/dark.tif": dark, "a/set.png": sixteen_bits(np.linspace(0, 1023, 256).round()[None])}
    make_shards(open_folder(fill(tmp_path / "p", files)), tmp_path / "out")
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if re.search(r"\b1 ", line) and "a/dark.tif" in line]) == 1
    assert open_index(str(tmp_path / "out" / "train-000000.tar")).provenance["bits"] == 10


@pytest.mark.parametrize("others", [True, False])
def test_a_depth_that_a_suffix_hides_is_named_and_not_clipped(tmp_path, capsys, others):
    ramp = np.linspace(0, 1023, 256).round()[None]
    files = {"a/deep.jpg": sixteen_bits(ramp * 16)} | ({"a/set.png": sixteen_bits(ramp)} if others else {})
    make_shards(open_folder(fill(tmp_path / "p", files)), tmp_path / "out")
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "a/deep.jpg" in line and "14" in line]) == 1
    index = open_index(str(tmp_path / "out" / "train-000000.tar"))
    for i in range(len(files)):
        assert np.abs(decode_rgb(ShardReader(index).read(i))[0, 0].numpy() - np.arange(256.0)).max() <= 1


@pytest.mark.parametrize("options", [[], ["--shorter-side", "16"]])
def test_an_orientation_is_counted_and_stays_with_the_image(tmp_path, run_command, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = PICTURE.resize((40, 20))
    files = {f"a/{kind}.{kind}": encode(wide, kind, exif=exif) for kind in ("jpeg", "png")}
    files |= {"a/cmyk.jpg": encode(wide.convert("CMYK"), "JPEG", exif=exif), "a/plain.jpg": encode(wide, "JPEG")}
    printed = run_command("shards", fill(tmp_path / "p", files), tmp_path / "out", *options)
    assert printed.code == 0 and re.search(r"3 \(75\.0%\) state an EXIF orientation", printed.out)
    index = open_index(str(tmp_path / "out" / "train-000000.tar"))
    for i in range(4):
        with Image.open(io.BytesIO(ShardReader(index).read(i))) as image:
            assert image.getexif().get(0x0112, 1) == (1 if index.key(i) == "a_plain" else 6)
            assert image.width == 2 * image.height

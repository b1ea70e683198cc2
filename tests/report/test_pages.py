"""Report pages: small, quick, self-contained, true, and no risk to the training that they show."""

import csv
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maedistill import durable
from maedistill.config.document import read_file
from maedistill.config.loader import load_config
from maedistill.config.values import STAGES
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, DataError
from maedistill.finetuning.loop import finetune
from maedistill.pretraining.loop import pretrain
from maedistill.report import interactive, run_page
from maedistill.report.interactive import curves, embed
from maedistill.report.markup import Album, element
from maedistill.report.page_pictures import reconstructions
from maedistill.report.recorded import read_run
from maedistill.report.run_page import PAGE, refresh, write_page
from maedistill.report.sheet import tile, untile
from tests.report.made_up import STEPS_PER_EPOCH, draw_sheets, made_run

ODD = ("a]b", "$x_1$", "<img src=x onerror=alert(1)>", "</script>")  # the last one is a folder `<` and one below it


class Parsed(HTMLParser):
    """The elements of a page with their attributes, its visible text, and the cells of its tables by row."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements, self.text, self.rows, self._open = [], "", [], []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = [*self._open, tag] if tag not in ("meta", "link", "img", "input", "br") else self._open
        self.rows += [[]] if tag == "tr" else []
        self.rows[-1:] = [[*self.rows[-1], ""]] if tag in ("td", "th") else self.rows[-1:]

    def handle_endtag(self, tag) -> None:
        self._open.pop()

    def handle_data(self, data) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, head: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == head)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def command(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["maedistill", "report", *map(str, words)])
    import_module("maedistill.commands.report").main()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """100 epochs on ImageNet: 6,255 logged steps, 100 kNN scores, 10 sheets of 8 images of 224 px in 5 columns."""
    run = made_run(tmp_path_factory.mktemp("long") / "run", epochs=100, every=20)
    draw_sheets(run, list(range(10, 101, 10)))
    return run


def test_a_page_of_100_epochs_is_below_5_mb_and_4_s_as_a_user_pays_them(long_run):
    """A new interpreter, everything that it imports included. The better of two, because the machine is shared."""
    seconds = []
    for _ in range(2):
        before = os.times()
        subprocess.run([sys.executable, "-m", "maedistill", "report", long_run], check=True, capture_output=True)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    page = long_run / PAGE
    print(seconds, page.stat().st_size)
    assert min(seconds) < 4  # docs/report.md says what was measured
    assert 1.3e6 < page.stat().st_size < 5e6  # BokehJS alone has 1.3 MB
    parsed = Parsed(page)
    assert len(parsed.all("img")) == 3 + 2 * 6, "images and masks once, predictions and errors of 6 epochs"
    assert [one["data-epochs"].split()[-1] for one in parsed.all("input") if one["type"] == "range"] == ["100"]
    assert "6 of 10 pictures" in parsed.text


def test_pictures_of_many_runs_stay_below_the_limit():
    album, noise = Album(100_000), np.random.default_rng(0).integers(0, 256, (112, 900, 3), dtype=np.uint8)
    pieces = [album.add(Image.fromarray(noise), "noise") for _ in range(3)]
    assert [piece.startswith("<img") for piece in pieces] == [True, False, False]
    assert len(pieces[0]) < 100_000 and "left out" in pieces[1]


def test_the_newest_pictures_get_the_room_first(long_run):
    run = read_run(long_run, "run")
    whole = Album(10**9)
    reconstructions(run, whole, most=6)
    few = Album((10**9 - whole.left) // 2)
    text = reconstructions(run, few, most=6)
    for shown in ("predicted, epoch 100", "error, epoch 100", "student sees", "true"):
        assert f'alt="{shown}"' in text
    assert '<small class="at">predicted, epoch 10:' in text and '<small class="at">error, epoch 10:' in text


def test_a_page_loads_nothing_and_no_name_becomes_markup(tmp_path):
    evil = "</script><script>alert(1)</script>"
    runs = [
        made_run(tmp_path / name, license=evil, starts=[{"command": f"echo '{evil}' \x1b[31m", "step": 0}], every=200)
        for name in ODD
    ]
    page = Parsed(write_page(runs, tmp_path / "page.html"))
    addresses = [
        value for _, found in page.elements for key, value in found.items() if key in ("src", "href", "action")
    ]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert len(page.all("script")) == 3 and not page.all("img") and not any("onerror" in a for _, a in page.elements)
    heads = next(row for row in page.rows if row[:1] == ["key"])
    assert heads[1:] == [*ODD[:3], "script>"]
    assert page.row("license of the weights used") == [evil] * 4 and "\\x1b[31m" in page.text
    assert (
        element("p", '<a href="x">', attributes={"title": '"&'})
        == '<p title="&quot;&amp;">&lt;a href=&quot;x&quot;&gt;</p>'
    )


def test_a_name_in_the_data_of_a_plot_ends_no_script():
    lines = {"</script><script>alert(1)</script>": [{"step": 1, "epoch": 1.0, "lr": 0.1}], "b": []}
    script, _ = embed(curves(lines, [0, 1]))
    assert script.lower().count("</script") == 1, "ours, between BokehJS and the plots"


def test_runs_side_by_side_show_first_what_differs(tmp_path):
    other = ("optim.weight_decay=0.1",)
    runs = [made_run(tmp_path / "a", every=500), made_run(tmp_path / "b", every=500, settings=other)]
    page = Parsed(write_page(runs, tmp_path / "page.html"))
    keys, heads = read_file(runs[0] / "config.yaml"), next(i for i, row in enumerate(page.rows) if row[0] == "key")
    rows = [row for row in page.rows[heads:] if row[0] in keys]
    assert [row[0] for row in rows] == ["run", "optim.weight_decay"] and rows[1][1:] == ["0.05", "0.1"]
    assert f"2 of {len(keys)} keys differ" in page.text
    alone = Parsed(write_page(runs[1:], tmp_path / "alone.html"))
    assert alone.row("optim.weight_decay") == ["0.1"] and "maedistill finetune" in alone.text


@pytest.mark.parametrize(
    ("ended", "state"),
    [("finished", "finished"), (None, "running, or killed"), ("a loss is nan", "ended early: a loss is nan")],
)
def test_a_page_says_how_a_run_stands(tmp_path, ended, state):
    run = made_run(tmp_path / "run", "finetune", epochs=4, done=2, every=200, ended=ended)
    page = Parsed(write_page([run], run / PAGE))
    assert f"{state} at epoch 1.918 of 4" in page.text and f"state{state}" in page.text
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [record["val_loss"] for record in records if "val_loss" in record]
    assert f"validation loss{scores[-1]:.4g}" in page.text and f"training loss{records[-1]['loss']:.4g}" in page.text
    assert ("Reload every" in page.text) == ("last record" in page.text) == (ended is None)
    assert "Reload every" not in Parsed(write_page([run], tmp_path / "other.html")).text, "nothing makes it again"
    (run / "exit.json").write_text("\0\0")
    assert "vit_small_patch16_224 (384 x 8), running, or killed at epoch" in Parsed(write_page([run], run / PAGE)).text
    (run / "metrics.jsonl").write_text("")
    assert not [a for a in Parsed(write_page([run], run / PAGE)).all("div") if "data-root-id" in a], "nothing to draw"


def test_curves_keep_peaks_and_small_numbers():
    records = [
        {"step": i, "epoch": i / 100, "trained_seconds": 6.0 * i, "lr": 1.5e-7, "grad_norm": 50.0 if i == 777 else 1.0}
        for i in range(1, 5001)
    ]
    plots = curves({"run": [*records, {"step": 5000, "epoch": 50.0, "knn": 0.5, "images": 100}]}, [0])
    data = plots["gradient norm"].renderers[0].data_source.data
    assert len(data["y"]) == 300 and max(data["high"]) == 50 and data["epoch"][-1] == 50 and data["minutes"][-1] == 500
    lr = plots["learning rate"]
    tips = dict(lr.hover[0].tooltips)
    assert tips["value"] == "@y{%.5g}" and lr.hover[0].formatters["@y"] == "printf", "five digits, also of 1.5e-7"
    knn = plots["kNN top-1"].renderers[0].data_source.data
    assert [knn[name][0] for name in ("y", "low", "high")] == pytest.approx([50, 40.4, 59.6], abs=0.1)
    long = "folder/" * 20
    names = [f"{long}{i}" for i in range(10)] + [f"{i}/{long}" for i in range(10)]
    many = curves({name: records[:200] for name in names}, range(20))["gradient norm"]
    lines = [one for one in many.renderers if type(one.glyph).__name__ == "Line"]
    assert sum(len(one.data_source.data["y"]) for one in lines) == 1800
    looks, tips = {(one.glyph.line_color, str(one.glyph.line_dash)) for one in lines}, {one.name for one in lines}
    assert len(looks) == len(tips) == 20


def test_a_sheet_is_taken_apart_as_it_was_put_together():
    columns = {name: torch.rand(3, 3, 32, 32) for name in "abcd"}
    sheet = tile([{"a": columns["a"]}, {name: columns[name] for name in "bcd"}], title="t")
    found = untile(sheet, side=32, groups=(1, 3))
    for name, images in zip("abcd", found, strict=True):
        for image, pixels in zip(images, columns[name], strict=True):
            small = np.asarray(image.resize((32, 32), Image.Resampling.NEAREST))
            assert np.array_equal(small, (pixels * 255).round().byte().permute(1, 2, 0).numpy())
    assert untile(sheet, side=32, groups=(2, 3)) is untile(sheet, side=31, groups=(1, 3)) is None
    empty = sheet.crop((0, 0, sheet.width, 52))  # the header alone
    assert untile(empty, side=32, groups=(1, 3)) is None


def test_predictions_stand_beside_the_truth_with_their_images(tmp_path, shards):
    index, names = open_index(f"{shards}/val-*.tar", split="val"), ["<b>ant", "bee", "cat"]
    run = made_run(tmp_path / "run", "finetune", every=500, settings=(f"data.val={shards}/val-*.tar",), classes=names)
    rows = []
    for i, label in enumerate(index.labels.tolist()):
        best = 1 if label == 0 and i < 12 else label  # ants that are taken for bees
        rows.append({"id": i, "key": index.key(i), "label": label, "loss": 0.1 + (best != label) * i, "top1": best})

    def write() -> Parsed:
        with (run / "predictions.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        return Parsed(write_page([run], run / PAGE))

    wrong = sum(row["label"] != row["top1"] for row in rows)
    page = write()
    assert f"{wrong} of 24 images are classified wrongly" in page.text
    assert page.row("<b>ant")[0] == "bee", "the worst confusion"
    pictures = [image["alt"] for image in page.all("img")]
    ants = [f"image {row['id']}" for row in reversed(rows) if row["label"] != row["top1"]]
    assert pictures[12:] == ants + ants[:2], "the largest loss first; of a pair of classes, two"
    rows[0]["key"] = "another"
    page = write()
    assert not page.all("img") and "other images" in page.text and "taken for" in page.text
    rows[0] |= {"key": index.key(0), "label": -1, "top1": 7}
    copy = shutil.copytree(shards, tmp_path / "copy")
    whole = Path(index.shards[index.shard_of(0)])
    with (copy / whole.name).open("r+b") as shard:
        shard.seek(int(index.offsets[0]))
        shard.write(b"damaged")
    for made in copy.glob("*.index.*"):
        made.unlink()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(shards), str(copy)))
    page = write()
    assert page.all("img")[0]["alt"] == "image 0 cannot be decoded"
    assert ["class -1", "class 7", "1", ""] in page.rows, "no such names"
    (run / "predictions.csv").write_text("id,what\n1,2\n")
    with pytest.raises(DataError) as refused:
        write_page([run], run / PAGE)
    assert "predictions.csv" in refused.value.cause and refused.value.remedy


def test_a_page_that_cannot_be_written_names_out_and_the_old_one_stays(tmp_path, monkeypatch):
    run = made_run(tmp_path / "run", every=500)
    before = write_page([run], run / PAGE).read_bytes()

    def full(path, data) -> None:
        path.write_bytes(data[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write_synced", full)
    with pytest.raises(DataError) as refused:
        command(monkeypatch, run)
    assert "No space" in refused.value.cause and "--out" in refused.value.remedy
    assert (run / PAGE).read_bytes() == before and not list(run.glob(".*"))


def test_the_command_refuses_what_is_no_run_and_a_missing_bokeh(tmp_path, monkeypatch):
    run = made_run(tmp_path / "run", every=500)
    with pytest.raises(ConfigError, match=r"run\.json"):
        command(monkeypatch, tmp_path)
    with pytest.raises(DataError, match="--out"):
        command(monkeypatch, run, "--out", tmp_path / "none" / "page.html")
    monkeypatch.setattr(interactive, "find_spec", lambda name: None)
    for stage in (pretrain, finetune):
        old = made_run(tmp_path / stage.__name__, stage.__name__, every=500)
        new = [f"run={tmp_path}/new", "log.report=true"]
        config = load_config(old / "config.yaml", new, root=STAGES[stage.__name__]).config
        with pytest.raises(ConfigError, match="Bokeh"):
            stage(config)
    assert not (tmp_path / "new").exists(), "said before the run starts"
    with pytest.raises(ConfigError, match=r"pip install 'maedistill\[report\]'"):
        command(monkeypatch, run)
    assert not (run / PAGE).exists()


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl"])
def test_records_of_another_version_are_an_error_of_two_lines(tmp_path, file):
    run = made_run(tmp_path / "run", "finetune", epochs=1, every=500)
    records = {"run.json": '{"stage": "other"}', "metrics.jsonl": '{"step": 1, "epoch": "x", "loss": 1, "top1": 1}\n'}
    (run / file).write_text(records[file])
    for runs in ([run], [made_run(tmp_path / "whole", every=500), run]):
        with pytest.raises(DataError) as refused:
            write_page(runs, tmp_path / PAGE)
        assert refused.value.cause.startswith(f"{run}: ") and "version" in refused.value.remedy
    (run / file).write_text('{"stage": "finetune"}' if file == "run.json" else '{"step": 1, "loss": 1.0}\n')
    with pytest.raises(DataError, match=f"^{run}: "):  # what the page is made of is missing
        write_page([made_run(tmp_path / "other", every=500), run], tmp_path / PAGE)


def test_records_that_cannot_be_read_are_an_error_of_two_lines(tmp_path):
    run = made_run(tmp_path / "run", every=500)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()  # it raises OSError, as another user's file does
    with pytest.raises(DataError, match=f"^{run} cannot be read"):
        write_page([run], run / PAGE)


@pytest.mark.parametrize(
    ("parts", "prefix", "name"), [({"exits": [3]}, "exit3_", "exit 3"), ({"peers": [{}, {}]}, "peer2_", "peer 2")]
)
def test_exits_and_peers_are_among_the_results(tmp_path, parts, prefix, name):
    run = made_run(tmp_path / "run", "finetune", epochs=2, **parts)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "epoch": 2.0, f"{prefix}top1_correct": 3, f"{prefix}images": 4}) + "\n")
    assert Parsed(write_page([run], run / PAGE)).row(f"{name}: top-1") == [
        "75.00 % (3 of 4), 95 % interval 30.06 to 95.44 %"
    ]


def test_a_page_is_refreshed_only_if_it_is_there_and_an_error_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_page, "_warned", set())
    page, calls = tmp_path / PAGE, []
    refresh(page, lambda: calls.append("unwanted"))
    refresh(page, lambda: calls.append("created"), create=True)
    page.touch()
    refresh(page, lambda: calls.append("again"))
    assert calls == ["created", "again"]
    for _ in range(3):
        refresh(page, lambda: 1 / 0)
    assert capsys.readouterr().err.count("division by zero") == 1


def test_a_training_refreshes_its_page_and_survives_its_errors(tuned, finetuning):
    run = finetuning.folder / "page"
    shutil.copytree(tuned.run, run)
    page = write_page([run], run / PAGE)
    before = page.read_bytes()
    (run / "predictions.csv").write_text("id\n1\n")
    source = f"init.source={read_file(run / 'config.yaml')['init.source'][0]}"
    ended = finetuning("page", source, "optim.epochs=4", "--extend")
    assert ended.err.count("is not up to date") == 1 and page.read_bytes() == before
    (run / "predictions.csv").unlink()
    finetuning("page", source, "optim.epochs=5", "--extend")
    assert "finished at epoch 5 of 5" in Parsed(page).text
    page.unlink()
    finetuning("page", source, "optim.epochs=5", "log.report=true")
    assert "finished at epoch 5 of 5" in Parsed(page).text, "also of a run that has ended"
    assert not (tuned.run / PAGE).exists(), "a run pays for no page that nobody asked for"


def test_epochs_of_sheets_are_those_of_their_steps(tmp_path):
    run = made_run(tmp_path / "run", epochs=4, every=STEPS_PER_EPOCH // 3)
    draw_sheets(run, [1, 2, 4], amd=False)
    (run / "pictures" / "step_000000001.png").write_bytes(b"\x89PNG cut short")
    (run / "pictures" / "step_x.png").write_bytes(b"no step")
    Image.new("RGB", (7, 7)).save(run / "pictures" / "step_000000002.png", "JPEG")
    Image.new("1", (20_000, 20_000)).save(run / "pictures" / "step_000000003.png")
    page = Parsed(write_page([run], run / PAGE))
    (knob,) = [one for one in page.all("input") if one["type"] == "range"]
    assert knob["data-epochs"] == "1 2 4" and knob["max"] == knob["value"] == "2"
    assert [image["alt"] for image in page.all("img") if "epoch" not in image["alt"]] == ["seen", "true"]
    hidden = [image["alt"] for image in page.all("img") if image.get("class") == "at"]
    assert hidden == ["predicted, epoch 1", "predicted, epoch 2", "error, epoch 1", "error, epoch 2"]

"""`tools/evaluate.py embed` in real processes: the same bytes for 1 and 3 of them, killed and continued, or damaged."""

import hashlib
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maedistill.commands.evaluate import parse
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, DataError, NumericsError
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.embed import EmbedSpec, embed
from maedistill.evaluation.features import extract_features
from maedistill.evaluation.full_pass import Predictor
from maedistill.weights.backbone import open_backbone
from tests.conftest import two_at_a_time
from tests.evaluation.tool import save_encoders
from tests.support.launch import TIMEOUT, Launcher

TRAIN = 96  # images


def start(launcher: Launcher, made: Path, shards: Path, out: str, *flags, ranks=1, **variables):
    """`--per-file 10` and `--batch 4`: neither divides the images, nor the batches the processes."""
    words = ["embed", made / "model", shards / "train-*.tar", made / out, "--per-file", 10, "--batch", 4, *flags]
    return launcher.start(made / out, ["tools/evaluate.py", *words], ranks=ranks, **variables)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A network with random weights, and one that is broken."""
    folder = tmp_path_factory.mktemp("embed")
    save_encoders(folder)
    return folder


@pytest.fixture(scope="module")
def whole(launcher, made, shards) -> dict[str, dict[str, bytes]]:
    """{name: files}, of one and of three processes, pooled and patches."""
    cases = {"one": ([], 1), "three": (["--workers", 1], 3)}
    cases |= {f"{name}_patches": ([*flags, "--patches", "--block", "0"], n) for name, (flags, n) in cases.items()}

    def run(name):
        flags, ranks = cases[name]
        ended = start(launcher, made, shards, name, *flags, ranks=ranks).finish()
        assert f"features of 96 images in {made / name}, 10 files written" in ended.out
        return content(made / name)

    return two_at_a_time(run, cases)


def test_any_number_of_processes_writes_the_same_bytes(whole):
    assert whole["one"] == whole["three"] and len(whole["one"]) == 11
    assert whole["one_patches"] == whole["three_patches"] != whole["one"]


def test_features_ids_and_labels_are_those_of_every_image(whole, made, shards):
    index = open_index(str(shards / "train-*.tar"))
    rows, labels = extract_features(
        open_backbone(str(made / "model")), index, EvalContext(torch.device("cpu"), 96, workers=0)
    )
    found = loaded(made / "one")
    assert found["ids"].tolist() == list(range(TRAIN)) and torch.equal(found["labels"], labels)
    torch.testing.assert_close(found["features"], rows, rtol=0, atol=1e-5)
    patches = loaded(made / "one_patches")["features"]
    assert patches.shape == (TRAIN, 3, 3, 32)
    shallow = extract_features(
        open_backbone(str(made / "model"), block=0), index, EvalContext(torch.device("cpu"), 96, workers=0)
    )[0]
    torch.testing.assert_close(patches.mean((1, 2)), shallow, rtol=0, atol=1e-5)


def test_the_manifest_has_the_settings_and_a_checksum_of_each_file(whole, shards):
    manifest = json.loads(whole["one"]["manifest.json"])
    assert manifest["settings"]["files"] == len(manifest["files"]) == 10
    assert manifest["settings"]["fingerprint"] == open_index(str(shards / "train-*.tar")).fingerprint()
    for name, entry in manifest["files"].items():
        data = whole["one"][name]
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert [entry["images"] for entry in manifest["files"].values()] == [10] * 9 + [6]


def test_killed_and_continued_by_another_number_of_processes(launcher, made, shards, whole):
    slow = {"FAULTS_FSYNC": 0.05}  # the kill comes before the end
    begun = start(launcher, made, shards, "killed", "--workers", 0, **slow)
    limit = time.monotonic() + TIMEOUT
    while not (made / "killed" / "features-000002.safetensors").exists():
        assert not begun.ended(0.002) and time.monotonic() < limit, begun.printed()
    begun.signal(signal.SIGKILL)
    assert begun.wait() == [-signal.SIGKILL]
    kept = json.loads((made / "killed" / "manifest.json").read_text())["files"]
    assert 2 <= len(kept) < 10
    times = {name: (made / "killed" / name).stat().st_mtime_ns for name in kept}
    (made / "killed" / f".features-000009.safetensors.{begun.pids[0]}.tmp").write_bytes(b"half of a file")
    ended = start(launcher, made, shards, "killed", "--workers", 0, ranks=3).finish()
    assert f"{len(kept)} of them are there already" in ended.out
    assert content(made / "killed") == whole["one"]
    assert {name: (made / "killed" / name).stat().st_mtime_ns for name in kept} == times, "kept, not written again"


def spec(made, shards, out, **settings) -> EmbedSpec:
    return EmbedSpec(str(made / "model"), str(shards / "train-*.tar"), out, **{"per_file": 10} | settings)


def context(batch=4) -> EvalContext:
    return EvalContext(torch.device("cpu"), batch, workers=0)


@pytest.mark.parametrize("number", [3, 9])
def test_only_what_is_damaged_or_lost_is_computed_again(made, shards, tmp_path, capsys, number):
    """A batch is a file; the last file, number 9, is padded to one, also if it alone is missing."""
    first = embed(spec(made, shards, tmp_path / "out"), context(64))
    before, file = content(tmp_path / "out"), tmp_path / "out" / f"features-00000{number}.safetensors"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1] + b"?"), file.unlink):
        damage()
        sizes = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Predictor, "__call__", noting(Predictor.__call__, sizes))
            assert embed(spec(made, shards, tmp_path / "out"), context(64)) == first
        assert content(tmp_path / "out") == before and sizes == [10]
        said = capsys.readouterr()
        assert f"{file} is not what the manifest says, and is computed again" in said.err
        assert "9 of them are there already" in said.out and "1 files written" in said.out


def noting(call, sizes: list[int]):
    def predict(predictor, pixels):
        sizes.append(len(pixels))
        return call(predictor, pixels)

    return predict


def test_an_image_that_cannot_be_decoded_is_in_no_file(made, bad_index, tmp_path, monkeypatch):
    monkeypatch.setattr("maedistill.evaluation.embed.open_index", lambda *_, **__: bad_index)
    where = EmbedSpec(str(made / "model"), bad_index.shards[0], tmp_path / "features", per_file=2)
    for _ in range(2):  # the second time everything is kept
        entries = embed(where, context(8))["files"].values()
        assert [(entry["images"], entry["bad_ids"]) for entry in entries] == [(1, [1]), (1, [])]
    assert loaded(tmp_path / "features")["ids"].tolist() == [0, 2]


def test_other_settings_and_folders_of_others_are_refused(made, shards, tmp_path):
    embed(spec(made, shards, tmp_path / "out"), context())
    before = content(tmp_path / "out")
    others = {"batch": ({}, 5), "images_per_file": ({"per_file": 11}, 4), "features": ({"block": 0}, 4)}
    for name, (settings, batch) in others.items():
        with pytest.raises(ConfigError, match=f"with another .*{name}"):
            embed(spec(made, shards, tmp_path / "out", **settings), context(batch))
    assert content(tmp_path / "out") == before
    again = embed(replace(spec(made, shards, tmp_path / "out"), model=f"{made}/../{made.name}/model"), context())
    assert again["files"] == json.loads(before["manifest.json"])["files"], "the same weights by another path"
    checkpoint = {"manifest.json": '{"step": 7, "files": {}}', "model.safetensors": "weights"}
    for name, files in (("run", {"run.json": "{}"}), ("checkpoint", checkpoint)):
        (tmp_path / name).mkdir()
        for file in (*files, ".run.json.7.tmp", ".features-000001.safetensors.7.tmp", ".manifest.json.7.tmp"):
            (tmp_path / name / file).write_text(files.get(file, "half of a file"))
        before = content(tmp_path / name)
        with pytest.raises(ConfigError, match=r"other files than features.*\n.*name a new folder"):
            embed(spec(made, shards, tmp_path / name), context())
        assert content(tmp_path / name) == before, "nothing of others is removed"
    for text in ("{", "[]", '{"settings": {}, "files": {"features-000000.safetensors": {"images": 10}}}'):
        (tmp_path / "out" / "manifest.json").write_text(text)
        with pytest.raises(DataError, match="is damaged"):
            embed(spec(made, shards, tmp_path / "out"), context())
    with pytest.raises(NumericsError, match="features of 10 of 10 images are not finite"):
        embed(EmbedSpec(str(made / "nan"), str(shards / "train-*.tar"), tmp_path / "nan", per_file=10), context())


def test_an_address_as_output_is_refused_before_anything_is_opened():
    arguments, begin = parse(["embed", "m", "s", "s3://bucket/out"])
    with pytest.raises(ConfigError, match="OUT: s3:/bucket/out is an address"):
        begin(arguments)

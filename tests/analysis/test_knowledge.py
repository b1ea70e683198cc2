"""`maedistill knowledge` on the runs of other tests: the same file for 1 and 2 processes, killed and continued."""

import io
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load, save
from timm.models import save_for_hf

from maedistill.analysis import knowledge
from maedistill.analysis.entropies import EntropySpec
from maedistill.analysis.knowledge import KnowledgeSpec, quantify
from maedistill.analysis.pictures import _read_mask, read_foreground, read_pictures
from maedistill.analysis.states import State, find_states, inspect_states, open_state
from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, DataError, NumericsError
from maedistill.evaluation.context import EvalContext
from maedistill.runs.restore import read_weights
from maedistill.weights.open_network import open_network
from tests.support.launch import TIMEOUT, Finished, Launcher

CONTEXT = EvalContext(torch.device("cpu"), 2, workers=0)
COUNT, UNITS = 5, 12  # images, in 3 batches; of 2 checkpoints of 2 runs
STEPS = 40  # enough that two processes share the work


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Networks of timm with random weights: for images of 24 px, with patches of 16 px, and without patches."""
    folder = tmp_path_factory.mktemp("knowledge")
    torch.manual_seed(0)
    vit = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    for name, model, size, settings in (
        ("small", "vit_tiny_patch16_224", 24, {"img_size": 24, "patch_size": 6, **vit}),
        ("coarse", "vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 16, **vit}),
        ("conv", "test_resnet", 32, {}),
    ):
        network = timm.create_model(model, num_classes=0, **settings)
        config = {"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
        save_for_hf(network, folder / name, model_args=settings, data_config=config, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def spec(mae: Finished, tuned: Finished, shards: Path) -> KnowledgeSpec:
    noise = EntropySpec(steps=STEPS, draws=2)
    return KnowledgeSpec([str(mae.run), str(tuned.run)], f"{shards}/val-*.tar", Path(), count=COUNT, noise=noise)


def start(launcher: Launcher, spec: KnowledgeSpec, out: Path, *, ranks: int = 1, **variables):
    words = [*spec.networks, "--images", spec.images, "--out", out, "--count", COUNT, "--batch", 2]
    return launcher.start(out, ["tools/knowledge.py", *words, "--steps", STEPS, "--draws", 2], ranks=ranks, **variables)


def content(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture(scope="module")
def two(launcher, spec, tmp_path_factory) -> tuple[Path, str]:
    """The folder that two processes wrote, and what they printed."""
    out = tmp_path_factory.mktemp("two") / "deep" / "out"
    return out, start(launcher, spec, out, ranks=2).finish().out


def test_one_process_writes_what_two_write_who_share_the_work(two, spec, tmp_path):
    out, printed = two
    assert 0 < printed.count(f"of {UNITS} in ") < UNITS, "of the first process alone"
    result = quantify(replace(spec, out=tmp_path / "one"), CONTEXT)
    files = content(out)
    assert content(tmp_path / "one") == files and len(files) == UNITS + 6
    assert json.loads(files["knowledge.json"]) == result
    assert {name for name in files if name.endswith(".png")} == {"metrics.png", "course.png", "maps.png"}
    page = files["knowledge.md"].decode()
    assert "| tuned - mae |" in page and f"{len(result['counted'])} of {COUNT} images count" in page
    assert len(result["counted"]) + sum(result["left_out"].values()) == COUNT
    names = [Path(run).name for run in spec.networks]
    assert list(result["networks"]) == names and result["differences"].keys() == {names[1]}
    for name in names:
        states = result["networks"][name]["checkpoints"]
        kept = sorted((Path(spec.networks[names.index(name)]) / "checkpoints").glob("step_?????????"))
        assert [state["step"] for state in states] == [int(path.name[5:]) for path in kept]
        assert states[0]["weight_distance"] == 0 < states[1]["weight_distance"]


def test_killed_and_continued_by_two_it_is_the_same_file_and_keeps_what_was_there(launcher, two, spec, tmp_path):
    slow = {"FAULTS_FSYNC": 0.05}  # the signal comes before the end
    begun = start(launcher, spec, tmp_path / "killed", **slow)
    limit = time.monotonic() + TIMEOUT
    while len(list((tmp_path / "killed" / "entropies").glob("*.safetensors"))) < 3:
        assert not begun.ended(0.002) and time.monotonic() < limit, begun.printed()
    begun.signal(signal.SIGSTOP)  # it keeps its lock
    with pytest.raises(ConfigError, match=r"--out: .* is in use by process"):
        quantify(replace(spec, out=tmp_path / "killed"), CONTEXT)
    begun.signal(signal.SIGKILL)
    assert begun.wait() == [-signal.SIGKILL]
    kept = sorted((tmp_path / "killed" / "entropies").glob("*.safetensors"))
    assert 3 <= len(kept) < UNITS
    times = [file.stat().st_mtime_ns for file in kept[:-1]]
    (kept[0].parent / ".00-000000001-0000.safetensors.7.tmp").write_bytes(b"half of a file")
    kept[-1].write_bytes(kept[-1].read_bytes()[:-4])  # cut
    ended = start(launcher, spec, tmp_path / "killed", ranks=2).finish()
    assert f"{len(kept) - 1} of them are there already" in ended.out
    assert f"{kept[-1]} is damaged, and is computed again" in ended.err
    assert content(tmp_path / "killed") == content(two[0])
    assert times == [file.stat().st_mtime_ns for file in kept[:-1]]


def test_results_and_page_are_on_disk_before_the_pictures(two, spec, tmp_path, monkeypatch):
    shutil.copytree(two[0], tmp_path / "out")
    for name in ("knowledge.json", "knowledge.md"):
        (tmp_path / "out" / name).unlink()

    def fail(*_, **__):
        raise RuntimeError("a chart")

    monkeypatch.setattr("maedistill.analysis.pages.draw_metrics", fail)
    with pytest.raises(RuntimeError, match="a chart"):
        quantify(replace(spec, out=tmp_path / "out"), CONTEXT)
    for name in ("knowledge.json", "knowledge.md"):
        assert (tmp_path / "out" / name).read_bytes() == (two[0] / name).read_bytes()


def test_other_foreground_needs_no_new_entropies_and_other_settings_are_refused(two, spec, tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "cell_entropies", None)
    shutil.copytree(two[0], tmp_path / "out")
    given = replace(spec, out=tmp_path / "out")
    assert "concepts" in quantify(replace(given, foreground="none"), CONTEXT)["networks"]["mae"]["metrics"]
    before = content(tmp_path / "out")
    noise = spec.noise
    for differing, settings in {
        "apply_exif": {"exif": "apply"},
        "crop": {"crop": 0.8},
        "ids": {"count": 4},
        "block": {"block": 0},
        "pool": {"pool": "class"},
        "grid": {"grid": 2, "foreground": "none"},
        "states": {"networks": spec.networks[:1]},
        "images": {"images": spec.images.replace("val", "train")},
        "entropy": {"noise": replace(noise, entropy=-2.5)},
        "steps": {"noise": replace(noise, steps=STEPS + 1)},
        "draws": {"noise": replace(noise, draws=4)},
        "seed": {"noise": replace(noise, seed=1)},
        "batch": {},
    }.items():
        context = replace(CONTEXT, batch=3 if differing == "batch" else 2)
        with pytest.raises(ConfigError, match=f"of another .*{differing}"):
            quantify(replace(given, **settings), context)
    (tmp_path / "mine").mkdir()
    mine = {"thesis.txt": "years of work", "settings.json": '{"editor.fontSize": 12}'}
    for name, text in mine.items():
        (tmp_path / "mine" / name).write_text(text)
        with pytest.raises(ConfigError, match="holds something else"):
            quantify(replace(spec, out=tmp_path / "mine"), CONTEXT)
    assert content(tmp_path / "out") == before
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == mine


def test_bad_inputs_are_refused_before_any_work(spec, made, tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "cell_entropies", None)
    empty = tmp_path / "empty"
    shutil.copytree(spec.networks[0], empty, ignore=shutil.ignore_patterns("checkpoints"))
    mae = spec.networks[0]
    for error, words, settings in (
        (DataError, "keeps no intact checkpoint.*\n.*log.keep", {"networks": [str(empty)]}),
        (ConfigError, "named twice", {"networks": [mae, mae + "/"]}),
        (ConfigError, "named twice", {"networks": [mae, f"run:{os.path.relpath(mae)}"]}),
        (
            ConfigError,
            "different image sizes .*'small': 24.*\n.*--image-size",
            {"networks": [mae, str(made / "small")]},
        ),
        (
            ConfigError,
            "different numbers of patches.*'coarse': 2.*\n.*--grid",
            {"networks": [mae, str(made / "coarse")]},
        ),
        (ConfigError, "conv has no patches.*\n.*--grid", {"networks": [str(made / "conv")]}),
        (ConfigError, "5 x 5 cells do not divide images of 32 pixels\nuse 4", {"grid": 5}),
        (ConfigError, "2 x 2 cells have no centre", {"grid": 2}),
        (ConfigError, "nowhere is not a folder", {"foreground": str(tmp_path / "nowhere")}),
        (DataError, "png is missing\n.*KEY.png", {"foreground": str(tmp_path)}),
        (ConfigError, "no block 7", {"block": 7}),
        (ConfigError, "no class token", {"networks": [str(made / "conv")], "grid": 4, "pool": "class"}),
    ):
        with pytest.raises(error, match=words):
            quantify(replace(spec, out=tmp_path / "out", **settings), CONTEXT)
    assert not (tmp_path / "out").exists()


def test_a_network_without_patches_is_compared_on_a_grid(spec, made, tmp_path):
    both = replace(spec, networks=[str(made / "conv"), str(made / "coarse")], grid=4, out=tmp_path / "out")
    result = quantify(replace(both, foreground="none"), CONTEXT)
    for one in result["networks"].values():
        assert one["metrics"].keys() == {"concepts"} and len(one["checkpoints"]) == 1
    assert result["settings"]["states"][0]["weights_sha256"]


def test_d_and_rho_are_compared_between_the_same_checkpoints_only_and_damaged_files_are_made_again(
    two, spec, tmp_path, capsys
):
    tuned = Path(spec.networks[1])
    shutil.copytree(tuned, tmp_path / "$_x$")
    names = [str(tmp_path / "$_x$"), str(tuned)]
    few = replace(spec, networks=names, out=tmp_path / "out", foreground="none", noise=EntropySpec(steps=2, draws=2))
    result = quantify(few, CONTEXT)
    assert result["differences"]["tuned"]["metrics"].keys() == {"concepts", "d_mean", "d_std", "rho"}
    others = json.loads((two[0] / "knowledge.json").read_bytes())["differences"]["tuned"]["metrics"]
    assert others.keys() == {"foreground", "background", "ratio"}, "the runs keep other steps"
    files = content(few.out)
    file = min((few.out / "entropies").iterdir())
    file.write_bytes(save({name: value.fill_(np.nan) for name, value in load(file.read_bytes()).items()}))
    quantify(few, CONTEXT)
    assert content(few.out) == files and f"{file} is damaged" in capsys.readouterr().err


def test_noise_under_which_a_network_breaks_is_an_error(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "normalize", lambda x, *_: x / 0)
    with pytest.raises(NumericsError, match="mae at step"):
        quantify(replace(spec, out=tmp_path / "out"), CONTEXT)


def test_every_checkpoint_opens_and_features_are_those_of_the_same_point_before_and_after_fine_tuning(spec):
    """The mean over the patches of the last block's output, before the norms that differ."""
    states = find_states(spec.networks)
    assert len(states) == 4
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    for state in states:
        network = open_state(state)
        vit, outputs = network.module.network, []
        handle = vit.blocks[-1].register_forward_hook(
            lambda module, inputs, output, outputs=outputs: outputs.append(output)
        )
        found = network.module(images)
        handle.remove()
        torch.testing.assert_close(found, outputs[0][:, vit.num_prefix_tokens :].mean(1))
        torch.testing.assert_close(open_state(state, pool="class").module(images), outputs[0][:, 0])
        assert not found.requires_grad
        seen.append(found)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[3])
    newest = open_network(spec.networks[0]).module.forward_intermediates(images, indices=1, intermediates_only=True)
    torch.testing.assert_close(newest[0].mean((2, 3)), seen[1])


def test_a_damaged_checkpoint_is_passed_over_and_one_alone_has_one_state(spec, tmp_path, capsys):
    shutil.copytree(spec.networks[0], tmp_path / "mae")
    first, second = sorted((tmp_path / "mae" / "checkpoints").glob("step_?????????"))
    (first / "model.safetensors").write_bytes(b"half of a file")
    assert [state.source for state in find_states([str(tmp_path / "mae")])] == [f"run:{second}"]
    assert f"{first} is damaged" in capsys.readouterr().err
    assert find_states([str(second)]) == [State(second.name, int(second.name[5:]), f"run:{second}")]
    (second / "run.json").write_text((second / "run.json").read_text() + "\n")
    for source in (first, second):
        with pytest.raises(DataError, match=f"{source} is damaged"):
            open_network(str(source))
    shutil.rmtree(first)  # as a run that still trains prunes it
    with pytest.raises(DataError):
        open_state(State("mae", 1, f"run:{first}"))


def test_pixels_are_from_0_to_1_and_each_network_normalises_them(spec, tmp_path, monkeypatch):
    seen = []

    def note(features, pixels, ids, *, grid, spec):
        seen.append((ids.tolist(), pixels, features(pixels)))
        return torch.zeros(len(ids), grid * grid), torch.zeros(len(ids))

    monkeypatch.setattr(knowledge, "cell_entropies", note)
    (tmp_path / "out").mkdir()
    # of a first start that computed nothing
    (tmp_path / "out" / "settings.json").write_text('{"format": 1, "states": [], "grid": 9}')
    (tmp_path / "out" / "maps.png").touch()
    result = quantify(replace(spec, out=tmp_path / "out"), CONTEXT)
    assert result["left_out"]["no_response"] == COUNT and not result["networks"], "none counts, and it is written"
    assert not list((tmp_path / "out").glob("*.png")), "those of another foreground"
    states, index = find_states(spec.networks), open_index(spec.images)
    assert len(seen) == UNITS and sorted(id for ids, *_ in seen[:3] for id in ids) == result["settings"]["ids"]
    for state, (ids, pixels, features) in zip(states, seen[::3], strict=True):
        network = open_state(state)
        images, *_ = EvaluationImages(index, torch.tensor(ids), network.transform()).__getitems__([0, 1])
        assert torch.equal(pixels, images / 255)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (network.mean, network.std))
        torch.testing.assert_close(features, network.module((images / 255 - mean) / std))


def test_the_distance_travelled_by_the_weights_is_relative_and_leaves_out_the_classifier(spec):
    states = find_states(spec.networks)
    travelled = inspect_states(states, open_state, grid=None).distances
    for name, prefix, pair in (("mae", "encoder.vit.", states[:2]), ("tuned", "vit.", states[2:])):
        before, after = (
            torch.cat([value.flatten().double() for key, value in sorted(read_weights(Path(state.source[4:])).items())
                       if key.startswith(prefix) and ".head." not in f".{key}"])
            for state in pair
        )  # fmt: skip
        assert travelled[name] == pytest.approx([0, float((after - before).norm() / before.norm())], rel=1e-6)


def test_masks_are_cropped_as_images_are_and_a_cell_counts_from_half_of_its_pixels(spec, tmp_path):
    index = open_index(spec.images)
    network = open_state(find_states(spec.networks[:1])[0])
    pictures = read_pictures(index, network, CONTEXT, count=2, seed=0)
    assert pictures.names == [index.key(i) for i in pictures.ids.tolist()]
    mask = np.zeros((32, 32), np.uint8)
    mask[:8] = 7  # the first line of cells
    mask[8:16, :4] = 1  # half of a cell
    mask[8:16, 8:11] = 255  # less than half of one
    for name in pictures.names:
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(file)
    found = read_foreground(str(tmp_path), pictures, network, grid=4)
    assert [np.flatnonzero(row).tolist() for row in found] == [[0, 1, 2, 3, 4]] * 2
    inner = read_foreground(str(tmp_path), pictures, replace(network, crop=0.5), grid=4)  # from pixel 8 on
    assert [np.flatnonzero(row).tolist() for row in inner] == [[0, 4]] * 2
    centre = read_foreground("center", pictures, network, grid=4)
    assert [np.flatnonzero(row).tolist() for row in centre] == [[5, 6, 9, 10]] * 2
    assert np.flatnonzero(read_foreground("center", pictures, network, grid=16)[0])[[0, -1]].tolist() == [34, 221]
    with io.BytesIO() as data:
        Image.fromarray(mask[:30]).save(data, "PNG")
        for content, words in ((data.getvalue(), "32 x 30 pixels and its image 32 x 32"), (b"no", "cannot be decoded")):
            file.write_bytes(content)
            with pytest.raises(DataError, match=words):
                read_foreground(str(tmp_path), pictures, network, grid=4)
    for mode in ("LA", "RGBA"):
        Image.fromarray(mask).convert(mode).save(file)  # opaque
        assert np.flatnonzero(read_foreground(str(tmp_path), pictures, network, grid=4)[-1]).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="is missing"):
        _read_mask(tmp_path, str(file.with_suffix("")), (32, 32))  # an absolute key

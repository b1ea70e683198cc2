"""Pre-training end to end, in real processes: what a run leaves, and that layout, kills and restarts change nothing.

Every start is `tools/pretrain.py` as a person, deepspeed or srun starts it (tests/support/launch.py). The AMD run
of one process, ZeRO 0 and no accumulation is the reference; the others must see the same samples, pixels and masks and
get the same losses. Their sums run in another order, which grows: 1e-5 holds for the first 20 steps.
"""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.runs.folder import RunFolder
from maedistill.runs.resolve_auto import resolve_auto
from tests.conftest import two_at_a_time
from tests.data.pictures import encode
from tests.data.tar_files import write_tar
from tests.faults.notes import same_result, witnessed

EPOCH = 8  # steps
STEPS = 3 * EPOCH
TERMS = {
    "mae": {"loss", "pixels"},
    "dmae": {"loss", "pixels", "align/1"},
    "amd": {"loss", "pixels", "align/0", "align/1", "generate/0", "generate/1"},
}
# Layouts that must not change the numbers: launcher, ranks, settings. Together all ZeRO stages, and all launchers but
# torchrun, which the fault tests use.
LAYOUTS = {
    "two ranks": ("fork", 2, []),
    "zero 1, srun, accumulation 3": ("slurm", 2, ["engine.zero=1", "engine.micro_batch=2", "data.workers=1"]),
    "zero 2, deepspeed": ("deepspeed", 2, ["engine.zero=2"]),
    "zero 3, accumulation 3": ("fork", 2, ["engine.zero=3", "engine.micro_batch=2", "optim.ema=null"]),
    "accumulation 3": ("fork", 1, ["engine.micro_batch=4", "engine.activation_checkpointing=true"]),
}


@pytest.fixture(scope="module")
def layouts(pretraining, settings, trio):
    """The AMD run again, in each layout."""

    def start(name):
        launcher, ranks, more = LAYOUTS[name]
        folder = name.replace(" ", "-").replace(",", "")
        return pretraining(folder, *settings["amd"], *more, launcher=launcher, ranks=ranks, witness=True)

    return two_at_a_time(start, LAYOUTS)


def test_auto_is_settled_by_the_images_and_kept_by_a_run_that_continues(mae, tmp_path):
    """`mae` has begun with 5 epochs of batch 12: neither more images nor other ranks change that."""
    auto = [f"optim.{name}=auto" for name in ("global_batch", "epochs", "warmup_epochs")]

    def numbers(*more: str) -> tuple[tuple[float, ...], str]:
        config = load_config(mae.run / "config.yaml", [*auto, *more], root=PretrainConfig).config
        settled, [line] = resolve_auto(config, 10_000, world_size=5, fresh=False)
        return (settled.optim.global_batch, settled.optim.epochs, settled.optim.warmup_epochs), line

    kept, line = numbers()
    assert kept == (12, 5.0, 0.5) and "as this run began" in line
    fresh, line = numbers(f"run={tmp_path}/new")
    assert fresh == (130, 260.0, 13.0) and "10,000 images" in line
    assert numbers("optim.epochs=7")[0] == (12, 7.0, 0.5), "what is given is not kept"


def test_images_without_labels_give_pictures_and_neither_knn_nor_an_error(pretraining, settings, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(40):
        Image.new("RGB", (32, 32), (6 * i, 255 - 6 * i, 99)).save(photos / f"{i}.png")
    make_shards(open_folder(photos, val_fraction=0.4), tmp_path / "shards")
    folders = [f"data.train={tmp_path}/shards", f"data.val={tmp_path}/shards", "log.probe_every_epochs=1"]
    ended = pretraining("bare", *settings["mae"], *folders, "optim.epochs=1", "optim.warmup_epochs=0")
    assert not {"knn", "linear"} & {name for record in ended.records() for name in record}
    assert len(list((ended.run / "pictures").iterdir())) == 1
    [line] = [line for line in ended.out.splitlines() if line.startswith("val ")]
    assert "16 images" in line and "(val-000000.tar)" in line and "24 of 24 training images have no label" in line
    assert f"{tmp_path}/shards (train-000000.tar)" in ended.out and "no kNN" in line


@pytest.mark.parametrize("method", TERMS)
def test_every_loss_falls(trio, method):
    steps = trio[method].metrics()
    for term in TERMS[method]:
        first, last = (sum(record[term] for record in part) / 8 for part in (steps[:8], steps[-8:]))
        assert last < 0.98 * first, term


@pytest.mark.parametrize("method", TERMS)
def test_a_run_leaves_a_complete_folder(trio, method):
    ended = trio[method]
    run, steps = ended.run, ended.metrics()
    total = 5 * EPOCH if method == "mae" else STEPS
    assert ended.err == ""
    assert f"step {total}/{total}" in ended.out and "kNN" in ended.out
    assert json.loads((run / "exit.json").read_text()) == {"exit_code": 0, "reason": "finished", "step": total}
    metadata = json.loads((run / "run.json").read_text())
    assert metadata["data"]["images"] == 96
    (start,) = metadata["starts"]
    assert "torch" in start["versions"]
    assert (metadata["teacher"] is None) == (method == "mae")
    assert len(steps) == total and TERMS[method] < steps[0].keys()
    assert [r["step"] for r in ended.records() if "knn" in r] == [*range(16, total, 16), total]
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert names == {f"step_{total - EPOCH:09d}", f"step_{total:09d}"}
    weights = load_file(ended.last_checkpoint() / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert {name.split(".")[0] for name in weights} == {
        "encoder",
        "decoder",
        *(() if method == "mae" else ("projections",)),
        *(("generators",) if method == "amd" else ()),
    }
    pictures = sorted((run / "pictures").iterdir())
    assert [picture.name for picture in pictures] == [f"step_{step:09d}.png" for step in (*range(16, total, 16), total)]
    with Image.open(pictures[0]) as sheet:
        columns = 5 if method == "amd" else 4  # amd's teacher sees more than the student, and has a column of its own
        assert sheet.size == (columns * 196 + 28, 52 + 8 * 196)  # cells of 192 px and their gaps
    assert (run / "report.md").is_file() and (run / "config.yaml").is_file()
    events = EventAccumulator(str(run / "tb")).Reload()
    assert [event.step for event in events.Scalars("train/pixels")] == list(range(1, total + 1))
    assert events.Tags()["images"] == ["reconstruction"]


def test_a_linear_probe_runs_beside_knn_on_a_period_of_its_own(pretraining, settings):
    periods = ["log.knn_every_epochs=2", "log.probe_every_epochs=1", "log.pictures_every_epochs=null"]
    ended = pretraining("probed", *settings["mae"], "optim.epochs=2", *periods, "log.report=true")
    scores = {record["step"]: record for record in ended.records() if "linear" in record}
    assert list(scores) == [EPOCH, 2 * EPOCH] and [("knn" in record) for record in scores.values()] == [False, True]
    assert all(0 < record["linear"] <= 1 for record in scores.values())
    assert ended.out.count("linear probe") == 2
    page = (ended.run / "report.html").read_text()
    assert "finished at epoch 2 of 2" in page and "linear probe top-1" in page


def probe_once(monkeypatch, images, device, metrics=None, **periods):
    """The precision of each pass and the device of each vote when so many images could be decoded."""
    loop = importlib.import_module("maedistill.pretraining.loop")
    found = torch.eye(3)[:images], torch.arange(images)
    precisions, devices = [], []
    monkeypatch.setattr(loop, "random_subset", lambda index, count: index)
    monkeypatch.setattr(loop, "pooled_features", lambda *args, **_: precisions.append(args[-1].precision) or found)
    monkeypatch.setattr(loop, "knn_accuracy", lambda *_, device: devices.append(device) or 0.5)
    config = SimpleNamespace(
        data=SimpleNamespace(image_size=32, eval_crop=1.0, max_bad_fraction=0.0),
        log=SimpleNamespace(**{"knn_every_epochs": 1, "probe_every_epochs": None, "knn_images": 3} | periods),
        engine=SimpleNamespace(precision="auto", loader_seconds=1.0),
    )
    plan = SimpleNamespace(batch=SimpleNamespace(micro_batch=2))
    parts = SimpleNamespace(config=config, module=None, index="train")
    run = SimpleNamespace(
        config=config, plan=plan, due=bool, workers=0, device=device, step=1, epoch=1.0, metrics=metrics
    )
    loop.probe(run, parts, "val")
    return precisions, devices


def test_every_rank_votes_on_its_own_device_in_the_precision_of_the_run(monkeypatch):
    """Also a rank that writes nothing: kNN is shared among all, on their devices, like every forward pass."""
    device = torch.device("cuda", 1)
    assert probe_once(monkeypatch, 3, device) == (["auto"] * 2, [device])


@pytest.mark.parametrize(("images", "knn", "scores"), [(1, None, []), (1, 1, [{"knn"}]), (2, 1, [{"knn", "linear"}])])
def test_a_linear_probe_of_one_image_is_left_out(monkeypatch, images, knn, scores):
    written = []
    metrics = SimpleNamespace(write=lambda step, record: written.append({"knn", "linear"} & record.keys()))
    probe_once(monkeypatch, images, torch.device("cpu"), metrics, knn_every_epochs=knn, probe_every_epochs=1)
    assert written == scores


def test_a_student_that_sees_all_and_predicts_no_pixels_imitates_alone(pretraining, settings, mae):
    """The same losses with ZeRO 0, 2 and 3, where the final norm has no gradient. No decoder, no pictures."""
    whole = [*settings["dmae"], "masks.student_keep_ratio=1", "pixels.weight=0", "optim.epochs=1"]
    runs = [pretraining("sees_all", *whole, "optim.ema=0.9", "log.report=true")]
    runs += [pretraining(f"sees_all{zero}", *whole, f"engine.zero={zero}", launcher="fork", ranks=2) for zero in (2, 3)]
    terms = [[{k: v for k, v in step.items() if k in TERMS["amd"]} for step in ended.metrics()] for ended in runs]
    assert terms[0][0].keys() == {"loss", "align/1"} and terms[0][-1]["loss"] < terms[0][0]["loss"]
    for ended, losses in zip(runs, terms, strict=True):
        assert losses == [pytest.approx(other, rel=1e-4) for other in terms[0]]
        assert not (ended.run / "pictures").exists()
        assert not any(name.startswith("decoder") for name in load_file(ended.last_checkpoint() / "model.safetensors"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_see_the_same_and_lose_the_same(trio, layouts, layout):
    reference, other = trio["amd"], layouts[layout]
    columns = ("samples", "images", "orders", "seen")
    expected, seen = witnessed(reference.run, *columns), witnessed(other.run, *columns)
    assert list(expected) == list(range(12 * STEPS)) and seen == expected
    assert len({tuple(order) for _, _, order, _ in expected.values()}) > 200, "masks differ between samples"
    for ours, theirs in zip(other.metrics()[:20], reference.metrics()[:20], strict=True):
        for term in TERMS["amd"]:
            assert ours[term] == pytest.approx(theirs[term], abs=1e-5, rel=0), (ours["step"], term)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    ours, theirs = (load_file(ended.last_checkpoint() / "model.safetensors") for ended in (other, reference))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not name.endswith("qkv.bias"):  # attention ignores the keys' bias: Adam makes steps of its rounding errors
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-3)


def test_ranks_pool_the_same_features(trio, layouts):
    """95 training images on 2 ranks, so one is padding. Each counts once, on every rank, also under ZeRO 3."""
    expected = torch.load(trio["amd"].run / "features-0.pt")
    assert [len(labels) for _, labels in expected] == [95, 24]
    for layout, rank in (("two ranks", 0), ("two ranks", 1), ("zero 3, accumulation 3", 1)):
        for (features, labels), (rows, truth) in zip(
            torch.load(layouts[layout].run / f"features-{rank}.pt"), expected, strict=True
        ):
            assert torch.equal(labels, truth)
            torch.testing.assert_close(features, rows, rtol=0, atol=1e-4)


@pytest.mark.faults
def test_a_killed_run_goes_on_bit_by_bit(pretraining, settings, trio):
    """Killed in the middle of step 21, 5 steps after its checkpoint; the reference ran through, without workers."""
    command = ["killed", *settings["amd"], "data.workers=1"]
    before = pretraining(*command, witness=True, code=-9, WITNESS_KILL="21")
    assert before.last_checkpoint().name == "step_000000016" and len(before.metrics()) == 20
    assert not (before.run / "exit.json").exists()
    after = pretraining(*command)
    assert "continues at step 16 of 24" in after.out
    same_result(after.run, trio["amd"].run)
    assert len(json.loads((after.run / "run.json").read_text())["starts"]) == 2


def test_bf16_trains_nearly_the_same(pretraining, settings, trio):
    ended = pretraining(
        "bf16", *settings["amd"], "engine.precision=bf16", "engine.zero=2", "engine.activation_checkpointing=true"
    )
    for ours, theirs in zip(ended.metrics(), trio["amd"].metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)
        assert ours["loss"] != theirs["loss"]
    dtypes = {value.dtype for value in load_file(ended.last_checkpoint() / "model.safetensors").values()}
    assert dtypes == {torch.float32}


def test_what_a_run_folder_allows_and_refuses(pretraining, settings, trio, shards, tmp_path):
    """Other epochs and teachers are refused, as are others in tests/faults/bad_inputs.py; moved shards are not."""
    run = pretraining.folder / "continued"
    shutil.copytree(trio["dmae"].run, run)
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "exit.json"}
    error, fix = pretraining("continued", *settings["dmae"], "optim.epochs=4", code=2).err.splitlines()
    assert "optim.epochs: 3.0 there, 4.0 now" in error and "add --extend" in fix
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path in before}
    more = [f"data.train={moved}/train-{{000000..000003}}.tar", "log.every_steps=2", "optim.epochs=4", "--extend"]
    ended = pretraining("continued", *settings["dmae"], *more)
    assert "continues at step 24 of 32" in ended.out
    assert [r["step"] for r in ended.records() if "loss" in r] == [*range(1, 25), 26, 28, 30, 32]
    again = pretraining("continued", *settings["dmae"], *more)
    assert again.records() == ended.records() and "continues at step 32 of 32" in again.out
    metadata = json.loads((run / "run.json").read_text())
    changed = metadata | {"teacher_weights": ["0" * 64]}  # as if the teacher had changed
    (run / "run.json").write_text(json.dumps(changed))
    error, fix = pretraining("continued", *settings["dmae"], *more, code=2).err.splitlines()
    assert f"other weights than now: {metadata['teacher']}" in error and "restore the weights" in fix
    fresh = pretraining("continued", *settings["dmae"], "optim.lr=1e-4", "--fresh", "--yes")
    assert len(fresh.metrics()) == 24 and len(json.loads((run / "run.json").read_text())["starts"]) == 1


def test_a_picture_shows_others_in_the_place_of_bad_images(monkeypatch, tmp_path):
    """Of ten images the first two cannot be decoded."""
    loop, drawn = importlib.import_module("maedistill.pretraining.loop"), []
    pictures = [encode(Image.new("RGB", (8, 8), (20 * i,) * 3), "PNG") for i in range(10)]
    members = {f"{i}.png": picture if i >= 2 else b"" for i, picture in enumerate(pictures)}
    index = open_index(str(write_tar(tmp_path / "a.tar", members)))
    monkeypatch.setattr(loop, "random_subset", lambda index, count: torch.arange(min(count, len(index))))
    monkeypatch.setattr(loop, "split_of", lambda *_: None)
    monkeypatch.setattr(loop, "reconstruction_sheet", lambda module, images, *_, **__: drawn.append(images))
    data, module = (
        SimpleNamespace(image_size=8, eval_crop=1.0),
        SimpleNamespace(encoder=SimpleNamespace(grid=1), decoder=torch.nn.Identity(), pixels=SimpleNamespace(weight=1)),
    )
    config, cpu = SimpleNamespace(data=data), torch.device("cpu")
    parts = SimpleNamespace(config=config, val_index=index, device=cpu, module=module, teachers=[], method_name="mae")
    run = SimpleNamespace(folder=RunFolder(tmp_path), step=1, epoch=1.0, metrics=None)
    loop.draw(run, parts)
    assert [round(float(image[0, 0, 0]) * 255) for image in drawn[0]] == [20 * i for i in range(2, 10)]

"""Codistillation through the tools: two runs learn from each other; kills and late or lost peers are no accident."""

import json
import os
import random
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import maedistill
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.errors import ConfigError, DataError
from maedistill.finetuning.objective import Mutual
from maedistill.finetuning.outputs import RequestedOutputs
from maedistill.finetuning.setup import dry_run, open_finetuning
from maedistill.finetuning.teacher import OutputTeacher
from maedistill.runs.published import publish, read_published, remove_published
from maedistill.weights.open_network import open_network, unloaded_run
from tests.conftest import SCRATCH
from tests.faults.notes import same_result
from tests.finetuning.test_distilled import IMAGES, TARGETS, assemble, vit
from tests.finetuning.test_self_terms import load
from tests.support.launch import Finished, Start

KILLS = max(3, int(os.environ.get("MAEDISTILL_KILLS", "12")) // 4)  # of each run
SMALL = [*SCRATCH, "optim.epochs=2", "log.save_every_epochs=0.5"]  # 16 steps, every fourth is saved
PLAIN = ["augment.mixup=0", "augment.cutmix=0", "augment.erasing=0", "student.drop_path=0"]  # what differs by rank


class Pair:
    """Two runs that name each other, in the folder of `finetuning`."""

    def __init__(self, finetuning, name: str, *given: str) -> None:
        self.finetuning, self.given = finetuning, [*SMALL, *given]
        self.names = [f"{name}-a", f"{name}-b"]

    def folder(self, which: int) -> Path:
        return self.finetuning.folder / self.names[which]

    def start(self, which: int, *given: str, **more) -> Start:
        section = f"distill.codistillation={{weight: 1, every_steps: 3, peers: [{self.folder(1 - which)}]}}"
        return self.finetuning.start(self.names[which], *self.given, section, f"seed={which}", *given, **more)

    def run(self) -> list[Finished]:
        starts = [self.start(which) for which in (0, 1)]
        return [start.finish() for start in starts]

    def remove(self) -> None:
        for which in (0, 1):
            shutil.rmtree(self.folder(which))


@pytest.fixture(scope="module")
def trained(finetuning):
    return Pair(finetuning, "pair").run()


def test_both_learn_from_each_other_and_keep_what_a_restart_may_need(trained):
    """Classifiers begin at 0, so all predictions are equal until they have moved."""
    for run in trained:
        losses = [record["codistillation"] for record in run.metrics()]
        assert losses[:2] == pytest.approx([0, 0], abs=1e-6) and min(losses[3:]) > 1e-5
        kept = sorted(int(path.name[5:]) for path in (run.run / "published").iterdir())
        oldest = min(int(path.name[5:]) for path in (run.run / "checkpoints").glob("step_*"))
        assert kept == list(range(kept[0], 16, 3)) and 0 < kept[0] <= oldest // 3 * 3
        saved = load_file(run.run / "published" / "step_000000015" / "model.safetensors")
        assert saved.keys() == open_network(f"run:{run.run}").module.state_dict().keys()
        entry = json.loads((run.run / "run.json").read_text())["codistillation"]
        assert (entry["every"], entry["first"], entry["last"]) == (3, 0, 15)


def test_a_step_sees_the_weights_of_its_period(trained, finetuning, tmp_path):
    """What the copies say is what the published network says: of step 12 in steps 12 to 14, then of step 15."""
    run, peer = trained
    config = load_config(run.run / "config.yaml", [f"run={tmp_path}"], root=FinetuneConfig).config
    parts = open_finetuning(config, world_size=1, device=torch.device("cpu"))
    network = parts.codistillation
    network._copies[str(peer.run)] = OutputTeacher(
        unloaded_run(peer.run), requested=RequestedOutputs(logits=True), student_mean=parts.mean,
        student_std=parts.std, student_grid=1,
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    folder, peers = SimpleNamespace(path=tmp_path), SimpleNamespace(paused=nullcontext)
    for step in (12, 14, 15):
        now = SimpleNamespace(folder=folder, module=parts.module, step=step, watch=peers)
        network.exchange(now)
        published = unloaded_run(peer.run).module
        period = peer.run / "published" / f"step_{step // 3 * 3:09d}" / "model.safetensors"
        published.load_state_dict(load_file(period))
        found = network.outputs(images, step)["peers"]
        torch.testing.assert_close(found[0], published(images), rtol=1e-5, atol=1e-6)
    kept = sorted(path.name for path in (tmp_path / "published").iterdir())
    assert kept == ["step_000000012", "step_000000015"]  # the peer's oldest checkpoint is of step 12
    assert network.outputs(images, 15)["peers"].shape == (1, 2, 3)


def test_a_pair_equals_mutual_learning_where_nothing_is_stale(tmp_path):
    """Period 1: KL to copies of this very step has the value and gradient of mutual learning of two."""
    config = load(tmp_path, "distill.codistillation={weight: 1, peers: [runs/b], every_steps: 1}")
    together, apart = ([vit(seed=1), vit(seed=2)] for _ in range(2))
    both = torch.optim.SGD([p for student in together for p in student.parameters()], 0.1)
    each = [torch.optim.SGD(student.parameters(), 0.1) for student in apart]
    module, alone = Mutual(together[0], together[1:], label_weight=1.0), [assemble(config, s)[0] for s in apart]
    for _ in range(3):
        both.zero_grad()
        module(IMAGES, TARGETS, [], torch.ones(1))["loss"].backward()
        both.step()
        copies = [student(IMAGES).detach() for student in apart]  # before either of them moves
        for own, optimizer, peer in zip(alone, each, copies[::-1], strict=True):
            optimizer.zero_grad()
            own(IMAGES, TARGETS, [], torch.ones(1), {"peers": peer[None]})["loss"].backward()
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def test_ranks_and_the_time_of_a_start_do_not_matter(finetuning):
    """One run on two ranks, the other late: the same losses up to rounding."""
    prompt, pair = Pair(finetuning, "prompt", *PLAIN).run(), Pair(finetuning, "late", *PLAIN)
    first = pair.start(0, ranks=2)
    first.ended(2)
    second = pair.start(1)
    for run, before in zip((first.finish(), second.finish()), prompt, strict=True):
        losses = [[record["loss"] for record in one.metrics()] for one in (run, before)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.faults
def test_a_pair_killed_at_random_instants_repeats_every_bit(finetuning, trained):
    """Also where the other one waits for it, or reads what it is about to publish again (MAEDISTILL_KILLS=40: ten)."""
    seed = int(os.environ.get("MAEDISTILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"MAEDISTILL_SEED={seed}")
    draws, kills, number = random.Random(seed), [0, 0], 0
    while min(kills) < KILLS:
        pair, number = Pair(finetuning, f"killed{number}"), number + 1
        starts = [pair.start(which, "distill.codistillation.wait_seconds=100") for which in (0, 1)]
        while any(starts):
            which = draws.choice([which for which in (0, 1) if starts[which]])
            if kills[which] < KILLS and not starts[which].ended(draws.uniform(0, 6)):
                starts[which].signal(signal.SIGKILL)
            code = starts[which].wait()[0]
            assert code in (0, -signal.SIGKILL), f"seed {seed}: {starts[which].printed()[-3000:]}"
            kills[which] += code != 0
            starts[which] = pair.start(which, "distill.codistillation.wait_seconds=100") if code else None
        for which in (0, 1):
            same_result(pair.folder(which), trained[which].run)
        pair.remove()


@pytest.mark.faults
def test_a_lost_peer_ends_the_run_or_is_left_out_for_good(finetuning, tmp_path):
    pair, wait = Pair(finetuning, "lost"), "distill.codistillation.wait_seconds=10"
    starts = [pair.start(0, wait), pair.start(1, witness=True, WITNESS_KILL="24")]
    starts[1].finish(-9)
    ended = starts[0].finish(5)
    assert str(pair.folder(1)) in ended.err and json.loads((ended.run / "exit.json").read_text())["exit_code"] == 5
    step = json.loads((ended.run / "exit.json").read_text())["step"]
    assert step == 12  # saved where it waited
    alone = pair.start(0, wait, "distill.codistillation.missing=leave_out").finish()
    assert f"continues at step {step}" in alone.out
    left_out = json.loads((ended.run / "codistillation.json").read_text())["left_out"]
    assert left_out == {str(pair.folder(1)): 12} == json.loads((ended.run / "run.json").read_text())["left_out"]
    assert "from step 12 on" in (ended.run / "report.md").read_text()
    card = (maedistill.export(ended.run, tmp_path / "out") / "README.md").read_text()
    assert "without 1 of them from step 12 on" in card
    assert [record["codistillation"] != 0 for record in alone.metrics()][3:] == [True] * 9 + [False] * 4


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"every": 4}, "every 4 steps"),
        ({"first": 3}, "from 3 to 15"),
        ({"seed": 0}, "seed, 0"),
        ({"classes": ["a", "b"]}, r"codistillation\.peers: .*classes"),
    ],
)
def test_a_peer_that_does_not_fit_is_named(trained, tmp_path, entry, told):
    """Other steps, the same seed, other classes."""
    run, peer = trained
    config = load_config(run.run / "config.yaml", [f"run={tmp_path}"], root=FinetuneConfig).config
    parts = open_finetuning(config, world_size=1, device=torch.device("cpu"))
    metadata = json.loads((peer.run / "run.json").read_text())
    metadata["codistillation"] |= {key: value for key, value in entry.items() if key != "classes"}
    if "classes" in entry:
        metadata["classes"], metadata["network"]["arguments"]["num_classes"] = entry["classes"], 2
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "run.json").write_text(json.dumps(metadata))
    with pytest.raises(ConfigError, match=told):
        parts.codistillation._open(str(tmp_path / "peer"))


def test_a_dry_run_counts_the_peers_passes(finetuning, trained, monkeypatch, capsys):
    """Of a run that is known, and of one that is not, as of a copy of the student."""
    passes, forward = [], OutputTeacher.forward
    monkeypatch.setattr(OutputTeacher, "forward", lambda copy, images: passes.append(1) or forward(copy, images))
    peers = f"distill.codistillation={{weight: 1, start_epoch: 1, peers: [{trained[1].run}, none]}}"
    given = [*SMALL, peers, f"run={finetuning.folder}/planned"]
    dry_run(load_config(finetuning.config, given, root=FinetuneConfig).config)
    out = capsys.readouterr().out
    assert "none counts as a copy of the student: none holds no run" in out and out.count("as a copy") == 1
    assert len(passes) >= 4  # two trial steps or more


def test_published_weights_are_hashed_and_never_half_there(tmp_path):
    weights = {"w": torch.arange(4.0)}
    assert read_published(tmp_path, 3, {"w": (4,)}) is None
    publish(tmp_path, 3, weights)
    publish(tmp_path, 6, {"w": torch.ones(4)})
    assert torch.equal(read_published(tmp_path, 3, {"w": (4,)})["w"], weights["w"])
    file = tmp_path / "published" / "step_000000006" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for step, shapes in ((6, {"w": (4,)}), (3, {"w": (5,)})):
        with pytest.raises(DataError):
            read_published(tmp_path, step, shapes)
    publish(tmp_path, 6, weights)  # a damaged one is written again
    assert torch.equal(read_published(tmp_path, 6, {"w": (4,)})["w"], weights["w"])
    remove_published(tmp_path, before=4)
    assert read_published(tmp_path, 3, {"w": (4,)}) is None and read_published(tmp_path, 6, {"w": (4,)}) is not None
    remove_published(tmp_path, after=5)
    assert not list((tmp_path / "published").iterdir())


@pytest.mark.faults
def test_a_signal_ends_the_wait_for_a_peer(finetuning, trained):
    """Before the first step and later: the run leaves with 75, and goes on as if nothing had happened."""
    pair = Pair(finetuning, "asked")
    for lone in (True, False):
        waiting, other = pair.start(0), None if lone else pair.start(1, witness=True, WITNESS_KILL="14")
        if other is not None:
            other.finish(-signal.SIGKILL)
        what = "waiting for" if lone else "its weights of step 9"
        while not waiting.logs[0][0].is_file() or what not in waiting.out:
            assert not waiting.ended(0.1), waiting.printed()
        waiting.signal(signal.SIGTERM)
        step = json.loads((waiting.finish(75).run / "exit.json").read_text())["step"]
        assert step == (0 if lone else 9)
    for run, before in zip(pair.run(), trained, strict=True):
        same_result(run.run, before.run)

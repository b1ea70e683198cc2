"""The real MLflow, with its server, and the real W&B, offline: what they have of a run, and a server that dies.

CI has neither package (half a gigabyte). `pip install mlflow wandb` into an environment of its own, then run this file.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec

import pytest

from tests.support.launch import free_port

EPOCHS = ["method=mae", "optim.epochs=12", "log.knn_every_epochs=4", "log.pictures_every_epochs=4"]  # 8 steps each
LAST_SEEN = "last measured on 2026-11-29 with mlflow 3.17.2 and wandb 0.31.0: passed"

# before the fixtures, so that CI runs nothing
needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason=f"needs mlflow; {LAST_SEEN}")
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason=f"needs wandb; {LAST_SEEN}")


@pytest.fixture(scope="module")
def plain(pretraining):
    return pretraining("plain", *EPOCHS, "log.trackers=[]", launcher="bare")  # to import them starts threads


@pytest.fixture
def server(tmp_path):
    """A server with its database and pictures in tmp_path: its address, and its process."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    words = ["server", "--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/runs.db"]
    words += ["--default-artifact-root", "mlflow-artifacts:/", "--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("w") as log:
        command = [sys.executable, "-m", "mlflow", *words]
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while True:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            break
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
        time.sleep(0.5)
    yield address, process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def weights(finished):
    return (finished.last_checkpoint() / "model.safetensors").read_bytes()


def written(finished):
    return b"".join(file.read_bytes() for file in finished.run.rglob("*") if file.is_file())


def wait_for_step(start, step):
    deadline, file = time.monotonic() + 120, start.run / "metrics.jsonl"
    while not file.exists() or f'"step": {step},' not in file.read_text():
        assert time.monotonic() < deadline and not start.ended(), start.printed()[-3000:]
        time.sleep(0.05)


@needs_mlflow
def test_mlflow_has_all_and_its_death_costs_warnings_only(pretraining, plain, server, monkeypatch) -> None:
    import mlflow

    address, process = server
    secret = {"MLFLOW_TRACKING_URI": address.replace("://", "://me:hunter2@"), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 2}
    # stopped in the middle and continued: one run, all points once
    # not every step, so that few wait for a slow machine when the run ends
    words = ["tracked", *EPOCHS, "log.every_steps=4", "log.trackers=[mlflow]"]
    stopped = pretraining.start(*words, launcher="bare", **secret)
    wait_for_step(stopped, 40)
    stopped.signal(signal.SIGTERM)
    stopped.finish(75)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.status == "KILLED"
    tracked = pretraining.start(*words, launcher="bare", **secret).finish()
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED" and run.data.params["method"] == "mae"
    assert not any(value for tag, value in run.data.tags.items() if tag.startswith("mlflow.source.git"))
    for tag, name in (("train/loss", "loss"), ("train/pixels", "pixels"), ("sys/data_wait", "data_wait")):
        points = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, tag)]
        assert points == [(record["step"], record[name]) for record in tracked.records() if "loss" in record]
    knn = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "val/knn")]
    assert knn == [(record["step"], record["knn"]) for record in tracked.records() if "knn" in record]
    files = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(files) == 3 and all("reconstruction" in file for file in files)
    picture = client.download_artifacts(run.info.run_id, files[0])
    with open(picture, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert b"hunter2" not in written(tracked) and "hunter2" not in tracked.out + tracked.err + stopped.printed()
    # the server dies in the middle
    start = pretraining.start("orphaned", *words[1:], launcher="bare", **secret)
    wait_for_step(start, 20)
    os.killpg(process.pid, signal.SIGKILL)
    began = time.monotonic()
    orphaned = start.finish()
    assert time.monotonic() - began < 60
    assert sum(line.startswith("warning: mlflow") for line in orphaned.err.splitlines()) == 1, orphaned.err
    assert weights(orphaned) == weights(tracked) == weights(plain)
    # a server that was never there, and one that accepts and does not answer
    with socket.create_server(("127.0.0.1", 0)) as mute:
        for name, port in (("refused", 9), ("mute", mute.getsockname()[1])):
            nowhere = {"MLFLOW_TRACKING_URI": f"http://me:hunter2@127.0.0.1:{port}"}
            began = time.monotonic()
            alone = pretraining(name, *words[1:], launcher="bare", **secret | nowhere)
            assert weights(alone) == weights(plain) and time.monotonic() - began < 90
            assert alone.err.count("warning: mlflow") == 1 and "hunter2" not in alone.out + alone.err


def offline_records(file):
    """Yield the records of a .wandb file, which is a log of LevelDB: blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is empty
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@needs_wandb
def test_wandb_offline_has_all_of_a_run_that_was_stopped_and_continued(pretraining, plain) -> None:
    words = ["offline", *EPOCHS, "log.trackers=[wandb]"]
    start = pretraining.start(*words, launcher="bare", WANDB_MODE="offline")
    wait_for_step(start, 45)
    start.signal(signal.SIGTERM)  # a kill loses what W&B has not written yet
    start.finish(75)
    ended = pretraining.start(*words, launcher="bare", WANDB_MODE="offline").finish()
    assert weights(ended) == weights(plain)
    rows, ids, ends, pictures = Counter(), set(), [], []
    for file in sorted(ended.run.glob("wandb/offline-run-*/run-*.wandb")):
        for record in offline_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
            elif kind == "exit":
                ends.append(record.exit.exit_code)
            elif kind == "history":
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.update((record.history.step.num, tag) for tag in values if tag[0] != "_")
                pictures += [json.loads(path) for name, path in values.items() if name == "reconstruction/path"]
    id = json.loads((ended.run / "trackers" / "wandb.json").read_text())["id"]
    assert ids == {id} and ends == [1, 0]
    records = ended.records()
    expected = {(r["step"], "train/loss") for r in records if "loss" in r}
    expected |= {(r["step"], "val/knn") for r in records if "knn" in r}
    assert {row for row in rows if row[1] in ("train/loss", "val/knn")} == expected
    assert max(rows.values()) == 1 and len(pictures) == 3
    assert all(len(list(ended.run.glob(f"wandb/offline-run-*/files/{picture}"))) == 1 for picture in pictures)
    assert not [*ended.run.glob("wandb/*/files/wandb-metadata.json"), *ended.run.glob("wandb/*/files/requirements.txt")]


@needs_wandb
def test_wandb_without_a_network_or_login_costs_a_warning_only(pretraining, plain) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        nowhere = {"WANDB_BASE_URL": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        words = [*EPOCHS, "log.trackers=[wandb]"]
        for login in ({"WANDB_API_KEY": "0123456789" * 4}, {}):
            ended = pretraining(f"unreachable-{len(login)}", *words, launcher="bare", **nowhere, **login)
            assert weights(ended) == weights(plain) and ended.err.count("warning: wandb") == 1, ended.err
            assert "0123456789" * 4 not in ended.out + ended.err + written(ended).decode(errors="replace")

"""tools/gpu_check.py without a GPU: parts that can run are green, and one that fails or hangs takes nothing along."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import ModuleType

import pytest
import torch

from maedistill.errors import ConfigError
from tests.support.waiting import lives

# Parts of the tests: each leaves a row, and what comes then is how it ends.
BAD_PARTS = {
    "raises": "raise RuntimeError('no such kernel')",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "(check.out / 'pid').write_text(str(subprocess.Popen(['sleep', '600']).pid)); time.sleep(600)",
    "works": "check.measured('speed', '3 images/s', goal='goal: at least 4: missed', images_per_second=3.0)",
}
FILES = {"results.json", "summary.md", "rows.jsonl", "logs.txt"}
MODULE = "import os, signal, subprocess, time\ndef run(check):\n    check.verdict('begins', True)\n    {end}\n"


@pytest.fixture(scope="module")
def tool(root) -> ModuleType:
    """The tool, imported."""
    sys.path.insert(0, str(root / "tools"))
    yield importlib.import_module("gpu_check")
    sys.path.remove(str(root / "tools"))


@pytest.fixture(scope="module")
def parts(tool) -> dict[str, ModuleType]:
    """Its modules that the tests look into."""
    return {
        name: importlib.import_module(f"gpu_parts.{name}")
        for name in ("check", "goals", "kernels", "pack", "rows", "runner", "runs", "speed", "starts")
    }


def test_the_check_is_green_on_small_sizes(root, tmp_path):
    command = [sys.executable, "tools/gpu_check.py", "--tiny", "--only", "engine,peaks", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.keys() == {"head", "tiny", "command", "seconds", "failed", "parts", "rows"} and found["tiny"]
    assert {"card", "driver", "torch", "cuda", "cudnn", "deepspeed", "timm", "cores", "date"} <= found["head"].keys()
    assert found["failed"] == 0 and {part["name"]: part["code"] for part in found["parts"]} == {"peaks": 0, "engine": 0}
    verdicts = {part: {row["verdict"] for row in found["rows"] if row["part"] == part} for part in ("peaks", "engine")}
    assert verdicts == {"peaks": {"measured"}, "engine": {"ok"}}
    assert next(row for row in found["rows"] if row["check"] == "bf16 product")["values"]["flops"] > 0
    summary = (tmp_path / "summary.md").read_text()
    for row in found["rows"]:
        assert row["check"] in ended.stdout and row["figure"] in summary
    assert {path.name for path in tmp_path.iterdir()} == FILES, "few files come back from a machine that is lent"
    assert "==== peaks: output.log" in (tmp_path / "logs.txt").read_text()


@pytest.mark.faults
def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tool, parts, tmp_path, monkeypatch, capfd):
    for name, end in BAD_PARTS.items():
        (tmp_path / f"part_that_{name}.py").write_text(MODULE.format(end=end))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    out, seconds = tmp_path / "out", {"hangs": 20.0}
    made = [parts["runner"].Part(name, f"part_that_{name}", seconds.get(name, 60.0), "") for name in BAD_PARTS]
    monkeypatch.setattr(tool, "PARTS", made)
    monkeypatch.setattr(parts["runner"], "bound", lambda part, settings: part.seconds)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--out", str(out)])
    failed = {row.part: row for row in tool.main()}
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["part"] for row in rows if row["check"] == "begins"] == list(BAD_PARTS), "what they had is kept"
    assert failed.keys() == {"raises", "crashes", "hangs"}
    assert "exit code 1: RuntimeError: no such kernel" in failed["raises"].figure
    assert f"exit code {-signal.SIGSEGV}" in failed["crashes"].figure
    assert "killed at its bound of 20 s" in failed["hangs"].figure
    assert not lives(int((out / "pid").read_text())), "what it has started ended with it"
    assert rows[-1]["values"] == {"images_per_second": 3.0} and rows[-1]["verdict"] == "measured"
    assert "[goal: at least 4: missed]" in capfd.readouterr().out


@pytest.mark.faults
def test_a_sigterm_keeps_what_is_known_and_ends_the_parts(tool, parts, tmp_path, monkeypatch):
    for name in ("works", "hangs"):
        (tmp_path / f"part_that_{name}.py").write_text(MODULE.format(end=BAD_PARTS[name]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out, names = tmp_path / "out", ("works", "hangs", "raises")
    monkeypatch.setattr(tool, "PARTS", [parts["runner"].Part(name, f"part_that_{name}", 60.0, "") for name in names])
    monkeypatch.setattr(parts["runner"], "_may_start", lambda part, running, settings: not running)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--out", str(out)])

    def stop() -> None:
        while not ((out / "pid").exists() and (out / "pid").read_text()):
            time.sleep(0.05)
        seen.append(json.loads((out / "results.json").read_text())["rows"])
        os.kill(os.getpid(), signal.SIGTERM)

    seen, before = [], signal.signal(signal.SIGTERM, tool._stop)
    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(SystemExit) as error:
            tool.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert error.value.code == 128 + signal.SIGTERM
    assert {row["part"] for row in seen[0]} >= {"works"}, "written as it comes"
    found = json.loads((out / "results.json").read_text())
    verdicts = [(row["part"], row["verdict"]) for row in found["rows"]]
    assert verdicts == [("works", "ok"), ("works", "measured"), ("hangs", "ok"), ("hangs", "skipped")]
    assert {end["name"]: end["code"] for end in found["parts"]} == {"works": 0, "hangs": None, "raises": None}
    assert not lives(int((out / "pid").read_text())) and {path.name for path in out.iterdir()} == {*FILES, "pid"}


def test_a_machine_without_a_card_and_unknown_parts_are_refused(tool, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(ConfigError, match="no GPU here") as error:
        tool.main()
    assert error.value.exit_code == 2 and "--tiny" in error.value.remedy
    monkeypatch.setattr(tool, "NEEDED", ["torch", "no_such_package"])
    with pytest.raises(ConfigError, match="not installed here: no_such_package"):
        tool.main()
    with pytest.raises(ConfigError, match="no part sped") as error:
        tool.chosen("peaks,sped")
    assert "speed-published" in error.value.remedy
    assert [part.name for part in tool.chosen("engine,peaks")] == ["peaks", "engine"], "in the table's order"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--help"])
    with pytest.raises(SystemExit):
        tool.main()
    text = capsys.readouterr().out
    assert "--pack packed" in text and all(part.about in text for part in tool.PARTS)


def test_it_starts_where_nothing_is_installed(root, tmp_path):
    command = [sys.executable, "-S", str(root / "tools" / "gpu_check.py"), "--list"]
    listed = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert listed.returncode == 0 and "speed-published" in listed.stdout, listed.stderr


def test_parts_come_by_importance_with_time_to_compile(tool, parts, root):
    for part in tool.PARTS:
        assert (root / "tools" / f"{part.module.replace('.', '/')}.py").is_file()
    names, speed = [part.name for part in tool.PARTS], parts["speed"]
    measured = [part for part in tool.PARTS if part.name.startswith("speed")]
    assert names[:2] == ["methods", "peaks"] and names[2:6] == [part.name for part in measured]
    for part in measured:
        assert part.seconds - 60 > 1.2 * speed._FIRST_COMPILE + 8, "after the eager steps"


def test_a_lack_of_time_is_no_failure_and_an_error_ends_its_own_check_only(parts, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    check = parts["check"].Check("runs", True, tmp_path, tmp_path / "work", time.time())
    monkeypatch.setattr(parts["starts"].Starts, "_start", lambda *_, **__: subprocess.Popen(["sleep", "60"]))
    starts = parts["starts"].Starts(check, tmp_path)
    starts.whole("one")
    starts.stopped("two")
    parts["runs"]._compare(check, starts, "one", "other", bound=0.0)
    with check.guarded("compiled"):
        raise AssertionError("no such kernel")
    rows = parts["rows"]
    assert [row.verdict for row in check.rows.all()] == [rows.SKIPPED] * 3 + [rows.FAIL]
    assert "AssertionError: no such kernel" in check.rows.all()[-1].figure


def test_the_digest_is_short_and_ends_with_what_matters(parts):
    rows = parts["rows"]
    many = [rows.Row("speed", f"figure {i}", rows.MEASURED, 500 * "x", values={}) for i in range(20)]
    many = [rows.Row("methods", f"check {i}", rows.OK) for i in range(99)] + many
    many += [rows.Row("details", f"figure {i}", rows.MEASURED, 500 * "x") for i in range(99)]
    many += [rows.Row("engine", "zero 0", rows.FAIL, "norms apart")]
    lines = rows.digest(many).splitlines()
    assert sum(map(len, lines)) < 9000 and lines[0].startswith("... ")
    assert lines[-1] == str(many[-1]) and lines[-2].endswith("methods: 99 checks")
    assert sum("speed: figure" in line for line in lines) == 20


def test_parts_that_are_timed_run_alone(parts):
    runner = parts["runner"]
    sure, timed = (runner.Part(name, "", 1, "", together=name == "sure") for name in ("sure", "timed"))
    running = [runner.Started(sure, None, 0.0, 0.0)]

    def may_start(part, running, *, jobs: int, tiny: bool = False) -> bool:
        return runner._may_start(part, running, runner.Settings(tiny, None, None, 0.0, jobs, {}))

    assert may_start(timed, [], jobs=4) and may_start(sure, running, jobs=4)
    assert not may_start(timed, running, jobs=4) and not may_start(sure, running, jobs=1)
    assert not may_start(sure, [runner.Started(timed, None, 0.0, 0.0)], jobs=4)
    assert may_start(timed, running, jobs=2, tiny=True)


def test_rows_are_read_whole(parts, tmp_path):
    rows, file = parts["rows"], tmp_path / "rows.jsonl"
    one = rows.Row("a", "b", rows.OK, "c | d")
    rows.RowFile(file).append(one)
    reader = rows.RowFile(file)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:10])  # another process is writing
    assert reader.new() == [one] and reader.new() == []
    file.write_bytes(whole + whole)
    assert reader.new() == [one] and rows.RowFile(file).all() == [one, one]
    assert "c \\| d" in rows.markdown([one])


def test_kernels_have_a_kind_and_goals_a_verdict(parts):
    kinds = {
        "triton_poi_fused_add_mul_0": "fused by the compiler",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
        "void pytorch_flash::flash_fwd_kernel<...>": "attention",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel": "layer norm",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel": "AdamW and lists",
        "Memcpy DtoD (Device -> Device)": "copies and casts",
        "void at::native::vectorized_elementwise_kernel<4>": "elementwise and reductions",
    }
    assert {name: parts["kernels"].kind_of(name) for name in kinds} == kinds
    goals = parts["goals"]
    assert goals.at_least(4000, 4100.4, ",.0f") == "goal: at least 4,000: met"
    assert goals.below(0.05, 0.05, ".0%") == "goal: under 5%: missed"
    assert goals.images_goal("NVIDIA H200", 600e12) == 4000
    assert goals.images_goal("NVIDIA H100 80GB HBM3", 675e12) == 3600


def test_packing_collects_packages_with_their_metadata(tool, parts, tmp_path, monkeypatch):
    asked = []
    pack = parts["pack"]
    monkeypatch.setattr(pack, "_download", lambda needed, folder, *, python: asked.append((needed, python)))
    monkeypatch.setattr(pack, "PURE", ("typing_inspection", "braceexpand"))
    text = pack.pack(tmp_path / "packed", python="3.13")
    assert (tmp_path / "packed" / "typing_inspection" / "__init__.py").is_file()
    assert len(list((tmp_path / "packed").glob("*.dist-info"))) == 2
    assert [name.partition("==")[0] for name in asked[0][0]] == ["pydantic_core", "simplejpeg"]
    assert asked[0][1] == "3.13"
    assert "PYTHONPATH=$PWD:$PWD/packed python3 tools/gpu_check.py" in text

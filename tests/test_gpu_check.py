"""tools/gpu_check.py without a GPU: parts that can run are green, and one that fails or hangs takes nothing along."""

import importlib
import json
import os
import signal
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from maedistill.errors import ConfigError

# Parts of the tests: each leaves a row, and what comes then is how it ends.
BAD_PARTS = {
    "raises": "raise RuntimeError('no such kernel')",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "(check.out / 'pid').write_text(str(subprocess.Popen(['sleep', '600']).pid)); time.sleep(600)",
    "works": "check.measured('speed', '3 images/s', goal='goal: at least 4: missed', images_per_second=3.0)",
}
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
        name: importlib.import_module(f"gpu_parts.{name}") for name in ("goals", "kernels", "pack", "rows", "runner")
    }


def test_the_check_is_green_on_small_sizes(root, tmp_path) -> None:
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
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"peaks.log", "engine.log"}


@pytest.mark.faults
def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tool, parts, tmp_path, monkeypatch, capfd) -> None:
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
    assert not _lives(int((out / "pid").read_text())), "what it has started ended with it"
    assert rows[-1]["values"] == {"images_per_second": 3.0} and rows[-1]["verdict"] == "measured"
    assert "[goal: at least 4: missed]" in capfd.readouterr().out


def _lives(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet buried does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_machine_without_a_card_and_unknown_parts_are_refused(tool, monkeypatch, capsys) -> None:
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


def test_all_parts_exist_and_the_sure_ones_come_before_the_timed(tool, root) -> None:
    for part in tool.PARTS:
        assert (root / "tools" / f"{part.module.replace('.', '/')}.py").is_file()
    kinds = [part.together for part in tool.PARTS if part.name != "peaks"]
    assert kinds == sorted(kinds, reverse=True)


def test_parts_that_are_timed_run_alone(parts) -> None:
    runner = parts["runner"]
    sure, timed = (runner.Part(name, "", 1, "", together=name == "sure") for name in ("sure", "timed"))
    running = [runner.Started(sure, None, 0.0, 0.0)]

    def may_start(part, running, *, jobs: int, tiny: bool = False) -> bool:
        return runner._may_start(part, running, runner.Settings(tiny, None, None, 0.0, jobs, {}))

    assert may_start(timed, [], jobs=4) and may_start(sure, running, jobs=4)
    assert not may_start(timed, running, jobs=4) and not may_start(sure, running, jobs=1)
    assert not may_start(sure, [runner.Started(timed, None, 0.0, 0.0)], jobs=4)
    assert may_start(timed, running, jobs=2, tiny=True)


def test_rows_are_read_whole(parts, tmp_path) -> None:
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


def test_kernels_have_a_kind_and_goals_a_verdict(parts) -> None:
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


def test_packing_collects_packages_with_their_metadata(tool, parts, tmp_path, monkeypatch) -> None:
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

"""`maedistill COMMAND`: the table, the doors in tools/, configs by name from any folder, declared dependencies."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import maedistill
from maedistill import cli
from maedistill.commands import study
from maedistill.config.document import CONFIGS, config_name, find_config
from maedistill.config.values import STAGES
from maedistill.errors import ConfigError
from maedistill.study.file import load_study

SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
# the distribution of a package that has another name
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "mlflow": "mlflow-skinny"}
# package -> the extra that brings it
OPTIONAL = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "simplejpeg": "fast",
    "sklearn": "demo",
    "scipy": "demo",
    "matplotlib": "demo",
    "s3fs": "remote",
    "bokeh": "report",
    "wandb": "wandb",
    "mlflow": "mlflow",
}


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("shards --verify a --shorter-side 8", "--shorter-side"),
        (f"shards --verify a --workers {os.cpu_count()}", "--workers"),
        ("shards --verify a --val-fraction 0", "--val-fraction"),
        ("export a --batch 8", "--batch"),
        ("pretrain a --explain seed --dry-run", "--dry-run"),
        ("pretrain a --explain --extend", "--extend"),
        ("pretrain --explain seed a seed=3", "a seed=3"),
        ("finetune a --print-config --fresh", "--fresh"),
    ],
)
def test_options_without_effect_are_refused(monkeypatch, words, option):
    monkeypatch.setattr(sys, "argv", ["maedistill", *words.split()])
    with pytest.raises(ConfigError, match=f"{option} "):
        import_module(f"maedistill.commands.{words.split()[0]}").main()


def test_help_of_every_command_imports_nothing_heavy():
    """Otherwise it takes seconds."""
    program = """
import sys
from importlib import import_module
for command in sys.argv[1].split():
    sys.argv = ["maedistill", command, "--help"]
    try:
        import_module(f"maedistill.commands.{command}").main()
    except SystemExit:
        pass
print(*sorted({"torch", "timm", "torchvision", "numpy", "PIL"} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program, " ".join(cli.COMMANDS)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "\n")


def test_a_config_may_be_called_maedistill_and_no_config_prints_the_usage(tmp_path):
    def run(*words):
        words = [sys.executable, "-m", "maedistill", *words]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stderr

    (tmp_path / "maedistill.yaml").write_text("method: mae\n")
    assert "data.train" in run("pretrain", "maedistill.yaml")[1]
    code, said = run("pretrain")
    assert code == 2 and "usage: maedistill pretrain CONFIG" in said


def test_the_quickstart_refuses_an_epoch_without_a_step(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["maedistill", "quickstart", "--epochs", "1"])
    with pytest.raises(ConfigError, match="31 images"):
        import_module("maedistill.commands.quickstart").main()


def test_a_command_gets_the_rest_of_the_line_and_runs_record_it(monkeypatch):
    lines = []
    monkeypatch.setattr("maedistill.commands.export.main", lambda: lines.append(sys.argv))
    cli._dispatch(["export", "runs/a", "--ema"])
    cli._dispatch(["--local_rank=1", "export", "runs/a", "--ema"])  # as `deepspeed --module maedistill` starts it
    assert lines == [["maedistill", "export", "runs/a", "--ema"]] * 2
    with pytest.raises(ConfigError) as refused:
        cli._dispatch(["pretran"])
    assert "pretrain" in refused.value.remedy


def test_the_version_is_the_package_s_and_paths_may_begin_with_a_tilde(monkeypatch, capsys, tmp_path):
    cli._dispatch(["--version"])
    assert capsys.readouterr().out == f"maedistill {maedistill.__version__}\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").touch()
    assert find_config("~/x.yaml") == tmp_path / "x.yaml"
    monkeypatch.setattr(sys, "argv", ["maedistill", "study", "quickstart/study", "--out=~/x"])
    assert study.parse().out == tmp_path / "x"


@pytest.mark.parametrize("words", ["--seeds 0 1", "--seeds 0,1", "--seeds 0 --seeds 1", "--seeds 0 1 log.keep=3"])
def test_seeds_of_a_study_may_be_written_in_many_ways(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["maedistill", "study", "quickstart/study", *words.split()])
    arguments = study.parse()
    assert arguments.seeds == [0, 1] and arguments.settings == (["log.keep=3"] if "keep" in words else [])


def test_every_file_in_tools_but_these_is_a_door_to_a_command(root):
    others = ("gpu_check", "make_docs")
    doors = {file.stem: file.read_text() for file in (root / "tools").glob("*.py") if file.stem not in others}
    commands = {name: re.search(r'run\("(\w+)"\)', text)[1] for name, text in doors.items()}
    assert sorted(commands.values()) == sorted(cli.COMMANDS) and commands.pop("make_shards") == "shards"
    assert all(name == command for name, command in commands.items())
    assert STAGES.keys() <= cli.COMMANDS.keys()


def test_configs_have_names_in_every_folder_and_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(SHIPPED) > 30 and all(find_config(config_name(path)) == path for path in SHIPPED)
    assert load_study("quickstart/study").students["mae"].config == "quickstart/mae"
    Path("imagenet").mkdir()
    Path("imagenet/dmae_vit_b").write_text("method: mae\n")
    assert find_config("imagenet/dmae_vit_b") == Path("imagenet/dmae_vit_b")
    assert find_config("imagenet/none") == Path("imagenet/none") and config_name("none.yaml") == "none.yaml"


def test_what_is_imported_is_declared(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", text)[0].lower().replace("-", "_") for text in project["dependencies"]}
    extras = {
        extra: {re.match(r"[\w-]+", text)[0] for text in texts}
        for extra, texts in project["optional-dependencies"].items()
    }
    for path in (root / "maedistill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"maedistill"}:
                assert module in OPTIONAL or DISTRIBUTIONS.get(module, module) in names, (path, module)
    for module, extra in OPTIONAL.items():  # some are imported by name only: s3fs by fsspec
        assert DISTRIBUTIONS.get(module, module) in extras[extra], (module, extra)

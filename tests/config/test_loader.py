"""Merging files and overrides, where each value came from, YAML's traps, and writing a config that loads back equal."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from maedistill.config.document import read_document
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys, all_sections, flat
from maedistill.config.loader import LoadedConfig, load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.render import WIDEST, config_yaml, render_config
from maedistill.errors import ConfigError

MAE = "method: mae\nrun: runs/test\ndata:\n  train: shards/a.tar\n  workers: 2\n"
SCRATCH = "run: runs/test\nstudent: {model: vit_tiny_patch16_224}\ndata:\n  train: shards/a.tar\n  val: shards/b.tar\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_origins_name_file_and_line(tmp_path):
    base = write(tmp_path / "base.yaml", MAE)
    top = write(
        tmp_path / "top.yaml", "# a comment\nextends: base.yaml\n\noptim: {epochs: 3, warmup_epochs: 0}\nseed: 4\n"
    )
    loaded = load_config(top, ["seed=5", "data.workers=0", "log={every_steps: 7}"], root=PretrainConfig)
    assert set(loaded.origins) == set(all_keys(PretrainConfig))
    shown = {name: origin for name, origin in loaded.origins.items() if origin != "default"}
    assert shown == {
        "method": f"{base}:1",
        "run": f"{base}:2",
        "data.train": f"{base}:4",
        "data.workers": "command line",
        "optim.epochs": f"{top}:4",
        "optim.warmup_epochs": f"{top}:4",
        "seed": "command line",
        "log.every_steps": "command line",
    }
    assert (loaded.config.seed, loaded.config.data.workers, loaded.config.log.every_steps) == (5, 0, 7)
    assert loaded.config.optim.epochs == 3.0 and isinstance(loaded.config.optim.epochs, float)


def test_what_wins_over_a_key_wins_over_what_excludes_it(tmp_path):
    """The command line over a file, a file over those it extends; at one level it is test_bad_configs.py's."""
    base = write(tmp_path / "base.yaml", MAE.replace("mae", "dmae", 1) + 'teacher: {source: "file:a.pth", depth: 9}\n')
    text = "extends: base.yaml\nalign: {student: [1], teacher: [1], distance: mse}\noptim: {base_lr: 1e-3}\n"
    top = write(tmp_path / "top.yaml", text)

    def load(*overrides: str, file: Path = top) -> LoadedConfig[PretrainConfig]:
        return load_config(file, overrides, root=PretrainConfig)

    rate = load("optim.lr=2e-3")
    assert (rate.config.optim.lr, rate.config.optim.base_lr) == (2e-3, None)
    assert rate.origins["optim.base_lr"] == f"default: optim.lr (command line) replaces {top}:3"
    assert "# default: optim.lr (command line) replaces" in render_config(rate)
    other = write(tmp_path / "lr.yaml", "extends: top.yaml\noptim: {lr: 3e-3}\n")
    assert load(file=other).config.optim.base_lr is None
    assert load("optim.base_lr=2e-3", file=other).config.optim.lr is None

    assert load("teacher.source=timm:vit_base_patch16_224").config.teacher.depth is None
    assert load("teacher.source=random:vit_base_patch16_224").config.teacher.depth == 9
    assert load("method=tinymim").config.align.distance == "l1"
    mae = load("method=mae")
    assert mae.config.teacher.source is None and mae.config.align.student == ()
    assert mae.origins["teacher.source"] == f"default: method (command line) replaces {base}:6"
    stored = write(tmp_path / "stored.yaml", "extends: top.yaml\nalign: {normalize: stored, stored_steps: 7}\n")
    align = load("method=tinymim", file=stored).config.align
    assert (align.normalize, align.stored_steps) == ("l2", 500)
    with pytest.raises(ConfigError, match=r"teacher\.sha256"):
        load("teacher.source=timm:vit_base_patch16_224", f"teacher.sha256={'0a' * 32}")


def test_a_files_warmup_is_scaled_to_fewer_epochs_of_the_command_line(tmp_path):
    file = write(tmp_path / "a.yaml", MAE + "optim: {epochs: 100, warmup_epochs: 20}\n")

    def warmup(*overrides: str, to: Path = file) -> tuple[object, int]:
        loaded = load_config(to, overrides, root=PretrainConfig)
        return loaded.config.optim.warmup_epochs, len(loaded.notes)

    assert warmup("optim.epochs=2") == (0.4, 1)
    assert warmup("optim.epochs=0.3") == (0.06, 1)
    assert warmup("optim.epochs=20") == (4.0, 1)
    assert warmup("optim.epochs=50") == (20.0, 0), "only where it would not end within the run"
    assert warmup("optim.epochs=2", "optim.warmup_epochs=1") == (1.0, 0)
    assert warmup("optim.epochs=auto") == (20.0, 0)
    assert warmup("optim.epochs=2", to=write(tmp_path / "b.yaml", MAE)) == (0.4, 1), "the defaults are 20 of 100"
    origin = load_config(file, ["optim.epochs=2"], root=PretrainConfig).origins["optim.warmup_epochs"]
    assert origin == f"{file}:6, scaled: 20 of 100 epochs"


def test_a_bare_path_that_exists_becomes_kind_and_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/run.json", "runs/a/export/config.json", "b.pth", "c.safetensors", "file:d"):
        write(tmp_path / name, "{}")
    file = write(tmp_path / "scratch.yaml", SCRATCH)
    for path, named in {
        "runs/a": "run:runs/a",
        "runs/a/export": "local-dir:runs/a/export",
        f"{tmp_path}/b.pth": f"file:{tmp_path}/b.pth",
        "c.safetensors": "file:c.safetensors",
        "run:nowhere": "run:nowhere",
    }.items():
        teachers = f"distill={{teachers: ['{path}'], logits: {{weight: 1}}}}"
        config = load_config(file, [f"init.source={path}", teachers], root=FinetuneConfig).config
        assert (config.init.source, config.distill.teachers) == (named, (named,))
    with pytest.raises(ConfigError, match=r"there is no file 'x\.pth'"):
        load_config(file, ["init.source=x.pth"], root=FinetuneConfig)
    with pytest.raises(ConfigError, match=r"did you mean timm:resnet50\?"):
        load_config(file, ["init.source=resnet50"], root=FinetuneConfig)
    with pytest.raises(ConfigError, match=r"neither a run .* nor an export"):
        load_config(file, ["init.source=runs"], root=FinetuneConfig)


def test_later_files_win_and_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    write(tmp_path / "base.yaml", MAE + "seed: 1\nthreads: 1\ndecoder: {width: 64, num_heads: 4, depth: 1}\n")
    write(tmp_path / "parts" / "small.yaml", "extends: ../base.yaml\nseed: 2\ndecoder: {depth: 2}\n")
    write(tmp_path / "parts" / "long.yaml", "seed: 3\nthreads: 3\n")
    top = write(tmp_path / "runs" / "top.yaml", "extends: [../parts/small.yaml, ../parts/long.yaml]\nthreads: 4\n")
    monkeypatch.chdir(tmp_path / "parts")
    config = load_config(Path("../runs/top.yaml"), ["seed=5", "seed=6"], root=PretrainConfig).config
    assert (config.seed, config.threads) == (6, 4)
    assert (config.decoder.width, config.decoder.depth) == (64, 2), "sections merge key by key"
    assert config.run == "runs/test", "values are kept as written"
    assert load_config(top, root=PretrainConfig).config.seed == 3

    name = write(tmp_path / "own" / "name.yaml", "extends: own/dmae\n")
    assert load_config(name, root=PretrainConfig, to_run=False).config.method == "dmae"
    write(tmp_path / "own" / "own" / "dmae", MAE)
    assert load_config(name, root=PretrainConfig).config.method == "mae", "a file of that name comes first"

    write(tmp_path / "x.yaml", "extends: y.yaml\n")
    write(tmp_path / "y.yaml", "extends: z.yaml\n")
    write(tmp_path / "z.yaml", "extends: y.yaml\n")
    with pytest.raises(ConfigError, match=r"y\.yaml -> .*z\.yaml -> .*y\.yaml"):
        load_config(tmp_path / "x.yaml", root=PretrainConfig)


def test_a_wrong_value_below_an_override_does_no_harm(tmp_path):
    file = write(tmp_path / "a.yaml", MAE + "optim: {epochs: many}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:6 optim\.epochs"):
        load_config(file, root=PretrainConfig)
    assert load_config(file, ["optim.epochs=30"], root=PretrainConfig).config.optim.epochs == 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-1.5E+2", -150.0),
        (".5", 0.5),
        ("3", 3),
        ("-0", 0),
        ("null", None),
        ("", None),
        ("[5, 11]", [5, 11]),
        ("[5,11]", [5, 11]),
        ("true", True),
        ("on", "on"),
        ("No", "No"),
        ("007", "007"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'3'", "3"),
        ('"null"', "null"),
        ("~/runs", "~/runs"),
        ("s3://b/train-{0000..1023}.tar", "s3://b/train-{0000..1023}.tar"),
        ("dir/train-*.tar", "dir/train-*.tar"),
        ("timm:vit_base_patch16_224.mae", "timm:vit_base_patch16_224.mae"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    ((name, (read, _)),) = read_document(text, prefix="key").items()
    assert name == "key" and read == value and type(read) is type(value)


def test_nan_and_infinity_are_numbers_for_the_schema_to_refuse():
    values = read_document("[.inf, -.INF, .NaN]", prefix="key")["key"][0]
    assert values[:2] == [math.inf, -math.inf] and math.isnan(values[2])


@pytest.mark.parametrize(
    ("root", "text", "overrides"),
    [
        (PretrainConfig, MAE, ["data.mean=[0.5,0.5,1e-5]", "data.val='#1: \"yes\".tar'"]),
        (FinetuneConfig, SCRATCH, ["augment.rand_augment=null", "data.val='#1: \"yes\".tar'"]),
    ],
)
def test_printed_config_loads_back_and_its_comments_are_aligned(tmp_path, root, text, overrides):
    file = write(tmp_path / "a.yaml", text)
    loaded = load_config(file, ["optim.lr=1e-3", *overrides], root=root)
    assert type(loaded.config) is root
    printed = render_config(loaded)
    again = load_config(write(tmp_path / "again.yaml", printed), root=root)
    assert again.config == loaded.config
    assert load_config(write(tmp_path / "bare.yaml", config_yaml(loaded.config)), root=root).config == loaded.config
    assert "default" not in again.origins.values(), "every key is printed"
    settings = [line for line in printed.splitlines() if "  # " in line]
    assert len(settings) == len(all_keys(root))
    assert len({line.rindex("  # ") for line in settings}) == 1
    first = text.splitlines()[0]
    assert f"{first}{' ' * 10}" in printed and f"# {file}:1\n" in printed and "# command line\n" in printed


def test_a_long_value_does_not_push_the_comments_of_others(tmp_path):
    printed = render_config(
        load_config(write(tmp_path / "a.yaml", MAE), [f"data.val={'long/' * 40}v.tar"], root=PretrainConfig)
    )
    columns = {line.rindex("  # ") for line in printed.splitlines() if "  # " in line and "long/" not in line}
    assert len(columns) == 1 and max(columns) <= WIDEST


texts = st.text(
    st.characters(min_codepoint=32, exclude_characters="\x7f\u2028\u2029", exclude_categories=("Cs", "Cc", "Cn"))
)
traps = st.sampled_from(
    ["on", "1e-3", "null", "007", "1:30", "2024-01-01", "a: b", "# x", "*a", "!t", " x ", "😀", "-", "="]
)
numbers = st.floats(min_value=0, exclude_min=True, max_value=1e300)


@settings(deadline=None, max_examples=30)
@given(
    run=texts | traps,
    val=st.none() | texts | traps,
    lr=st.none() | numbers,
    std=st.tuples(numbers, numbers, numbers),
)
def test_any_config_is_written_and_read_back_exactly(tmp_path_factory, run, val, lr, std):
    config = PretrainConfig.model_validate(
        {
            "method": "mae",
            "run": run or "x",
            "data": {"train": "a.tar", "val": val, "std": std},
            "optim": {"lr": lr},
        }
    )
    text = config_yaml(config)
    assert len(text.splitlines()) == len(all_keys(PretrainConfig)) + len(all_sections(PretrainConfig))
    leaves = {name: value for name, (value, _) in read_document(text).items()}
    assert leaves == flat(config)
    other_reader = yaml.safe_load(text)
    assert other_reader["run"] == config.run and other_reader["data"]["val"] == val
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(file, root=PretrainConfig).config == config
    commented = render_config(LoadedConfig(config, dict.fromkeys(all_keys(PretrainConfig), "default")))
    assert {name: value for name, (value, _) in read_document(commented).items()} == leaves

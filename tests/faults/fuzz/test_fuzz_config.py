"""Configs: YAML damaged as text and as trees, and overrides; a shard pattern, which is a small language too.

A config that is taken is written out and read back as the same one; a pattern that is taken names files in one folder.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys, flat
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.render import config_yaml
from maedistill.data.shards.patterns import find_shards
from maedistill.errors import ConfigError, DataError
from tests.faults.fuzz.damage import NASTY, ODD, byte_edits, cases, edited, regrown, tree_edits

REFUSALS = (ConfigError, DataError)
ROOTS, OWN = (PretrainConfig, FinetuneConfig), ({"method": "mae"}, {"init": {"source": "run:runs/a"}})
YAML = """\
# a comment
run: runs/tiny
data:
  train: "shards/train-*.tar"
  mean: [0.5, 0.5, 0.5]   # another
  std: [ 0.25, .25, 2.5e-1 ]
student: {model: vit_tiny_patch16_224, width: 32, depth: 2, num_heads: 2, patch_size: 8}
optim:
    epochs: 3
    warmup_epochs: 0.5
    lr: 3e-3
    global_batch: 12
    ema: ~
engine: {micro_batch: 4}
"""
TREE = {
    "data": {"train": "x-{000..003}.tar", "image_size": 32, "crop_scale": [0.2, 1.0], "val": None},
    "optim": {"epochs": 3, "betas": [0.9, 0.95], "ema": None, "warmup_epochs": 0},
    "student": {"model": "vit_tiny_patch16_224", "drop_path": 0.1},
    "seed": 0,
    "extends": [],
}
LANGUAGE = (b"*a", b"&a ", b"!!python/object:os.system ", b"!x ", b"<<: ", b"? ", b": ", b"- ", b"---\n", b"...\n",
            b"|\n",
            b">\n", b"%YAML 1.1\n---\n", b"%YAML " + b"9" * 5000 + b".1\n---\n", b"%TAG ! !\n", b'"\\UFFFFFFFF"',
            b'"\\U00110000"', b'"\\ud800"', b"\t", b"#", b"extends: base.yaml\n", b"extends: [bad.yaml]\n", b"{", b"}",
            b"]",
            b",", b"0x1F", b"1_000", b"1:30", b"2001-01-01", b".inf", b"-.nan", b"1e400", b"1" * 29, b"\xef\xbb\xbf",
            b"null", b"true", b"'", b"optim.lr: 1\n", b"seed: 1\n")  # fmt: skip


def check(case: tuple[str, Any, int]) -> None:
    """A file, a list of overrides of a good file, or a pattern."""
    kind, value, stage = case
    if kind == "pattern":
        paths = find_shards(value)
        assert paths == tuple(sorted(set(paths))) and len({Path(path).parent for path in paths}) == 1
        return
    root, file = ROOTS[stage], Path("case.yaml")
    file.write_bytes(value if kind == "file" else json.dumps(TREE | OWN[stage]).encode())
    Path("base.yaml").write_text("seed: 5\n")
    Path("bad.yaml").write_text("extends: case.yaml\n")
    for name in ("a.tar", "b-0.tar", "b-1.tar"):
        Path(name).touch()
    loaded = load_config(file, value if kind == "overrides" else (), root=root, to_run=False)
    assert type(loaded.config) is root and loaded.origins.keys() == all_keys(root).keys()
    file.write_text(config_yaml(loaded.config))
    again = load_config(file, root=root, to_run=False)
    assert flat(again.config) == flat(loaded.config)


def yaml(stage: int) -> bytes:
    """A good config of a stage, as a person writes it."""
    return f"{YAML}{json.dumps(OWN[stage])[1:-1]}\n".encode()


STAGES = st.sampled_from([0, 1])
PATTERNS = st.lists(
    st.one_of(
        st.sampled_from(["{0..1}", "{00..01}", "{a,b}", "{,}", "{}", "{", "}", "{9..0}", "{0..99999999}", "*", "?", "[",
                         "[z-a]", "[!", "~", "~root", "/", "..", "pipe:", "http://", "s3://b/", "::", "a", "b-", ".tar",
                         "file:///", "\0", "\ud800", "\n", "{" + "9" * 5000 + "..1}", "{a,b}" * 30, "{0..9}" * 7,
                         "x" * 300]),
        st.text(max_size=5),
    ),
    max_size=5,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_not_damaged_is_taken(sandbox, stage):
    assert sandbox(("file", yaml(stage), stage)) == sandbox(("overrides", ["seed=3"], stage)) == "taken"
    assert sandbox(("pattern", "b-{0,1}.tar", 0)) == "taken"


@cases(0.06)
@given(byte_edits(5, nasty=(*NASTY, *LANGUAGE)), STAGES)
@example([("insert", 0, b'? "\\UFFFFFFFF"\n: ')], 0)
@example([("insert", 0, b"%YAML " + b"9" * 5000 + b".1\n---\n")], 0)
@example([("insert", 0, b"a: " + b"[" * 20_000)], 0)
def test_texts_of_any_kind(sandbox, edits, stage):
    sandbox(("file", edited(yaml(stage), edits), stage))


@cases(0.05)
@given(tree_edits(4, odd=(*ODD, 10**29, 10**31, 1e-320, -0.0, 2**1000)), STAGES)
def test_trees_of_any_values(sandbox, grown, stage):
    sandbox(("file", json.dumps(regrown(TREE | OWN[stage], grown)).encode(), stage))


NAMES = sorted(all_keys(PretrainConfig)) + sorted(all_keys(FinetuneConfig))
VALUES = st.one_of(st.sampled_from([json.dumps(value) for value in ODD]), st.text(max_size=10), st.integers().map(str))


@cases(0.05)
@given(
    st.lists(st.builds("{}={}".format, st.one_of(st.sampled_from(NAMES), st.text(max_size=8)), VALUES), max_size=3),
    STAGES,
)
def test_overrides_of_any_kind(sandbox, overrides, stage):
    sandbox(("overrides", overrides, stage))


@cases(0.04)
@given(PATTERNS)
@example("{a,b}" * 20_000)
@example("{0.." + "9" * 5000 + "}")
@example("{a,b}" * 19 + "x" * 100_000)
@example("a\0*.tar")
@example("[" * 10_000 + "*")
def test_patterns_of_any_kind(sandbox, pattern):
    sandbox(("pattern", pattern, 0))

"""Each of `wrong_settings.py` gives a line of cause that names the place and a line of remedy, before torch."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import all_keys, all_sections
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from tests.config.wrong_settings import FILES, FINETUNE, GOOD, ROWS, TINYMIM


@pytest.fixture
def refused(tmp_path, messages, request):
    """Checks that loading these settings over this file is refused in two lines, which the golden file has."""

    def check(text: str, overrides: list[str], *, root=PretrainConfig, name: str | None = None) -> ConfigError:
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(file, overrides, root=root)
        error = caught.value
        assert error.exit_code == 2
        assert "\n" not in error.cause and "\n" not in error.remedy, "one line each"
        if more := re.search(r"(\S+): .* \(and (\d+) more: (.+)\)$", error.cause):
            keys = more[3].removesuffix(", ...").split(", ")
            assert len({*keys}) == len(keys) and (int(more[2]) == len(keys) or "..." in more[3]), "each key once"
            assert not any(re.match(rf"(command line |.*:\d+ )?{re.escape(key)}[=:]", error.cause) for key in keys)
        messages.check(f"{root.title} | {name or ' '.join(overrides)}", error.cause, error.remedy, FOLDER=tmp_path)
        return error

    return check


@pytest.mark.parametrize(("root", "good", "override"), ROWS, ids=[f"{row[0].stage}-{row[2][:40]}" for row in ROWS])
def test_wrong_override(refused, tmp_path, root, good, override):
    (tmp_path / "good.yaml").write_text(good)
    load_config(tmp_path / "good.yaml", root=root)
    refused(good, [override], root=root)


@pytest.mark.parametrize("text", FILES, ids=[text.replace(GOOD, "")[:20] for text in FILES])
def test_wrong_file(refused, text):
    refused(text, [], name=f"file | {text.replace(GOOD, 'GOOD ').replace(TINYMIM, 'TINYMIM ')}")


def test_every_problem_is_named_and_the_first_is_shown(refused):
    shown = refused(GOOD, ["engine.zero=3", "optim.ema=0.9", "decoder.num_heads=5", "align.student=[99]"])
    assert "optim.ema=0.9" in shown.cause and "problems: align.student, decoder.num_heads" in shown.cause
    shown = refused(GOOD, ["sed=1", "optim.lr=x", "decoder.num_heads=5"])
    assert "sed" in shown.cause and "problems: optim.lr" in shown.cause


def test_what_has_no_effect_beside_another_setting_is_refused_or_gives_way(refused, tmp_path):
    off = "distill={teachers: ['run:a'], label_weight: 0, logits: {weight: 1}}"
    alone = ["student.exits=[2]", "distill.exits={weight: 1, alpha: 0}", "distill.exits.temperature=2"]
    for words, key in (([off, "augment.smoothing=0.2"], "augment.smoothing"), (alone, "distill.exits.temperature")):
        assert key in refused(FINETUNE, words, root=FinetuneConfig).cause
    file = tmp_path / "finetune.yaml"
    file.write_text(f"{FINETUNE}augment: {{smoothing: 0.2}}\n")
    assert load_config(file, [off], root=FinetuneConfig).config.augment.smoothing == 0.1
    file.write_text(f"{GOOD}log: {{knn_every_epochs: 5}}\n")
    assert load_config(file, [], root=PretrainConfig).config.log.knn_every_epochs == 5, "a recipe may be for either"


def test_a_copy_of_the_network_needs_whole_weights(refused):
    given = ["distill={label_weight: 0, past: {weight: 1}, codistillation: {weight: 1, peers: [b]}}", "engine.zero=3"]
    assert "distill.past.source" in refused(FINETUNE, given, root=FinetuneConfig).cause


def test_a_term_that_is_off_may_be_given_whole(tmp_path):
    """As RUN/config.yaml has it: with its weight, 0."""
    given = ["distill.past={weight: 0, alpha: 0.8, source: weights}", "distill.dkd.weight=0"]
    (tmp_path / "finetune.yaml").write_text(FINETUNE)
    assert not load_config(tmp_path / "finetune.yaml", given, root=FinetuneConfig).config.distill.terms


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("mae", "align.student=[1]"),
        ("mae", "teacher.precision=bf16"),
        ("dmae", "generate.by=decoder"),
        ("tinymim", "generate.weight=3"),
    ],
)
def test_settings_of_what_a_method_does_not_use_are_refused(method, setting):
    with pytest.raises(ConfigError) as error:
        load_config({"method": method, "run": "r", "data": {"train": "x.tar"}}, [setting], root=PretrainConfig)
    assert setting.partition("=")[0] in error.value.cause


def test_a_term_of_a_file_is_turned_off_by_its_weight(tmp_path):
    terms = "logits: {weight: 0.9, temperature: 2.0, standardize: true}, hard_label: {weight: 1}"
    (tmp_path / "finetune.yaml").write_text(f"{FINETUNE}distill: {{teachers: ['run:t'], {terms}}}\n")
    distill = load_config(tmp_path / "finetune.yaml", ["distill.logits.weight=0"], root=FinetuneConfig).config.distill
    assert list(distill.terms) == ["hard_label"] and distill.logits.temperature == 4


@pytest.mark.parametrize("override", ["align.student=3", "optim.betas=0.9", "data.mean=0.5", "distill.teachers=run:x"])
def test_brackets_are_a_remedy_only_where_they_help(tmp_path, override):
    root = FinetuneConfig if override.startswith("distill") else PretrainConfig
    with pytest.raises(ConfigError) as first:
        load_config({}, [override], root=root)
    found = re.search(r"put it in brackets: (\[.*?\])", first.value.remedy)
    assert bool(found) == override.startswith(("align", "distill"))
    if found:
        with pytest.raises(ConfigError) as second:  # other keys are still missing
            load_config({}, [f"{override.partition('=')[0]}={found[1]}"], root=root)
        assert "expected" not in second.value.cause


def test_fine_tuning_starts_from_something(refused, tmp_path):
    file = tmp_path / "finetune.yaml"
    file.write_text(FINETUNE)
    refused(FINETUNE, ["student.model=null", "init.source=null"], root=FinetuneConfig)
    load_config(file, ["init.source=null"], root=FinetuneConfig)
    load_config(file, ["student.model=null", "init.source=run:runs/x"], root=FinetuneConfig)
    load_config(file, ["augment={mixup: 0, cutmix: 0}", "engine.micro_batch=1"], root=FinetuneConfig)
    refused(GOOD, [], root=FinetuneConfig, name="a pre-training config")


def test_amd_generators_must_fit_the_teacher(refused, tmp_path):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    amd = ["method=amd", "masks.teacher_keep_ratio=0.5"]
    load_config(file, [*amd, "generate.num_heads=8"], root=PretrainConfig)
    refused(GOOD, [*amd, "generate.num_heads=7"])
    refused(GOOD, ["method=amd", "masks.teacher_keep_ratio=0.251"])


def test_a_student_that_predicts_no_pixels_may_see_all(refused, tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD + "decoder: {width: 64}\n")
    whole = ["masks.student_keep_ratio=1", "pixels.weight=0"]
    loaded = load_config(tmp_path / "good.yaml", whole, root=PretrainConfig).config
    assert not loaded.needs_decoder and loaded.decoder == PretrainConfig().decoder, "the file's gives way"
    assert "decoder.depth" in refused(GOOD, [*whole, "decoder.depth=2"]).cause
    assert "pictures_every_epochs" in refused(GOOD, [*whole, "log.pictures_every_epochs=1"]).cause
    assert "student_keep_ratio" in refused(GOOD, [*whole, "method=amd", "masks.teacher_keep_ratio=1"]).cause


def test_amd_by_the_decoder_and_the_average_as_teacher(refused, tmp_path):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    shared = ["method=amd", "masks.teacher_keep_ratio=1", "generate.by=decoder"]
    load_config(file, [*shared, "decoder.attention=cross"], root=PretrainConfig)
    assert "generate.by" in refused(GOOD, shared).cause
    load_config(file, [*shared, "generate.weight=0"], root=PretrainConfig)  # nothing is generated
    features = [*shared, "decoder.attention=cross", "pixels.weight=0", "log.pictures_every_epochs=1"]
    assert "pictures_every_epochs" in refused(GOOD, features).cause
    for setting in ("decoder.predict_ratio=0.5", "pixels.target=raw"):
        assert setting.partition("=")[0] in refused(GOOD, [*features[:-1], setting]).cause
    assert "generate.depth" in refused(GOOD, [*shared, "decoder.attention=cross", "generate.depth=1"]).cause
    average = ["method=amd", "masks.teacher_keep_ratio=1", "teacher.source=ema", "align.teacher=[11]"]
    assert "engine.zero" in refused(GOOD, [*average, "engine.zero=3"]).remedy
    assert "align.teacher" in refused(GOOD, [*average[:-1], "engine.zero=1"]).cause, "it has the student's blocks"
    assert "align.normalize" in refused(GOOD, [*average, "align.normalize=stored"]).cause, "it changes in every step"
    file.write_text(GOOD + "generate: {depth: 1}\n")
    loaded = load_config(file, [*average, "generate.by=decoder", "decoder.attention=cross"], root=PretrainConfig).config
    assert loaded.generate.depth == 2 and loaded.teacher_architecture == loaded.student_architecture


NAMES = [name for root in (PretrainConfig, FinetuneConfig) for name in (*all_keys(root), *all_sections(root))]
NAMES += ["", "extends", "a.b.c", ".", "optim."]


@settings(deadline=None, max_examples=300)
@given(
    stage=st.sampled_from([(PretrainConfig, GOOD), (FinetuneConfig, FINETUNE)]),
    key=st.sampled_from(NAMES) | st.text(max_size=5),
    value=st.text(alphabet="[]{}:,#&*!|>'\"%@`~-.?=<0123456789eEinfaxytru \n\t\\\ud800\x85", max_size=12) | st.text(),
)
@example(stage=(PretrainConfig, GOOD), key="? a", value="{? [1]: 2}")
@example(stage=(PretrainConfig, GOOD), key="data", value="{'': 1}")
@example(stage=(PretrainConfig, GOOD), key="optim.lr", value="9" * 5000)
@example(stage=(PretrainConfig, GOOD), key="optim.lr", value="1e" + "9" * 5000)
@example(stage=(FinetuneConfig, FINETUNE), key="init.source", value="':'")
def test_whatever_is_typed_is_taken_or_refused_in_two_lines(tmp_path_factory, stage, key, value):
    root, good = stage
    file = tmp_path_factory.getbasetemp() / "good.yaml"
    file.write_text(good)
    try:
        load_config(file, [f"{key}={value}"], root=root)
    except ConfigError as error:
        assert len(error.cause.splitlines()) == 1 and len(error.remedy.splitlines()) == 1
    wild = tmp_path_factory.getbasetemp() / "wild.yaml"
    wild.write_text(f"{good}{key}: {value}", encoding="utf-8", errors="surrogatepass")
    try:
        load_config(wild, root=root)
    except ConfigError as error:
        assert len(error.cause.splitlines()) == 1 and len(error.remedy.splitlines()) == 1


def test_missing_or_unreadable_files(messages, tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "dmae_vit_b.yaml").write_text(GOOD)
    (tmp_path / "teacher.pth").write_bytes(b"\x80\x02\xff\xfe")
    for name in ("pretrain/dmae_vitb.yaml", "dmae_vit_b.yaml", "typo/x.yaml", "pretrain", "teacher.pth"):
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name, root=PretrainConfig)
        assert str(tmp_path / name) in caught.value.cause
        messages.check(f"config file | {name}", caught.value.cause, caught.value.remedy, FOLDER=tmp_path)


PROBE = """
import json, pathlib, sys
from maedistill.config.plan import batch_plan, world_size_from_environment
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.render import explain, render_config
from maedistill.errors import ConfigError, exit_code_of
folder = sys.argv[1]
for root in (PretrainConfig, FinetuneConfig):
    for override in json.loads(pathlib.Path(folder, f"{root.stage}.json").read_text()):
        try:
            load_config(f"{folder}/{root.stage}.yaml", [override], root=root)
        except ConfigError:
            continue
        raise SystemExit(f"accepted {override}")
file = f"{folder}/pretrain.yaml"
render_config(load_config(file, root=PretrainConfig)), explain("optim.lr", PretrainConfig)
batch_plan(8, 4, world_size=world_size_from_environment())
heavy = {"torch", "timm", "numpy", "deepspeed"} & set(sys.modules)
assert not heavy, heavy
sys.exit(exit_code_of(lambda: load_config(file, ["lr=1e-3"], root=PretrainConfig)))
"""


def test_nothing_here_imports_torch(tmp_path):
    for root, good in ((PretrainConfig, GOOD), (FinetuneConfig, FINETUNE)):
        (tmp_path / f"{root.stage}.yaml").write_text(good)
        (tmp_path / f"{root.stage}.json").write_text(json.dumps([row[2] for row in ROWS if row[0] is root]))
    command = [sys.executable, "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: command line lr=1e-3: unknown key lr\n  fix: did you mean optim.lr?\n"

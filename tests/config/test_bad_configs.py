"""Wrong settings, one per row: each gives a line of cause that names the place and a line of remedy, before torch."""

import json
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

GOOD = """\
method: dmae
run: runs/test
data:
  train: shards/train-{000000..000003}.tar
student: {model: vit_base_patch16_224}
teacher: {source: "timm:vit_large_patch16_224.mae"}
align: {student: [8], teacher: [17]}
"""
TINYMIM = GOOD.replace("dmae", "tinymim")
FINETUNE = """\
run: runs/test
data:
  train: shards/train-{000000..000003}.tar
  val: shards/val-000000.tar
init: {source: "file:student.safetensors"}
student: {model: vit_small_patch16_224}
"""
TAUGHT = "distill={teachers: ['run:a'], "  # and terms
FILE = "FILE"  # stands for the path of the file in the expected texts

# (overrides, fragments of the cause, fragments of the remedy), on top of GOOD
OVERRIDES = [
    # unknown keys
    ("lr=1e-3", ["command line lr=1e-3", "no key lr"], ["did you mean optim.lr?"]),
    ("optim.lrr=1e-3", ["command line optim.lrr=1e-3"], ["did you mean optim.lr?"]),
    ("engine.width=64", ["no key engine.width"], ["student.width", "teacher.width", "decoder.width"]),
    ("mask_ratio=0.75", ["no key mask_ratio"], ["masks.student_keep_ratio"]),
    ("--batch-size=64", ["--batch-size=64", "key=value"], ["without dashes"]),
    ("batch-size=64", ["no key batch-size"], ["optim.global_batch"]),
    ("qqqq=1", ["no key qqqq"], ["sections are data, student", "--explain"]),
    ("optim", ["not of the form key=value"], ["optim.epochs=300"]),
    ("extends=base.yaml", ["inside a file only"], ["command line itself"]),
    ("optim=3", ["optim is a section", "cannot be set to 3"], ["optim.lr"]),
    ("optim.lr.peak=3", ["optim.lr is not a section", "a number > 0, or null"], ["set optim.lr itself"]),
    ("optim.lr={a: 1}", ["optim.lr is not a section"], ["set optim.lr itself"]),
    ("optim.lr={}", ["expected a number > 0, or null, got a mapping"], ["--explain optim.lr"]),
    # wrong types and values
    ("optim.lr=fast", ["optim.lr=fast", "expected a number > 0, or null, got the text 'fast'"], ["--explain optim.lr"]),
    ("optim.lr=-1e-3", ["a number > 0", "got -0.001"], ["--explain optim.lr"]),
    ("optim.lr=.nan", ["expected a number > 0", "got NaN"], ["--explain"]),
    ("optim.epochs=.inf", ["got Infinity"], ["the default is 100.0"]),
    ("optim.epochs=1e999", ["got Infinity"], ["the default is 100.0"]),
    ("optim.epochs=null", ["expected a number > 0, got null"], ["the default is 100.0"]),
    ("optim.global_batch=1e3", ["a whole number >= 1, got 1000.0"], ["write 1000, without"]),
    ("optim.global_batch=true", ["a whole number >= 1, got true"], ["the default is 4096"]),
    ("seed=007", ["a whole number", "the text '007'"], ["the default is 0"]),
    ("seed=9223372036854775808", ["<= 9223372036854775807"], ["the default is 0"]),
    ("engine.zero=true", ["a whole number >= 0 and <= 3, got true"], ["the default is 0"]),
    ("engine.zero=4", ["<= 3, got 4"], ["the default is 0"]),
    ("data.image_size=100000", ["<= 8192, got 100000"], ["the default is 224"]),
    ("student.width=1000000000", ["<= 16384, or null, got 1000000000"], ["write a whole number >= 1 and <= 16384"]),
    ("data.flip=on", ["expected true or false, got the text 'on'"], ["write true or false"]),
    ("data.flip=0", ["expected true or false, got 0"], ["write true or false"]),
    ("method=dame", ["one of mae, dmae, amd, tinymim, got the text 'dame'"], ["did you mean dmae?"]),
    ("pixels.target=4", ["one of norm_patch, raw, norm_patch_channel"], ["write patch or raw or norm_patch_channel"]),
    ("run=2024", ["expected text, got 2024"], ["quotes"]),
    ("align.student=8", ["a list of whole numbers, each >= 0, got 8"], ["[8]"]),
    ("align.student=[8.5]", ["each >= 0, got [8.5]"], ["--explain align.student"]),
    ("data.crop_scale=[0.2]", ["a list of 2 numbers, each > 0 and <= 1, got [0.2]"], ["[0.2, 1.0]"]),
    ("data.mean=[0.5, 0.5, .nan]", ["a list of 3 numbers", "NaN"], ["[0.485, 0.456, 0.406]"]),
    ("teacher.sha256=abc", ["[0-9a-f]{64}"], ["--explain teacher.sha256"]),
    # overrides that are not YAML, or too much of it
    ("data.train=*.tar", ["command line data.train=*.tar: not YAML"], ["quotes"]),
    ("data.train=[a", ["command line data.train=[a: not YAML"], ["quotes"]),
    ("data.train=*shards", ["*shards is an alias"], ["text that begins with * needs quotes"]),
    ("run=!!python/object:os.system x", ["tag"], ["without ! tags"]),
    ("run=!env HOME", ["tag"], ["without ! tags"]),
    ("align.student=" + "[" * 200, ["nested more than 8 deep"], ["sections and keys"]),
    ('run="a\\nb"', ["line breaks or control characters"], ["one plain line"]),
    ('run="\\ud800"', ["line breaks or control characters"], ["one plain line"]),
    # rules between keys
    ("data.train=''", ["data.train", "no training shards"], ["tools/make_shards.py"]),
    ("run=''", ["no run folder"], ["run=runs/NAME"]),
    ("data.std=[0.2, 0, 0.2]", ["data.std", "not above 0"], ["deviations"]),
    ("data.crop_ratio=[1.3, 0.7]", ["data.crop_ratio", "not an increasing pair"], ["smaller value first"]),
    ("optim={lr: 1e-3, base_lr: 1.5e-4}", ["lr=0.001 and base_lr=0.00015"], ["keep one", "lr=0.0024"]),
    ("optim.min_lr=1", ["optim.min_lr", "above lr=0.0024"], ["smaller"]),
    ("optim.warmup_epochs=100", ["100 is not below epochs=100"], ["5"]),
    ("data.views_per_image=3", ["3 does not divide global_batch=4096"], ["divisor"]),
    ("engine={zero: 3, compile: true}", ["a compiled student reads whole weights"], ["engine.zero=2"]),
    ("log.probe_every_epochs=5", ["log.probe_every_epochs=5: no labelled shards"], ["data.val=DIR/val-*.tar"]),
    ("log={probe_every_epochs: 5, knn_images: 1}", ["and 1 more: log.knn_images"], ["data.val=DIR/val-*.tar"]),
    ("masks.student_keep_ratio=1.0", ["nothing to predict"], ["0.25"]),
    ("masks.teacher_keep_ratio=0.5", ["0.5 differs from student_keep_ratio=0.25"], ["method=amd"]),
    ("method=amd", ["masks.teacher_keep_ratio: missing"], ["sees more"]),
    ("method=mae", ["method=mae has no teacher", "and 2 more: align.student, align.teacher"], ["remove it"]),
    ("masks.student_keep_ratio=0.001", ["of 196 patches the student sees 0"], ["at least one"]),
    ("teacher.source=null", ["method=dmae needs a teacher"], ["timm:vit_large_patch16_224.mae"]),
    ("teacher.source=vit_large_patch16_224", ["is not KIND:NAME"], ["timm, hf-hub, local-dir"]),
    ("teacher.source=file:x.pth", ["needs its model's name"], ["teacher.model=vit_large_patch16_224"]),
    ("teacher.model=vit_large_patch16_224", ["a timm: teacher names its model itself"], ["remove it"]),
    ("teacher.width=64", ["a timm: teacher brings its own width"], ["remove it"]),
    (f"teacher.sha256={'0a' * 32}", ["only a file: teacher"], ["remove it"]),
    ("teacher.std=[1, 1, 1]", ["mean and std go together"], ["both or none"]),
    ("student.model=resnet50", ["'resnet50' is no VisionTransformer"], ["vit_small_patch16_224"]),
    ("teacher.source=timm:resnet50", ["'resnet50' is no VisionTransformer"], ["vit_small_patch16_224"]),
    ("align.student=[12]", ["block 12 does not exist, the student has 12"], ["0 to 11"]),
    ("align.teacher=[24]", ["block 24 does not exist, the teacher has 24"], ["0 to 23"]),
    ("align.teacher=[1, 2]", ["1 student blocks for 2 teacher blocks"], ["one to one"]),
    ("align={student: [8, 8], teacher: [1, 2]}", ["twice in [8, 8]"], ["each block once"]),
    ("data.image_size=230", ["patch size 16 does not divide 230"], ["use 224"]),
    ("decoder.num_heads=7", ["7 heads do not divide width 384"], ["divisor of 384"]),
    ("decoder={width: 6, num_heads: 1}", ["6 is not a multiple of 4"], ["use 8"]),
]

# The same on top of FINETUNE; what both stages share is above.
FINETUNE_OVERRIDES = [
    # the other stage's, and its neighbours
    (
        "masks.student_keep_ratio=0.5",
        ["masks.student_keep_ratio belongs to pre-training (tools/pretrain.py)"],
        ["remove it"],
    ),
    ("method=amd", ["method belongs to pre-training"], ["run tools/pretrain.py"]),
    ("teacher.sorce=x", ["teacher.sorce belongs to pre-training"], ["remove it"]),
    ("align=3", ["align belongs to pre-training"], ["remove it"]),
    ("init.sorce=x", ["no key init.sorce"], ["did you mean init.source?"]),
    ("layer_decay=0.75", ["no key layer_decay"], ["did you mean optim.layer_decay?"]),
    ("reprob=0.25", ["no key reprob"], ["augment.erasing"]),
    ("qqqq=1", ["no key qqqq"], ["sections are init, student, data, augment"]),
    # values
    ("optim.layer_decay=0", ["a number > 0 and <= 1, got 0"], ["the default is 0.65"]),
    ("optim.layer_decay=1.5", ["a number > 0 and <= 1, got 1.5"], ["the default is 0.65"]),
    ("data.label_fraction=0", ["a number > 0 and <= 1, got 0"], ["the default is 1.0"]),
    ("data.num_classes=1", ["a whole number >= 2, or null, got 1"], ["--explain data.num_classes"]),
    ("augment.mixup=-0.1", ["a number >= 0, got -0.1"], ["the default is 0.8"]),
    ("augment.mix_probability=1.1", ["a number >= 0 and <= 1, got 1.1"], ["the default is 1.0"]),
    ("augment.smoothing=1.0", ["a number >= 0 and < 1, got 1.0"], ["the default is 0.1"]),
    ("student.global_pool=cls", ["one of avg, token, got the text 'cls'"], ["write avg or token"]),
    # rules between keys
    ("data.train=''", ["no training shards"], ["tools/make_shards.py"]),
    ("data.val=null", ["data.val", "no labelled shards to evaluate on"], ["data.val=DIR/val-*.tar"]),
    ("run=''", ["no run folder"], ["run=runs/NAME"]),
    ("data.std=[0.2, 0.2, 0.2]", ["mean and std go together"], ["both or none"]),
    ("data={mean: [0, 0, 0], std: [0, 1, 1]}", ["[0.0, 1.0, 1.0] is not above 0"], ["deviations"]),
    ("data.crop_scale=[1.0, 0.5]", ["[1, 0.5] is not an increasing pair"], ["smaller value first"]),
    ("optim={lr: 1e-3, base_lr: 5e-4}", ["lr=0.001 and base_lr=0.0005"], ["keep one", "lr=0.002"]),
    ("optim.min_lr=1", ["above lr=0.002"], ["1e-06 in the papers"]),
    ("optim.epochs=5", ["5 is not below epochs=5"], ["shorten the warm-up"]),
    ("engine={zero: 3, compile: true}", ["a compiled student reads whole weights"], ["engine.zero=2"]),
    ("init.source=vit_small_patch16_224", ["is not KIND:NAME"], ["run, timm, hf-hub, local-dir, file"]),
    ("init.source=random:vit_small_patch16_224", ["is not KIND:NAME"], ["run, timm"]),
    ("init.source='run:'", ["is not KIND:NAME"], ["run, timm"]),
    ("init.source=timm:resnet50", ["'resnet50' is no VisionTransformer"], ["vit_small_patch16_224"]),
    ("student.model=resnet50", ["'resnet50' is no VisionTransformer"], ["vit_small_patch16_224"]),
    ("student.model=null", ["a file: source needs its model's name"], ["student.model=vit_small_patch16_224"]),
    ("init={source: null, license: mit}", ["nothing is loaded without init.source"], ["add init.source"]),
    ("init={source: 'run:a', positions: learned}", ["a run: source brings its own positions"], ["remove it"]),
    (f"init={{source: 'timm:vit_small_patch16_224', sha256: {'0a' * 32}}}", ["only a file: source"], ["remove it"]),
    ("student={class_token: false, pooling: token}", ["there is no class token to read"], ["student.global_pool=avg"]),
    ("data.image_size=230", ["patch size 16 does not divide 230"], ["use 224"]),
    ("student.num_heads=7", ["7 heads do not divide width 384"], ["divisor of 384"]),
    ("augment.rand_augment=m9", ["'m9' is not timm's notation"], ["rand-m9-mstd0.5-inc1"]),
    ("augment.rand_augment=rand-m9.5", ["'rand-m9.5' is not timm's notation"], ["rand-m9-mstd0.5-inc1"]),
    ("optim.global_batch=1023", ["1023 images cannot be mixed in pairs"], ["augment.mixup=0 augment.cutmix=0"]),
    ("engine.micro_batch=1", ["1 image cannot be mixed"], ["use 2 or more"]),
    # distillation, whose terms are sections in a section
    ("distill=3", ["distill is a section"], ["distill.logits.temperature"]),
    ("distill.logits=3", ["distill.logits is a section", "cannot be set to 3"], ["distill.logits.weight"]),
    ("distill.logits.temprature=3", ["no key distill.logits.temprature"], ["did you mean distill.logits.temperature?"]),
    ("distill.logits.temperature=0", ["distill.logits.temperature", "got 0"], ["the default is 4.0"]),
    ("distill.logits.temperature=-1", ["got -1"], ["the default is 4.0"]),
    ("distill.teachers=timm:resnet50", ["a list of texts, got the text"], ['put it in brackets: ["timm:resnet50"]']),
    ("distill.teachers=['resnet50']", ["a teacher is named, but every term has weight 0"], ["distill.logits.weight=1"]),
    (
        "distill={teachers: [resnet50], logits: {weight: 1}}",
        ["'resnet50' is not KIND:NAME"],
        ["run, timm, hf-hub, local-dir"],
    ),
    ("distill={teachers: ['run:a', 'run:a'], logits: {weight: 1}}", ["a teacher is named twice"], ["name each once"]),
    ("distill.logits.weight=1", ["distill.teachers: no teacher is named for logits"], ["timm:vit_base_patch16_224"]),
    ("distill.image_size=96", ["distill.image_size", "there is no teacher"], ["remove it"]),
    ("distill.dkd.beta=2", ["distill.dkd.beta", "the term is off: its weight is 0"], ["distill.dkd.weight above 0"]),
    ("distill.dkd.start_epoch=2", ["distill.dkd.start_epoch", "the term is off"], ["or remove it"]),
    ("distill.label_weight=0", ["nothing that teaches the classifier"], ["distill.logits, dkd or hard"]),
    (
        f"{TAUGHT}label_weight: 0, logits: {{weight: 1, stop_epoch: 9}}}}",
        ["the classifier from the first step"],
        ["above 0"],
    ),
    (
        f"{TAUGHT}label_weight: 0, hard_label: {{weight: 1, token: true}}}}",
        ["teaches the classifier"],
        ["dkd or hard_label without"],
    ),
    (f"{TAUGHT}label_weight: 0, logits: {{weight: 1, warmup_epochs: 1}}}}", ["from the first step"], ["warmup_epochs"]),
    (f"{TAUGHT}dkd: {{weight: 1, alpha: 0, beta: 0}}}}", ["alpha and beta are both 0"], ["use 1 and 8"]),
    (f"{TAUGHT}hints: {{weight: 1}}}}", ["0 student blocks for 0 teacher depths"], ["distill.hints.student=[11]"]),
    (f"{TAUGHT}maps: {{weight: 1, student: [12], teacher: [1]}}}}", ["block 12 does not exist"], ["use 0 to 11"]),
    (f"{TAUGHT}maps: {{weight: 1, student: [1, 1], teacher: [2, 2]}}}}", ["a pair is named twice"], ["once"]),
    (f"{TAUGHT}dkd: {{weight: 1, start_epoch: 100}}}}", ["100 is not below optim.epochs=100"], ["start earlier"]),
    (f"{TAUGHT}dkd: {{weight: 1, start_epoch: 3, stop_epoch: 2}}}}", ["3 is not below stop_epoch=2"], ["earlier"]),
    (f"{TAUGHT}dkd: {{weight: 1, warmup_epochs: 101}}}}", ["101 epochs from 0 on go beyond"], ["at most 100"]),
    (f"{TAUGHT}dkd: {{weight: 1, stop_epoch: 101}}}}", ["101 is after the end, optim.epochs=100"], ["before it"]),
]
ROWS = [(PretrainConfig, GOOD, *row) for row in OVERRIDES]
ROWS += [(FinetuneConfig, FINETUNE, *row) for row in FINETUNE_OVERRIDES]

# (the file's text, fragments of the cause, fragments of the remedy)
FILES = [
    (GOOD + "optim:\n  epoch: 3\n", [f"{FILE}:9 optim.epoch", "no key"], ["did you mean optim.epochs?"]),
    (GOOD + "optim:\n  lr: yes\n", [f"{FILE}:9 optim.lr", "got the text 'yes'"], ["--explain optim.lr"]),
    (GOOD + "optim:\n", [f"{FILE}:8 optim", "is a section", "null"], ["optim.epochs"]),
    (GOOD + "method: mae\n", [f"{FILE}:8", "method is given twice, first in line 1"], ["keep one"]),
    (GOOD + "optim:\n  lr: 1\n  lr: 2\n", [f"{FILE}:10", "lr is given twice, first in line 9"], ["keep one"]),
    (GOOD + "optim.lr: 1\n", [f"{FILE}:8", "dots are for the command line"], ["`optim:`", "`lr: ...`"]),
    (GOOD + "optim: &o {lr: 1}\nlog: *o\n", [f"{FILE}:9", "*o is an alias"], ["write the value itself"]),
    (GOOD + "<<: {seed: 1}\n", [f"{FILE}:8", "there is no key <<.seed"], ["did you mean seed?"]),
    (GOOD + "1: 2\n", [f"{FILE}:8", "not a plain name"], ["name: value"]),
    (GOOD + "seed: !!int 3\n", [f"{FILE}:8", "is a tag"], ["without ! tags"]),
    (GOOD + "optim:\n\tlr: 1\n", [f"{FILE}:9", "not YAML"], ["spaces"]),
    (GOOD + "run: [\n", [FILE, "not YAML"], ["correct it"]),
    (GOOD + "---\nseed: 1\n", [f"{FILE}:8", "not YAML"], ["correct it"]),
    (GOOD + "threads: \x01\n", [f"{FILE}:8", "U+0001"], ["remove it"]),
    (GOOD + "threads: |\n  several\n  lines\n", [f"{FILE}:8", "line breaks"], ["one plain line"]),
    (GOOD + "extends: missing.yaml\n", [f"{FILE}:8 extends", "missing.yaml"], ["bad.yaml"]),
    (GOOD + "extends: [1]\n", [f"{FILE}:8 extends", "a file name or a list"], ["extends: base.yaml"]),
    (GOOD + "extends: bad.yaml\n", [f"{FILE}:8 extends", "extend each other"], ["break the circle"]),
    (TINYMIM.replace("{student", "{head: mlp, student"), ["align.head", "not features"], ["remove it"]),
    (TINYMIM + "masks: {teacher_keep_ratio: 0.5}\n", ["which tinymim does not allow"], ["method=amd"]),
    ("- a\n- b\n", [FILE, "a mapping of `key: value`"], ["configs/"]),
    ("just text\n", [FILE, "a mapping of `key: value`"], ["configs/"]),
    ("", ["data.train: no training shards", "and 3 more: run, teacher.source, align.student"], ["data.train="]),
]


def check(error: ConfigError, cause: list[str], remedy: list[str], file: str) -> None:
    assert error.exit_code == 2
    assert "\n" not in error.cause and "\n" not in error.remedy, "one line each"
    for text, fragments in ((error.cause, cause), (error.remedy, remedy)):
        for fragment in fragments:
            assert fragment.replace(FILE, file) in text, f"{fragment!r} not in {text!r}"


@pytest.mark.parametrize(
    ("root", "good", "override", "cause", "remedy"), ROWS, ids=[f"{row[0].stage}-{row[2][:40]}" for row in ROWS]
)
def test_wrong_override(tmp_path, root, good, override, cause, remedy):
    file = tmp_path / "good.yaml"
    file.write_text(good)
    load_config(file, root=root)
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override], root=root)
    check(caught.value, cause, remedy, str(file))


@pytest.mark.parametrize(("text", "cause", "remedy"), FILES, ids=[text.replace(GOOD, "")[:20] for text, _, _ in FILES])
def test_wrong_file(tmp_path, text, cause, remedy):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    check(caught.value, cause, remedy, str(file))


def test_every_problem_is_counted_and_the_first_is_shown(tmp_path):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["engine.zero=3", "optim.ema=0.9", "decoder.num_heads=5", "align.student=[99]"])
    check(
        caught.value,
        ["optim.ema=0.9", "ZeRO 3", "(and 2 more: align.student, decoder.num_heads)"],
        ["zero=2"],
        str(file),
    )
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["sed=1", "optim.lr=x", "decoder.num_heads=5"])
    check(caught.value, ["no key sed", "(and 1 more: optim.lr)"], ["did you mean seed?"], str(file))


def test_fine_tuning_starts_from_something(tmp_path):
    file = tmp_path / "finetune.yaml"
    file.write_text(FINETUNE)
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["student.model=null", "init.source=null"], root=FinetuneConfig)
    check(caught.value, ["neither weights nor student.model"], ["init.source=run:runs/NAME", "from scratch"], str(file))
    load_config(file, ["init.source=null"], root=FinetuneConfig)
    load_config(file, ["student.model=null", "init.source=run:runs/x"], root=FinetuneConfig)
    load_config(file, ["augment={mixup: 0, cutmix: 0}", "engine.micro_batch=1"], root=FinetuneConfig)
    file.write_text(GOOD)
    with pytest.raises(ConfigError) as caught:
        load_config(file, root=FinetuneConfig)
    check(caught.value, [f"{file}:1", "method belongs to pre-training", "more"], ["run tools/pretrain.py"], str(file))


def test_amd_generators_must_fit_the_teacher(tmp_path):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    amd = ["method=amd", "masks.teacher_keep_ratio=0.5"]
    load_config(file, [*amd, "generate.num_heads=8"])
    with pytest.raises(ConfigError) as caught:
        load_config(file, [*amd, "generate.num_heads=7"])
    check(caught.value, ["generate.num_heads=7", "the teacher's width 1024"], ["16 in AMD"], str(file))
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["method=amd", "masks.teacher_keep_ratio=0.251"])
    check(caught.value, ["of 196 patches the teacher sees 49, the student 49"], ["at least one more"], str(file))


NAMES = [*all_keys(), *all_keys(root=FinetuneConfig), *all_sections(), *all_sections(root=FinetuneConfig)]
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


def test_missing_or_unreadable_files(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "dmae_vit_b.yaml").write_text(GOOD)
    binary = tmp_path / "teacher.pth"
    binary.write_bytes(b"\x80\x02\xff\xfe")
    for path, cause, remedy in (
        (tmp_path / "pretrain" / "dmae_vitb.yaml", "there is no config file", "pretrain/dmae_vit_b.yaml?"),
        (tmp_path / "dmae_vit_b.yaml", "there is no config file", "pretrain/dmae_vit_b.yaml?"),
        (tmp_path / "typo" / "x.yaml", "there is no config file", "pretrain/dmae_vit_b.yaml"),
        (tmp_path / "pretrain", "cannot be read", "name a YAML file"),
        (binary, "cannot be read", "name a YAML file"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        check(caught.value, [str(path), cause], [remedy], "")


PROBE = """
import json, pathlib, sys
from maedistill.config.batch import batch_plan, world_size_from_environment
from maedistill.config.explain import explain
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.render import render_config
from maedistill.errors import ConfigError, exit_code_of
folder = sys.argv[1]
for root in (PretrainConfig, FinetuneConfig):
    for override in json.loads(pathlib.Path(folder, f"{root.stage}.json").read_text()):
        try:
            load_config(f"{folder}/{root.stage}.yaml", [override], root=root)
        except ConfigError:
            continue
        raise SystemExit(f"accepted {override}")
file = f"{folder}/pre-training.yaml"
render_config(load_config(file)), explain("optim.lr"), batch_plan(8, 4, world_size=world_size_from_environment())
heavy = {"torch", "timm", "numpy", "deepspeed"} & set(sys.modules)
assert not heavy, heavy
sys.exit(exit_code_of(lambda: load_config(file, ["lr=1e-3"])))
"""


def test_nothing_here_imports_torch(tmp_path):
    for root, good in ((PretrainConfig, GOOD), (FinetuneConfig, FINETUNE)):
        (tmp_path / f"{root.stage}.yaml").write_text(good)
        (tmp_path / f"{root.stage}.json").write_text(json.dumps([row[2] for row in ROWS if row[0] is root]))
    command = [sys.executable, "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: command line lr=1e-3: there is no key lr\n  fix: did you mean optim.lr?\n"

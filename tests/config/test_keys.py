"""The schemas as they describe themselves: every key marked and explained, and what forbids continuing a run."""

from operator import attrgetter

import pytest
from pydantic import BaseModel, ValidationError

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import ALIASES, all_keys, all_sections, differing_keys, flat, nearest_keys, nested
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.render import KINDS, explain
from maedistill.errors import ConfigError

ROOTS = (PretrainConfig, FinetuneConfig)
each_root = pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.stage)


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Dotted name -> field, walked over the classes themselves, not over the JSON schema that keys.py reads."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


@each_root
def test_every_leaf_is_marked_documented_and_known(root):
    fields = leaves(root)
    assert list(fields) == list(all_keys(root))
    for name, field in fields.items():
        assert field.json_schema_extra["kind"] in ("result", "runtime"), name
        assert field.description and "None" not in field.description, name
        assert all_keys(root)[name].kind == field.json_schema_extra["kind"]
    kinds = {name: key.kind for name, key in all_keys(root).items()}
    assert {kinds[name] for name in ("optim.lr", "seed", "student.drop_path")} == {"result"}
    assert {kinds[name] for name in ("engine.zero", "data.workers", "run")} == {"runtime"}


@each_root
def test_every_section_has_one_line_and_is_frozen(root):
    config = root()
    for name, doc in all_sections(root).items():
        section = type(attrgetter(name)(config))
        assert doc == section.__doc__ and "\n" not in doc and doc.endswith(".")
        assert section.model_config["frozen"] and section.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0


@each_root
def test_defaults_are_what_the_class_has(root):
    assert flat(root()) == {name: key.default for name, key in all_keys(root).items()}
    assert root.model_validate(nested(flat(root())), strict=False) == root()


def test_only_result_keys_forbid_continuing():
    old = PretrainConfig()
    new = PretrainConfig.model_validate(
        {"run": "elsewhere", "optim": {"lr": 0.1, "betas": (0.9, 0.99)}, "engine": {"zero": 2, "micro_batch": 8}}
    )
    assert differing_keys(old, new) == [("optim.lr", None, 0.1), ("optim.betas", [0.9, 0.95], [0.9, 0.99])]
    assert differing_keys(new, new) == []
    old = FinetuneConfig()
    new = FinetuneConfig.model_validate({"data": {"eval_crop": 1.0}, "log": {"eval_every_epochs": None}})
    assert differing_keys(old, new) == [("data.eval_crop", 0.875, 1.0)], "it changes the top-1 that is reported"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optim.epoch", "optim.epochs"),
        ("masks.student_visble", "masks.student_keep_ratio"),
        ("zero", "engine.zero"),
        ("optimizer.weight_decay", "optim.weight_decay"),
        ("weightdecay", "optim.weight_decay"),
        ("data.blr", "optim.base_lr"),
        ("model.image_size", "data.image_size"),
        ("engin", "engine"),
    ],
)
def test_nearest_key(name, nearest):
    assert nearest_keys(name, PretrainConfig)[0] == nearest


def test_aliases_lead_to_keys_and_hide_none():
    known = {name for root in ROOTS for name in all_keys(root)}
    assert {key for keys in ALIASES.values() for key in keys} <= known
    assert not set(ALIASES) & {name.rpartition(".")[2] for name in known}
    assert nearest_keys("nb_classes", FinetuneConfig) == ["data.num_classes"]
    assert "data.num_classes" not in nearest_keys("nb_classes", PretrainConfig), (
        "no advice that pre-training cannot take"
    )


def test_explain():
    first, takes, default, kind = explain("masks.student_keep_ratio", PretrainConfig).splitlines()
    assert first == f"masks.student_keep_ratio: {all_keys(PretrainConfig)['masks.student_keep_ratio'].doc}"
    assert takes.split(maxsplit=1) == ["takes", "a number > 0 and <= 1"] and default.split() == ["default", "0.25"]
    assert kind.split(maxsplit=1) == ["kind", f"result: {KINDS['result']}"]
    assert "one of l1, mse, smooth_l1" in explain("align.distance", PretrainConfig)
    assert "a list of whole numbers, each >= 0" in explain("align.student", PretrainConfig)
    assert "runtime: changes speed" in explain("engine.zero", PretrainConfig)
    text = explain("masks", PretrainConfig)
    assert text.startswith("masks: How many patches") and text.count("\n") == 2
    assert "  masks.teacher_keep_ratio=null  share the teacher sees" in text
    assert "share of each class's labelled images" in explain("data.label_fraction", FinetuneConfig)
    for root in ROOTS:
        for name in [*all_keys(root), *all_sections(root)]:
            assert explain(name, root).startswith(f"{name}: ")
        listed = [line.split()[0].partition("=")[0] for line in explain("", root).splitlines()[1:]]
        assert sorted(listed) == sorted({name.partition(".")[0] for name in all_keys(root)})
    with pytest.raises(ConfigError, match=r"unknown key lr\ndid you mean optim\.lr\?"):
        explain("lr", PretrainConfig)
    with pytest.raises(ConfigError, match=r"optim\.layer_decay belongs to fine-tuning \(maedistill finetune\)"):
        explain("optim.layer_decay", PretrainConfig)

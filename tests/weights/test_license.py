"""The license of weights that derive from several, what it says to a hub and a person, and what a run keeps of it."""

import pytest
import torch

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.errors import ConfigError
from maedistill.exporting.hub import require_pushable
from maedistill.finetuning.setup import open_finetuning
from maedistill.runs.folder import RunFolder
from maedistill.weights.from_run import validated_metadata
from maedistill.weights.license import (
    NO_OTHERS,
    combined_license,
    completed_license,
    hub_license,
    license_sentence,
    why_unpublishable,
)
from tests.exporting.imitation import imitate, random_vit


def test_licenses_add_up_and_none_is_hidden():
    assert combined_license([]) == combined_license([NO_OTHERS, NO_OTHERS]) == NO_OTHERS
    assert combined_license([NO_OTHERS, "mit", "mit"]) == "mit"
    assert combined_license(["", "mit"]) == "mit; not stated" and combined_license([" "]) == "not stated"
    several = combined_license(["not stated (set init.license)", "mit", "cc-by-nc-4.0"])
    assert several == "mit; cc-by-nc-4.0; not stated (set init.license)"
    assert hub_license(several) == ("other", "mit-cc-by-nc-4.0-not-stated-set-init.license")
    assert several in license_sentence(several) and "forbids commercial use" in license_sentence(several)
    assert hub_license(combined_license(["not stated", "mit"])) == ("other", "mit-not-stated")


@pytest.mark.parametrize(
    ("text", "identifier", "name"),
    [
        ("cc-by-nc-4.0", "cc-by-nc-4.0", None),
        ("CC BY-NC 4.0", "cc-by-nc-4.0", None),
        ("code Apache-2.0, weights CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0", None),
        ("CC BY-NC 3.0", "cc-by-nc-3.0", None),
        ("research only; cc-by-nc-4.0", "other", "research-only-cc-by-nc-4.0"),
        ("cc-by-nc-nd-4.0; cc-by-nc-sa-4.0", "other", "cc-by-nc-nd-4.0-cc-by-nc-sa-4.0"),
        ("cc-by-nc-nd-4.0 cc-by-nc-sa-4.0", "other", "cc-by-nc-nd-4.0-cc-by-nc-sa-4.0"),
        ("cc-by-nc-4.0; CC BY-NC 4.0", "cc-by-nc-4.0", None),
        ("mit;", "other", "mit"),
        ("Apache-2.0", "apache-2.0", None),
        ("mit, but ask first", "other", "mit-but-ask-first"),
        ("yours: no other weights were used", "other", "to-be-chosen-by-who-trained-it"),
    ],
)
def test_a_license_is_never_called_freer_than_it_is(text, identifier, name):
    assert hub_license(text) == (identifier, name)
    forbids = "It forbids commercial use" in license_sentence(text)
    assert forbids == ("nc" in text.lower().replace("-", " ").split())


def test_a_text_that_forbids_commerce_is_said_to():
    assert "It forbids commercial use" in license_sentence("Non-Commercial use only")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "?",
        "Unknown",
        "other",
        "N/A",
        "none",
        "not stated (set init.license)",
        "mit; ",
        "license: unknown",
        "License unknown",
        "no",
        "without license",
        "no explicit license",
        "to be determined",
        "TBA",
        "see README",
        "nan",
        "license",
    ],
)
def test_what_names_no_license_is_not_passed_on(text):
    assert "is not stated" in why_unpublishable(text)


@pytest.mark.parametrize("text", ["mit", "cc-by-nc-4.0; mit", "Not for commercial use", "unlicense", NO_OTHERS])
def test_a_stated_license_may_be_passed_on_but_forbids_what_it_forbade(text):
    assert why_unpublishable(text) is None and why_unpublishable(text, NO_OTHERS) is None
    assert why_unpublishable(text, "unknown") is None and why_unpublishable(text, text) is None
    assert (why_unpublishable(text, "CC BY-NC 4.0") is None) == text.startswith("cc-by-nc")


@pytest.mark.parametrize(
    ("source", "setting", "result"),
    [
        ("cc-by-nc-4.0", None, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "mit", None),
        ("cc-by-nc-4.0", NO_OTHERS, None),
        ("not stated", "yours", None),
        ("not stated", " Yours: x", None),
        ("not stated", "mit", "mit"),
        ("cc-by-nc-4.0; not stated", "mit", "cc-by-nc-4.0; mit"),
        (NO_OTHERS, "mit", "mit"),
    ],
)
def test_a_setting_states_what_the_source_does_not_and_changes_nothing_else(source, setting, result):
    if result is None:
        with pytest.raises(ConfigError, match=r"init\.license.*\n.*remove it"):
            completed_license(source, setting, "init.license")
    else:
        assert completed_license(source, setting, "init.license") == result


def test_a_run_has_the_license_of_its_source_and_no_other(finetuning, tmp_path):
    first = imitate(tmp_path / "first", random_vit(num_classes=0), license="research only")

    def license_of(*settings: str) -> str:
        given = [f"init.source=run:{first}", "run=nowhere", *settings]
        config = load_config(finetuning.config, given, root=FinetuneConfig).config
        return open_finetuning(config, world_size=1, device=torch.device("cpu")).metadata["license"]

    assert license_of() == "research only"
    with pytest.raises(ConfigError, match=r"init\.license: 'mit' is not the license of the source"):
        license_of("init.license=mit")


def test_a_finished_run_that_starts_again_renews_the_license_alone(finetuning, mae):
    words = (f"init.source=run:{mae.run}", "optim.epochs=1")
    first = finetuning("licensed", *words)
    trained = (first.last_checkpoint() / "model.safetensors").read_bytes()
    assert validated_metadata(RunFolder(first.run))["license"].startswith("yours")
    again = finetuning("licensed", *words, "init.license=unknown")
    with pytest.raises(ConfigError, match=r"not stated \(unknown\).*\n.*init\.license"):
        require_pushable("alice/small-vit", again.run)
    finetuning("licensed", *words, "init.license=mit")
    assert validated_metadata(RunFolder(first.run))["license"] == "mit"
    assert (first.last_checkpoint() / "model.safetensors").read_bytes() == trained

"""`auto`: the batch, epochs and warm-up of a number of images, and what a run keeps of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maedistill.config.auto import LIMITS, auto_batch, auto_epochs, auto_keys, size_warnings, with_numbers, with_values
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.keys import flat, nested
from maedistill.config.loader import load_config, require_consistent
from maedistill.config.plan import batch_plan, make_plan
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError

AUTO = {"optim.global_batch": "auto", "optim.epochs": "auto", "optim.warmup_epochs": "auto"}
BOTH = pytest.mark.parametrize("root", [PretrainConfig, FinetuneConfig], ids=lambda root: root.stage)


def config_of(root, **values):
    names = {name.replace("__", "."): value for name, value in values.items()}
    return root.model_validate(nested(flat(root()) | AUTO | names), strict=False)


@pytest.mark.parametrize(
    ("root", "images", "batch", "epochs", "warmup"),
    [
        (PretrainConfig, 24, 64, 1600, 80),
        (PretrainConfig, 450, 64, 1600, 80),
        (PretrainConfig, 10_000, 128, 260, 13),
        (PretrainConfig, 100_000, 1024, 210, 10.5),
        (PretrainConfig, 1_281_167, 4096, 100, 5),
        (FinetuneConfig, 450, 32, 300, 15),
        (FinetuneConfig, 10_000, 128, 70, 3.5),
        (FinetuneConfig, 1_281_167, 1024, 50, 2.5),
    ],
)
def test_numbers_of_known_sizes(root, images, batch, epochs, warmup):
    optim = with_numbers(config_of(root), images, world_size=1).optim
    assert (optim.global_batch, optim.epochs, optim.warmup_epochs) == (batch, epochs, warmup)


@BOTH
@given(images=st.integers(1, 10**8), ranks=st.integers(1, 70), views=st.integers(1, 5))
def test_numbers_are_within_their_limits_and_can_be_shared(root, images, ranks, views):
    """The oracle: by the definition, power by power."""
    limits = LIMITS[root.stage]
    least, most = limits.batch
    assert auto_batch(images, limits) == max(
        [least, *(2**n for n in range(13) if least <= 2**n <= min(most, images / 50))]
    )
    batch = auto_batch(images, limits, unit=ranks * views)
    batch_plan(batch, 10**6, world_size=ranks, group=views)
    assert abs(batch - auto_batch(images, limits)) <= ranks * views
    epochs = auto_epochs(images, batch, limits)
    assert limits.epochs[0] <= epochs <= limits.epochs[1] and epochs % 10 == 0
    if epochs < limits.epochs[1]:
        assert epochs * images / batch >= limits.updates
    if epochs > limits.epochs[0]:
        assert (epochs - 10) * images / batch < limits.updates


def test_only_what_is_auto_changes_and_depends_on_what_is_not():
    config = with_numbers(config_of(PretrainConfig, optim__global_batch=32), 10_000, world_size=1)
    assert (config.optim.global_batch, config.optim.epochs) == (32, 100)
    config = with_numbers(config_of(PretrainConfig, optim__epochs=7.0, data__views_per_image=3), 500, world_size=2)
    assert (config.optim.global_batch, config.optim.epochs, config.optim.warmup_epochs) == (66, 7, 0.35)
    assert not auto_keys(config) and config.data == config_of(PretrainConfig, data__views_per_image=3).data
    assert with_numbers(config_of(FinetuneConfig), 450, world_size=3).optim.global_batch == 30, "pairs for mixup"


def test_rules_are_looked_at_again_with_the_numbers(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("method: mae\nrun: r\ndata: {train: a.tar}\noptim: {epochs: auto, warmup_epochs: 150}\n")
    config = load_config(file, ["optim.global_batch=auto"], root=PretrainConfig).config
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs: 150 is not below epochs=100"):
        require_consistent(with_numbers(config, 2_000_000, world_size=1))
    require_consistent(with_numbers(config, 10_000, world_size=1))


@BOTH
@given(images=st.integers(1, 10**7), ranks=st.integers(1, 9))
def test_auto_itself_is_never_warned_of(root, images, ranks):
    config = with_numbers(config_of(root), images, world_size=ranks)
    steps = int(config.optim.epochs * images // config.optim.global_batch)
    assert not size_warnings(config, images, steps, world_size=ranks)


@pytest.mark.parametrize("ranks", [1, 3, 5, 8])
def test_the_numbers_of_a_warning_can_be_run(ranks):
    config = config_of(PretrainConfig, optim__global_batch=120 * ranks, optim__epochs=2.0, optim__warmup_epochs=0.1)
    [line] = size_warnings(config, 1_000, 2, world_size=ranks)
    numbers = {key: float(value) for key, value in re.findall(r"(optim\.\w+)=(\d+)", line)}
    assert numbers.keys() == {"optim.global_batch", "optim.epochs"}
    better = with_values(config, numbers)
    plan = make_plan(better, 1_000, world_size=ranks)
    assert not size_warnings(better, 1_000, plan.steps, world_size=ranks)


def test_a_large_batch_and_few_updates_are_warned_of_with_better_numbers():
    imagenet = config_of(PretrainConfig, optim__global_batch=4096, optim__epochs=100.0, optim__warmup_epochs=20.0)
    [line] = size_warnings(imagenet, 450, 10, world_size=1)
    assert "optim.global_batch=64 optim.epochs=1600" in line and "tenth of 450" in line and "10 updates" in line
    assert not size_warnings(imagenet, 1_281_167, 31_278, world_size=1)
    short = config_of(FinetuneConfig, optim__global_batch=128, optim__epochs=2.0, optim__warmup_epochs=0.1)
    [line] = size_warnings(short, 45_000, 703, world_size=1)
    assert "optim.epochs=50" in line and "global_batch=" not in line

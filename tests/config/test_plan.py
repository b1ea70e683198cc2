"""Sharing a global batch: the fewest micro-batches that fit, exact step counts, and the launcher's number of ranks."""

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from maedistill.config.plan import batch_plan, total_steps, world_size_from_environment
from maedistill.errors import ConfigError

sizes = st.integers(1, 200)


@given(images=sizes, micro_batch=sizes, world_size=st.integers(1, 9), group=st.integers(1, 5))
def test_no_smaller_accumulation_fits(images, micro_batch, world_size, group):
    global_batch = images * group * world_size
    if micro_batch < group:
        with pytest.raises(ConfigError, match=rf"micro_batch={group}"):
            batch_plan(global_batch, micro_batch, world_size=world_size, group=group)
        return
    plan = batch_plan(global_batch, micro_batch, world_size=world_size, group=group)
    assert plan.micro_batch * plan.accumulation * world_size == global_batch
    assert plan.micro_batch <= micro_batch and plan.micro_batch % group == 0
    per_rank = global_batch // world_size
    for a in range(1, plan.accumulation):
        assert per_rank % a or per_rank // a > micro_batch or per_rank // a % group


@pytest.mark.parametrize(
    ("global_batch", "world_size", "group", "remedy"),
    [
        (4096, 6, 1, "start 4 or 8 ranks, or set optim.global_batch=4092 or 4098"),
        (4, 8, 1, "start 4 ranks, or set optim.global_batch=8"),
        (12, 5, 2, "start 3 or 6 ranks, or set optim.global_batch=10 or 20"),
        (13, 2, 2, "set optim.global_batch=12 or 16"),
    ],
)
def test_uneven_batch_names_rank_counts_that_divide(global_batch, world_size, group, remedy):
    with pytest.raises(ConfigError) as caught:
        batch_plan(global_batch, 4, world_size=world_size, group=group)
    assert f"cannot be shared evenly by {world_size} ranks" in caught.value.cause
    assert caught.value.remedy == remedy


def test_too_few_samples_for_a_step_are_refused():
    with pytest.raises(ConfigError, match=r"0.5 epochs of 100 images are 50 samples, .*global_batch=64"):
        total_steps(0.5, 100, global_batch=64)


@given(st.integers(1, 10**6), st.integers(1, 10**7), st.integers(1, 10**5))
@example(290, 100, 1)  # 0.29 * 100 < 29
def test_total_steps_is_the_floor(thousandths, images, global_batch):
    exact = math.floor(Fraction(thousandths, 1000) * images / global_batch)
    if exact:
        assert total_steps(thousandths / 1000, images, global_batch=global_batch) == exact


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "8"}, 8),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_ID": "0"}, 16),
        ({"SLURM_NTASKS": "16"}, 1),  # a batch script: one process that starts the others
        ({"WORLD_SIZE": "2", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "0"}, 2),  # torchrun below srun
    ],
)
def test_world_size_from_environment(environment, ranks):
    assert world_size_from_environment(environment) == ranks


@pytest.mark.parametrize("text", ["0", "", "many", "-1", "1.5"])
def test_impossible_world_size(text):
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        world_size_from_environment({"WORLD_SIZE": text})

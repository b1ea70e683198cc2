"""A term's weight over time, against a plain reading of its words, and the table that a run takes it from."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from maedistill.config.distill import TermConfig
from maedistill.config.plan import BatchPlan, Plan
from maedistill.finetuning.term_weights import TermWeights

EPOCHS = st.floats(0, 50)


@given(EPOCHS, EPOCHS, EPOCHS, EPOCHS)
def test_nothing_before_the_start_and_after_the_stop_a_line_in_between(epoch, start, warmup, stop):
    times = {"start_epoch": start, "warmup_epochs": warmup, "stop_epoch": stop}
    weight = TermConfig.model_construct(weight=3.0, **times).weight_at(epoch)
    if epoch < start or epoch >= stop:
        assert weight == 0
    elif epoch >= start + warmup:
        assert weight == 3
    else:
        assert 0 <= weight <= 3 and abs(weight * warmup - 3 * (epoch - start)) < 1e-9


def test_a_table_has_a_row_for_each_step_and_a_column_for_each_term():
    terms = [
        TermConfig(weight=2),
        TermConfig(weight=4, start_epoch=1, warmup_epochs=2),
        TermConfig(weight=1, stop_epoch=1.5),
    ]
    plan = Plan(BatchPlan(4, 1), world_size=1, images=8, steps=8, warmup_steps=0)  # two steps an epoch
    weights = TermWeights(terms, plan, torch.device("cpu"))
    table = torch.stack([weights[step] for step in range(8)])
    assert weights.heaviest_step == 7  # the last of two that are equal
    assert table.T.tolist() == [[2] * 8, [0, 0, 0, 1, 2, 3, 4, 4], [1, 1, 1, 0, 0, 0, 0, 0]]
    term = TermConfig(weight=9, start_epoch=5, warmup_epochs=20, stop_epoch=100)
    assert term.describe_schedule() == "9 from epoch 5, warm-up 20, to epoch 100"

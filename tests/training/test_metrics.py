"""The hint about waiting for data: said once, when it is due, and what it says can be done."""

import itertools

import pytest

from maedistill.training import metrics
from maedistill.training.metrics import WaitHint, wait_hint


def test_the_hint_comes_once_after_three_slow_intervals_in_a_row_the_first_one_left_out() -> None:
    slow, fast = 0.06, 0.05  # 5 % are borne
    for shares in itertools.product((slow, fast), repeat=8):
        hint = WaitHint()
        said = [i for i, share in enumerate(shares) if hint.note(share, workers=2)]
        due = [i for i in range(3, 8) if shares[i - 2 : i + 1] == (slow,) * 3]
        assert said == due[:1]


def test_the_hint_names_what_is_set_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, is_named in ((None, True), (object(), False)):
        monkeypatch.setattr(metrics, "find_spec", lambda name, spec=spec: spec)
        said = wait_hint(0.31, workers=7)
        assert "31%" in said and "data.workers, now 7" in said and "--shorter-side" in said
        assert ("pip install simplejpeg" in said) == is_named

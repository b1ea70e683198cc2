"""ZeRO 3 on two ranks, which cuts up the weights, with terms that need no teacher: it learns what one rank learns."""

import pytest

from tests.test_exits import EXITS
from tests.test_mutual import MUTUAL
from tests.test_predictions import PSKD

PLAIN = ["optim.ema=null", "augment.mixup=0", "augment.cutmix=0", "augment.erasing=0", "student.drop_path=0"]


@pytest.mark.parametrize(("name", "settings"), [("exits", EXITS), ("mutual", MUTUAL), ("predictions", PSKD)])
def test_cut_up_weights_learn_the_same(finetuning, name, settings):
    whole = finetuning(f"{name}-whole", *settings, *PLAIN).metrics()
    cut = finetuning(f"{name}-cut", *settings, *PLAIN, "engine.zero=3", ranks=2).metrics()
    for one, other in zip(whole, cut, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), one["step"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), one["step"]

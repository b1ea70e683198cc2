"""ZeRO 3 cuts up the weights: two ranks learn what one rank learns, and a start makes up for what a kill left out."""

import json

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


@pytest.mark.faults
def test_a_pre_training_makes_up_for_what_it_has_not_drawn_or_probed(pretraining):
    """Before its first step, when DeepSpeed has seen no forward pass yet."""
    given = ["cut-left-out", "method=mae", "engine.zero=3", "optim.ema=null", "optim.epochs=2"]
    ended = pretraining(*given)
    before = [record["knn"] for record in ended.records() if "knn" in record]
    picture, lines = ended.run / "pictures/step_000000016.png", ended.run / "metrics.jsonl"
    picture.unlink()
    pretraining(*given)
    assert picture.is_file()
    kept = [line for line in lines.read_text().splitlines() if "knn" not in json.loads(line)]
    lines.write_text("".join(f"{line}\n" for line in kept))
    assert [record["knn"] for record in pretraining(*given).records() if "knn" in record][-1] == before[-1]


@pytest.mark.faults
def test_a_fine_tuning_makes_up_for_an_evaluation_of_exits(finetuning):
    given = [*EXITS, *PLAIN, "engine.zero=3"]
    tops = []
    for _ in range(2):
        records = finetuning("cut-exits", *given).records()
        tops.append({name: value for record in records for name, value in record.items() if "top1_correct" in name})
        kept = [json.dumps(record) for record in records if not any("top1" in name for name in record)]
        (finetuning.folder / "cut-exits/metrics.jsonl").write_text("\n".join([*kept, ""]))
    assert tops[0] == tops[1] and len(tops[0]) > 1

"""Mutual learning: each student's gradient is that of its own loss, and equal students teach each other nothing."""

import pytest
import torch
from torch.nn import functional as F

from maedistill.errors import ConfigError, UserError
from maedistill.finetuning.objective import Ensemble, Mutual, Supervised
from maedistill.finetuning.peers import open_peers, peer_configs
from tests.finetuning.test_distilled import IMAGES, MEAN, STD, TARGETS, vit
from tests.finetuning.test_self_terms import load


@pytest.mark.parametrize("label_weight", [1.0, 0.0])
def test_every_student_has_the_gradient_of_its_own_loss(label_weight):
    """Three students of two shapes, against the formula written out, each by itself."""
    students = [vit(seed=1), vit(seed=2), vit(seed=3, width=48, num_heads=3)]
    module = Mutual(students[0], students[1:], label_weight=label_weight)
    losses = module(IMAGES, TARGETS, [], torch.tensor([0.7]))
    losses["loss"].backward()
    found = [[p.grad.clone() for p in student.parameters()] for student in students]
    total = 0.0
    for i, student in enumerate(students):
        own = student(IMAGES).log_softmax(1)
        others = [other(IMAGES).detach().softmax(1) for j, other in enumerate(students) if j != i]
        mutual = sum((p * (p.log() - own)).sum(1).mean() for p in others) / 2
        loss = label_weight * F.cross_entropy(own, TARGETS) + 0.7 * mutual
        torch.testing.assert_close(losses[f"peer{i}/mutual" if i else "mutual"], mutual)
        for ours, theirs in zip(found[i], torch.autograd.grad(loss, list(student.parameters())), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        total += float(loss.detach())
    assert float(losses["loss"].detach()) == pytest.approx(total, rel=1e-5)


def test_equal_students_learn_from_labels_alone():
    plain, twins = vit(seed=1), [vit(seed=1), vit(seed=1)]
    Supervised(plain)(IMAGES, TARGETS)["loss"].backward()
    losses = Mutual(twins[0], twins[1:], label_weight=1.0)(IMAGES, TARGETS, [], torch.ones(1))
    losses["loss"].backward()
    assert float(losses["mutual"].detach()) == pytest.approx(0, abs=1e-7)
    for twin in twins:
        pairs = zip(twin.parameters(), plain.parameters(), strict=True)
        assert all(torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7) for one, other in pairs)


def test_an_ensemble_is_the_mean_of_probabilities():
    students = [vit(seed=1).eval(), vit(seed=2).eval()]
    mean = (students[0](IMAGES).softmax(1) + students[1](IMAGES).softmax(1)) / 2
    torch.testing.assert_close(Ensemble(students)(IMAGES).exp(), mean)


def mutual(*students: str) -> str:
    return f"distill.mutual={{weight: 1, students: {list(students)}}}"


def test_peers_have_seeds_heads_and_shapes_of_their_own(tmp_path):
    config = load(tmp_path, mutual("", "student.width=48 student.num_heads=3 student.depth=2 seed=7"), "seed=3")
    one, two = peer_configs(config)
    assert (one.seed, two.seed) == (4, 7) and not one.distill.terms
    peers = open_peers(config, num_classes=5, mean=MEAN, std=STD)
    assert [(peer.vit.embed_dim, len(peer.vit.blocks)) for peer in peers] == [(192, 12), (48, 2)]
    assert peers[1].metadata["network"]["arguments"]["embed_dim"] == 48 and peers[1].metadata["init"] is None
    again, other = (open_peers(config, num_classes=5, mean=MEAN, std=STD)[0].vit for _ in range(2))
    assert torch.equal(again.head.weight, other.head.weight) and again.head.weight.count_nonzero()


@pytest.mark.parametrize(
    ("students", "told"),
    [
        (["seed=0"], "seed 0"),
        (["", "seed=1"], "seed 1"),
        (["optim.lr=1"], "optim.lr"),
        (["optim.epochs=10"], "sets optim.epochs"),  # the run's own value
        (["distill.dkd.weight=0"], "sets distill.dkd.weight"),
        (["data.image_size=64"], "data.image_size"),
        (["student.widht=3"], "student.widht"),
        (["student.width=50"], "student.width=50"),
        (["resnet50"], "resnet50"),
    ],
)
def test_what_peers_cannot_be_is_refused(tmp_path, students, told):
    with pytest.raises(ConfigError, match=r"distill\.mutual\.students") as caught:
        peer_configs(load(tmp_path, mutual(*students)))
    assert told in caught.value.cause and caught.value.remedy


def test_weights_that_do_not_serve_a_peer_are_named_with_its_text(tmp_path):
    text = "init.source=run:nowhere"
    with pytest.raises(UserError, match=r"distill\.mutual\.students: 'init\.source=run:nowhere'.*\nin this text"):
        open_peers(load(tmp_path, mutual("", text)), num_classes=5, mean=MEAN, std=STD)

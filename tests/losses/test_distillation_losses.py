"""Response and relation losses against published numbers, and what each of them must not notice."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from maedistill.losses.features import attention_transfer_loss
from maedistill.losses.logits import decoupled_divergence, hard_label_loss, kd_loss, standardize
from maedistill.losses.relations import (
    contrast_loss,
    merge_heads,
    pkt_loss,
    relation_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    sp_loss,
)
from tests.support.golden import GOLDEN


def kd(student, teacher, temperature):
    return kd_loss(student, teacher, temperature=temperature)


def dkd(student, teacher, labels, temperature):
    parts = decoupled_divergence(student, teacher, labels, temperature=temperature)
    return parts.target + 8 * parts.others


def rkd(student, teacher):
    return 25 * rkd_distance_loss(student, teacher) + 50 * rkd_angle_loss(student, teacher)


LOSSES = {  # reference: (its inputs, what it is)
    "kd_T4": ("logits", lambda s, t, y: kd(s, t, 4.0)),
    "kd_logit_standardized_T2": ("logits", lambda s, t, y: kd(standardize(s), standardize(t), 2.0)),
    "dkd_a1_b8_T4": ("logits", lambda s, t, y: dkd(s, t, y, 4.0)),
    "dkd_logit_standardized_a1_b8_T2": ("logits", lambda s, t, y: dkd(standardize(s), standardize(t), y, 2.0)),
    "rkd_d25_a50": ("embedding", lambda s, t, y: rkd(s, t)),
    "pkt": ("embedding", lambda s, t, y: pkt_loss(s, t)),
    "similarity_preserving": ("embedding", lambda s, t, y: sp_loss(s, t)),
    "attention_transfer_p2": ("map", lambda s, t, y: attention_transfer_loss(s, t)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_golden_losses(name):
    with np.load(GOLDEN / "losses.npz") as arrays:
        inputs = {key: torch.from_numpy(value) for key, value in arrays.items()}
    kind, loss = LOSSES[name]
    student = inputs[f"student_{kind}"].requires_grad_()
    value = loss(student, inputs[f"teacher_{kind}"], inputs["target"])
    (gradient,) = torch.autograd.grad(value, student)
    for ours, theirs in ((value.detach(), inputs[name]), (gradient, inputs[f"{name}_grad"])):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        print(f"{name}: {error:.1e}")
        assert error <= 1e-5


RESPONSES = {
    "kd": lambda s, t: kd(s, t, 3.0),
    "dkd": lambda s, t: dkd(s, t, torch.arange(8) % 5, 3.0),
}
RELATIONS = {
    "rkd_distance": rkd_distance_loss,
    "rkd_angle": rkd_angle_loss,
    "probabilities": pkt_loss,
    "similarities": sp_loss,
}


def draws(*shape):
    return torch.randn(*shape, dtype=torch.float64).float()


@pytest.mark.parametrize("loss", [*RESPONSES.values(), *RELATIONS.values()], ids=[*RESPONSES, *RELATIONS])
def test_the_teacher_gets_no_gradient(loss):
    torch.manual_seed(0)
    teacher = draws(8, 5).requires_grad_()
    student = draws(8, 5).requires_grad_()
    student_gradient, teacher_gradient = torch.autograd.grad(
        loss(student, teacher), [student, teacher], allow_unused=True
    )
    assert teacher_gradient is None and float(student_gradient.abs().max()) > 0


def test_divergence_is_its_two_parts_weighted_by_what_is_no_label():
    torch.manual_seed(0)
    student, teacher, labels = 3 * draws(9, 6), 3 * draws(9, 6), torch.randint(6, (9,))
    for i in range(9):  # row by row: the weight is the teacher's own
        row = slice(i, i + 1)
        parts = decoupled_divergence(student[row], teacher[row], labels[row], temperature=1.0)
        weight = 1 - teacher[i].softmax(0)[labels[i]]
        torch.testing.assert_close(parts.target + weight * parts.others, kd(student[row], teacher[row], 1.0))


def test_standardized_logits_have_no_scale_and_no_shift():
    torch.manual_seed(0)
    student, teacher = draws(8, 10), draws(8, 10)
    plain = kd(standardize(student), standardize(teacher), 2.0)
    moved = kd(standardize(7 * student + 3), standardize(0.2 * teacher - 5), 2.0)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-6)


def test_at_a_high_temperature_kd_matches_logits():
    """The gradient is (z_s - z_t) / C for centred logits, whatever T is (Hinton et al., section 2.1)."""
    torch.manual_seed(0)
    student, teacher = draws(1, 50).requires_grad_(), draws(1, 50)
    value = kd_loss(student, teacher, temperature=400.0)
    (gradient,) = torch.autograd.grad(value, student)
    expected = (student - student.mean() - (teacher - teacher.mean())) / 50
    torch.testing.assert_close(gradient, expected.detach(), rtol=0.05, atol=1e-3)


def test_equal_images_have_no_angle_and_no_endless_gradient():
    torch.manual_seed(0)
    student, teacher = draws(4, 5), draws(4, 5)
    student[1] = student[0]
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(rkd_angle_loss(student, teacher), student)
    assert 0 < float(gradient.abs().max()) < 10


def test_where_a_network_is_active_has_no_sign():
    torch.manual_seed(0)
    maps, others = draws(2, 3, 4, 4), draws(2, 3, 4, 4)
    for power in (1, 2, 3):
        expected = attention_transfer_loss(maps.abs(), others, power=power)
        assert torch.equal(attention_transfer_loss(-maps, others, power=power), expected)


def test_hard_labels_are_the_teacher_s_first_choice():
    student, teacher = draws(6, 4), draws(6, 4)
    torch.testing.assert_close(hard_label_loss(student, teacher), F.cross_entropy(student, teacher.argmax(1)))


def test_contrast_asks_which_image_of_the_other_side_is_the_same():
    torch.manual_seed(0)
    student, teacher = draws(6, 5), draws(6, 5)
    expected = 0.0
    for one, other in ((student, teacher), (teacher, student)):
        for i in range(6):
            likeness = torch.stack([F.cosine_similarity(one[i], row, dim=0) / 0.2 for row in other]).exp()
            expected -= float((likeness[i] / likeness.sum()).log()) / 12
    assert float(contrast_loss(student, teacher, temperature=0.2)) == pytest.approx(expected, rel=1e-5)
    rotation, order = torch.linalg.qr(draws(5, 5))[0], torch.randperm(6)
    moved = contrast_loss(7 * student[order] @ rotation, 0.1 * teacher[order] @ rotation, temperature=0.2)
    assert float(moved) == pytest.approx(expected, rel=1e-4)
    assert float(contrast_loss(torch.eye(6), torch.eye(6), temperature=0.05)) < 1e-7


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_do_not_notice_rotations_nor_scale_where_normalised(name):
    torch.manual_seed(0)
    student, teacher = draws(8, 5), draws(8, 9)
    rotation = torch.linalg.qr(draws(9, 9))[0]
    loss = partial(RELATIONS[name], student)
    torch.testing.assert_close(loss(teacher @ rotation), loss(teacher), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss(4 * teacher), loss(teacher), rtol=1e-4, atol=1e-6)
    assert float(loss(draws(8, 9))) != pytest.approx(float(loss(teacher)), rel=1e-3)


def test_token_relations_are_softmaxed_scaled_products_of_any_heads():
    torch.manual_seed(0)
    queries, keys, wide = draws(2, 3, 5, 4), draws(2, 3, 5, 4), draws(2, 6, 5, 8)
    expected = torch.zeros(())
    other_queries = merge_heads(wide, 3)  # [2, 3, 5, 16]
    assert torch.equal(other_queries.transpose(1, 2).reshape(2, 5, 48), wide.transpose(1, 2).reshape(2, 5, 48))
    for b in range(2):
        for h in range(3):
            predicted = (queries[b, h] @ keys[b, h].T / 2).softmax(-1)
            wanted = (other_queries[b, h] @ other_queries[b, h].T / 4).softmax(-1)
            expected = expected + (wanted * (wanted / predicted).log()).sum(-1).mean() / 6
    loss = relation_loss((queries, keys), (other_queries, other_queries))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)

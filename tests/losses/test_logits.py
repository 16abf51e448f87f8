"""Losses against plain float64 loops written from the formulas."""

import math

import pytest
import torch

from understudy.errors import ModelError
from understudy.losses import cross_entropy, kl


def softmax(row, temperature):
    top = max(row)
    weights = [math.exp((value - top) / temperature) for value in row]
    return [weight / sum(weights) for weight in weights]


def plain_kl(student, teacher, temperature):
    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        p_student, p_teacher = softmax(student_row, temperature), softmax(teacher_row, temperature)
        total += sum(p * math.log(p / q) for p, q in zip(p_teacher, p_student, strict=True) if p)
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("num_samples", [1, 7])
def test_kl_equals_the_plain_formula(temperature, num_samples):
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(num_samples, 10, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(num_samples, 10, generator=generator, dtype=torch.float64) * 3
    expected = plain_kl(student, teacher, temperature)
    assert kl(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-9)
    single = kl(student.float(), teacher.float(), temperature=temperature)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-4)


def test_kl_is_zero_between_equals_and_ignores_shifts():
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    assert kl(logits, logits, temperature=4).item() == pytest.approx(0, abs=1e-6)
    assert kl(logits + 7, logits - 3, temperature=4).item() == pytest.approx(0, abs=1e-5)


def test_kl_gradient_reaches_the_student_only():
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: kl(s, teacher.detach(), temperature=3.0), (student,))
    kl(student, teacher, temperature=3.0).backward()
    assert teacher.grad is None


def test_kl_stands_extreme_logits_half_precision_and_autocast():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = kl(student, torch.tensor([[-1e4, 1e4, 0.0]]), temperature=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = kl(logits.bfloat16(), logits.half(), temperature=2.0)
    assert loss.dtype == torch.float32
    assert loss.item() < 1e-3


def test_kl_names_both_shapes():
    with pytest.raises(ModelError, match=r"\(2, 10\).*\(2, 100\)"):
        kl(torch.zeros(2, 10), torch.zeros(2, 100), temperature=1.0)


def test_cross_entropy_of_mixed_pictures_weighs_both_labels():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 5, generator=generator)
    own, partner = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 1, 0, 4, 2, 3])
    weight = torch.tensor([1.0, 0.3, 0.5, 0.9, 0.0, 0.25])
    expected = 0.0
    for row, a, b, w in zip(logits.tolist(), own, partner, weight.tolist(), strict=True):
        probabilities = softmax(row, 1.0)
        expected -= w * math.log(probabilities[a]) + (1 - w) * math.log(probabilities[b])
    mixed = cross_entropy(logits, own, partner_labels_N=partner, label_weight_N=weight)
    assert mixed.item() == pytest.approx(expected / 6, rel=1e-5)
    plain = cross_entropy(logits, own)
    whole = cross_entropy(logits, own, partner_labels_N=partner, label_weight_N=torch.ones(6))
    assert whole.item() == pytest.approx(plain.item(), rel=1e-6)

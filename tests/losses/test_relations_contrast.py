"""Contrastive distillation and its memory, against a plain float64 loop."""

import math

import pytest
import torch

from understudy.errors import ModelError
from understudy.losses.contrast import ContrastMemory, crd
from understudy.losses.shapes import unit_rows


def units(num_rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return unit_rows(torch.randn(num_rows, width, generator=generator, dtype=torch.float64))


def small_memory(labels_M=None, num_negatives=7):
    torch.manual_seed(5)
    return ContrastMemory(10, 4, num_negatives=num_negatives, temperature=0.5, labels_M=labels_M)


def plain_crd(student, teacher, positions, memory, negatives, constants=None):
    """The loss, and both constants; the negatives an anchor must not have are left out."""
    labels = memory.labels_M

    def allowed(anchor):
        if labels is None:
            return [k for k in negatives if k != anchor]
        return [k for k in negatives if labels[k] != labels[anchor]]

    def score(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True)) / memory.temperature

    loss, found = 0.0, []
    sides = [
        (student.tolist(), teacher.tolist(), memory.teacher_bank_MD.tolist()),
        (teacher.tolist(), student.tolist(), memory.student_bank_MD.tolist()),
    ]
    for side, (anchors, partners, bank) in enumerate(sides):
        exponentials = [
            math.exp(score(anchor, bank[k]))
            for anchor, own in zip(anchors, positions, strict=True)
            for k in allowed(own)
        ]
        mean = constants[side] if constants else sum(exponentials) / len(exponentials)
        found.append(mean)

        def h(u, v, mean=mean):
            e = math.exp(score(u, v))
            return e / (e + len(negatives) * mean)

        for anchor, partner, own in zip(anchors, partners, positions, strict=True):
            loss -= math.log(h(anchor, partner))
            terms = [math.log(1 - h(anchor, bank[k])) for k in allowed(own)]
            loss -= len(negatives) * sum(terms) / len(terms)
    return loss / len(positions), found


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]])
def test_crd_equals_the_plain_formula(labels):
    memory = small_memory(None if labels is None else torch.tensor(labels))
    student, teacher = units(3, 4, 0), units(3, 4, 1)
    positions, negatives = [2, 0, 7], [3, 2, 9, 0, 4, 4, 7]
    draws = {"negatives_K": torch.tensor(negatives)}
    expected, constants = plain_crd(student, teacher, positions, memory, negatives)
    loss = crd(student, teacher, torch.tensor(positions), memory, **draws)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert memory.log_mean_teacher.exp().item() == pytest.approx(constants[0], rel=1e-6)
    assert memory.log_mean_student.exp().item() == pytest.approx(constants[1], rel=1e-6)
    # The constants stay; the bank has moved.
    student, teacher = units(3, 4, 2), units(3, 4, 3)
    expected, _ = plain_crd(student, teacher, positions, memory, negatives, constants)
    loss = crd(student, teacher, torch.tensor(positions), memory, **draws)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_crd_gradients_reach_both_sides():
    memory = small_memory()
    positions, draws = torch.tensor([1, 5, 8]), {"negatives_K": torch.tensor([0, 2, 5, 9, 9])}
    crd(units(3, 4, 4), units(3, 4, 5), positions, memory, **draws)
    student, teacher = units(3, 4, 6).requires_grad_(), (3 * units(3, 4, 7)).requires_grad_()

    def loss(s, t):
        return crd(s, t, positions, memory, update=False, **draws)

    assert torch.autograd.gradcheck(loss, (student, teacher))
    # Updating the bank in place does not spoil the gradient.
    (expected,) = torch.autograd.grad(loss(student, teacher), student)
    (gradient,) = torch.autograd.grad(crd(student, teacher, positions, memory, **draws), student)
    assert torch.equal(gradient, expected)


def test_crd_pulls_pairs_together():
    torch.manual_seed(0)
    memory = ContrastMemory(32, 8, num_negatives=64)
    teacher = units(32, 8, 8).float()
    student = torch.randn(32, 8, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.05)
    losses = []
    for _ in range(150):
        loss = crd(student, teacher, torch.arange(32), memory)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    nearest = (unit_rows(student.detach()) @ teacher.T).argmax(dim=1)
    assert (nearest == torch.arange(32)).float().mean() > 0.9


def test_the_memory_moves_seen_rows_by_the_momentum_and_no_others():
    memory = small_memory()
    before = memory.student_bank_MD.clone(), memory.teacher_bank_MD.clone()
    student, teacher, positions = units(2, 4, 9).float(), units(2, 4, 10).float(), [6, 1]
    crd(2 * student, teacher, torch.tensor(positions), memory)
    sides = [
        (memory.student_bank_MD, before[0], student),
        (memory.teacher_bank_MD, before[1], teacher),
    ]
    for bank, old, rows in sides:
        expected = old.clone()
        for row, position in zip(rows, positions, strict=True):
            mixed = 0.5 * old[position] + 0.5 * row
            expected[position] = mixed / mixed.norm()
        assert torch.allclose(bank, expected, atol=1e-6)
    state = {name: value.clone() for name, value in memory.state_dict().items()}
    crd(student, teacher, torch.tensor(positions), memory, update=False)
    assert all(torch.equal(value, state[name]) for name, value in memory.state_dict().items())


def test_the_draws_come_from_the_global_generator():
    memory, student, teacher = small_memory(), units(2, 4, 11).float(), units(2, 4, 12).float()
    memory.log_mean_student.zero_()
    memory.log_mean_teacher.zero_()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(crd(student, teacher, torch.tensor([0, 1]), memory, update=False).item())
    assert losses[0] == losses[1] != losses[2]
    draws = torch.bincount(ContrastMemory(5, 2, num_negatives=50_000).draw(), minlength=5)
    assert draws.tolist() == pytest.approx([10_000] * 5, rel=0.05)


def test_the_memory_goes_on_from_its_state():
    positions = torch.tensor([3, 4])
    first, student, teacher = small_memory(), units(2, 4, 13).float(), units(2, 4, 14).float()
    crd(student, teacher, positions, first)
    torch.manual_seed(99)
    second = ContrastMemory(10, 4, num_negatives=7, temperature=0.5)
    second.load_state_dict(first.state_dict())
    results = []
    for memory in (first, second):
        torch.manual_seed(3)
        crd(student, teacher, positions, memory)
        results.append(crd(student, teacher, positions, memory).item())
    assert results[0] == results[1]
    assert sorted(first.state_dict()) == [
        "log_mean_student",
        "log_mean_teacher",
        "student_bank_MD",
        "teacher_bank_MD",
    ]


def test_images_of_the_same_class_are_no_negatives():
    memory = small_memory(torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]))
    student, teacher, positions = units(1, 4, 15), units(1, 4, 16), torch.tensor([0])
    draws = {"negatives_K": torch.arange(10)}
    crd(student, teacher, positions, memory, **draws)
    loss = crd(student, teacher, positions, memory, update=False, **draws)
    memory.teacher_bank_MD[:5] = 0.5
    assert torch.equal(loss, crd(student, teacher, positions, memory, update=False, **draws))
    memory.teacher_bank_MD[5:] = 0.5
    assert not torch.equal(loss, crd(student, teacher, positions, memory, update=False, **draws))


def test_a_batch_without_negatives_is_finite_and_fixes_no_constant():
    memory = small_memory(torch.zeros(10, dtype=torch.int64))
    student = units(2, 4, 17).requires_grad_()
    loss = crd(student, units(2, 4, 18), torch.tensor([0, 1]), memory)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert memory.log_mean_student.isnan()


def test_mistakes_are_named():
    memory, rows = small_memory(), torch.zeros(2, 4)
    with pytest.raises(ModelError, match=r"\(2, 5\).*\(2,\).*\(10, 4\)"):
        crd(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 1]), memory)
    with pytest.raises(ModelError, match=r"\(2, 4\).*\(3,\)"):
        crd(rows, rows, torch.tensor([0, 1, 2]), memory)
    with pytest.raises(ModelError, match="0 to 10; expected 0 to 9"):
        crd(rows, rows, torch.tensor([0, 10]), memory)
    with pytest.raises(ModelError, match=r"\(3,\).*\(10, 4\)"):
        ContrastMemory(10, 4, labels_M=torch.zeros(3))
    with pytest.raises(ModelError, match="0 negatives"):
        ContrastMemory(10, 4, num_negatives=0)

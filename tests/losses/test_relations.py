"""Relation losses against plain float64 loops written from the papers' equations."""

import itertools
import math

import pytest
import torch

from understudy.losses import relations
from understudy.losses.relations import correlation_congruence, pkt, rkd, similarity_preserving


def random_rows(num_rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator, dtype=torch.float64) * 2


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def length(u):
    return math.sqrt(dot(u, u))


def minus(u, v):
    return [a - b for a, b in zip(u, v, strict=True)]


def cosine(u, v):
    return dot(u, v) / length(u) / length(v)


def huber(x, y):
    return (x - y) ** 2 / 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def squared_difference(first, second):
    rows = zip(first, second, strict=True)
    return sum(length(minus(u, v)) ** 2 for u, v in rows)


def plain_similarity_preserving(student, teacher):
    def similarities(rows):
        products = [[dot(u, v) for v in rows] for u in rows]
        return [[value / length(row) for value in row] for row in products]

    difference = squared_difference(similarities(student), similarities(teacher))
    return difference / len(student) ** 2


def plain_rkd_distance(student, teacher):
    pairs = list(itertools.permutations(range(len(student)), 2))

    def distances(rows):
        values = [length(minus(rows[i], rows[j])) for i, j in pairs]
        return [value * len(values) / sum(values) for value in values]

    values = zip(distances(student), distances(teacher), strict=True)
    return sum(huber(s, t) for s, t in values) / len(pairs)


def plain_rkd_angle(student, teacher):
    triples = list(itertools.permutations(range(len(student)), 3))

    def angles(rows):
        return [cosine(minus(rows[i], rows[j]), minus(rows[k], rows[j])) for i, j, k in triples]

    values = zip(angles(student), angles(teacher), strict=True)
    return sum(huber(s, t) for s, t in values) / len(triples)


def plain_pkt(student, teacher):
    def conditional(rows, i, j):
        others = [k for k in range(len(rows)) if k != i]
        kernel = {k: (cosine(rows[i], rows[k]) + 1) / 2 for k in others}
        return kernel[j] / sum(kernel.values())

    total = 0.0
    for i, j in itertools.permutations(range(len(student)), 2):
        p, q = conditional(teacher, i, j), conditional(student, i, j)
        total += p * math.log(p / q)
    return total / len(student)


def plain_correlation_congruence(student, teacher, gamma, order):
    def kernel(u, v):
        x = cosine(u, v)
        terms = [(2 * gamma) ** p / math.factorial(p) * x**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(terms)

    def correlations(rows):
        return [[kernel(u, v) for v in rows] for u in rows]

    difference = squared_difference(correlations(student), correlations(teacher))
    return difference / len(student) ** 2


@pytest.mark.parametrize("num_rows", [1, 2, 6])
def test_similarity_preserving_equals_the_plain_formula(num_rows):
    student, teacher = random_rows(num_rows, 4, 0), random_rows(num_rows, 7, 1)
    expected = plain_similarity_preserving(student.tolist(), teacher.tolist())
    loss = similarity_preserving(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_rkd_equals_the_plain_formula():
    student, teacher = random_rows(6, 4, 2), random_rows(6, 7, 3)
    distance = plain_rkd_distance(student.tolist(), teacher.tolist())
    angle = plain_rkd_angle(student.tolist(), teacher.tolist())
    assert rkd(student, teacher).item() == pytest.approx(25 * distance + 50 * angle, rel=1e-9)
    only_distance = rkd(student, teacher, distance_weight=2, angle_weight=0)
    assert only_distance.item() == pytest.approx(2 * distance, rel=1e-9)
    only_angle = rkd(student, teacher, distance_weight=0, angle_weight=3)
    assert only_angle.item() == pytest.approx(3 * angle, rel=1e-9)


def test_rkd_reaches_the_linear_part_of_huber():
    student = torch.tensor([[0.0], [1.0], [2.0], [30.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [9.0], [1.0], [2.0]], dtype=torch.float64)
    distance = plain_rkd_distance(student.tolist(), teacher.tolist())
    angle = plain_rkd_angle(student.tolist(), teacher.tolist())
    assert rkd(student, teacher).item() == pytest.approx(25 * distance + 50 * angle, rel=1e-9)


def test_rkd_ignores_shifts():
    student, teacher = random_rows(5, 4, 4), random_rows(5, 4, 5)
    moved = rkd(student + 100, teacher - random_rows(1, 4, 6))
    assert moved.item() == pytest.approx(rkd(student, teacher).item(), rel=1e-9)


def test_rkd_in_groups_is_the_same_with_its_gradient(monkeypatch):
    student, teacher = random_rows(7, 4, 7).requires_grad_(), random_rows(7, 4, 8)
    whole = rkd(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(relations, "MAX_ANGLE_ELEMENTS", 2 * 7 * 7)
    grouped = rkd(student, teacher)
    (gradient,) = torch.autograd.grad(grouped, student)
    assert grouped.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda s: rkd(s, teacher), (student,))


def test_rkd_with_images_at_the_same_place_has_a_bounded_gradient():
    student = random_rows(5, 4, 9).float()
    student[3] = student[1]
    student.requires_grad_()
    rkd(student, random_rows(5, 4, 10).float()).backward()
    assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize("num_rows", [2, 3, 6])
def test_pkt_equals_the_plain_formula(num_rows):
    student, teacher = random_rows(num_rows, 4, 11), random_rows(num_rows, 7, 12)
    expected = plain_pkt(student.tolist(), teacher.tolist())
    assert pkt(student, teacher).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_pkt_and_correlations_ignore_the_scale_of_each_embedding():
    student, teacher = random_rows(6, 4, 13), random_rows(6, 4, 14)
    scale = torch.tensor([[1e-3], [1.0], [5.0], [0.1], [1e4], [7.0]], dtype=torch.float64)
    for loss in (pkt, correlation_congruence):
        moved = loss(student * scale, teacher / scale)
        assert moved.item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)


def test_pkt_takes_opposite_directions():
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = pkt(student, torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (1.0, 0), (0.7, 5)])
def test_correlation_congruence_equals_the_plain_formula(gamma, order):
    student, teacher = random_rows(6, 4, 15), random_rows(6, 7, 16)
    expected = plain_correlation_congruence(student.tolist(), teacher.tolist(), gamma, order)
    loss = correlation_congruence(student, teacher, gamma=gamma, order=order)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    if (gamma, order) == (0.4, 2):
        assert correlation_congruence(student, teacher).item() == loss.item()


def test_the_expansion_approaches_the_gaussian_kernel():
    student, teacher = random_rows(4, 3, 17), random_rows(4, 3, 18)

    def gaussian(rows):
        units = rows / rows.norm(dim=1, keepdim=True)
        return torch.exp(-0.4 * torch.cdist(units, units) ** 2)

    expected = (gaussian(student) - gaussian(teacher)).square().mean().item()
    loss = correlation_congruence(student, teacher, order=12)
    assert loss.item() == pytest.approx(expected, rel=1e-6)

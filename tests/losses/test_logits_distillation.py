"""Logit losses against plain float64 loops written from the papers' equations."""

import math

import pytest
import torch

from understudy.errors import ModelError
from understudy.losses.class_priors import class_prior, class_prior_table
from understudy.losses.logits import dist, dkd, kl, mse_logits, standardized_kl, top_k_kl


def random_rows(num_rows, num_classes, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64) * scale


def soft(row, temperature=1.0):
    weights = [math.exp((value - max(row)) / temperature) for value in row]
    return [weight / sum(weights) for weight in weights]


def divergence(p_row, q_row):
    return sum(p * math.log(p / q) for p, q in zip(p_row, q_row, strict=True) if p)


def pairs(student, teacher):
    return list(zip(student.tolist(), teacher.tolist(), strict=True))


def plain_dkd(student, teacher, labels, target_weight, nontarget_weight, temperature):
    total = 0.0
    for (s_row, t_row), label in zip(pairs(student, teacher), labels.tolist(), strict=True):
        p_s, p_t = soft(s_row, temperature), soft(t_row, temperature)
        binary_s, binary_t = [p_s[label], 1 - p_s[label]], [p_t[label], 1 - p_t[label]]
        others = [k for k in range(len(p_s)) if k != label]
        q_s = [p_s[k] / (1 - p_s[label]) for k in others]
        q_t = [p_t[k] / (1 - p_t[label]) for k in others]
        total += target_weight * divergence(binary_t, binary_s)
        total += nontarget_weight * divergence(q_t, q_s)
    return temperature**2 * total / len(labels)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_dkd_equals_the_plain_formula(num_rows, temperature):
    student, teacher = random_rows(num_rows, 5, 0), random_rows(num_rows, 5, 1)
    labels = torch.arange(num_rows) % 5
    loss = dkd(
        student, teacher, labels, target_weight=0.7, nontarget_weight=3, temperature=temperature
    )
    expected = plain_dkd(student, teacher, labels, 0.7, 3, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_dkd_defaults_are_the_papers_and_two_classes_have_no_second_part():
    student, teacher, labels = (
        random_rows(4, 2, 2),
        random_rows(4, 2, 3),
        torch.tensor([0, 1, 1, 0]),
    )
    expected = plain_dkd(student, teacher, labels, 1, 8, 4)
    assert dkd(student, teacher, labels).item() == pytest.approx(expected, rel=1e-9)
    only_target = dkd(student, teacher, labels, nontarget_weight=0)
    assert only_target.item() == pytest.approx(kl(student, teacher, temperature=4).item())


def test_dkd_with_the_teachers_own_weight_is_kl():
    student, teacher, labels = random_rows(1, 6, 4), random_rows(1, 6, 5), torch.tensor([3])
    own_weight = 1 - soft(teacher[0].tolist(), 2.0)[3]
    loss = dkd(student, teacher, labels, nontarget_weight=own_weight, temperature=2.0)
    assert loss.item() == pytest.approx(kl(student, teacher, temperature=2.0).item(), rel=1e-9)


def plain_pearson(u, v):
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    spread_u = math.sqrt(sum((a - mean_u) ** 2 for a in u))
    return covariance / spread_u / math.sqrt(sum((b - mean_v) ** 2 for b in v))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_equals_the_plain_formula(temperature):
    student, teacher = random_rows(6, 5, 6), random_rows(6, 5, 7)
    p_s = [soft(row, temperature) for row in student.tolist()]
    p_t = [soft(row, temperature) for row in teacher.tolist()]
    inter = sum(1 - plain_pearson(s, t) for s, t in zip(p_s, p_t, strict=True)) / 6
    columns = zip(zip(*p_s, strict=True), zip(*p_t, strict=True), strict=True)
    intra = sum(1 - plain_pearson(s, t) for s, t in columns) / 5
    loss = dist(student, teacher, inter_weight=2, intra_weight=0.5, temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * (2 * inter + 0.5 * intra), rel=1e-9)


def test_dist_is_zero_for_an_affine_map_of_the_probabilities():
    teacher = random_rows(6, 5, 8)
    flatter = 0.3 * torch.softmax(teacher, dim=1) + 0.7 / 5
    assert dist(flatter.log(), teacher).item() == pytest.approx(0, abs=1e-12)
    assert kl(flatter.log(), teacher, temperature=1).item() > 0.1


def test_dist_counts_undefined_correlations_as_said():
    student, teacher = random_rows(1, 5, 9), random_rows(1, 5, 10)
    assert dist(student, teacher, inter_weight=0).item() == 0
    constant = torch.full((4, 10), 0.1)
    varied = random_rows(4, 10, 11).float()
    assert dist(varied, constant).item() == 0
    constant.requires_grad_()
    loss = dist(constant, varied)
    assert loss.item() == pytest.approx(2)
    loss.backward()
    assert not constant.grad.any()


def standardized(row):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row))
    return [(value - mean) / deviation for value in row]


@pytest.mark.parametrize("num_rows", [1, 7])
def test_standardized_kl_equals_the_plain_formula(num_rows):
    student, teacher = random_rows(num_rows, 5, 12), random_rows(num_rows, 5, 13)
    expected = sum(
        divergence(soft(standardized(t), 2.0), soft(standardized(s), 2.0))
        for s, t in pairs(student, teacher)
    )
    expected *= 2.0**2 / num_rows
    assert standardized_kl(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_standardized_kl_ignores_shift_and_scale_of_each_row():
    student, teacher = random_rows(5, 6, 14), random_rows(5, 6, 15)
    expected = standardized_kl(student, teacher).item()
    scale, shift = torch.rand(5, 1, dtype=torch.float64) + 0.1, random_rows(5, 1, 16)
    moved = standardized_kl(student * scale + shift, teacher / scale - shift)
    assert moved.item() == pytest.approx(expected, rel=1e-9)
    assert standardized_kl(teacher * 9 + 4, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
def test_standardized_kl_takes_constant_logits_as_uniform(value):
    student = torch.full((3, 10), value, requires_grad=True)
    teacher = random_rows(3, 10, 17).float()
    loss = standardized_kl(student, teacher)
    p_rows = [soft(standardized(row), 2.0) for row in teacher.tolist()]
    expected = 4 * sum(divergence(p_row, [0.1] * 10) for p_row in p_rows) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert not student.grad.any()


def test_mse_logits_equals_the_plain_formula():
    student, teacher = random_rows(4, 5, 18), random_rows(4, 5, 19)
    squares = [(a - b) ** 2 for s, t in pairs(student, teacher) for a, b in zip(s, t, strict=True)]
    assert mse_logits(student, teacher).item() == pytest.approx(sum(squares) / 20, rel=1e-12)


def test_mse_of_centred_logits_is_the_limit_of_kl():
    student, teacher = random_rows(4, 5, 20), random_rows(4, 5, 21)
    student = student - student.mean(dim=1, keepdim=True)
    teacher = teacher - teacher.mean(dim=1, keepdim=True)
    hot = kl(student, teacher, temperature=1e4)
    assert hot.item() == pytest.approx(mse_logits(student, teacher).item() / 2, rel=1e-2)


def test_class_priors_equal_the_plain_formula():
    teacher, labels = random_rows(9, 4, 22), torch.tensor([0, 1, 1, 3, 3, 3, 0, 1, 3])
    table = class_prior_table(teacher, labels, num_classes=4, temperature=3.0)
    for label, row in enumerate(table.tolist()):
        members = [
            soft(t, 3.0) for t, c in zip(teacher.tolist(), labels, strict=True) if c == label
        ]
        means = [sum(column) / len(members) for column in zip(*members, strict=True)]
        assert row == pytest.approx(means or [0.25] * 4, rel=1e-12)
    student = random_rows(5, 4, 23)
    chosen = torch.tensor([3, 0, 2, 1, 1])
    expected = sum(
        divergence(table[label].tolist(), soft(row, 3.0))
        for row, label in zip(student.tolist(), chosen, strict=True)
    )
    loss = class_prior(student, table, chosen, temperature=3.0)
    assert loss.item() == pytest.approx(9 * expected / 5, rel=1e-9)


def test_class_prior_is_zero_at_the_prior_and_takes_zeros_in_it():
    table = torch.tensor([[1.0, 0, 0], [0.2, 0.5, 0.3], [0, 0, 1]])
    at_prior = table[[1, 1]].log() * 2 + 5
    loss = class_prior(at_prior, table, torch.tensor([1, 1]), temperature=2.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    one_hot = class_prior(torch.zeros(1, 3), table, torch.tensor([0]), temperature=1.0)
    assert one_hot.item() == pytest.approx(math.log(3))


def test_class_prior_table_adds_up_over_many_rows():
    teacher = random_rows(1, 3, 24).float().expand(200_000, 3)
    table = class_prior_table(
        teacher, torch.zeros(200_000, dtype=torch.int64), num_classes=3, temperature=1.0
    )
    assert table.dtype == torch.float32
    assert table[0].tolist() == pytest.approx(soft(teacher[0].tolist()), rel=1e-6)
    assert table.sum(dim=1).tolist() == pytest.approx([1, 1, 1], rel=1e-6)


def test_class_prior_names_wrong_shapes():
    with pytest.raises(ModelError, match=r"\(2, 10\).*\(5, 5\)"):
        class_prior(torch.zeros(2, 10), torch.zeros(5, 5), torch.zeros(2).long(), temperature=1)
    with pytest.raises(ModelError, match=r"\(3,\).*\(2, 10\)"):
        class_prior(torch.zeros(2, 10), torch.zeros(10, 10), torch.zeros(3).long(), temperature=1)
    with pytest.raises(ModelError, match=r"\(2, 10\) for 7 classes"):
        class_prior_table(torch.zeros(2, 10), torch.zeros(2).long(), num_classes=7, temperature=1.0)


def test_top_k_kl_equals_kl_when_all_classes_are_kept():
    student, teacher = random_rows(6, 5, 25), random_rows(6, 5, 26)
    values, indices = teacher.topk(5, dim=1)
    loss = top_k_kl(student, values, indices.int(), temperature=4.0)
    assert loss.item() == pytest.approx(kl(student, teacher, temperature=4.0).item(), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_kl_equals_the_plain_conditional_formula(k):
    student, teacher = random_rows(6, 5, 27), random_rows(6, 5, 28)
    values, indices = teacher.topk(k, dim=1)
    expected = 0.0
    for (s_row, t_row), kept in zip(pairs(student, teacher), indices.tolist(), strict=True):
        p_s, p_t = soft(s_row, 2.0), soft(t_row, 2.0)
        given_s = [p_s[c] / sum(p_s[c] for c in kept) for c in kept]
        given_t = [p_t[c] / sum(p_t[c] for c in kept) for c in kept]
        expected += divergence(given_t, given_s)
    loss = top_k_kl(student, values, indices, temperature=2.0)
    assert loss.item() == pytest.approx(4 * expected / 6, rel=1e-9, abs=1e-12)


def test_top_k_kl_asks_nothing_of_the_other_classes():
    student, teacher = random_rows(3, 6, 29), random_rows(3, 6, 30)
    values, indices = teacher.topk(2, dim=1)
    student.requires_grad_()
    top_k_kl(student, values, indices, temperature=1.0).backward()
    assert (student.grad != 0).sum(dim=1).tolist() == [2, 2, 2]


def test_logit_losses_name_wrong_shapes():
    with pytest.raises(ModelError, match=r"\(3,\).*\(2, 10\)"):
        dkd(torch.zeros(2, 10), torch.zeros(2, 10), torch.zeros(3).long())
    with pytest.raises(ModelError, match="at least 2 classes"):
        dkd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2).long())
    with pytest.raises(ModelError, match=r"\(2, 10, 4\)"):
        kl(torch.zeros(2, 10, 4), torch.zeros(2, 10, 4), temperature=1.0)
    with pytest.raises(ModelError, match=r"\(2, 3\).*\(2, 4\).*\(2, 4\)"):
        top_k_kl(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4).long(), temperature=1.0)
    with pytest.raises(ModelError, match=r"\(2, 9\).*\(2, 4\).*\(2, 3\)"):
        top_k_kl(torch.zeros(2, 9), torch.zeros(2, 4), torch.zeros(2, 3).long(), temperature=1.0)

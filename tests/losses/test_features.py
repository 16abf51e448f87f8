"""Feature losses against plain float64 loops written from the papers' equations."""

import math

import pytest
import torch

from understudy.errors import ModelError
from understudy.losses.features import (
    embedding_alignment,
    hint,
    nst,
    review,
    vid,
    vid_variance,
)


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def flat(tensor):
    return tensor.reshape(-1).tolist()


def plain_hint(student, teacher):
    return mean((s - t) ** 2 for s, t in zip(flat(student), flat(teacher), strict=True))


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length if length else 0.0 for x in vector]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def plain_nst(student, teacher):
    total = 0.0
    for picture_s, picture_t in zip(student, teacher, strict=True):
        rows_s = [unit(flat(channel)) for channel in picture_s]
        rows_t = [unit(flat(channel)) for channel in picture_t]
        total += mean(dot(a, b) ** 2 for a in rows_t for b in rows_t)
        total += mean(dot(a, b) ** 2 for a in rows_s for b in rows_s)
        total -= 2 * mean(dot(a, b) ** 2 for a in rows_t for b in rows_s)
    return total / len(student)


def plain_pool(channel, level):
    """Average a list of rows down to level x level, as adaptive pooling defines its windows."""
    height, width = len(channel), len(channel[0])
    pooled = []
    for i in range(level):
        rows = range(i * height // level, math.ceil((i + 1) * height / level))
        for j in range(level):
            columns = range(j * width // level, math.ceil((j + 1) * width / level))
            pooled.append(mean(channel[r][c] for r in rows for c in columns))
    return pooled


def plain_review(student, teacher):
    loss, weight, total = plain_hint(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        if level >= min(student.shape[2:]):
            continue
        weight /= 2
        squares = []
        for channel_s, channel_t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
            pooled_s = plain_pool(channel_s.tolist(), level)
            pooled_t = plain_pool(channel_t.tolist(), level)
            squares += [(s - t) ** 2 for s, t in zip(pooled_s, pooled_t, strict=True)]
        loss += weight * mean(squares)
        total += weight
    return loss / total


def plain_vid(predicted, teacher, raw, eps):
    """One sample after the other; channels are the dimension that ``raw`` counts."""
    if predicted.ndim == 3:
        predicted, teacher = predicted.mT, teacher.mT
    terms = []
    for mean_n, teacher_n in zip(predicted, teacher, strict=True):
        for mean_c, teacher_c, a in zip(mean_n, teacher_n, raw.tolist(), strict=True):
            variance = math.log(1 + math.exp(a)) + eps
            for m, t in zip(flat(mean_c), flat(teacher_c), strict=True):
                terms.append(math.log(math.sqrt(variance)) + (t - m) ** 2 / (2 * variance))
    return mean(terms)


def plain_alignment(student, teacher, cosine_weight=1.0, mse_weight=1.0):
    cosines = [
        1 - dot(unit(s), unit(t)) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    return cosine_weight * mean(cosines) + mse_weight * plain_hint(student, teacher)


MAPS = [(3, 4, 5, 6), (1, 2, 3, 3)]
LOSSES = {"hint": hint, "nst": nst, "review": review, "embedding_alignment": embedding_alignment}


@pytest.mark.parametrize("shape", [*MAPS, (3, 6, 4), (1, 5), (4, 7)])
def test_hint_equals_the_plain_formula(shape):
    student, teacher = random(*shape), random(*shape, seed=1)
    expected = plain_hint(student, teacher)
    assert hint(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert hint(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(
    # Few positions: Gram matrices over positions; many: over channels.
    ("student_channels", "teacher_channels", "height", "width"),
    [(4, 6, 2, 2), (2, 3, 5, 4), (3, 3, 3, 2), (1, 8, 1, 1)],
)
def test_nst_equals_the_plain_loops(student_channels, teacher_channels, height, width, num_samples):
    student = random(num_samples, student_channels, height, width)
    teacher = random(num_samples, teacher_channels, height, width, seed=1).relu()
    expected = plain_nst(student, teacher)
    assert nst(student, teacher).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    single = nst(student.float(), teacher.float())
    assert single.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_nst_of_tokens_is_that_of_the_same_maps():
    student, teacher = random(2, 3, 2, 4), random(2, 5, 2, 4, seed=1)
    tokens = [maps.flatten(2).mT for maps in (student, teacher)]
    assert nst(*tokens).item() == pytest.approx(nst(student, teacher).item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, 2, 4, 5)])
def test_nst_ignores_scale_and_order_of_channels_but_not_their_pattern(shape):
    student, teacher = random(*shape), random(*shape, seed=1)
    loss = nst(student, teacher).item()
    scale = torch.tensor([0.01, 7.0, -3.0, 1e4])[: shape[1], None, None]
    assert nst(student * scale, teacher).item() == pytest.approx(loss, rel=1e-9)
    assert nst(student, teacher * scale).item() == pytest.approx(loss, rel=1e-9)
    assert nst(student.flip(1), teacher).item() == pytest.approx(loss, rel=1e-9)
    assert nst(teacher.flip(1) * 3, teacher).item() == pytest.approx(0, abs=1e-12)
    # A channel twice is the same distribution over channels.
    assert nst(teacher.repeat(1, 2, 1, 1), teacher).item() == pytest.approx(0, abs=1e-12)
    assert nst(student.flip(3), teacher).item() != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (1, 2, 5, 7), (2, 2, 4, 4), (2, 2, 3, 9), (3, 4, 2, 2), (3, 4, 1, 1)]
)
def test_review_equals_the_plain_formula(shape):
    student, teacher = random(*shape), random(*shape, seed=1)
    expected = plain_review(student, teacher)
    assert review(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    assert review(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)


def test_review_weighs_a_difference_of_the_mean_more_than_one_that_pools_away():
    teacher = random(2, 3, 8, 8)
    checkers = torch.ones(8, 8, dtype=torch.float64)
    checkers[::2, 1::2] = checkers[1::2, ::2] = -1
    # 1 / (1 + 1/2 + 1/4 + 1/8): only the whole map sees the checkers.
    assert review(teacher + checkers, teacher).item() == pytest.approx(8 / 15, rel=1e-9)
    assert review(teacher + 1, teacher).item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 4, 2, 3), (1, 4, 1, 1), (2, 5, 4), (6, 4), (1, 4)])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_vid_equals_the_plain_formula(shape, eps):
    student, teacher, raw = random(*shape), random(*shape, seed=1), random(4, seed=2) * 3
    expected = plain_vid(student, teacher, raw, eps)
    assert vid(student, teacher, raw, eps=eps).item() == pytest.approx(expected, rel=1e-10)
    single = vid(student.float(), teacher.float(), raw.float(), eps=eps)
    assert single.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("initial", [0.001, 1.0, 5.0, 500.0])
def test_vid_begins_with_the_variance_that_was_asked_for(initial):
    raw = vid_variance(3, initial=initial)
    variance = torch.nn.functional.softplus(raw) + 1e-5
    assert isinstance(raw, torch.nn.Parameter)
    assert variance.tolist() == pytest.approx([initial] * 3, rel=1e-4)
    # Where the prediction is exact only the variance's logarithm is left.
    teacher = random(2, 3, 4, 4)
    expected = pytest.approx(math.log(initial) / 2, rel=1e-3, abs=1e-6)
    assert vid(teacher, teacher, raw).item() == expected
    with pytest.raises(ModelError, match=r"initial variance of 1e-06; expected more than eps"):
        vid_variance(3, initial=1e-6)


def test_vid_is_smallest_where_each_variance_is_its_channels_squared_error():
    student, teacher = random(8, 3, 4, 4), random(8, 3, 4, 4, seed=1)
    teacher[:, 1] *= 5
    error_C = (student - teacher).square().mean(dim=(0, 2, 3))
    raw_C = (error_C - 1e-5).expm1().log().requires_grad_()
    (gradient_C,) = torch.autograd.grad(vid(student, teacher, raw_C), raw_C)
    assert gradient_C.abs().max().item() < 1e-12
    (gradient_C,) = torch.autograd.grad(vid(student, teacher, raw_C + 0.1), raw_C)
    assert (gradient_C > 0).all()


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 2.0), (3.0, 0.0)])
def test_embedding_alignment_equals_the_plain_formula(num_samples, weights):
    student, teacher = random(num_samples, 6), random(num_samples, 6, seed=1)
    named = dict(zip(("cosine_weight", "mse_weight"), weights, strict=True))
    expected = plain_alignment(student, teacher, **named)
    assert embedding_alignment(student, teacher, **named).item() == pytest.approx(expected)
    single = embedding_alignment(student.float(), teacher.float(), **named)
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_embedding_alignment_splits_direction_and_length():
    teacher = random(4, 6)
    cosine = embedding_alignment(teacher * 9, teacher, mse_weight=0)
    assert cosine.item() == pytest.approx(0, abs=1e-12)
    opposite = embedding_alignment(-teacher, teacher, mse_weight=0)
    assert opposite.item() == pytest.approx(2, rel=1e-12)
    assert embedding_alignment(teacher * 9, teacher).item() > 1
    # An embedding of zeros counts as one at a right angle.
    zero = torch.zeros(4, 6)
    assert embedding_alignment(zero, teacher.float(), mse_weight=0).item() == pytest.approx(1)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_layers_have_loss_zero(name):
    shape = (4, 6) if name == "embedding_alignment" else (2, 3, 8, 8)
    layers = random(*shape, dtype=torch.float32)
    assert LOSSES[name](layers, layers).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right_and_the_teacher_has_none(name):
    shapes = [(2, 3)] if name == "embedding_alignment" else [(2, 2, 3, 3), (2, 4, 1, 2)]
    for shape in shapes:
        student, teacher = (random(*shape, seed=seed).requires_grad_() for seed in (0, 1))
        assert torch.autograd.gradcheck(lambda s, t=teacher: LOSSES[name](s, t.detach()), student)
        LOSSES[name](student, teacher).backward()
        assert student.grad.abs().max() > 0
        assert teacher.grad is None


def test_vid_gradients_reach_mean_and_variances():
    student, teacher, raw = (
        t.requires_grad_() for t in (random(2, 3, 2), random(2, 3, 2, seed=1), random(2))
    )
    assert torch.autograd.gradcheck(lambda s, r: vid(s, teacher.detach(), r), (student, raw))
    vid(student, teacher, raw).backward()
    assert raw.grad.abs().min() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_lists_are_summed_over_their_layers(name):
    shapes = [(4, 6), (4, 3)] if name == "embedding_alignment" else [(2, 3, 8, 8), (2, 5, 2, 3)]
    students = [random(*shape) for shape in shapes]
    teachers = [random(*shape, seed=1) for shape in shapes]
    loss = LOSSES[name]
    expected = sum(loss(s, t).item() for s, t in zip(students, teachers, strict=True))
    assert loss(students, tuple(teachers)).item() == pytest.approx(expected, rel=1e-12)
    assert loss(students[:1], teachers[:1]).item() == loss(students[0], teachers[0]).item()


def test_vid_takes_lists_with_a_variance_each():
    students, teachers = [random(2, 3, 4, 4), random(2, 5)], [random(2, 3, 4, 4, seed=1)]
    teachers.append(random(2, 5, seed=1))
    variances = torch.nn.ParameterList([vid_variance(3), vid_variance(5)])
    expected = sum(
        vid(s, t, v).item() for s, t, v in zip(students, teachers, variances, strict=True)
    )
    assert vid(students, teachers, list(variances)).item() == pytest.approx(expected)
    with pytest.raises(ModelError, match=r"a list of 2, teacher layers: a list of 1"):
        vid(students, teachers, [variances[0]])


@pytest.mark.parametrize("loss", [hint, nst, review, embedding_alignment])
def test_unequal_lists_are_an_error_that_counts_both(loss):
    layers = random(2, 3, 4, 4)
    with pytest.raises(
        ModelError, match="student layers: a list of 2, teacher layers: a list of 3"
    ):
        loss([layers] * 2, [layers] * 3)
    with pytest.raises(
        ModelError, match="a tensor, teacher layers: a list of 1; expected a tensor"
    ):
        loss(layers, [layers])
    with pytest.raises(ModelError, match="a list of 0"):
        loss([], [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(dtype):
    student, teacher = random(2, 3, 8, 8, dtype=dtype), random(2, 3, 8, 8, seed=1, dtype=dtype)
    raw = vid_variance(3)
    for loss in (hint, nst, review, lambda s, t: vid(s, t, raw)):
        with torch.autocast("cpu", torch.bfloat16):
            half = loss(student, teacher)
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(
            loss(student.double(), teacher.double()).item(), rel=1e-4
        )
    vectors = [student.flatten(1), teacher.flatten(1)]
    with torch.autocast("cpu", torch.bfloat16):
        half = embedding_alignment(*vectors)
    assert half.dtype == torch.float32
    exact = embedding_alignment(*(v.double() for v in vectors))
    assert half.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4])
def test_dead_tiny_and_large_layers_stay_finite(scale):
    raw = vid_variance(3)
    for kill in (0, 1, slice(None)):
        values = random(2, 3, 8, 8, dtype=torch.float32)
        values[:, kill] *= scale
        teacher = random(2, 3, 8, 8, seed=1, dtype=torch.float32)
        for loss in (hint, nst, review, lambda s, t: vid(s, t, raw)):
            for one, other in ((values, teacher), (teacher, values), (values, values)):
                student = one.clone().requires_grad_()
                result = loss(student, other)
                result.backward()
                assert torch.isfinite(result)
                assert torch.isfinite(student.grad).all()
        student = values.flatten(1).requires_grad_()
        result = embedding_alignment(student, teacher.flatten(1))
        result.backward()
        assert torch.isfinite(result)
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("raw", [-1e4, -50.0, 0.0, 1e4])
def test_vid_stands_extreme_variances(raw):
    student, teacher = random(2, 3, 2, 2, dtype=torch.float32), random(2, 3, 2, 2).float() * 100
    raw_C = torch.full((3,), raw, requires_grad=True)
    result = vid(student, teacher, raw_C)
    result.backward()
    assert torch.isfinite(result)
    assert torch.isfinite(raw_C.grad).all()


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "says"),
    [
        (hint, (2, 3, 4, 4), (2, 5, 4, 4), "equal shapes"),
        (hint, (2, 3, 4, 4), (2, 3, 8, 8), "equal shapes"),
        (review, (2, 3, 4, 4), (2, 5, 4, 4), "equal shapes"),
        (review, (2, 3), (2, 3), r"expected \[N, C, H, W\]"),
        (nst, (2, 3, 4, 4), (2, 5, 8, 8), "equal positions"),
        (nst, (2, 3, 4, 4), (3, 3, 4, 4), "the same N"),
        (nst, (2, 16, 3), (2, 3, 4, 4), "equal positions"),
        (nst, (2, 3), (2, 3), r"expected \[N, C, H, W\] or \[N, T, C\]"),
        (embedding_alignment, (2, 3), (2, 64), "adapter"),
        (embedding_alignment, (2, 3, 4), (2, 3, 4), r"expected \[N, D\]"),
    ],
)
def test_shape_mistakes_name_both_shapes(loss, student, teacher, says):
    with pytest.raises(ModelError, match=says) as caught:
        loss(torch.zeros(student), torch.zeros(teacher))
    assert str(student) in str(caught.value)
    assert str(teacher) in str(caught.value)


def test_vid_names_the_shapes_that_do_not_fit():
    with pytest.raises(ModelError, match=r"\(2, 3, 4, 4\).*\(2, 5, 4, 4\).*adapter"):
        vid(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), vid_variance(5))
    with pytest.raises(ModelError, match=r"variances of shape \(4,\).*\(2, 3, 4, 4\).*\(3,\)"):
        vid(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), vid_variance(4))

"""Attention losses against plain float64 loops, and what they promise about occlusion."""

import math

import pytest
import torch

from understudy.errors import ModelError
from understudy.losses.attention import attention_map, attention_transfer, salient_attention

LOSSES = [attention_transfer, salient_attention]
SHARE, LIMIT, BACKGROUND = 0.8, 3.0, 0.01


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def plain_map(picture, power):
    """Attention of one picture [C, H, W] as a flat list; [H, W] is taken as it is."""
    if picture.ndim == 2:
        return picture.reshape(-1).tolist()
    _, height, width = picture.shape
    values = picture.tolist()
    return [
        mean(abs(channel[y][x]) ** power for channel in values)
        for y in range(height)
        for x in range(width)
    ]


def plain_transfer(student, teacher, power=2):
    terms = []
    for picture_s, picture_t in zip(student, teacher, strict=True):
        maps = [plain_map(picture, power) for picture in (picture_s, picture_t)]
        lengths = [math.sqrt(sum(v * v for v in values)) for values in maps]
        units = [
            [v / n if n else 0.0 for v in values] for values, n in zip(maps, lengths, strict=True)
        ]
        terms += [(s - t) ** 2 for s, t in zip(*units, strict=True)]
    return mean(terms)


def with_sum_one(values):
    total = sum(values)
    return [v / total if total else 1 / len(values) for v in values]


def plain_target(values, share=SHARE, limit=LIMIT):
    """The four steps of the docstring, one position after the other."""
    ceiling = limit * mean(values)
    cut = with_sum_one([min(v, ceiling) for v in values])
    held, region = 0.0, set()
    for value in sorted(set(cut), reverse=True):
        if held >= share:
            break
        for position, other in enumerate(cut):
            if other == value:
                region.add(position)
                held += value
    return with_sum_one([v if position in region else 0.0 for position, v in enumerate(cut)])


def plain_salient(student, teacher, share=SHARE, limit=LIMIT, background=BACKGROUND):
    losses = []
    for picture_s, picture_t in zip(student, teacher, strict=True):
        values_t = plain_map(picture_t, 2)
        target = plain_target(values_t, share, limit)
        own = with_sum_one([max(v, 0.0) for v in plain_map(picture_s, 2)])
        even = background / len(own)
        loss = 0.0
        for q, r in zip(target, own, strict=True):
            q, r = (1 - background) * q + even, (1 - background) * r + even
            loss += q * math.log(q / r)
        losses.append(loss if sum(values_t) else 0.0)
    return mean(losses)


PAIRS = [
    ((3, 4, 5, 6), (3, 7, 5, 6)),
    ((1, 2, 4, 4), (1, 2, 4, 4)),
    ((3, 5, 6), (3, 7, 5, 6)),
    ((3, 4, 5, 6), (3, 5, 6)),
    ((2, 3, 3), (2, 3, 3)),
    ((2, 3, 1, 1), (2, 5, 1, 1)),
]


def pair(shapes):
    """Ready attention maps are not negative; feature maps are."""
    values = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return [v.abs() if v.ndim == 3 else v for v in values]


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_map_is_the_mean_of_powers(power):
    features = random(3, 4, 5, 6)
    result = attention_map(features, power=power)
    assert result.shape == (3, 5, 6)
    for picture, values in zip(features, result, strict=True):
        assert values.reshape(-1).tolist() == pytest.approx(plain_map(picture, power), rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention_map(features.half(), power=power)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, result.float(), rtol=1e-2, atol=1e-4)


def test_attention_map_refuses_what_is_no_map():
    with pytest.raises(ModelError, match=r"shape \(3, 4\) and power 2"):
        attention_map(torch.zeros(3, 4))
    with pytest.raises(ModelError, match=r"power 0\.5; expected .* at least 1"):
        attention_map(torch.zeros(3, 4, 2, 2), power=0.5)


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("power", [2.0, 1.0])
def test_attention_transfer_equals_the_plain_formula(shapes, power):
    student, teacher = pair(shapes)
    expected = plain_transfer(student, teacher, power)
    loss = attention_transfer(student, teacher, power=power)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-15)
    single = attention_transfer(student.float(), teacher.float(), power=power)
    assert single.item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("arguments", [(0.8, 3.0, 0.01), (0.3, 1.2, 0.2), (1.0, math.inf, 1e-4)])
def test_salient_attention_equals_the_plain_formula(shapes, arguments):
    student, teacher = pair(shapes)
    expected = plain_salient(student, teacher, *arguments)
    named = dict(zip(("salient_share", "peak_limit", "background"), arguments, strict=True))
    loss = salient_attention(student, teacher, **named)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    single = salient_attention(student.float(), teacher.float(), **named)
    assert single.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_ready_attention_map_is_as_good_as_its_features(loss):
    student, teacher = random(3, 4, 5, 6), random(3, 7, 5, 6, seed=1)
    expected = loss(student, teacher).item()
    ready_student, ready_teacher = attention_map(student), attention_map(teacher)
    assert loss(ready_student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert loss(student, ready_teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_scales_of_pictures_and_signs_do_not_matter(loss):
    student, teacher = random(3, 4, 5, 6), random(3, 7, 5, 6, seed=1)
    expected = loss(student, teacher).item()
    scale = torch.tensor([1e-3, 1.0, -1e5])[:, None, None, None]
    assert loss(student * scale, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert loss(student, teacher * scale).item() == pytest.approx(expected, rel=1e-9)


def test_attention_transfer_is_zero_between_equal_maps_and_symmetric():
    student, teacher = random(3, 4, 5, 6), random(3, 4, 5, 6, seed=1)
    assert attention_transfer(student, student.flip(1)).item() == pytest.approx(0, abs=1e-15)
    assert attention_transfer(student, teacher).item() == pytest.approx(
        attention_transfer(teacher, student).item(), rel=1e-12
    )


def target_of(teacher_NHW):
    rows = [plain_target(values.reshape(-1).tolist()) for values in teacher_NHW]
    return torch.tensor(rows).view_as(teacher_NHW)


def test_salient_attention_is_zero_where_the_student_has_the_target():
    teacher = random(4, 6, 6).square()
    assert salient_attention(target_of(teacher), teacher).item() == pytest.approx(0, abs=1e-6)
    even = torch.ones(4, 6, 6)
    assert salient_attention(even * 5, even).item() == pytest.approx(0, abs=1e-6)
    assert salient_attention(even, teacher).item() > 0.1


def test_no_single_spot_stands_for_the_object():
    # A spot of a hundred, and seven more positions of the object; the rest is background.
    teacher = torch.full((1, 6, 6), 0.1)
    teacher[0, 2:4, 2:6] = 4.0
    teacher[0, 2, 2] = 100.0
    target = target_of(teacher)
    assert target[0, 2:4, 2:6].gt(0).all()
    assert target.gt(0).sum() == 8
    # Four times the mean would let it outweigh the others 25 times; cut off it is below 3.
    assert target.max() / target[0, 3, 3] < 3
    spot, whole = torch.zeros(1, 6, 6), torch.zeros(1, 6, 6)
    spot[0, 2, 2] = whole[0, 2:4, 2:6] = 1
    assert salient_attention(whole, teacher) < 0.2 * salient_attention(spot, teacher)
    # The squared difference prefers the student that looks at the spot alone.
    assert attention_transfer(spot, teacher) < attention_transfer(whole, teacher)


def test_looking_away_from_a_part_of_the_object_costs_more_than_a_squared_difference_says():
    teacher = torch.zeros(1, 8, 8)
    teacher[0, 2:6, 2:6] = 1
    part = teacher.clone()
    part[0, 4:6, 2:6] = 0
    away = 1 - teacher
    given_up, lost = salient_attention(part, teacher), salient_attention(away, teacher)
    assert 0 < salient_attention(teacher * 0.9 + 0.01, teacher) < 0.2 * given_up
    assert given_up < lost
    # Where in the background the rest of the attention lies is free.
    left, right = teacher + 0.0, teacher + 0.0
    left[0, :, :2] = right[0, :, 6:] = 0.3
    costs = [salient_attention(side, teacher).item() for side in (left, right)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shapes", [((2, 3, 3, 2), (2, 2, 3, 2)), ((2, 3, 3), (2, 4, 3, 3))])
def test_gradients_are_right_and_the_teacher_has_none(loss, shapes):
    student, teacher = (side.requires_grad_() for side in pair(shapes))
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), (student,))
    loss(student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_following_the_gradient_brings_the_maps_together(loss):
    student, teacher = random(4, 3, 4, 4).requires_grad_(), random(4, 5, 4, 4, seed=1)
    optimizer = torch.optim.Adam([student], lr=0.05)
    start = loss(student, teacher).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert loss(student, teacher).item() < 0.1 * start


@pytest.mark.parametrize("loss", LOSSES)
def test_lists_are_summed_over_their_layers(loss):
    students, teachers = [random(2, 3, 4, 4), random(2, 5, 3).abs()], [random(2, 6, 4, 4, seed=1)]
    teachers.append(random(2, 2, 5, 3, seed=1))
    expected = sum(loss(s, t).item() for s, t in zip(students, teachers, strict=True))
    assert loss(students, teachers).item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(
        ModelError, match="student layers: a list of 2, teacher layers: a list of 1"
    ):
        loss(students, teachers[:1])
    with pytest.raises(ModelError, match="student layers: a tensor, teacher layers: a list of 2"):
        loss(students[0], teachers)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(loss, dtype):
    student, teacher = random(3, 4, 5, 6, dtype=dtype), random(3, 7, 5, 6, seed=1, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(student, teacher)
    assert half.dtype == torch.float32
    exact = loss(student.double(), teacher.double()).item()
    assert half.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1e4, 1e18])
@pytest.mark.parametrize("ndim", [3, 4])
def test_dead_tiny_and_large_maps_stay_finite(loss, scale, ndim):
    one = random(3, 4, 5, 6)[:, 0] if ndim == 3 else random(3, 4, 5, 6)
    one = (one.abs() * torch.tensor([1.0, scale, scale]).view(3, *[1] * (ndim - 1))).float()
    other = random(3, 4, 5, 6, seed=1).float()
    for a, b in ((one, other), (other, one), (one, one)):
        student = a.clone().requires_grad_()
        result = loss(student, b)
        result.backward()
        assert torch.isfinite(result)
        assert torch.isfinite(student.grad).all()


def test_a_dead_map_has_no_gradient_and_a_dead_teacher_no_say():
    dead, alive = torch.zeros(2, 3, 4, 4), random(2, 3, 4, 4).float()
    for loss in LOSSES:
        student = dead.clone().requires_grad_()
        loss(student, alive).backward()
        assert student.grad.abs().max() == 0
    assert salient_attention(alive, dead).item() == 0
    mixed = torch.cat([alive[:1], dead[1:]])
    half = salient_attention(alive[:1].flip(3), alive[:1]).item() / 2
    assert salient_attention(alive.flip(3), mixed).item() == pytest.approx(half, rel=1e-6)


def test_salient_attention_is_bounded_however_far_apart():
    student, teacher = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    student[0, 0, 0] = teacher[0, 7, 7] = 1
    worst = salient_attention(student, teacher, background=0.02).item()
    assert worst == pytest.approx(plain_salient(student, teacher, background=0.02), rel=1e-5)
    assert 7 < worst < math.log(64 / 0.02)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 3, 4, 4), (2, 3, 8, 8)),
        ((2, 4, 4), (2, 3, 8, 8)),
        ((2, 4, 4), (2, 4, 5)),
        ((2, 3, 4, 4), (3, 3, 4, 4)),
        ((2, 4), (2, 4)),
        ((2, 3, 4, 4), (2, 3, 4, 4, 4)),
    ],
)
def test_shape_mistakes_name_both_shapes(loss, student, teacher):
    with pytest.raises(ModelError) as caught:
        loss(torch.zeros(student), torch.zeros(teacher))
    assert str(student) in str(caught.value)
    assert str(teacher) in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"salient_share": 0}, {"salient_share": 1.1}, {"peak_limit": 0}, {"background": 1}]
)
def test_salient_attention_refuses_arguments_out_of_range(wrong):
    with pytest.raises(ModelError, match=rf"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        salient_attention(torch.ones(1, 2, 2), torch.ones(1, 2, 2), **wrong)

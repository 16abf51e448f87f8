"""Adapters: widths, positions, fusion; trained by gradient and drawn from torch's generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ModelError
from understudy.heads.adapters import (
    Embedder,
    ReviewFusion,
    build_adapter,
    describe_match,
    match_positions,
)


def fitted(modules: nn.Module, loss, num_steps: int = 200) -> tuple[float, float]:
    """Return the loss before and after some steps of gradient descent."""
    optimizer = torch.optim.Adam(modules.parameters(), lr=0.05)
    first = loss().item()
    for _ in range(num_steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return first, value.item()


# Widths


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((8, 4, 4), (12, 4, 4), nn.Conv2d),
        ((8, 4, 4), (8, 2, 2), nn.Identity),
        ((6,), (9,), nn.Linear),
        ((6,), (6,), nn.Identity),
        ((16, 6), (16, 9), nn.Linear),
        ((16, 6), (17, 6), nn.Identity),
        ((6, 4, 4), (17, 9), nn.Conv2d),
        ((16, 6), (9, 7, 7), nn.Linear),
    ],
)
def test_auto_brings_the_student_to_the_teachers_width(student, teacher, expected) -> None:
    adapter = build_adapter("auto", student, teacher, where="x")
    assert type(adapter) is expected
    adapted, taught = match_positions(adapter(torch.randn(2, *student)), torch.randn(2, *teacher))
    assert adapted.shape == taught.shape


def test_named_adapters_are_built_at_equal_widths_too() -> None:
    assert isinstance(build_adapter("conv1x1", (8, 4, 4), (8, 4, 4), where="x"), nn.Conv2d)
    assert isinstance(build_adapter("linear", (8,), (8,), where="x"), nn.Linear)
    assert not list(build_adapter("none", (8,), (8,), where="x").parameters())


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "text"),
    [
        (
            "none",
            (8, 4, 4),
            (9, 4, 4),
            r"losses\.hint: adapter 'none' .* not 8 and 9\.",
        ),
        ("conv1x1", (8,), (9,), r"shape \[8\], a vector; expected conv1x1 for a map.*linear or"),
        ("linear", (8, 4, 4), (9, 4, 4), r"shape \[8, 4, 4\], a map; .* Choose conv1x1 or auto"),
        ("conv", (8,), (9,), r"adapter 'conv'; expected one of auto, conv1x1, linear, none"),
        ("auto", (8, 4, 4), (9,), r"losses\.hint: student .*\[8, 4, 4\] and teacher .*\[9\]"),
    ],
)
def test_what_does_not_fit_is_an_error(kind, student, teacher, text) -> None:
    with pytest.raises(ModelError, match=text):
        build_adapter(kind, student, teacher, where="losses.hint")


@pytest.mark.parametrize(
    ("student", "teacher"), [((6, 4, 4), (10, 4, 4)), ((6,), (10,)), ((4, 6), (4, 10))]
)
def test_adapters_learn_a_linear_map(student, teacher) -> None:
    torch.manual_seed(0)
    adapter = build_adapter("auto", student, teacher, where="x")
    features = torch.randn(32, *student)
    target = build_adapter("auto", student, teacher, where="x")(features).detach()
    first, last = fitted(adapter, lambda: F.mse_loss(adapter(features), target))
    assert last < 0.01 * first


def test_weights_come_from_torchs_generator_and_keep_the_variance() -> None:
    def draw() -> list[Tensor]:
        torch.manual_seed(5)
        modules = (
            build_adapter("auto", (64, 4, 4), (256, 4, 4), where="x"),
            build_adapter("auto", (64,), (256,), where="x"),
            Embedder(64, 16),
            ReviewFusion([(8, 4, 4)] * 2, [(6, 4, 4)] * 2, mid_channels=5),
        )
        return [value for module in modules for value in module.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(draw(), draw(), strict=True))
    adapter = build_adapter("auto", (64,), (256,), where="x")
    assert adapter(torch.randn(100, 64)).std().item() == pytest.approx(1, abs=0.1)
    assert adapter.bias.count_nonzero() == 0


# Positions


def test_the_larger_side_is_pooled_to_the_smaller() -> None:
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    pooled = F.avg_pool2d(student, 2)
    found = match_positions(student, teacher)
    torch.testing.assert_close(found[0], pooled)
    assert found[1] is teacher
    torch.testing.assert_close(match_positions(teacher, student)[1], pooled)
    odd = match_positions(torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 6))
    assert odd[0].shape == odd[1].shape == (2, 3, 5, 4)


@pytest.mark.parametrize("shape", [(3, 4, 4), (10, 3), (7,)])
def test_what_agrees_is_returned_as_it_is(shape) -> None:
    student, teacher = torch.randn(2, *shape), torch.randn(2, *shape)
    found = match_positions(student, teacher)
    assert found[0] is student
    assert found[1] is teacher
    assert describe_match(shape, shape) == ""


def test_tokens_are_matched_on_their_grid() -> None:
    maps = torch.randn(2, 3, 4, 4)
    tokens = torch.cat([torch.randn(2, 1, 3), maps.flatten(2).transpose(1, 2)], dim=1)
    student = torch.randn(2, 3, 2, 2)
    found = match_positions(student, tokens)
    assert found[0] is student
    torch.testing.assert_close(found[1], F.avg_pool2d(maps, 2))
    fewer = student.flatten(2).transpose(1, 2)
    found = match_positions(fewer, tokens)
    torch.testing.assert_close(found[0], student)
    torch.testing.assert_close(found[1], F.avg_pool2d(maps, 2))


def test_attention_maps_are_matched_as_maps() -> None:
    student, teacher = torch.rand(2, 8, 8), torch.rand(2, 4, 4)
    found = match_positions(student, teacher, kind="attention")
    torch.testing.assert_close(found[0], F.avg_pool2d(student[:, None], 2)[:, 0])
    beside_map = match_positions(torch.rand(2, 5, 8, 8), teacher, kind="attention")
    assert beside_map[0].shape == (2, 5, 4, 4)


def test_vectors_and_maps_never_meet() -> None:
    with pytest.raises(ModelError, match=r"\[2, 8, 4, 4\] and teacher .*\[2, 9\]; expected both"):
        match_positions(torch.randn(2, 8, 4, 4), torch.randn(2, 9))
    with pytest.raises(ModelError, match="Take both pooled"):
        describe_match((8, 4, 4), (9,))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "expected"),
    [
        (
            (16, 32, 32),
            (64, 8, 8),
            {},
            "student [16, 32, 32], teacher [64, 8, 8]: a 1x1 convolution brings the student from "
            "16 to 64 channels; the student's positions are average-pooled from 32x32 to 8x8.",
        ),
        (
            (16, 8, 8),
            (64, 16, 16),
            {"kind": "none"},
            "student [16, 8, 8], teacher [64, 16, 16]: the teacher's positions are "
            "average-pooled from 16x16 to 8x8.",
        ),
        (
            (6,),
            (9,),
            {},
            "student [6], teacher [9]: a linear layer brings the student from 6 to 9 channels.",
        ),
        (
            (6, 4, 4),
            (17, 6),
            {},
            "student [6, 4, 4], teacher [17, 6]: the teacher's 17 tokens are laid out as a map.",
        ),
        (
            (6, 2, 2),
            (17, 6),
            {},
            "student [6, 2, 2], teacher [17, 6]: the teacher's 17 tokens are laid out as a map; "
            "the teacher's positions are average-pooled from 4x4 to 2x2.",
        ),
        (
            (8, 8),
            (4, 4),
            {"features": "attention"},
            "student [8, 8], teacher [4, 4]: the student's positions are average-pooled from 8x8 "
            "to 4x4.",
        ),
    ],
)
def test_a_match_is_described(student, teacher, options, expected) -> None:
    assert describe_match(student, teacher, **options) == expected


# Embedder and fusion


def test_the_embedder_lands_on_the_unit_sphere() -> None:
    torch.manual_seed(0)
    embedder = Embedder(6, 4)
    vectors = torch.randn(3, 6)
    expected = vectors @ embedder.linear.weight.T + embedder.linear.bias
    expected = expected / expected.pow(2).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(embedder(vectors), expected)
    torch.testing.assert_close(embedder(vectors[:, :, None, None].expand(3, 6, 2, 2)), expected)
    target = F.normalize(torch.randn(3, 4), dim=1)
    first, last = fitted(embedder, lambda: F.mse_loss(embedder(vectors), target))
    assert last < 0.01 * first


def test_fusion_gives_the_teachers_shapes_at_unequal_widths_and_resolutions() -> None:
    student_shapes = [(8, 16, 16), (12, 8, 8), (20, 8, 8), (10,)]
    teacher_shapes = [(16, 32, 32), (6, 8, 8), (64, 3, 5), (30,)]
    fusion = ReviewFusion(student_shapes, teacher_shapes, mid_channels=7)
    maps = [torch.randn(2, *shape, requires_grad=True) for shape in student_shapes]
    outputs = fusion(maps)
    assert [tuple(output.shape[1:]) for output in outputs] == teacher_shapes
    # A level reads itself and all deeper ones, and no shallower one.
    for number, output in enumerate(outputs):
        gradients = torch.autograd.grad(
            output.square().sum(), maps, allow_unused=True, retain_graph=True
        )
        reads = [gradient is not None for gradient in gradients]
        assert reads == [other >= number for other in range(4)]


def test_fusion_computes_the_published_module() -> None:
    """Plain arithmetic after section 3.3, with attention per pixel in a loop over levels."""
    torch.manual_seed(2)
    fusion = ReviewFusion([(3, 4, 4), (5, 2, 2)], [(6, 4, 4), (7, 2, 2)], mid_channels=4)
    fusion = fusion.double().eval()
    for module in fusion.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    shallow = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    deep = torch.randn(2, 5, 2, 2, dtype=torch.float64)

    def normed(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        mean, var = norm.running_mean.view(-1, 1, 1), norm.running_var.view(-1, 1, 1)
        return (x - mean) / (var + norm.eps).sqrt()

    def entered(level: nn.Module, x: Tensor) -> Tensor:
        weight = level.enter[0].weight[:, :, 0, 0]
        return normed(level.enter[1], torch.einsum("nchw,mc->nmhw", x, weight))

    def left(level: nn.Module, x: Tensor) -> Tensor:
        return normed(level.leave[1], F.conv2d(x, level.leave[0].weight, padding=1))

    first, last = fusion.levels
    deep_mid, own = entered(last, deep), entered(first, shallow)
    enlarged = deep_mid.repeat_interleave(2, 2).repeat_interleave(2, 3)
    fused = torch.zeros_like(own)
    weight, bias = first.attention.weight[:, :, 0, 0], first.attention.bias
    for row in range(4):
        for column in range(4):
            both = torch.cat([own[:, :, row, column], enlarged[:, :, row, column]], dim=1)
            shares = 1 / (1 + (-(both @ weight.T + bias)).exp())
            fused[:, :, row, column] = both[:, :4] * shares[:, :1] + both[:, 4:] * shares[:, 1:]
    outputs = fusion([shallow, deep])
    torch.testing.assert_close(outputs[0], left(first, fused))
    torch.testing.assert_close(outputs[1], left(last, deep_mid))


def test_fusion_learns() -> None:
    torch.manual_seed(0)
    shapes, teacher_shapes = [(4, 8, 8), (6, 4, 4)], [(5, 8, 8), (9, 2, 2)]
    fusion = ReviewFusion(shapes, teacher_shapes, mid_channels=32)
    maps = [torch.randn(2, *shape) for shape in shapes]
    targets = [torch.randn(2, *shape) for shape in teacher_shapes]

    def loss() -> Tensor:
        pairs = zip(fusion(maps), targets, strict=True)
        return sum((F.mse_loss(found, target) for found, target in pairs), torch.zeros(()))

    first, last = fitted(fusion, loss, num_steps=60)
    assert last < 0.5 * first


@pytest.mark.parametrize(
    ("student", "teacher"), [([(8, 4, 4)], []), ([], []), ([(16, 8)], [(8, 4, 4)])]
)
def test_fusion_refuses_unpaired_levels_and_tokens(student, teacher) -> None:
    with pytest.raises(ModelError, match="expected as many of both, each a map"):
        ReviewFusion(student, teacher, mid_channels=4)

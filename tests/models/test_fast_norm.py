"""The native batch norm with ReLU computes what PyTorch computes, and steps aside elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_inputs import channels_last
from torch import Tensor, nn

from understudy.models import fast_norm, native
from understudy.models.fast_layers import FastSequential
from understudy.models.fast_norm import norm_activation
from understudy.models.separable import SeparableNet

needs_kernels = pytest.mark.skipif(
    native.channel_kernels() is None, reason="no C compiler or no AVX2"
)


def trained_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=0.3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


# Whole vectors and overlapping ones, whole and partial blocks, fewer rows than shares.
@needs_kernels
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (2, 24, 7, 5), (5, 56, 9, 9), (1, 17, 1, 2)])
@pytest.mark.parametrize("centre", [0.0, 100.0])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardswish()], ids=["relu", "hardswish"])
def test_values_gradients_and_running_averages(
    shape: tuple[int, ...], centre: float, activation: nn.Module
) -> None:
    torch.manual_seed(0)
    norm = trained_norm(shape[1])
    exact = copy.deepcopy(norm).double()
    features = (channels_last(*shape) + centre).requires_grad_()
    doubled = features.detach().double().requires_grad_()
    assert fast_norm._suits_kernels(features, norm, activation)
    for _ in range(2):
        output = norm_activation(norm, activation, features)
        expected = activation(exact(doubled))
    assert output.is_contiguous(memory_format=torch.channels_last)
    gradient = channels_last(*shape)
    output.backward(gradient)
    expected.backward(gradient.double())
    tolerance = 2e-5 if centre == 0 else 2e-3  # float32 has 1e-5 left beside 100
    pairs = [
        (output, expected),
        (features.grad, doubled.grad),
        (norm.weight.grad, exact.weight.grad),
        (norm.bias.grad, exact.bias.grad),
        (norm.running_mean, exact.running_mean),
        (norm.running_var, exact.running_var),
    ]
    for ours, reference in pairs:
        assert ours is not None
        assert reference is not None
        torch.testing.assert_close(ours.double(), reference, rtol=tolerance, atol=tolerance * 5)
    assert norm.num_batches_tracked == 2


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (5, 56, 9, 9)])
def test_the_norm_of_scaled_features(shape: tuple[int, ...]) -> None:
    """The factor's gradient comes from eps alone: here it is as large as the variance."""
    torch.manual_seed(0)
    num_channels = shape[1]
    given = [channels_last(*shape)] + [torch.randn(num_channels) for _ in range(3)]
    running = [torch.randn(num_channels), torch.rand(num_channels)]
    ours = [tensor.clone(memory_format=torch.preserve_format) for tensor in (*given, *running)]
    exact = [tensor.double() for tensor in (*given, *running)]
    for values in (ours, exact):
        for tensor in values[:4]:
            tensor.requires_grad_()
    output = fast_norm.scaled_norm(*ours, momentum=0.3, eps=0.7)
    features, factor, weight, bias, mean, variance = exact
    scaled = features * factor.reshape(1, -1, 1, 1)
    expected = nn.functional.batch_norm(
        scaled, mean, variance, weight, bias, training=True, momentum=0.3, eps=0.7
    )
    assert output is not None
    gradient = channels_last(*shape)
    output.backward(gradient)
    expected.backward(gradient.double())
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=1e-4)
    for own, reference in zip(ours[:4], exact[:4], strict=True):
        assert own.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(own.grad.double(), reference.grad, rtol=1e-4, atol=1e-3)
    for own, reference in zip(ours[4:], exact[4:], strict=True):
        torch.testing.assert_close(own.double(), reference, rtol=2e-5, atol=1e-4)


@needs_kernels
def test_the_bits_do_not_depend_on_the_threads(restored_threads: None) -> None:
    torch.manual_seed(0)
    features, gradient = channels_last(7, 24, 15, 15), channels_last(7, 24, 15, 15)
    norm = trained_norm(24)
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        own, inputs = copy.deepcopy(norm), features.clone().requires_grad_()
        output = norm_activation(own, nn.ReLU(), inputs)
        output.backward(gradient)
        results.append([output, inputs.grad, own.weight.grad, own.bias.grad, own.running_var])
    for other in results[1:]:
        assert all(
            torch.equal(a, b)
            for a, b in zip(results[0], other, strict=True)
            if a is not None and b is not None
        )


def test_a_network_trains_and_evaluates_as_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = SeparableNet(num_classes=4, stages=((16, 1), (24, 2))).to(
        memory_format=torch.channels_last
    )
    plain = copy.deepcopy(model)
    images = channels_last(6, 3, 12, 12)
    model(images).square().sum().backward()
    monkeypatch.setattr(fast_norm, "channel_kernels", lambda: None)
    plain(images).square().sum().backward()
    for own, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, reference.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_hooks_evaluation_and_other_layouts_get_the_plain_modules() -> None:
    features = channels_last(2, 16, 4, 4)
    norm, activation = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    assert not fast_norm._suits_kernels(features.contiguous(), norm, activation)
    with torch.no_grad():
        assert not fast_norm._suits_kernels(features, norm, activation)
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    FastSequential(norm, activation)(features)
    assert len(seen) == 1
    assert bool((seen[0] < 0).any())
    handle.remove()
    norm.eval()
    assert not fast_norm._suits_kernels(features, norm, activation)


def test_an_export_holds_the_plain_operators() -> None:
    norm = FastSequential(nn.BatchNorm2d(16), nn.ReLU())
    program = torch.export.export(norm, (channels_last(2, 16, 4, 4),))
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)

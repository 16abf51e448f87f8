"""The native depthwise convolution, gate and residual norm compute what PyTorch computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kernel_inputs import channels_last
from torch import Tensor, nn

from understudy.models import dropout, fast_conv, fast_depthwise, fast_norm, inverted, native
from understudy.models.dropout import set_dropout_step
from understudy.models.fast_conv import conv3x3
from understudy.models.fast_depthwise import depthwise
from understudy.models.fast_layers import FastSequential
from understudy.models.fast_norm import norm_add
from understudy.models.inverted import InvertedResidualNet, SqueezeExcite
from understudy.models.paper import PaperTeacher
from understudy.models.resnet import ResNet

needs_kernels = pytest.mark.skipif(
    native.channel_kernels() is None, reason="no C compiler or no AVX2"
)

Call = Callable[[nn.Module, Tensor], Tensor]


def depthwise_convolution(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(
        channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False
    )


def is_native(filtered: Tensor) -> bool:
    return type(filtered.grad_fn).__name__ == "_DepthwiseBackward"


def assert_equal_to_torch(module: nn.Module, call: Call, features: Tensor) -> None:
    """Compare outputs and every gradient with the module's own in float64."""
    exact = copy.deepcopy(module).double()
    features.requires_grad_()
    doubled = features.detach().double().requires_grad_()
    output, expected = call(module, features), call(exact, doubled)
    gradient = channels_last(*output.shape)
    output.backward(gradient)
    expected.backward(gradient.double())
    pairs = [(output, expected), (features.grad, doubled.grad)]
    pairs += [
        (own.grad, reference.grad)
        for own, reference in zip(module.parameters(), exact.parameters(), strict=True)
    ]
    for ours, reference in pairs:
        assert ours is not None
        assert reference is not None
        torch.testing.assert_close(ours.double(), reference, rtol=2e-5, atol=2e-4)


# Whole vectors and overlapping ones; sides of one, odd sides, sides below the kernel.
@needs_kernels
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (2, 24, 7, 5), (17, 40, 6, 9), (2, 17, 1, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_depthwise_convolution(shape: tuple[int, ...], stride: int, kernel: int) -> None:
    torch.manual_seed(0)
    module, features = depthwise_convolution(shape[1], kernel, stride), channels_last(*shape)
    assert is_native(depthwise(module, features))
    assert_equal_to_torch(module, depthwise, features)


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (2, 24, 7, 5), (5, 56, 33, 1)])
def test_squeeze_and_excitation(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = SqueezeExcite(shape[1], 4)
    assert_equal_to_torch(module, lambda gate, features: gate(features), channels_last(*shape))


@needs_kernels
def test_frozen_gates_pass_the_gradient_on() -> None:
    torch.manual_seed(0)
    module = SqueezeExcite(16, 4)
    module.reduce.requires_grad_(False)
    features = channels_last(2, 16, 4, 4).requires_grad_()
    module(features).square().sum().backward()
    exact = copy.deepcopy(module).double()
    doubled = features.detach().double().requires_grad_()
    exact(doubled).square().sum().backward()
    assert module.reduce.weight.grad is None
    assert features.grad is not None
    assert doubled.grad is not None
    torch.testing.assert_close(features.grad.double(), doubled.grad, rtol=2e-5, atol=2e-4)


@needs_kernels
def test_a_kept_graph_gives_its_gradients_again() -> None:
    torch.manual_seed(0)
    model = InvertedResidualNet(num_classes=4, blocks=((16, 1, 1, 3),), squeeze=4).to(
        memory_format=torch.channels_last
    )
    loss = model(channels_last(2, 3, 8, 8)).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_kernels
def test_batch_norm_with_the_input_added() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24)
    nn.init.normal_(norm.weight)
    features, added = channels_last(3, 24, 7, 5), channels_last(3, 24, 7, 5).requires_grad_()
    assert fast_norm._suits_kernels(features, norm)
    assert_equal_to_torch(norm, lambda module, x: norm_add(module, x, added), features)
    assert added.grad is not None
    added.grad = None
    gradient = channels_last(3, 24, 7, 5)
    norm_add(norm, features, added).backward(gradient)
    assert torch.equal(added.grad, gradient)


@needs_kernels
def test_the_bits_do_not_depend_on_the_threads(restored_threads: None) -> None:
    torch.manual_seed(0)
    features, gradient = channels_last(19, 24, 9, 9), channels_last(19, 24, 9, 9)
    convolution = depthwise_convolution(24, 3, 1)
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        own, inputs = copy.deepcopy(convolution), features.clone().requires_grad_()
        depthwise(own, inputs).backward(gradient)
        results.append([inputs.grad, own.weight.grad])
    for other in results[1:]:
        for ours, same in zip(results[0], other, strict=True):
            assert ours is not None
            assert same is not None
            assert torch.equal(ours, same)


@pytest.mark.parametrize("activation", ["relu", "hardswish"])
def test_a_network_trains_and_evaluates_as_with_torch(
    monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    torch.manual_seed(0)
    blocks = ((16, 1, 1, 3), (24, 2, 2, 5), (24, 1, 1, 3))
    model = InvertedResidualNet(
        num_classes=4, blocks=blocks, squeeze=4, head=32, activation=activation
    ).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    images = channels_last(6, 3, 12, 12)
    model(images).square().sum().backward()
    for module in (fast_norm, fast_depthwise, inverted):
        monkeypatch.setattr(module, "channel_kernels", lambda: None)
    plain(images).square().sum().backward()
    for own, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, reference.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_other_convolutions_get_the_plain_module() -> None:
    features = channels_last(2, 16, 4, 4)
    fitting = depthwise_convolution(16, 3, 1)
    others = [
        nn.Conv2d(16, 16, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(16, 32, 3, padding=1, groups=16, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16, bias=False),
        copy.deepcopy(fitting).eval(),
    ]
    for convolution in others:
        assert not is_native(depthwise(convolution, features))
        assert torch.equal(depthwise(convolution, features), convolution(features))
    assert not is_native(depthwise(fitting, features.contiguous()))


def test_a_sequence_adds_its_input_with_and_without_a_norm_at_the_end() -> None:
    torch.manual_seed(0)
    features, added = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    norm = nn.BatchNorm2d(4)
    expected = copy.deepcopy(norm)(features) + added
    torch.testing.assert_close(FastSequential(norm)(features, added), expected)
    middle = FastSequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    plain = copy.deepcopy(middle)
    expected = plain[1](plain[0](features)) + added
    torch.testing.assert_close(middle(features, added), expected)
    assert torch.equal(FastSequential()(features, added), features + added)


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "sides"), [(3, (8, 16)), (16, (4, 8))])
def test_plain_3x3_convolutions(inputs: int, sides: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(inputs, 32, 3, padding=1, bias=bias)
    assert_equal_to_torch(module, conv3x3, channels_last(2, inputs, *sides))
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _, __, output: seen.append(output))
    output = conv3x3(module, channels_last(2, inputs, *sides))
    assert seen == [output]


@pytest.mark.parametrize("bias", [True, False])
def test_convolution_with_a_leaky_relu_after_it(bias: bool) -> None:
    module = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=bias), nn.LeakyReLU(0.1))
    images = channels_last(3, 16, 8, 12)

    def both(module: nn.Sequential, features: Tensor) -> Tensor:
        return conv3x3(module[0], features, module[1])

    assert_equal_to_torch(module, both, images)
    seen: list[Tensor] = []
    module[1].register_forward_hook(lambda _, __, output: seen.append(output))
    assert seen == [both(module, images)]


def test_the_teachers_of_the_paper_train_and_evaluate_as_with_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = PaperTeacher(num_classes=4, num_layers=2).to(memory_format=torch.channels_last)
    set_dropout_step(model, seed=1, step=2)
    plain = copy.deepcopy(model)
    images = channels_last(6, 3, 16, 16)
    model(images).square().sum().backward()
    monkeypatch.setattr(fast_norm, "channel_kernels", lambda: None)
    monkeypatch.setattr(fast_conv, "convolution_kernels", lambda: None)
    monkeypatch.setattr(dropout, "kernels", lambda: None)
    plain(images).square().sum().backward()
    for own, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, reference.grad, rtol=2e-3, atol=1e-4)
    for own, reference in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_a_resnet_trains_and_evaluates_as_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ResNet(num_classes=4, depth=8, shortcut="conv").to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    images = channels_last(6, 3, 16, 16)
    model(images).square().sum().backward()
    monkeypatch.setattr(fast_norm, "channel_kernels", lambda: None)
    monkeypatch.setattr(fast_conv, "convolution_kernels", lambda: None)
    plain(images).square().sum().backward()
    for own, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, reference.grad, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)

"""The compiled kernels compute what PyTorch and numpy compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_inputs import channels_last
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.models import dropout, fast_conv, native
from understudy.models.dropout import FastDropout, LeakyReLUDropout, set_dropout_step
from understudy.models.fast_conv import FastConv3x3
from understudy.models.paper import PaperStudent

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no C compiler")
needs_convolutions = pytest.mark.skipif(
    native.convolution_kernels() is None, reason="no C compiler or no AVX2"
)


# Whole and partial blocks of 16 tiles, one and two vectors of outputs, first layers.
SHAPES = [
    (2, 16, 32, 16, 16),
    (3, 32, 32, 4, 4),
    (1, 48, 16, 12, 8),
    (5, 64, 80, 8, 8),
    (3, 3, 16, 16, 8),
    (2, 1, 48, 8, 8),
]


@needs_convolutions
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "inputs", "outputs", "height", "width"), SHAPES)
def test_convolution_and_its_gradients(
    n: int, inputs: int, outputs: int, height: int, width: int, bias: bool
) -> None:
    layer = FastConv3x3(inputs, outputs, bias=bias)
    images = channels_last(n, inputs, height, width).requires_grad_()
    gradient = channels_last(n, outputs, height, width)
    assert layer._suits_kernels(images)
    output = layer(images)
    output.backward(gradient)
    assert output.is_contiguous(memory_format=torch.channels_last)

    exact = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    exact_images = images.detach().double().requires_grad_()
    expected = exact(exact_images)
    expected.backward(gradient.double())
    pairs = [(output, expected), (images.grad, exact_images.grad)]
    pairs += [
        (ours.grad, theirs.grad)
        for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True)
    ]
    for found, wanted in pairs:
        assert found is not None
        assert wanted is not None
        assert (found - wanted).abs().max() < 3e-5 * wanted.abs().max()


@needs_convolutions
def test_other_layouts_of_the_gradient_are_taken() -> None:
    layer = FastConv3x3(16, 16)
    images = channels_last(2, 16, 8, 8)
    gradient = torch.randn(2, 16, 8, 8)
    found = torch.autograd.grad(layer(images), layer.weight, gradient)[0]
    again = torch.autograd.grad(
        layer(images), layer.weight, gradient.contiguous(memory_format=torch.channels_last)
    )[0]
    assert torch.equal(found, again)


@pytest.mark.parametrize(
    "images",
    [
        channels_last(2, 16, 6, 8),
        torch.randn(2, 16, 8, 8),
        channels_last(2, 16, 8, 8).double(),
        channels_last(0, 16, 8, 8),
    ],
)
def test_what_the_kernels_do_not_suit_goes_to_pytorch(images: Tensor) -> None:
    layer = FastConv3x3(16, 32).to(images.dtype)
    assert not layer._suits_kernels(images)
    expected = F.conv2d(images, layer.weight, layer.bias, padding=1)
    assert torch.equal(layer(images), expected)


def test_evaluation_is_plain_pytorch() -> None:
    layer = FastConv3x3(16, 16, activation=LeakyReLUDropout(0.5)).eval()
    images = channels_last(2, 16, 8, 8)
    expected = F.leaky_relu(F.conv2d(images, layer.weight, layer.bias, padding=1))
    assert torch.equal(layer(images), expected)


@needs_kernels
@pytest.mark.parametrize("shape", [(4, 16, 6, 6), (7, 13), (1,), (3, 5, 2, 2)])
@pytest.mark.parametrize("make", [FastDropout, LeakyReLUDropout])
def test_masks_are_those_of_numpy(
    make: type[FastDropout], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(0.3)
    values = torch.randn(shape)
    if len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(values)

    def outputs() -> tuple[Tensor, Tensor]:
        set_dropout_step(layer, seed=11, step=5)
        leaf = values.clone().requires_grad_()
        output = layer(leaf)
        output.backward(gradient)
        assert leaf.grad is not None
        return output.detach(), leaf.grad

    by_kernels = outputs()
    monkeypatch.setattr(dropout, "kernels", lambda: None)
    for found, expected in zip(by_kernels, outputs(), strict=True):
        torch.testing.assert_close(found, expected)
        assert torch.equal(found == 0, expected == 0)


@needs_convolutions
@pytest.mark.parametrize("inputs", [3, 32])
def test_fused_activation_is_the_activation_after(inputs: int) -> None:
    fused = FastConv3x3(inputs, 48, activation=LeakyReLUDropout(0.4, negative_slope=0.1))
    alone = FastConv3x3(inputs, 48)
    alone.load_state_dict(fused.state_dict())
    images = channels_last(3, inputs, 8, 16)
    activation = LeakyReLUDropout(0.4, negative_slope=0.1)
    results = []
    for model in (fused, nn.Sequential(alone, activation)):
        set_dropout_step(model, seed=2, step=9)
        output = model(images)
        output.square().sum().backward()
        results.append(output)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(fused.weight.grad, alone.weight.grad)
    torch.testing.assert_close(fused.bias.grad, alone.bias.grad)


@needs_kernels
@pytest.mark.parametrize("make", [FastDropout, LeakyReLUDropout])
def test_gradient_of_a_sum_over_pixels(make: type[FastDropout]) -> None:
    layer = make(0.5)
    weights = torch.randn(3, 32)
    gradients = []
    for dense in (False, True):
        set_dropout_step(layer, seed=1, step=1)
        torch.manual_seed(0)
        values = channels_last(3, 32, 4, 6).requires_grad_()
        output = layer(values)
        if dense:
            (output * weights[:, :, None, None]).sum().backward()
        else:
            (output.sum(dim=(2, 3)) * weights).sum().backward()
        gradients.append(values.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def train_student(num_steps: int) -> list[float]:
    torch.manual_seed(0)
    student = PaperStudent(num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    images, labels = channels_last(16, 3, 16, 16), torch.randint(10, (16,))
    losses = []
    for step in range(num_steps):
        set_dropout_step(student, seed=3, step=step)
        optimizer.zero_grad()
        loss = F.cross_entropy(student(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_convolutions
def test_losses_are_the_same_bits_for_any_number_of_threads(restored_threads: None) -> None:
    torch.set_num_threads(1)
    alone = train_student(1)
    torch.set_num_threads(3)
    layer, images = FastConv3x3(32, 32), channels_last(20, 32, 8, 8)
    gradients = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        layer.zero_grad()
        layer(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))
    assert train_student(1) == alone


@needs_kernels
def test_training_is_the_same_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = train_student(5)
    assert with_kernels == train_student(5)
    monkeypatch.setattr(dropout, "kernels", lambda: None)
    monkeypatch.setattr(fast_conv, "convolution_kernels", lambda: None)
    assert with_kernels == pytest.approx(train_student(5), rel=1e-3)


def test_without_a_compiler_or_when_switched_off_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.kernels.__wrapped__() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("UNDERSTUDY_NATIVE", "0")
    assert native.kernels.__wrapped__() is None


def test_what_a_failing_compiler_says_may_be_in_any_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nprintf 'erreur: r\\351glage' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(compiler))
    assert native.kernels.__wrapped__() is None
    assert "native kernels are not used: erreur: r\ufffdglage" in caplog.text


@needs_kernels
def test_a_failing_compiler_is_survived_and_a_working_one_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert native.kernels.__wrapped__() is None
    assert "native kernels are not used" in caplog.text
    assert not list(tmp_path.rglob("*kernels-*"))
    monkeypatch.delenv("CC")
    assert native.kernels.__wrapped__() is not None
    (library,) = tmp_path.rglob("kernels-*.so")
    written = library.stat().st_mtime_ns
    assert native.kernels.__wrapped__() is not None
    assert library.stat().st_mtime_ns == written

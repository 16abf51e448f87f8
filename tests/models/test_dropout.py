"""The fast dropout has the distribution, gradient and reproducibility that it promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from understudy.errors import ModelError
from understudy.models.dropout import FastDropout, LeakyReLUDropout, set_dropout_step

RATES = [0.05, 0.2, 0.5, 0.9]


def masks(layer: FastDropout, *, seed: int, step: int, num_elements: int = 1 << 16) -> torch.Tensor:
    set_dropout_step(layer, seed=seed, step=step)
    return layer(torch.ones(num_elements)) != 0


@pytest.mark.parametrize("rate", RATES)
def test_rate_is_met_to_1_in_512_and_by_the_draw(rate: float) -> None:
    layer = FastDropout(rate)
    assert abs(layer.realised_rate - rate) <= 1 / 512
    num_elements = 1 << 20
    dropped = 1 - masks(layer, seed=1, step=1, num_elements=num_elements).float().mean().item()
    deviation = (layer.realised_rate * (1 - layer.realised_rate) / num_elements) ** 0.5
    assert abs(dropped - layer.realised_rate) < 5 * deviation


@pytest.mark.parametrize("rate", RATES)
def test_kept_values_are_scaled_so_that_the_mean_stays(rate: float) -> None:
    layer = FastDropout(rate)
    values = torch.randn(1000)
    output = layer(values)
    kept = output != 0
    torch.testing.assert_close(output[kept], values[kept] / (1 - layer.realised_rate))


def test_masks_look_random_along_every_axis_and_between_neighbours() -> None:
    kept = FastDropout(0.5)(torch.ones(64, 16, 8, 8)) != 0
    for axis in range(4):
        others = [dim for dim in range(4) if dim != axis]
        share = kept.float().mean(dim=others)
        deviation = 0.5 / (kept.numel() / kept.shape[axis]) ** 0.5
        assert (share - 0.5).abs().max() < 5 * deviation
    flat = kept.flatten().float() - 0.5
    for lag in (1, 2, 7, 8, 64, 1024):
        correlation = (flat[lag:] * flat[:-lag]).mean() * 4
        assert abs(correlation) < 5 / len(flat) ** 0.5


def test_masks_are_a_function_of_seed_step_and_layer() -> None:
    layer = FastDropout(0.5)
    first = masks(layer, seed=1, step=1)
    assert torch.equal(first, masks(layer, seed=1, step=1))
    assert torch.equal(first, masks(FastDropout(0.5), seed=1, step=1))
    for other in (masks(layer, seed=1, step=2), masks(layer, seed=2, step=1)):
        agreement = (first == other).float().mean()
        assert abs(agreement - 0.5) < 0.02


def test_layers_and_calls_within_a_step_differ() -> None:
    model = nn.Sequential(FastDropout(0.5), nn.Identity(), FastDropout(0.5))
    set_dropout_step(model, seed=1, step=1)
    ones = torch.ones(1 << 14)
    results = [model[0](ones), model[0](ones), model[2](ones)]
    for index, left in enumerate(results):
        for right in results[:index]:
            assert abs((left == right).float().mean() - 0.5) < 0.04
    set_dropout_step(model, seed=1, step=1)
    assert torch.equal(model[0](ones), results[0])


def test_masks_do_not_touch_torch_random_state() -> None:
    before = torch.get_rng_state()
    FastDropout(0.5)(torch.ones(100))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("layer", [FastDropout(0.3), LeakyReLUDropout(0.3)])
def test_gradient_is_the_derivative(layer: FastDropout) -> None:
    values = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def same_mask(features: torch.Tensor) -> torch.Tensor:
        set_dropout_step(layer, seed=3, step=7)
        return layer(features)

    assert torch.autograd.gradcheck(same_mask, (values,))
    assert torch.autograd.gradgradcheck(same_mask, (values,))


def test_leaky_relu_dropout_equals_the_two_modules() -> None:
    values = torch.randn(8, 4, 6, 6)
    both = LeakyReLUDropout(0.3, negative_slope=0.2)
    alone = FastDropout(0.3)
    set_dropout_step(both, seed=5, step=2)
    set_dropout_step(alone, seed=5, step=2)
    torch.testing.assert_close(both(values), alone(F.leaky_relu(values, 0.2)))
    assert torch.equal(both.eval()(values), F.leaky_relu(values, 0.2))


@pytest.mark.parametrize("make", [FastDropout, LeakyReLUDropout])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_and_type_are_kept(make: type[FastDropout], dtype: torch.dtype) -> None:
    values = torch.rand(2, 5, 4, 3, dtype=dtype) + 1
    values = values.contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = make(0.25)
    output = layer(values)
    output.sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert output.dtype == dtype
    torch.testing.assert_close(values.grad * values.detach(), output.detach(), rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (7, 3)])
def test_any_shape_works(shape: tuple[int, ...]) -> None:
    assert FastDropout(0.5)(torch.ones(shape)).shape == shape


def test_a_slice_of_a_larger_tensor_works() -> None:
    values = torch.ones(6, 8)[:, ::2]
    output = FastDropout(0.5)(values)
    assert set(output.unique().tolist()) <= {0.0, 2.0}


def test_evaluation_and_rate_zero_are_the_identity() -> None:
    values = torch.randn(10)
    assert FastDropout(0.5).eval()(values) is values
    assert FastDropout(0.0)(values) is values


def test_compiled_models_use_torch_dropout() -> None:
    layer = FastDropout(0.5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert set(compiled(torch.ones(1000)).unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("rate", [-0.1, 1.0, 0.999])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ModelError, match=r"expected a number from 0 to 255/256"):
        FastDropout(rate)

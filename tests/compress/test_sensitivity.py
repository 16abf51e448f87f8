import copy

import pytest
import torch
from torch import nn

from understudy.compress.sensitivity import (
    LayerSensitivity,
    choose_float_layers,
    quantized,
    sensitivity,
)
from understudy.errors import InputError, ModelError
from understudy.models.build import NormalizedModel, build_network

SHAPE = (3, 16, 16)


def make_model():
    torch.manual_seed(2)
    network = build_network(
        "resnet", num_classes=5, image_shape=SHAPE, arguments={"depth": 8, "widths": [4, 8, 8]}
    )
    model = NormalizedModel(network, mean=[0.5] * 3, std=[0.25] * 3).train()
    model(make_images(32))
    return model.eval()


def make_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def ranked():
    labels_N = torch.arange(40) % 5
    return sensitivity(make_model(), make_images(40), labels_N, calibration_NCHW=make_images(20, 1))


def test_every_weighted_layer_is_ranked_worst_first(ranked):
    names = [n for n, m in make_model().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(record.name for record in ranked) == sorted(names)
    assert [record.kl for record in ranked] == sorted((r.kl for r in ranked), reverse=True)
    for record in ranked:
        assert 0 < record.kl < 0.1
        assert 0.5 < record.top1_agreement <= 1
        assert abs(record.accuracy_change) <= 1 - record.top1_agreement
    assert ranked[0].to_json().keys() == {
        "name",
        "num_weights",
        "kl",
        "top1_agreement",
        "accuracy_change",
    }


def test_a_layer_is_compared_as_a_plain_reference_does(ranked):
    model = make_model()
    images, calibration = make_images(40), make_images(20, 1)
    seen = []
    layer = model.network.layer2[0].conv1
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        float_logits = model(images)
        seen.clear()
        model(calibration)
    hook.remove()
    low, high = min(0.0, seen[0].min().item()), max(0.0, seen[0].max().item())
    step = (high - low) / 255
    zero = round(-low / step)
    scale = layer.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 63

    class Reference(nn.Module):
        def forward(self, values):
            levels = (torch.round(values / step) + zero).clamp(0, 255)
            weight = torch.round(layer.weight / scale) * scale
            values = (levels - zero) * step
            return nn.functional.conv2d(values, weight, stride=layer.stride, padding=1)

    rounded = copy.deepcopy(model)
    rounded.network.layer2[0].conv1 = Reference()
    with torch.no_grad():
        int8_logits = rounded(images)
    kl = nn.functional.kl_div(
        int8_logits.log_softmax(1), float_logits.softmax(1), reduction="batchmean"
    )
    (record,) = (r for r in ranked if r.name == "network.layer2.0.conv1")
    assert record.num_weights == layer.weight.numel()
    assert record.kl == pytest.approx(kl.item(), rel=0.02)
    agreement = (int8_logits.argmax(1) == float_logits.argmax(1)).double().mean().item()
    assert record.top1_agreement == pytest.approx(agreement)


def test_a_spoiled_layer_comes_first():
    model = make_model()
    block = model.network.layer3[0]
    with torch.no_grad():  # a channel that nothing reads takes the range from all others
        block.bn1.bias[0] = 2000
        block.conv2.weight[:, 0] = 0
    first = sensitivity(model, make_images(40), calibration_NCHW=make_images(20, 1))[0]
    assert first.name == "network.layer3.0.conv2"
    assert first.accuracy_change is None


def test_the_model_is_left_as_it_was():
    model = make_model().train()
    state = copy.deepcopy(model.state_dict())
    sensitivity(model, make_images(4), calibration_NCHW=make_images(4))
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    layer = model.network.linear
    weight = layer.weight.data.clone()
    bounds = torch.tensor(-1.0), torch.tensor(1.0)
    with quantized(layer, *bounds):
        assert not torch.equal(layer.weight.data, weight)
        assert layer._forward_pre_hooks
    assert torch.equal(layer.weight.data, weight)
    assert not layer._forward_pre_hooks


def records(*names):
    return [LayerSensitivity(name, 1, 1.0 / n, 1.0, None) for n, name in enumerate(names, 1)]


def test_the_fewest_worst_layers_are_kept_float():
    asked = []

    def passes(names):
        asked.append(names)
        return len(names) >= 2

    assert choose_float_layers(records("a", "b", "c", "d"), passes) == ("a", "b")
    assert asked == [(), ("a",), ("a", "b")]
    assert choose_float_layers(records("a", "b"), lambda names: True) == ()


@pytest.mark.parametrize(("limit", "num_asked"), [(None, 3), (1, 2), (0, 1), (99, 3)])
def test_a_gate_that_nothing_passes_is_an_error(limit, num_asked):
    asked = []
    with pytest.raises(ModelError, match="loses more than the gate allows"):
        choose_float_layers(records("a", "b", "c"), asked.append, max_float_layers=limit)
    assert len(asked) == num_asked


def test_missing_images_labels_and_layers_are_named_at_once():
    none = torch.zeros(0, *SHAPE)
    with pytest.raises(InputError) as caught:
        sensitivity(nn.ReLU(), none, torch.zeros(3), calibration_NCHW=none)
    assert len(caught.value.problems) == 4

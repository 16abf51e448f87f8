"""Quantisation-aware training: against plain references, in the real loop, on every family."""

import copy
import importlib.util
import itertools
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from understudy.compress import quantize
from understudy.compress.quant_affine import (
    activation_scale,
    fake_quantize_activation,
    fake_quantize_weight,
    largest_weight,
    value_range,
    weight_scales,
)
from understudy.compress.quantize import (
    check_layers,
    convert_qat,
    float_weights,
    layer_names,
    prepare_qat,
)
from understudy.data.sources import load_data
from understudy.errors import CheckpointError, InputError, MissingExtraError, ModelError
from understudy.evaluate.accuracy import eval_mode
from understudy.models import native
from understudy.models.build import NormalizedModel, build_network
from understudy.train.devices import make_fabric
from understudy.train.feed import Feed, ViewPlan
from understudy.train.loop import train
from understudy.train.objective import LabelObjective
from understudy.train.plan import TrainPlan
from understudy.train.settings import TrainSettings

# Found, not imported: that takes seconds.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs the extra 'compress'"
)

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
SHAPE = (3, 16, 16)
FAMILIES = {
    "separable": {"stages": [[8, 1], [16, 2], [16, 1]], "residual": True},
    "inverted": {"stem": [8, 1], "blocks": [[8, 1, 1, 3, 3], [16, 2, 2, 3]], "squeeze": 4},
    "resnet": {"depth": 8, "widths": [4, 8, 8]},
    "paper_student": {"channels": 8},
    "paper_teacher": {"channels": 8, "num_layers": 2},
    "mlp": {"dropout": 0.1},
}


def make_model(family, arguments, shape=SHAPE):
    torch.manual_seed(3)
    network = build_network(family, num_classes=10, image_shape=shape, arguments=arguments)
    mean, std = [0.4] * shape[0], [0.2] * shape[0]
    flips = family == "inverted"
    model = NormalizedModel(network, mean=mean, std=std, flip_average=flips).train()
    for _ in range(3):  # batch-norm statistics that are not those of the start
        model(make_images(16, shape=shape))
    return model.eval()


def make_images(count, *, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, shape[0], 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
    return (images * 255).round().to(torch.uint8)


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


# The arithmetic, against numpy


@pytest.mark.parametrize("largest", [63, 127])
def test_weights_are_rounded_as_the_formula_says(largest):
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    plain = weight.numpy()
    scale = np.abs(plain).max(axis=(1, 2, 3), keepdims=True) / np.float32(largest)
    expected = np.clip(np.rint(plain / scale), -largest, largest) * scale
    scales = weight_scales(weight, largest=largest)
    assert torch.equal(scales, torch.from_numpy(scale.reshape(-1)))
    rounded = fake_quantize_weight(weight, scales, largest=largest)
    np.testing.assert_allclose(rounded, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "num_groups", "largest"),
    [
        ((8, 1, 3, 3), 8, 127),
        ((8, 1, 3, 3), 1, 63),  # one colour: its products are added in pairs
        ((16, 1, 3, 3), 8, 63),  # two outputs a channel: another kernel in ONNX Runtime
        ((8, 2, 3, 3), 4, 63),
        ((1, 1, 3, 3), 1, 63),
        ((10, 1), 1, 63),
    ],
)
def test_depthwise_weights_alone_take_eight_bits(shape, num_groups, largest):
    assert largest_weight(shape, num_groups) == largest


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.1), (0.4, 3.0), (-2.0, -0.5), (0.0, 0.0)])
def test_activations_are_rounded_as_the_formula_says(low, high):
    values = torch.linspace(low - 1, high + 1, 301)
    plain = values.numpy()
    bottom, top = np.float32(min(low, 0)), np.float32(max(high, 0))
    step = max((top - bottom) / np.float32(255), np.float32(2.0**-24))
    zero = np.clip(-np.rint(bottom / step), 0, 255)
    expected = (np.clip(np.rint(plain / step) + zero, 0, 255) - zero) * step
    scale, zero_point = activation_scale(torch.tensor(low), torch.tensor(high))
    rounded = fake_quantize_activation(values, scale, zero_point)
    # A value between two levels may go to either.
    assert np.abs(rounded.numpy() - expected).max() <= step * 1.001
    assert (np.abs(rounded.numpy() - expected) > step / 2).mean() < 0.01
    exact_zero = fake_quantize_activation(torch.zeros(1), scale, zero_point)
    assert exact_zero.item() == 0


def test_gradients_pass_where_nothing_is_clipped():
    values = torch.tensor([-5.0, 0.2, 0.9, 5.0], requires_grad=True)
    scale, zero_point = activation_scale(torch.tensor(-1.0), torch.tensor(1.0))
    fake_quantize_activation(values, scale, zero_point).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("layout", ["plain", "channels last", "with gaps"])
def test_the_kernel_rounds_as_pytorch_does(layout):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 7, 9, generator=generator)
    scale, zero_point = activation_scale(torch.tensor(-1.0), torch.tensor(2.0))
    values.view(-1)[:40] = (torch.arange(40) - 20 + 0.5) * scale  # between two levels
    values.view(-1)[40:42] = torch.tensor([torch.nan, 1e9])
    if layout == "channels last":
        values = values.to(memory_format=torch.channels_last)
    results = []
    for function in (
        fake_quantize_activation,
        lambda *args: torch.fake_quantize_per_tensor_affine(*args, 0, 255),
    ):
        leaf = values.clone().requires_grad_()
        given = leaf[:, :, ::2] if layout == "with gaps" else leaf
        rounded = function(given, scale, zero_point)
        (rounded.contiguous() * torch.arange(rounded.numel()).view(rounded.shape)).sum().backward()
        results.append((rounded.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_range_is_that_of_all_values(memory_format):
    values = torch.randn(4, 3, 5, 6).to(memory_format=memory_format)
    assert value_range(values) == (values.min(), values.max())


def test_a_dead_channel_does_not_get_a_scale_that_its_bias_overflows():
    weight = torch.randn(4, 8)
    weight[1] = 1e-12
    scales = weight_scales(weight, largest=63)
    assert scales[1] == scales.max() * 2.0**-12
    assert (weight_scales(torch.zeros(4, 8), largest=63) == 2.0**-24).all()


# The prepared network


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    shape = (1, 8, 8) if request.param == "mlp" else SHAPE
    model = make_model(request.param, FAMILIES[request.param], shape)
    images = make_images(32, shape=shape)
    return model, images, prepare_qat(model, example_NCHW=images)


def test_every_family_trains_and_converts(family):
    model, images, prepared = family
    network = copy.deepcopy(prepared)
    before = {name: p.clone() for name, p in network.named_parameters()}
    network.train().to(memory_format=torch.channels_last)
    logits = network(images)
    nn.functional.cross_entropy(logits, torch.arange(32) % 10).backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert all(not torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert {f"graph.{name}" for name, _ in model.named_parameters()} == before.keys()
    assert network.eval()(images[:1]).shape == (1, 10)
    with torch.no_grad():
        converted_logits = convert_qat(network)(images.float() / 255)
        torch.testing.assert_close(converted_logits, network(images), rtol=0, atol=1e-5)


def test_before_training_it_answers_nearly_as_the_float_network(family):
    model, images, prepared = family
    with torch.no_grad(), eval_mode(prepared):
        float_logits, int8_logits = model(images), prepared(images)
        pixels = images.float() / 255
        torch.testing.assert_close(prepared(pixels), int8_logits, rtol=0, atol=0)
    error = (float_logits - int8_logits).abs().max()
    assert 0 < error < 0.08 * float_logits.abs().max()


def num_layer_calls(model, images):
    """Count the runs of weighted layers in a pass: a block of several passes runs its own again."""
    calls, handles = [], []
    for name in layer_names(model):
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_hook(lambda *_, name=name: calls.append(name)))
    model(images[:1])
    for handle in handles:
        handle.remove()
    assert set(calls) == set(layer_names(model))
    return len(calls)


def test_every_weighted_layer_is_int8_and_its_kernel_can_be_fused(family):
    model, images, prepared = family
    graph = convert_qat(prepared)
    found = targets(graph)
    assert found.count(decomposed.dequantize_per_channel.default) == num_layer_calls(model, images)
    assert not any(p.requires_grad for p in graph.parameters())
    convolutions = graph.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    for node in convolutions:
        assert node.args[0].target is decomposed.dequantize_per_tensor.default
        end = node
        while next(iter(end.users)).target in (aten.relu.default, aten.relu_.default):
            end = next(iter(end.users))
        users = {user.target for user in end.users}
        assert users == {decomposed.quantize_per_tensor.default}


def test_the_integers_are_no_larger_than_the_kernels_can_add(family):
    _, _, prepared = family
    graph = convert_qat(prepared)
    for node in graph.graph.nodes:
        if node.target in (aten.conv2d.default, aten.linear.default):
            groups = node.args[6] if len(node.args) > 6 else 1
            integers = getattr(graph, node.args[1].args[0].target)
            assert integers.int().abs().max() == largest_weight(integers.shape, groups)


@pytest.mark.parametrize(
    ("activation", "lowest", "highest"),
    [(nn.Hardswish, -3, np.inf), (nn.Hardsigmoid, -3, 3), (nn.LeakyReLU, -np.inf, np.inf)],
)
def test_no_step_is_spent_where_an_activation_is_flat(activation, lowest, highest):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, momentum=1.0),
        activation(),
        nn.Flatten(),
        nn.Linear(1568, 4),
    )
    nn.init.normal_(network[1].weight, 0, 8)
    images = make_images(64)
    given = network[:2](images.float() / 255)
    assert given.min() < -6
    assert given.max() > 6
    prepared = prepare_qat(network.eval(), example_NCHW=images)
    prepared.train()(images)
    with torch.no_grad(), eval_mode(prepared):
        graph = convert_qat(prepared)
    names = ("hardswish", "hardsigmoid", "leaky_relu")
    (read,) = (
        node.args[0]
        for node in graph.graph.nodes
        if str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_") in names
    )
    scale, zero = read.args[1:3]
    assert scale * (0 - zero) == pytest.approx(max(lowest, given.min().item()), rel=0.2)
    assert scale * (255 - zero) == pytest.approx(min(highest, given.max().item()), rel=0.2)


def test_train_and_eval_really_switch(family):
    _, images, prepared = family
    network = copy.deepcopy(prepared)
    start = copy.deepcopy(network.state_dict())
    with torch.inference_mode():
        first, second = network.eval()(images), network(images)
    assert torch.equal(first, second)
    changed = {n for n, value in network.state_dict().items() if not torch.equal(value, start[n])}
    assert not changed  # evaluation leaves no trace: neither statistics nor ranges
    network.train()(images + 1)
    changed = {n for n, value in network.state_dict().items() if not torch.equal(value, start[n])}
    assert any(name.endswith("maximum") for name in changed)
    has_norm = any(name.endswith("running_var") for name in start)
    assert any(name.endswith("running_var") for name in changed) == has_norm


def test_an_evaluator_that_sets_the_attribute_back_gets_training_back():
    model = make_model("mlp", {"dropout": 0.5}, (1, 8, 8))
    images = make_images(16, shape=(1, 8, 8))
    network = prepare_qat(model, example_NCHW=images)
    network(images)
    with torch.no_grad(), eval_mode(network):
        network(images)
    assert not torch.equal(network(images), network(images))  # dropout is at work


def test_an_averaged_copy_computes_with_its_own_weights(family):
    _, images, prepared = family
    network = copy.deepcopy(prepared).train()
    averaged = AveragedModel(network, use_buffers=True)
    for _ in range(2):
        network(images)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.05)
        averaged.update_parameters(network)
    with torch.no_grad():
        logits = averaged.module.eval()(images)
        again = copy.deepcopy(prepared).eval()
        again.load_state_dict(averaged.module.state_dict())
        assert torch.equal(again(images), logits)
    assert torch.isfinite(logits).all()


def test_float_weights_go_back_into_the_model(family):
    model, images, prepared = family
    network = copy.deepcopy(prepared).train()
    network(images).sum().backward()
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    restored = float_weights(network, model)
    assert type(restored) is type(model)
    trained = dict(network.graph.named_parameters())
    for name, parameter in restored.named_parameters():
        assert torch.equal(parameter, trained[name])
    with torch.no_grad():
        difference = (restored(images) - network.eval()(images)).abs().max()
        assert difference < 0.1 * restored(images).abs().max()


def test_norms_keep_their_own_eps_and_momentum():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=True),
        nn.BatchNorm2d(8, eps=0.1, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8, affine=False, eps=0.01),
        nn.Flatten(),
        nn.Linear(8 * 14 * 14, 5),
    )
    images = make_images(16)
    model.train()(images / 255)
    reference = copy.deepcopy(model)
    network = prepare_qat(model.eval(), example_NCHW=images)
    pixels = images.float() / 255
    with torch.no_grad():
        # Fake quantisation off: what is left must be the network itself, in both modes.
        for module in network.graph.modules():
            if hasattr(module, "calculate_qparams"):
                module.forward = lambda values: values
        torch.testing.assert_close(network.eval()(images), reference.eval()(pixels))
        torch.testing.assert_close(network.train()(images), reference.train()(pixels))
    state = network.graph.state_dict()
    torch.testing.assert_close(state["1.running_var"], reference[1].running_var)
    torch.testing.assert_close(state["4.running_mean"], reference[4].running_mean)
    untouched = prepare_qat(model, example_NCHW=images).eval()
    with torch.no_grad():
        torch.testing.assert_close(convert_qat(untouched)(pixels), untouched(images))


def test_mirror_images_count_in_evaluation_and_not_in_training():
    model = make_model("inverted", FAMILIES["inverted"])
    images = make_images(8)
    model.flip_average = False
    plain = prepare_qat(model, example_NCHW=images)
    model.flip_average = True
    network = prepare_qat(model, example_NCHW=images)
    assert model.flip_average  # the model itself is left alone
    assert network.num_ranges == plain.num_ranges
    plain.load_state_dict(network.state_dict())
    mirrored = images.flip(3)
    with torch.no_grad():
        plain.eval()
        expected = (plain(images) + plain(mirrored)) / 2
        torch.testing.assert_close(network.eval()(images), expected)
        converted = convert_qat(network)(images.float() / 255)
        # A batch of twice the size may be summed in another order, and a value on the border of two
        # integers then goes to the other one: one or two pictures of eight, by a step of one layer.
        difference_N = (converted - expected).abs().amax(1)
        assert (difference_N < 1e-5).sum() >= 6, difference_N
        assert difference_N.max() < 1e-3
        assert (expected - plain(images)).abs().max() > 1e-3
        torch.testing.assert_close(network.train()(images), plain.train()(images))


def wide_model():
    """Of layers that the native kernels know; trained a little, so that its norms are not 1."""
    model = make_model(
        "inverted",
        {"stem": [16, 1], "blocks": [[16, 1, 1, 3, 2], [32, 2, 1, 5]], "activation": "hardswish"},
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model.to(memory_format=torch.channels_last)


def gradient_functions(result):
    """Return the names of all functions of the graph behind a tensor."""
    found, waiting = {}, [result.grad_fn]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in found:
            found[function] = type(function).__name__
            waiting += [following for following, _ in function.next_functions]
    return set(found.values())


@pytest.mark.parametrize("freeze_after", [None, 0])
def test_native_kernels_train_as_torch_does(freeze_after):
    """Two updates in float32 against float64: roundings of int8 would hide everything else."""
    images = make_images(16)
    results = []
    for dtype in (torch.float32, torch.float64):
        network = prepare_qat(wide_model(), example_NCHW=images, freeze_after=freeze_after)
        for module in network.graph.modules():
            if hasattr(module, "calculate_qparams"):
                module.forward = lambda values: values
        network.train().to(dtype).to(memory_format=torch.channels_last)
        pixels = (images.to(dtype) / 255).contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            logits = network(pixels)
            nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
            optimizer.step()
        results.append((logits, network))
    (logits, network), (expected, exact) = results
    found = gradient_functions(logits)
    if native.channel_kernels() is not None:
        assert "_DepthwiseBackward" in found
        assert ("_NormBackward" in found) == (freeze_after is None)
    assert gradient_functions(expected).isdisjoint({"_DepthwiseBackward", "_NormBackward"})
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    state = exact.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value.double(), state[name].double(), rtol=1e-3, atol=1e-4)
    for name, parameter in network.named_parameters():
        reference = exact.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.double(), reference, rtol=1e-3, atol=1e-4)


def test_a_channel_pruned_to_zero_stays_finite():
    model = make_model("separable", FAMILIES["separable"])
    model.network.stem[1].weight.data[0] = 0
    images = make_images(8)
    network = prepare_qat(model, example_NCHW=images).train()
    network(images).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert model.network.stem[1].weight[0] == 0  # the model itself is left alone


def test_float_layers_are_float_and_whole_in_the_graph():
    model = make_model("resnet", FAMILIES["resnet"])
    images = make_images(16)
    kept = ("network.layer2.0.conv1", "network.layer1")
    graph = convert_qat(prepare_qat(model, example_NCHW=images, float_layers=kept))
    dequantized = targets(graph).count(decomposed.dequantize_per_channel.default)
    assert dequantized == len(layer_names(model)) - 3
    for node in graph.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        names = {name for name, _ in node.meta["nn_module_stack"].values()}
        is_kept = not names.isdisjoint(kept)
        assert (node.args[1].op == "get_attr") == is_kept
    with torch.no_grad():
        assert torch.isfinite(graph(images.float() / 255)).all()


def test_freezing_stops_statistics_and_ranges_at_the_pass():
    model = make_model("separable", FAMILIES["separable"])
    images = make_images(16)
    network = prepare_qat(model, example_NCHW=images, freeze_after=2).train()
    statistics = ("running_mean", "running_var", "minimum", "maximum")

    def state():
        return {n: v.clone() for n, v in network.state_dict().items() if n.endswith(statistics)}

    states = [state()]
    for seed in range(4):
        logits = network(make_images(16, seed=seed))
        states.append(state())
    same = [
        all(torch.equal(one[name], other[name]) for name in one)
        for one, other in itertools.pairwise(states)
    ]
    assert same == [False, False, True, True]
    assert network.frozen
    logits.sum().backward()  # the weights still learn
    assert network.get_parameter("graph.network.stem.0.weight").grad.abs().sum() > 0


def test_the_moving_range_follows_the_batches():
    model = make_model("mlp", {}, (1, 8, 8))
    images = make_images(32, shape=(1, 8, 8))
    network = prepare_qat(model, example_NCHW=images).train()
    first = network.graph.activation_post_process_0
    start = first.maximum.item()
    top = model.normalize(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item()
    network(torch.full((8, 1, 8, 8), 255, dtype=torch.uint8))
    assert first.maximum.item() == pytest.approx(start + 0.01 * (top - start), rel=1e-6)


# In the loop


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def make_plan(digits, folder, **settings):
    def validate(network):
        indices_N = torch.arange(300, 400)
        answers = network(digits.images(indices_N)).argmax(1)
        return {"accuracy": (answers == digits.labels_N[indices_N]).double().mean().item()}

    values = {"num_epochs": 2, "batch_size": 32, "optimizer": {"learning_rate": 0.02}, **settings}
    feed = Feed(digits, None, torch.arange(256), 32, ViewPlan(1), 1)
    folder.mkdir(exist_ok=True)
    return TrainPlan(feed, LabelObjective(), TrainSettings.model_validate(values), validate, folder)


def digits_model(digits):
    torch.manual_seed(1)
    channels, height, width = digits.images(torch.arange(1)).shape[1:]
    network = build_network(
        "separable",
        num_classes=10,
        image_shape=(channels, height, width),
        arguments={"stages": [[8, 1], [16, 2]]},
    )
    return NormalizedModel(network, mean=[0.3] * channels, std=[0.35] * channels)


class StopError(Exception):
    pass


def run_aware(digits, folder, progress=lambda *_: None):
    fabric = make_fabric()
    fabric.launch()
    images = digits.images(torch.arange(64))
    network = prepare_qat(digits_model(digits), example_NCHW=images, freeze_after=10)
    settings = {"ema_decay": 0.9, "checkpoint_every_steps": 2, "clip_norm": 5.0}
    plan = make_plan(digits, folder, **settings)
    torch.manual_seed(7)
    return train(network, plan, fabric=fabric, progress=progress)


@pytest.fixture(scope="module")
def unbroken(digits, tmp_path_factory):
    return run_aware(digits, tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize("stop_at", [5, 13], ids=["before", "after_freezing"])
def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(digits, unbroken, tmp_path, stop_at):
    def stop(step, *_):
        if step == stop_at:
            raise StopError

    with pytest.raises(StopError):
        run_aware(digits, tmp_path, stop)
    resumed = run_aware(digits, tmp_path)
    assert [r["train_loss"] for r in resumed.rows] == [r["train_loss"] for r in unbroken.rows]
    assert resumed.weights.keys() == unbroken.weights.keys()
    assert all(torch.equal(resumed.weights[n], value) for n, value in unbroken.weights.items())


def test_training_mends_what_rounding_breaks(digits, tmp_path, monkeypatch):
    """With 3-bit weights, where rounding hurts, the trained network beats the rounded one."""
    fabric = make_fabric()
    fabric.launch()
    model = digits_model(digits)
    quick = {"num_epochs": 12, "optimizer": {"learning_rate": 0.2}, "validate_every_epochs": 12}
    plan = make_plan(digits, tmp_path / "float", **quick)
    model.load_state_dict(train(model, plan, fabric=fabric, progress=lambda *_: None).weights)
    from understudy.compress import quant_annotate

    monkeypatch.setattr(quant_annotate, "largest_weight", lambda *_: 3)
    monkeypatch.setitem(quant_annotate._WEIGHT_SPECS, 3, quant_annotate._weight_spec(3))
    prepared = prepare_qat(model, example_NCHW=digits.images(torch.arange(256)), freeze_after=60)
    plan = make_plan(digits, tmp_path / "aware", num_epochs=10, optimizer={"learning_rate": 0.05})
    before = plan.validate(prepared.eval())["accuracy"]
    result = train(prepared, plan, fabric=fabric, progress=lambda *_: None)
    prepared.load_state_dict(result.weights)
    after = plan.validate(prepared.eval())["accuracy"]
    assert after > before + 0.05


# What is refused


def test_unknown_float_layers_are_named_with_the_known_ones():
    model = make_model("mlp", {}, (1, 8, 8))
    images = make_images(8, shape=(1, 8, 8))
    with pytest.raises(InputError) as caught:
        prepare_qat(model, example_NCHW=images, float_layers=("network.nine", "network.ten"))
    assert caught.value.problems == (
        "the float layer 'network.nine' is not in the model; expected one of network.layers.1, "
        "network.layers.3, or a module that holds some. Correct the name.",
        "the float layer 'network.ten' is not in the model; expected one of network.layers.1, "
        "network.layers.3, or a module that holds some. Correct the name.",
    )
    assert check_layers(model, ("network.layers.1",)) == []


def test_no_images_and_no_int8_layer_are_refused():
    model = make_model("mlp", {}, (1, 8, 8))
    with pytest.raises(InputError, match="at least two images"):
        prepare_qat(model, example_NCHW=torch.zeros(0, 1, 8, 8))
    with pytest.raises(ModelError, match="no layer of the model is left to quantise"):
        prepare_qat(model, example_NCHW=make_images(4, shape=(1, 8, 8)), float_layers=("network",))


class Branching(nn.Module):
    def forward(self, pixels):
        return pixels.flatten(1) if pixels.mean().item() > 0.5 else -pixels.flatten(1)


def test_a_model_that_cannot_be_captured_is_a_model_error():
    with pytest.raises(ModelError, match="cannot be captured"):
        prepare_qat(Branching(), example_NCHW=make_images(4))


def test_weights_of_another_network_are_refused(family):
    _, _, prepared = family
    with pytest.raises(CheckpointError, match="no fitting"):
        float_weights(prepared, nn.Sequential(nn.Linear(3, 3)))


def test_without_torchao_the_install_command_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torchao'", name="torchao")

    monkeypatch.setattr(quantize.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r'pip install "understudy\[compress\]"'):
        prepare_qat(nn.Sequential(nn.Linear(3, 3)), example_NCHW=make_images(4))


def test_nothing_is_printed_for_developers(caplog, capfd):
    caplog.set_level(logging.WARNING)
    model = make_model("mlp", {}, (1, 8, 8))
    convert_qat(prepare_qat(model, example_NCHW=make_images(8, shape=(1, 8, 8))))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []

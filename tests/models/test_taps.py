"""Taps: the right tensors under the right names, and a network that does not notice."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import onnx
import pytest
import torch
from lightning_fabric import Fabric
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ModelError
from understudy.models.build import NormalizedModel, build_network
from understudy.models.onnx_model import OnnxModel
from understudy.models.taps import (
    Tap,
    Taps,
    as_kind,
    check_taps,
    kind_shape,
    tap_shapes,
    tokens_to_map,
)

SHAPE = (3, 16, 16)
FAMILIES = ["resnet8", "paper_student", "paper_teacher", "separable", "mlp"]


def model_of(name: str) -> NormalizedModel:
    torch.manual_seed(3)
    network = build_network(name, num_classes=7, image_shape=SHAPE)
    return NormalizedModel(network, mean=[0.4] * 3, std=[0.3] * 3, output_order=[4, 2, 0])


def images(count: int = 4) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def hooks_on(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


class Foreign(nn.Module):
    """Tuples, mappings, masks, tokens, a module called twice, one never, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.named = Named()
        self.paired = Paired()
        self.twice = nn.Tanh()
        self.never = nn.Tanh()
        self.labels = Labels()
        self.head = nn.Linear(6, 5)
        self.auxiliary = nn.Linear(6, 5)

    def forward(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        tokens = self.patches(images_NCHW).flatten(2).transpose(1, 2)
        tokens = self.named(tokens)["last"]
        features = self.twice(self.twice(self.paired(tokens)[1].mean(1)))
        self.labels(features)
        logits = self.head(input=features)
        return OrderedDict(loss=None, logits=logits, auxiliary=self.auxiliary(features * 2))


class Named(nn.Module):
    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"last": tokens + 1, "first": tokens}


class Paired(nn.Module):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens.argmax(2), tokens * 2


class Labels(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.argmax(1)


class ConvHead(nn.Module):
    """Classifies with a 1x1 convolution before it averages; in place wherever possible."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features = self.relu(self.norm(self.conv(images_NCHW)))
        return self.classifier(features).mean((2, 3)).flatten(1)


# Names and shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_every_listed_name_can_be_tapped_and_has_the_listed_shape(name: str) -> None:
    model = model_of(name).eval()
    shapes = tap_shapes(model, SHAPE)
    taps = [Tap(layer) for layer in shapes]
    logits_NK, features = Taps(model, taps).run(model, images())
    assert torch.equal(logits_NK, model(images()))
    assert list(features) == [f"{layer}:map" for layer in shapes]
    assert {key: value.shape[1:] for key, value in features.items()} == {
        f"{layer}:map": torch.Size(shape) for layer, shape in shapes.items()
    }
    assert check_taps(model, SHAPE, list(shapes), where="losses") == []


def test_a_network_that_averages_over_mirror_images_has_the_same_layers() -> None:
    model = model_of("resnet")
    expected = tap_shapes(model, SHAPE)
    model.flip_average = True
    assert tap_shapes(model, SHAPE) == expected
    assert model.flip_average


@pytest.mark.parametrize("name", FAMILIES)
def test_every_listed_name_can_be_tapped_in_training(name: str) -> None:
    model = model_of(name).train().to(memory_format=torch.channels_last)
    pixels = images().contiguous(memory_format=torch.channels_last)
    taps = [Tap(layer) for layer in tap_shapes(model, SHAPE)]
    features = Taps(model, taps).run(model, pixels)[1]
    assert len(features) == len(taps)


def test_taps_give_what_the_layers_compute() -> None:
    model = model_of("resnet8").eval()
    network, x = model.network, model.normalize(images())
    taps = [Tap("layer1"), Tap("layer3", "pooled"), Tap("layer3", "attention"), Tap("embedding")]
    logits_NK, features = Taps(model, taps).run(model, images())
    layer1 = network.layer1(F.relu(network.bn1(network.conv1(x))))
    layer3 = network.layer3(network.layer2(layer1))
    assert torch.equal(features["layer1:map"], layer1)
    torch.testing.assert_close(features["layer3:pooled"], layer3.mean((2, 3)))
    torch.testing.assert_close(features["layer3:attention"], (layer3**2).mean(1))
    torch.testing.assert_close(features["embedding:map"], layer3.mean((2, 3)))
    torch.testing.assert_close(network.linear(features["embedding:map"])[:, [4, 2, 0]], logits_NK)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_embedding_is_what_the_last_linear_layer_reads(name: str) -> None:
    model = model_of(name).train()
    taps = Taps(model, [Tap("embedding")])
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    for _ in range(2):  # the second time the classifier is known
        logits_NK, features = taps.run(model, images())
        embedding_ND = features["embedding:map"]
        torch.testing.assert_close(last(embedding_ND)[:, [4, 2, 0]], logits_NK)


def test_the_embedding_of_a_convolution_that_classifies_is_averaged() -> None:
    network = ConvHead().eval()
    logits_NK, features = Taps(network, [Tap("embedding")]).run(network, images())
    embedding_ND = features["embedding:map"]
    assert embedding_ND.shape == (4, 8)
    scores = F.linear(embedding_ND, network.classifier.weight[:, :, 0, 0], network.classifier.bias)
    torch.testing.assert_close(scores, logits_NK)


def test_foreign_outputs_are_tapped_by_their_first_tensor() -> None:
    network = Foreign()
    shapes = tap_shapes(network, SHAPE)
    assert shapes == {
        "embedding": (6,),
        "patches": (6, 4, 4),
        "named": (16, 6),
        "paired": (16, 6),
        "head": (5,),
        "auxiliary": (5,),
    }
    taps = [Tap("named"), Tap("paired", "pooled"), Tap("named", "attention"), Tap("embedding")]
    output, features = Taps(network, taps).run(network, images())
    tokens = network.patches(images()).flatten(2).transpose(1, 2)
    assert torch.equal(features["named:map"], tokens + 1)
    torch.testing.assert_close(features["paired:pooled"], (tokens * 2 + 2).mean(1))
    attention = ((tokens + 1) ** 2).mean(2).view(4, 4, 4)
    torch.testing.assert_close(features["named:attention"], attention)
    # Of two heads of one shape, the one whose output is the network's.
    torch.testing.assert_close(network.head(features["embedding:map"]), output["logits"])


def test_a_classifier_of_another_make_is_found() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 12))

        def forward(self, features: Tensor) -> Tensor:
            return F.normalize(features, dim=1) @ F.normalize(self.weight, dim=1).T

    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 12), nn.ReLU(inplace=True), Cosine())
    features = Taps(network, [Tap("embedding")]).run(network, images())[1]
    expected = F.relu(network[1](images().flatten(1)))
    torch.testing.assert_close(features["embedding:map"], expected)


# Memory and gradients


@pytest.mark.parametrize("kind", ["map", "attention", "pooled"])
@pytest.mark.parametrize("layer", ["norm", "relu"])
def test_operations_in_place_do_not_reach_what_was_tapped(layer: str, kind: str) -> None:
    torch.manual_seed(0)
    network = ConvHead().train()
    pixels = images()
    plain = network.norm(network.conv(pixels))
    if layer == "relu":
        plain = F.relu(plain)
    plain = as_kind(plain, kind)
    plain.square().sum().backward()
    expected = network.conv.weight.grad
    network.zero_grad()
    features = Taps(network, [Tap(layer, kind)]).run(network, pixels)[1]
    tapped = features[f"{layer}:{kind}"]
    torch.testing.assert_close(tapped, plain)
    tapped.square().sum().backward()
    torch.testing.assert_close(network.conv.weight.grad, expected)


def test_the_separable_family_is_tapped_before_its_activations() -> None:
    model = model_of("separable").train()
    block = model.network.blocks[0]
    names = ["stem", "blocks.0.depthwise_norm", "blocks.0.pointwise_norm"]
    features = Taps(model, [Tap(name) for name in names]).run(model, images())[1]
    normed = block.depthwise_norm(block.depthwise(features["stem:map"]))
    torch.testing.assert_close(features["blocks.0.depthwise_norm:map"], normed)
    assert features["blocks.0.pointwise_norm:map"].min() < 0


def test_the_gradients_of_logits_and_features_add_up() -> None:
    model = model_of("separable").eval()
    tapped = "blocks.0.pointwise_norm"

    def gradient(logits_share: float, feature_share: float) -> Tensor:
        model.zero_grad()
        logits_NK, features = Taps(model, [Tap(tapped)]).run(model, images())
        loss = logits_share * logits_NK.square().sum()
        (loss + feature_share * features[f"{tapped}:map"].square().mean()).backward()
        return model.network.stem[0].weight.grad.clone()

    torch.testing.assert_close(gradient(1, 1), gradient(1, 0) + gradient(0, 1))
    model.zero_grad()
    model(images()).square().sum().backward()
    torch.testing.assert_close(model.network.stem[0].weight.grad, gradient(1, 0))


def test_features_are_float32_under_autocast_and_free_of_gradients_in_inference() -> None:
    model = model_of("resnet8").eval()
    taps = Taps(model, [Tap("layer1"), Tap("layer2", "pooled"), Tap("embedding")])
    with torch.autocast("cpu", torch.bfloat16):
        features = taps.run(model, images())[1]
    assert {value.dtype for value in features.values()} == {torch.float32}
    with torch.inference_mode():
        features = taps.run(model, images())[1]
    assert all(value.is_inference() for value in features.values())
    features = Taps(model.double(), [Tap("layer1")]).run(model, images().double())[1]
    assert features["layer1:map"].dtype == torch.float64


# The network does not notice


@pytest.mark.parametrize("name", FAMILIES)
def test_looking_at_a_network_leaves_it_as_it_was(name: str) -> None:
    model = model_of(name).train()
    list(model.modules())[-1].eval()  # a part that is frozen stays so
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(11)
    random = torch.get_rng_state()
    tap_shapes(model, SHAPE)
    check_taps(model, SHAPE, ["embedding", "nothing"], where="losses")
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks_on(model) == 0


def test_a_tapped_run_leaves_no_hooks_and_trains_as_an_untapped_one() -> None:
    tapped, plain = model_of("separable").train(), model_of("separable").train()
    taps = Taps(tapped, [Tap("blocks.0"), Tap("embedding")])
    for _ in range(2):
        assert torch.equal(taps.run(tapped, images())[0], plain(images()))
    assert hooks_on(tapped) == 0
    for key, value in plain.state_dict().items():
        assert torch.equal(tapped.state_dict()[key], value)


def test_hooks_are_gone_when_the_forward_pass_fails() -> None:
    model = model_of("resnet8")
    taps = Taps(model, [Tap("layer1"), Tap("embedding")])
    with pytest.raises(RuntimeError):
        taps.run(model, torch.rand(2, 4, 16, 16))
    assert hooks_on(model) == 0
    broken = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(5))
    with pytest.raises((RuntimeError, ValueError)):
        tap_shapes(broken, (4,))
    assert hooks_on(broken) == 0
    assert broken.training


def test_the_forward_pass_may_be_that_of_a_wrapper() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = model_of("separable").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, _ = fabric.setup(model, optimizer)
    taps = Taps(model, [Tap("blocks.0"), Tap("embedding", "pooled")])
    logits_NK, features = taps.run(prepared, images())
    assert {value.dtype for value in features.values()} == {torch.float32}
    embedding_ND = features["embedding:pooled"]
    expected = model.network.linear(embedding_ND)[:, [4, 2, 0]]
    torch.testing.assert_close(logits_NK, expected, atol=0.02, rtol=0.02)  # bfloat16's rounding
    fabric.backward(features["blocks.0:map"].square().mean())
    assert model.network.stem[0].weight.grad.count_nonzero() > 0
    assert hooks_on(prepared) == 0


def test_no_taps_are_no_work() -> None:
    model = model_of("mlp").eval()
    logits_NK, features = Taps(model, []).run(model, images())
    assert torch.equal(logits_NK, model(images()))
    assert features == {}
    assert check_taps(model, SHAPE, [], where="losses") == []


# Errors


def test_an_unknown_name_lists_the_near_and_all_names_with_shapes() -> None:
    model = model_of("resnet8")
    (problem,) = check_taps(model, SHAPE, ["network.layer3", "pool"], where="distill.losses.hint")
    assert problem.startswith("distill.losses.hint: the network has no layer 'network.layer3', ")
    for part in ("embedding [64], conv1 [16, 16, 16]", "layer2.0 [32, 8, 8]", "linear [7]"):
        assert part in problem
    assert "Did you mean layer3 or" in problem
    with pytest.raises(ModelError, match=r"no layer 'layer4' to tap.*Did you mean layer"):
        Taps(model, [Tap("layer4")])


def test_a_module_called_twice_is_an_error_that_says_so() -> None:
    network = Foreign()
    (problem,) = check_taps(network, SHAPE, ["twice"], where="losses.hint")
    assert problem.startswith("losses.hint: 'twice' is called 2 times in one forward pass;")
    with pytest.raises(ModelError, match="'twice' is called 2 times"):
        Taps(network, [Tap("twice")]).run(network, images())
    assert hooks_on(network) == 0
    (problem,) = check_taps(model_of("separable"), SHAPE, ["blocks.0.activation"], where="x")
    assert "is called 2 times" in problem


@pytest.mark.parametrize("name", ["never", "labels"])
def test_a_module_that_gives_nothing_is_an_error(name: str) -> None:
    network = Foreign()
    (problem,) = check_taps(network, SHAPE, [name], where="x")
    assert f"no layer '{name}'" in problem
    with pytest.raises(ModelError, match=f"'{name}' gave nothing in this forward pass"):
        Taps(network, [Tap(name)]).run(network, images())


def test_activations_inside_fast_convolutions_are_not_offered() -> None:
    model = model_of("paper_student")
    (problem,) = check_taps(model, SHAPE, ["features.0.activation"], where="x")
    assert "Did you mean features.0" in problem


def test_a_network_without_a_classifier_has_no_embedding() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert "embedding" not in tap_shapes(network, SHAPE)
    (problem,) = check_taps(network, SHAPE, ["embedding"], where="x")
    assert "no layer 'embedding' to tap; expected one of: 0 [5, 14, 14]" in problem
    with pytest.raises(ModelError, match=r"gives its logits, so 'embedding' names nothing.*: 0, 1"):
        Taps(network, [Tap("embedding")]).run(network, images())


def test_kinds_are_checked_with_the_names() -> None:
    model = model_of("resnet8")
    taps = [Tap("layer1", "attention"), Tap("embedding", "attention")]
    (problem,) = check_taps(model, SHAPE, taps, where="x")
    assert problem.startswith("x: 'embedding': features of shape (1, 64) for attention")
    with pytest.raises(ModelError, match="a tap of kind 'maps'; expected one of map, pooled"):
        Tap("layer1", "maps")


def test_a_black_box_has_no_features(tmp_path: Path) -> None:
    pixels = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 1, 1])
    logits = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([helper.make_node("Flatten", ["x"], ["y"])], "g", [pixels], [logits])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    box = OnnxModel(tmp_path / "m.onnx", num_classes=3, image_shape=(3, 1, 1))
    model = NormalizedModel(box, mean=[0.0] * 3, std=[1.0] * 3)
    assert tap_shapes(model, (3, 1, 1)) == {}
    assert check_taps(model, (3, 1, 1), [], where="x") == []
    (problem,) = check_taps(model, (3, 1, 1), ["embedding"], where="teacher")
    assert problem.startswith("teacher: features 'embedding' of an ONNX file, a black box;")
    with pytest.raises(ModelError, match="black box; expected a network in PyTorch"):
        Taps(model, [Tap("embedding")])
    assert Taps(model, []).run(model, torch.rand(2, 3, 1, 1))[0].shape == (2, 3)


def test_a_compiled_network_is_refused() -> None:
    model = model_of("mlp")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ModelError, match="of a compiled network"):
        Taps(model, [Tap("embedding")]).run(compiled, images())
    assert Taps(model, []).run(compiled, images())[0].shape == (4, 3)


# Kinds


def test_kinds_of_maps_tokens_and_vectors() -> None:
    maps, tokens, vectors = torch.randn(2, 3, 4, 5), torch.randn(2, 9, 3), torch.randn(2, 6)
    for features in (maps, tokens, vectors):
        assert as_kind(features, "map") is features
    torch.testing.assert_close(as_kind(maps, "pooled"), maps.mean((2, 3)))
    torch.testing.assert_close(as_kind(tokens, "pooled"), tokens.mean(1))
    assert as_kind(vectors, "pooled") is vectors
    torch.testing.assert_close(as_kind(maps, "attention"), maps.pow(2).mean(1))
    assert as_kind(torch.full((1, 2, 2, 2), 300.0).half(), "attention").max() == 90_000
    assert kind_shape((3, 4, 5), "attention") == (4, 5)
    assert kind_shape((9, 3), "attention") == (3, 3)
    assert kind_shape((6,), "pooled") == (6,)
    with pytest.raises(ModelError, match="a vector has no positions"):
        as_kind(vectors, "attention")


def test_tokens_are_laid_out_row_by_row_without_the_class_token() -> None:
    maps = torch.randn(2, 3, 4, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.equal(tokens_to_map(tokens), maps)
    with_class_token = torch.cat([torch.randn(2, 1, 3), tokens], dim=1)
    assert torch.equal(tokens_to_map(with_class_token), maps)
    with pytest.raises(ModelError, match=r"12 tokens.*expected those of a square grid"):
        tokens_to_map(torch.randn(2, 12, 3))

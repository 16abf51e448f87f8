import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from understudy.errors import InputError, ModelError, ParityError
from understudy.export.artifact_parity import check_artifact_parity, require_artifact_parity
from understudy.export.divergence import OUTPUT, find_divergence, layer_graph
from understudy.export.target import Artifact, ExportSource, find_target, open_artifact
from understudy.models.build import NormalizedModel, build_network

CLASS_NAMES = ("ant", "bee", "cat", "dog")
IMAGE_SHAPE = (3, 8, 8)


def make_model() -> NormalizedModel:
    """A network with branches: where a block changes the shape, a convolution is its shortcut."""
    torch.manual_seed(0)
    arguments = {"widths": (4, 8, 8), "shortcut": "conv"}
    network = build_network("resnet8", num_classes=4, image_shape=IMAGE_SHAPE, arguments=arguments)
    network.train()
    network(torch.randn(32, *IMAGE_SHAPE))
    return NormalizedModel(network, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)).eval()


def make_images(num_images: int = 110) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (num_images, *IMAGE_SHAPE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def make_source(model: nn.Module) -> ExportSource:
    return ExportSource(model, IMAGE_SHAPE, CLASS_NAMES, calibration_NCHW=make_images(32))


class Faulty:
    """The target ``onnx``, with a fault: one layer's weights are written wrongly."""

    PRECISIONS = ("float32", "int8")
    RUNS_HERE = True

    def __init__(self, layer: str, *, factor: float = 1.5) -> None:
        self.layer = layer
        self.factor = factor
        self.num_exports = 0

    def export(self, source: ExportSource, folder: Path, *, precision: str) -> Artifact:
        self.num_exports += 1
        broken = copy.deepcopy(source.model)
        (weight,) = (
            p for name, p in broken.named_parameters() if name.endswith(f"{self.layer}.weight")
        )
        with torch.no_grad():
            weight[0] *= self.factor
        source = replace(source, model=broken)
        return find_target("onnx").export(source, folder, precision=precision)


@pytest.fixture(scope="module")
def model() -> NormalizedModel:
    return make_model()


@pytest.fixture(scope="module")
def float32(model: NormalizedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("float32")
    return find_target("onnx").export(make_source(model), folder, precision="float32")


def test_float32_parity_is_that_of_the_plain_reference(model, float32):
    images_NCHW = make_images()
    parity = check_artifact_parity(model, float32, images_NCHW)
    given_NK = torch.from_numpy(open_artifact(float32)((images_NCHW.float() / 255).numpy()))
    with torch.inference_mode():
        expected_NK = model(images_NCHW)
    difference_NK = (given_NK - expected_NK).abs()
    assert parity.max_abs_difference == pytest.approx(difference_NK.max().item(), abs=1e-6)
    assert parity.mean_abs_difference == pytest.approx(difference_NK.mean().item(), abs=1e-6)
    assert parity.tolerance == pytest.approx(1e-4 * max(1.0, expected_NK.abs().max().item()))
    assert (parity.num_images, parity.top1_agreement, parity.passed) == (110, 1.0, True)
    assert json.loads(json.dumps(parity.to_json()))["target"] == "onnx"
    require_artifact_parity(parity, float32)


def other_model(model: NormalizedModel) -> NormalizedModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.network.linear.weight.mul_(1.1)
    return other


def test_float32_is_judged_by_the_difference(model, float32):
    parity = check_artifact_parity(other_model(model), float32, make_images())
    assert not parity.passed
    with pytest.raises(ParityError, match=r"\(onnx, float32\) differs .*a difference of at most"):
        require_artifact_parity(parity, float32)


def test_int8_is_judged_by_the_agreement(model, float32):
    """The same file under the name of int8: only what is asked of it changes."""
    int8 = replace(float32, precision="int8")
    other = other_model(model)
    parity = check_artifact_parity(other, int8, make_images(), min_agreement=0.5)
    assert parity.passed
    assert parity.max_abs_difference > parity.tolerance
    with torch.no_grad():
        other.network.linear.weight.mul_(-1)
    parity = check_artifact_parity(other, int8, make_images(), min_agreement=0.99)
    assert not parity.passed
    with pytest.raises(ParityError, match=r"expected a top-1 agreement of at least 99\.00%"):
        require_artifact_parity(parity, int8)


def test_what_cannot_be_compared_is_an_error(model, float32, tmp_path):
    with pytest.raises(InputError, match="expected uint8 images"):
        check_artifact_parity(model, float32, make_images(4).float())
    with pytest.raises(ParityError, match="does not run on images of shape"):
        check_artifact_parity(model, float32, make_images(4)[..., :7])
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.network.linear.bias[0] = torch.nan
    with pytest.raises(ModelError, match="the model returns NaN or infinity for 4 of 4 images"):
        check_artifact_parity(broken, float32, make_images(4))
    bad = find_target("onnx").export(make_source(broken), tmp_path, precision="float32")
    with pytest.raises(ParityError, match="returns NaN or infinity"):
        check_artifact_parity(model, bad, make_images(4))


def test_layers_are_in_the_order_of_the_computation_and_know_their_origins(model):
    graph = layer_graph(model, IMAGE_SHAPE)
    place = {name: number for number, name in enumerate(graph.order)}
    assert graph.order[0] == "network.conv1"
    assert graph.order[-2:] == ("network", OUTPUT)
    block = "network.layer2.0"
    assert place[f"{block}.shortcut"] < place[f"{block}.bn2"] < place[block]
    assert f"{block}.conv1" not in graph.origins[f"{block}.shortcut"]
    assert {f"{block}.shortcut", f"{block}.bn2"} <= graph.origins[block]
    for name, origins in graph.origins.items():
        assert all(place[origin] < place[name] for origin in origins)


def test_the_search_finds_a_fault_in_any_layer_with_few_questions(model):
    graph = layer_graph(model, IMAGE_SHAPE)
    for faulty in graph.order:
        asked: list[str] = []

        def fails(name: str, faulty: str = faulty, asked: list[str] = asked) -> bool:
            asked.append(name)
            return name == faulty or faulty in graph.origins[name]

        assert graph.first_failing(fails) == faulty
        assert len(asked) <= 8 < len(graph.order)


class Branches(nn.Module):
    """Two branches; the second is computed after the first and does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.main = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.side = nn.Conv2d(4, 4, 1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features_NCHW = self.stem(images_NCHW)
        return (self.main(features_NCHW) + self.side(features_NCHW)).mean(dim=(2, 3))


@pytest.mark.parametrize("every_layer", [False, True])
def test_the_layer_that_a_target_breaks_is_named(every_layer):
    """Behind it lies a layer of another branch that is right, where plain halving goes wrong."""
    torch.manual_seed(0)
    source = make_source(Branches().eval())
    order = layer_graph(source.model, IMAGE_SHAPE).order
    assert order == ("stem", "main.0", "main.1", "main", "side", OUTPUT)
    target = Faulty("main.0")
    images_NCHW = make_images(4).float() / 255
    found = find_divergence(source, target, images_NCHW, every_layer=every_layer)
    assert found.first == "main.0"
    assert found.target == "onnx"
    by_name = {row.name: row.relative_difference for row in found.rows}
    assert list(by_name) == [name for name in order if name in by_name]
    assert target.num_exports == len(by_name)
    assert len(by_name) == len(order) if every_layer else len(by_name) < len(order)
    assert by_name["main.0"] > 0.01
    assert by_name[OUTPUT] > found.tolerance
    assert by_name["stem"] < 1e-5
    assert by_name.get("side", 0) < 1e-5
    assert found.not_exported == ()
    assert json.loads(json.dumps(found.to_json()))["first"] == found.first


@pytest.mark.parametrize("every_layer", [False, True])
def test_the_layer_is_named_also_where_mirror_images_are_averaged(every_layer):
    torch.manual_seed(0)
    given = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "flip_average": True}
    source = make_source(NormalizedModel(Branches(), **given).eval())
    found = find_divergence(source, Faulty("main.0"), make_images(4), every_layer=every_layer)
    assert found.first == "network.main.0"
    assert found.target == "onnx"
    right = find_divergence(source, find_target("onnx"), make_images(4), every_layer=every_layer)
    assert right.first is None


def test_layers_that_stay_in_float_do_not_end_the_search():
    """A part of such layers alone has nothing to quantise."""
    torch.manual_seed(0)
    source = replace(make_source(Branches().eval()), float_layers=("stem",))
    found = find_divergence(
        source,
        Faulty("main.0", factor=4),
        make_images(4).float() / 255,
        precision="int8",
        tolerance=0.1,
        every_layer=True,
    )
    assert found.first == "main.0"
    assert found.not_exported == ("stem",)


def test_no_layer_is_named_where_the_logits_agree(model):
    found = find_divergence(make_source(model), find_target("onnx"), make_images(4))
    assert found.first is None
    assert [row.name for row in found.rows] == [OUTPUT]
    assert found.rows[0].relative_difference < 1e-5


def test_divergence_needs_images_and_a_target_that_runs(model):
    with pytest.raises(InputError, match="on 0 images with a target that runs here"):
        find_divergence(make_source(model), find_target("onnx"), make_images(0))
    with pytest.raises(InputError, match="a target that does not run here"):
        find_divergence(make_source(model), find_target("coreml"), make_images(4))

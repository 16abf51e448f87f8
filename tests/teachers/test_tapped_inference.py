import pytest
import torch
from test_inference import NATIVE, Awkward, needs_kernels, random_statistics
from torch import nn
from torch.nn import functional as F

from understudy.errors import ModelError
from understudy.models.build import NormalizedModel, build_network
from understudy.models.taps import Tap, Taps
from understudy.teachers.inference import TOLERANCE, fast_inference

IMAGE_SHAPE = (3, 16, 16)
RUNTIMES = ("pytorch", "pytorch folded channels-last", "onnxruntime")
# Nested layers, a convolution before its norm, a norm, one layer in several kinds.
TAPS = (
    Tap("layer2"),
    Tap("layer2", "attention"),
    Tap("layer2.0.conv1"),
    Tap("layer2.0.bn2", "pooled"),
    Tap("conv1"),
    Tap("embedding"),
)


@pytest.fixture(scope="module", name="images_NCHW")
def some_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (64, *IMAGE_SHAPE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module", name="model")
def teacher():
    torch.manual_seed(0)
    arguments = {"widths": [16, 16, 32]}
    network = build_network("resnet8", num_classes=10, image_shape=IMAGE_SHAPE, arguments=arguments)
    model = NormalizedModel(
        random_statistics(network), mean=[0.5] * 3, std=[0.25] * 3, output_order=range(9, -1, -1)
    )
    return model.eval()


def plain(model, taps, images_NCHW):
    with torch.no_grad():
        return Taps(model, taps).run(model, images_NCHW)


def assert_agrees(outputs, expected, *, tolerance=TOLERANCE):
    logits_NK, features = expected
    assert (outputs.logits_NK - logits_NK).abs().max() <= tolerance * max(1, logits_NK.abs().max())
    assert list(outputs.features) == list(features)
    for key, values in outputs.features.items():
        assert values.dtype == torch.float32
        assert values.shape == features[key].shape
        difference = (values - features[key]).abs().max()
        assert difference <= tolerance * features[key].abs().max(), key


@pytest.mark.parametrize("runtime", [*RUNTIMES, pytest.param(NATIVE, marks=needs_kernels)])
def test_every_runtime_gives_the_features_of_plain_pytorch(model, images_NCHW, runtime):
    infer = fast_inference(
        model,
        image_shape=IMAGE_SHAPE,
        sample_images_NCHW=images_NCHW,
        runtime=runtime,
        taps=(*TAPS, TAPS[0]),
    )
    assert infer.taps == TAPS
    for count in (64, 1, 7):
        expected = plain(model, TAPS, images_NCHW[:count])
        assert_agrees(infer.outputs(images_NCHW[:count]), expected)
        assert torch.equal(infer(images_NCHW[:count]), infer.outputs(images_NCHW[:count]).logits_NK)
    assert expected[1]["embedding:map"].shape == (7, 32)


def test_float32_is_plain_pytorch_bit_for_bit(model, images_NCHW):
    infer = fast_inference(model, image_shape=IMAGE_SHAPE, precision="float32", taps=TAPS)
    logits_NK, features = plain(model, TAPS, images_NCHW)
    outputs = infer.outputs(images_NCHW)
    assert torch.equal(outputs.logits_NK, logits_NK)
    assert all(torch.equal(outputs.features[key], features[key]) for key in features)


def test_auto_takes_the_fastest_runtime_that_agrees_in_the_features(model, images_NCHW):
    infer = fast_inference(
        model, image_shape=IMAGE_SHAPE, sample_images_NCHW=images_NCHW, taps=TAPS
    )
    assert all(candidate.refusal is None for candidate in infer.candidates)
    assert all(0 <= c.feature_difference <= TOLERANCE for c in infer.candidates)
    assert any(c.feature_difference > 0 for c in infer.candidates)
    fastest = max(infer.candidates, key=lambda candidate: candidate.images_per_second)
    assert infer.runtime == fastest.runtime
    assert_agrees(infer.outputs(images_NCHW), plain(model, TAPS, images_NCHW))


@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 0.05), ("int8", 0.2)])
def test_narrow_precision_gives_features_too(model, images_NCHW, precision, limit):
    infer = fast_inference(
        model,
        image_shape=IMAGE_SHAPE,
        precision=precision,
        sample_images_NCHW=images_NCHW,
        taps=TAPS,
    )
    expected = plain(model, TAPS, images_NCHW)
    assert_agrees(infer.outputs(images_NCHW), expected, tolerance=limit)
    assert infer.candidates[0].feature_difference > TOLERANCE


class InPlace(nn.Module):
    """Writes over what a tapped layer has given, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, images_NCHW):
        x = self.relu(self.norm(self.stem(images_NCHW)))
        kept = x
        x = self.body(x)
        x += kept
        return self.head(x.relu_()).mean((2, 3))


@pytest.mark.parametrize("runtime", [*RUNTIMES, pytest.param(NATIVE, marks=needs_kernels)])
def test_features_are_those_before_the_network_wrote_over_them(images_NCHW, runtime):
    torch.manual_seed(0)
    network = random_statistics(InPlace())
    model = NormalizedModel(network, mean=[0.5] * 3, std=[0.25] * 3).eval()
    taps = [Tap(name) for name in ("stem", "norm", "body", "body.0", "embedding")]
    infer = fast_inference(model, image_shape=IMAGE_SHAPE, runtime=runtime, taps=taps)
    expected = plain(model, taps, images_NCHW)
    assert expected[1]["norm:map"].min() < 0
    assert expected[1]["embedding:map"].shape == (64, 16)
    assert_agrees(infer.outputs(images_NCHW), expected)


@needs_kernels
@pytest.mark.parametrize("name", ["stem", "widen", "b", "a", "c"])
def test_taps_keep_native_convolutions_from_changing_what_others_read(name):
    """The same network as without taps; its layers called several times cannot be tapped."""
    torch.manual_seed(0)
    model = Awkward().eval()
    images_NCHW = torch.randint(256, (3, 3, 8, 12), dtype=torch.uint8)
    infer = fast_inference(model, image_shape=(3, 8, 12), runtime=NATIVE, taps=[Tap(name)])
    outputs = infer.outputs(images_NCHW)
    with torch.no_grad():
        logits_NK = model(images_NCHW)
    assert (outputs.logits_NK - logits_NK).abs().max() <= TOLERANCE * logits_NK.abs().max()
    if name in ("stem", "widen"):
        assert_agrees(outputs, plain(model, [Tap(name)], images_NCHW))


class OtherFeatures(nn.Module):
    """Answers alike in every layout, by another way in channels-last: as a fault would."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, images_NCHW):
        pooled_NC = images_NCHW.float().mean((2, 3))
        last = images_NCHW.is_contiguous(memory_format=torch.channels_last)
        self.layer(pooled_NC + 1000 if last else pooled_NC)
        return pooled_NC


def test_a_runtime_that_disagrees_in_features_is_refused(images_NCHW):
    arguments = {"image_shape": IMAGE_SHAPE, "sample_images_NCHW": images_NCHW, "num_images": 1}
    infer = fast_inference(OtherFeatures(), **arguments)
    assert infer.candidates[1].refusal is None
    infer = fast_inference(OtherFeatures(), **arguments, taps=[Tap("layer")])
    assert infer.runtime != "pytorch folded channels-last"
    assert "features differ by" in (infer.candidates[1].refusal or "")


def test_a_network_that_cannot_be_traced_is_tapped_in_its_parts(images_NCHW):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Linear(8, 4)

        def forward(self, images_NCHW):
            pooled = F.relu(self.body(images_NCHW.float() / 255)).mean((2, 3))
            return self.head(pooled if pooled.sum().item() < 1e9 else pooled * 2)

    torch.manual_seed(0)
    model = random_statistics(Branching()).eval()
    taps = [Tap("body"), Tap("body.0", "pooled"), Tap("embedding")]
    for runtime in RUNTIMES[:2]:
        infer = fast_inference(model, image_shape=IMAGE_SHAPE, runtime=runtime, taps=taps)
        assert_agrees(infer.outputs(images_NCHW), plain(model, taps, images_NCHW))


def test_an_unknown_layer_is_refused(model):
    with pytest.raises(ModelError, match="no layer 'layer9' to tap"):
        fast_inference(model, image_shape=IMAGE_SHAPE, taps=[Tap("layer9")])


def test_the_model_is_as_it_was(model, images_NCHW):
    before = [(name, type(module)) for name, module in model.named_modules()]
    given = {"image_shape": IMAGE_SHAPE, "sample_images_NCHW": images_NCHW, "num_images": 1}
    fast_inference(model, **given, taps=TAPS)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert not any(module._forward_hooks for module in model.modules())

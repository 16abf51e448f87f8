import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from understudy.errors import InputError, ModelError
from understudy.models.build import NormalizedModel, build_network
from understudy.models.native import kernels
from understudy.teachers.folding import folded
from understudy.teachers.inference import NATIVE, TOLERANCE, fast_inference
from understudy.teachers.native_conv import FrozenConv3x3, with_native_convolutions

IMAGE_SHAPE = (3, 16, 16)


def random_statistics(module: nn.Module) -> nn.Module:
    """Batch norms of a new network are the identity, which any folding gets right."""
    generator = torch.Generator().manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d):
            for values in (child.running_mean, child.bias.data):
                values.copy_(torch.randn(values.shape, generator=generator) * 0.1)
            for values in (child.running_var, child.weight.data):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return module


@pytest.fixture(scope="module", name="images_NCHW")
def some_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (64, *IMAGE_SHAPE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    arguments = {"widths": [8, 8, 16]}
    network = build_network("resnet8", num_classes=10, image_shape=IMAGE_SHAPE, arguments=arguments)
    model = NormalizedModel(
        random_statistics(network), mean=[0.5] * 3, std=[0.25] * 3, output_order=range(9, -1, -1)
    )
    return model.eval()


@pytest.fixture(scope="module", name="expected_NK")
def plain_outputs(teacher, images_NCHW):
    with torch.no_grad():
        return teacher(images_NCHW)


def test_auto_takes_the_fastest_runtime_that_agrees(teacher, images_NCHW, expected_NK, caplog):
    with caplog.at_level(logging.INFO, logger="understudy"):
        infer = fast_inference(teacher, image_shape=IMAGE_SHAPE, sample_images_NCHW=images_NCHW)
    assert infer.precision == "float32"
    by_name = {candidate.runtime: candidate for candidate in infer.candidates}
    names = ["pytorch", "pytorch folded channels-last", NATIVE, "onnxruntime"]
    assert list(by_name) == [name for name in names if name != NATIVE or kernels() is not None]
    assert all(candidate.refusal is None for candidate in infer.candidates)
    assert by_name[infer.runtime].images_per_second == max(
        candidate.images_per_second for candidate in infer.candidates
    )
    limit = TOLERANCE * max(1, expected_NK.abs().max())
    for count in (64, 1, 7):
        logits_NK = infer(images_NCHW[:count])
        assert logits_NK.dtype == torch.float32
        assert (logits_NK - expected_NK[:count]).abs().max() <= limit
    assert f"The teacher runs in {infer.runtime}" in caplog.text


@pytest.mark.parametrize("runtime", ["pytorch", "pytorch folded channels-last"])
def test_a_runtime_can_be_asked_for(teacher, images_NCHW, expected_NK, runtime):
    infer = fast_inference(teacher, image_shape=IMAGE_SHAPE, runtime=runtime)
    assert (infer.runtime, infer.precision, infer.candidates) == (runtime, "float32", ())
    assert torch.allclose(infer(images_NCHW), expected_NK, atol=1e-4)


def test_float32_is_plain_pytorch_bit_for_bit(teacher, images_NCHW, expected_NK):
    infer = fast_inference(teacher, image_shape=IMAGE_SHAPE, precision="float32")
    assert infer.runtime == "pytorch"
    assert torch.equal(infer(images_NCHW), expected_NK)


@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_narrow_precision_is_measured_and_named(
    teacher, images_NCHW, expected_NK, precision, limit
):
    infer = fast_inference(
        teacher, image_shape=IMAGE_SHAPE, precision=precision, sample_images_NCHW=images_NCHW
    )
    [measured] = infer.candidates
    assert infer.precision == precision
    assert 0 < measured.max_abs_difference < limit * expected_NK.abs().max()
    assert 0 < measured.kl < 0.01
    difference = (infer(images_NCHW) - expected_NK).abs().max().item()
    assert difference == pytest.approx(measured.max_abs_difference, rel=0.5)


def test_few_images_do_not_pay_for_an_export(teacher, images_NCHW):
    infer = fast_inference(
        teacher, image_shape=IMAGE_SHAPE, sample_images_NCHW=images_NCHW, num_images=100
    )
    assert infer.candidates[-1].refusal == "too few images to repay the export"
    assert infer.runtime != "onnxruntime"


class Untraceable(nn.Module):
    """Branches on values, so neither tracing nor exporting works; its parts can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, images_NCHW):
        pooled = self.body(images_NCHW.float() / 255).mean((2, 3))
        if pooled.sum().item() > 1e9:
            pooled = pooled * 2
        return self.head(pooled)


def test_a_teacher_that_cannot_be_exported_runs_in_pytorch(images_NCHW):
    torch.manual_seed(0)
    model = random_statistics(Untraceable()).eval()
    infer = fast_inference(model, image_shape=IMAGE_SHAPE, sample_images_NCHW=images_NCHW)
    assert infer.runtime.startswith("pytorch")
    assert infer.candidates[-1].refusal
    with torch.no_grad():
        assert torch.allclose(infer(images_NCHW), model(images_NCHW), atol=1e-5)


class Wrong(nn.Module):
    """Answers differently in channels-last, as a kernel with a fault would."""

    def forward(self, images_NCHW):
        pooled_NC = images_NCHW.float().mean((2, 3))
        last = images_NCHW.is_contiguous(memory_format=torch.channels_last)
        return pooled_NC + 1000 if last else pooled_NC


def test_a_runtime_that_disagrees_is_refused(images_NCHW):
    infer = fast_inference(
        Wrong(), image_shape=IMAGE_SHAPE, sample_images_NCHW=images_NCHW, num_images=1
    )
    assert infer.runtime != "pytorch folded channels-last"
    assert "differs by 1e+03" in (infer.candidates[1].refusal or "")


class Broken(nn.Module):
    """Divides by the brightness, which black pictures have none of."""

    def forward(self, images_NCHW):
        pooled_NC = images_NCHW.float().mean((2, 3))
        return pooled_NC / pooled_NC


def test_a_teacher_whose_answers_are_not_finite_is_refused(images_NCHW):
    images_NCHW = images_NCHW.clone()
    images_NCHW[[3, 8]] = 0
    text = "the teacher's answers are not finite for 2 of 64 sample pictures"
    with pytest.raises(ModelError, match=text):
        fast_inference(Broken(), image_shape=IMAGE_SHAPE, sample_images_NCHW=images_NCHW)


class Random(nn.Module):
    """Drops pixels in evaluation mode as well."""

    def forward(self, images_NCHW):
        return F.dropout(images_NCHW.float(), training=True).mean((2, 3))


def test_a_teacher_that_answers_by_chance_is_refused(images_NCHW):
    with pytest.raises(ModelError, match="answers the same pictures differently each time"):
        fast_inference(
            Random(), image_shape=IMAGE_SHAPE, sample_images_NCHW=images_NCHW, num_images=1
        )


def test_bad_requests_are_listed_together(teacher, images_NCHW):
    with pytest.raises(InputError, match="precision is 'float8'"):
        fast_inference(teacher, image_shape=IMAGE_SHAPE, precision="float8")
    with pytest.raises(InputError, match="int8 on 'cpu' with 5 images"):
        fast_inference(
            teacher,
            image_shape=IMAGE_SHAPE,
            precision="int8",
            sample_images_NCHW=images_NCHW[:5],
        )
    with pytest.raises(InputError, match=r"the runtime 'tensorrt'.*pytorch"):
        fast_inference(teacher, image_shape=IMAGE_SHAPE, runtime="tensorrt")


class Reused(nn.Module):
    """One convolution called twice, one norm after a sum, one linear layer with its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.after_sum = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 5)
        self.linear_norm = nn.BatchNorm1d(5)

    def forward(self, images_NCHW):
        once = self.norm(self.shared(images_NCHW))
        twice = F.relu(self.shared(once))
        return self.linear_norm(self.linear(self.after_sum(once + twice).mean((2, 3))))


def test_folding_keeps_the_function_and_removes_norms(teacher, images_NCHW, expected_NK):
    model = random_statistics(Reused()).eval()
    images = images_NCHW.float() / 255
    less = folded(model)
    with torch.no_grad():
        assert torch.allclose(less(images), model(images), atol=1e-5)
        assert torch.allclose(folded(teacher)(images_NCHW), expected_NK, atol=1e-4)
    # The shared convolution cannot carry a norm that only one of its calls has.
    names = [name for name, part in less.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert names == ["norm", "after_sum"]
    folded_names = {type(part) for part in folded(teacher).modules()}
    assert nn.BatchNorm2d not in folded_names


needs_kernels = pytest.mark.skipif(
    kernels() is None, reason="no native kernels: they need a C compiler"
)


@needs_kernels
@pytest.mark.parametrize(
    ("widths", "side"), [([16, 32, 64], 16), ([16, 16, 48], 32), ([16, 24, 32], 20), ([16] * 3, 15)]
)
def test_native_convolutions_compute_the_same(widths, side):
    torch.manual_seed(0)
    shape = (3, side, side)
    network = build_network(
        "resnet14", num_classes=10, image_shape=shape, arguments={"widths": widths}
    )
    model = NormalizedModel(random_statistics(network), mean=[0.5] * 3, std=[0.25] * 3).eval()
    images_NCHW = torch.randint(256, (70, *shape), dtype=torch.uint8)
    infer = fast_inference(model, image_shape=shape, runtime=NATIVE)
    with torch.no_grad():
        expected_NK = model(images_NCHW)
    for count in (70, 34, 1):
        logits_NK = infer(images_NCHW[:count])
        limit = TOLERANCE * max(1, expected_NK.abs().max())
        assert (logits_NK - expected_NK[:count]).abs().max() <= limit
    assert len(infer(images_NCHW[:0])) == 0


@needs_kernels
def test_sums_and_relus_are_fused_into_native_convolutions():
    network = build_network("resnet8", num_classes=10, image_shape=(3, 32, 32)).eval()
    traced = with_native_convolutions(network)
    layers = dict(traced.named_modules())
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    frozen = [node for node in calls if isinstance(layers[node.target], FrozenConv3x3)]
    assert len(frozen) == 4
    # The stem's and the strided convolutions' are left.
    assert sum(node.target is F.relu for node in traced.graph.nodes) == 3


class Awkward(nn.Module):
    """Sums and ReLUs that must not be taken along, or only with care."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.widen = nn.Conv2d(16, 32, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images_NCHW):
        x = self.stem(images_NCHW.float() / 255)
        first = self.a(x)
        view = first[:, :, 1:]
        x = self.b(first) + first  # the input itself, and read again by the view
        x = self.relu(self.c(x) + x.mean((2, 3), keepdim=True))  # another shape
        late = self.c(x)  # a layer called twice
        x = self.relu(x)
        x = late + x
        before = self.a(x)
        x += self.b(x)  # changes x
        twice = self.c(before)
        both = twice.relu() + twice  # two readers
        once_more = self.b(both) + before  # its last reader: written over
        pooled = torch.cat([t.mean((2, 3)) for t in (x, once_more, view)], 1)
        return torch.cat([pooled, self.widen(once_more).relu_().mean((2, 3)) + 1], 1)


@needs_kernels
def test_native_convolutions_respect_other_readers():
    torch.manual_seed(0)
    model = Awkward().eval()
    images_NCHW = torch.randint(256, (3, 3, 8, 12), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images_NCHW)
        difference = with_native_convolutions(model)(images_NCHW) - expected
    assert difference.abs().max() <= TOLERANCE * expected.abs().max()


def test_native_convolutions_are_offered_only_where_they_are(teacher, images_NCHW, monkeypatch):
    without = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    for model, switch in ((without, "1"), (teacher, "0")):
        monkeypatch.setenv("UNDERSTUDY_NATIVE", switch)
        kernels.cache_clear()
        with pytest.raises(InputError, match=f"the runtime '{NATIVE}'"):
            fast_inference(model, image_shape=IMAGE_SHAPE, runtime=NATIVE)
    monkeypatch.undo()
    kernels.cache_clear()

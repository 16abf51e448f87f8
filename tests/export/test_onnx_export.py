import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from understudy.errors import InputError, ModelError, ParityError
from understudy.export.onnx_file import (
    DEFAULT_OPSET,
    METADATA_KEYS,
    export_onnx,
    read_onnx_facts,
)
from understudy.export.onnx_run import onnx_logits
from understudy.export.parity import Parity, check_parity, require_parity

CLASS_NAMES = ("ant", "bee", "größer", "dog, wild")
IMAGE_SHAPE = (3, 8, 8)


class TinyNormalized(nn.Module):
    """Takes uint8 or [0, 1] floats, normalises inside: what the exporter is given in real runs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        )
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.1]).reshape(1, 3, 1, 1))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if not images_NCHW.is_floating_point():
            images_NCHW = images_NCHW.float() / 255
        return self.network((images_NCHW - self.mean) / self.std)


@torch.library.custom_op("understudy_tests::twist", mutates_args=())
def twist(values: Tensor) -> Tensor:
    return values.flip(-1).clone()


@twist.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


class Twist(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return twist(values)


class Svd(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.linalg.svdvals(values)


class BranchOnValue(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * 2 if values.mean().item() > 0.5 else values


class FixedBatch(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.reshape(2, 3, 8, 8)


def make_model() -> TinyNormalized:
    torch.manual_seed(0)
    model = TinyNormalized()
    model(torch.rand(16, *IMAGE_SHAPE))  # running statistics that are not 0 and 1
    return model


def make_images(num_images: int = 110) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_images, *IMAGE_SHAPE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyNormalized, Path]:
    model, path = make_model(), tmp_path_factory.mktemp("export") / "student.onnx"
    export_onnx(
        model,
        path,
        image_shape=IMAGE_SHAPE,
        class_names=CLASS_NAMES,
        metadata={"recipe_hash": "c0ffee"},
    )
    return model, path


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_raw_pixels_in_and_logits_out_at_any_batch_size(exported, batch_size):
    model, path = exported
    images_NCHW = make_images(batch_size)
    (logits_NK,) = session_of(path).run(
        ["logits"], {"images": images_NCHW.numpy().astype(np.float32) / 255}
    )
    # The plain reference: scale, normalise by hand, run the bare network.
    pixels_NCHW = images_NCHW.float() / 255
    normalised = (pixels_NCHW - torch.tensor([0.5, 0.4, 0.3]).reshape(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.1]
    ).reshape(3, 1, 1)
    with torch.no_grad():
        model.network.eval()
        expected_NK = model.network(normalised)
        model.network.train()
    np.testing.assert_allclose(logits_NK, expected_NK.numpy(), atol=1e-5)


def test_metadata_is_readable_by_the_runtime_alone(exported):
    _, path = exported
    entries = session_of(path).get_modelmeta().custom_metadata_map
    assert set(METADATA_KEYS) == set(entries)
    assert json.loads(entries["understudy.class_names"]) == list(CLASS_NAMES)
    assert entries["understudy.recipe_hash"] == "c0ffee"
    assert json.loads(entries["understudy.input"]) == {
        "name": "images",
        "dtype": "float32",
        "layout": "NCHW",
        "range": [0, 1],
        "image_shape": [3, 8, 8],
    }


def test_facts_read_back(exported):
    _, path = exported
    facts = read_onnx_facts(path)
    assert facts.class_names == CLASS_NAMES
    assert (facts.input_name, facts.input_shape) == ("images", (None, 3, 8, 8))
    assert (facts.output_name, facts.output_shape) == ("logits", (None, 4))
    assert facts.opset == DEFAULT_OPSET
    assert facts.size_bytes == path.stat().st_size
    json.dumps(facts.to_json())


def test_the_exporters_bulk_is_gone(exported):
    _, path = exported
    proto = onnx.load(path)
    assert not proto.graph.value_info
    assert not proto.doc_string
    for owner in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        assert not owner.doc_string
        assert not owner.metadata_props
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    assert path.stat().st_size < weights + 2500
    # Dropout is gone and batch normalisation folded into the convolution.
    assert {"Dropout", "BatchNormalization"}.isdisjoint({node.op_type for node in proto.graph.node})


def test_same_model_same_bytes_and_nothing_is_left_behind(exported, tmp_path, capfd):
    model, path = exported
    again = tmp_path / "again.onnx"
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(
            model,
            again,
            image_shape=IMAGE_SHAPE,
            class_names=CLASS_NAMES,
            metadata={"recipe_hash": "c0ffee"},
        )
    assert not caught
    assert again.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.onnx"]
    assert logging.getLogger("torch.onnx").level == level
    # The model given is neither put in evaluation mode nor keeps hooks of the tracing.
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Twist(), r"layer 1\.0 \(Twist\) .*no operator for understudy_tests\.twist"),
        (Svd(), r"layer 1\.0 \(Svd\) cannot be exported .*svd"),
        (BranchOnValue(), r"layer 1\.0 \(BranchOnValue\) cannot be exported"),
        (FixedBatch(), r"the model cannot be exported .*only for the batch size"),
    ],
)
def test_a_layer_that_onnx_cannot_express_is_named(layer, message, tmp_path, capfd):
    out = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    model = nn.Sequential(nn.ReLU(), nn.Sequential(layer), out).eval()
    model(torch.rand(2, *IMAGE_SHAPE))
    with pytest.raises(ModelError, match=message):
        export_onnx(model, tmp_path / "no.onnx", image_shape=IMAGE_SHAPE, class_names=CLASS_NAMES)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_class_names_and_opset_must_fit(tmp_path):
    model, path = make_model(), tmp_path / "no.onnx"
    with pytest.raises(ModelError, match=r"returns \(2, 4\); expected logits of shape \(2, 3\)"):
        export_onnx(model, path, image_shape=IMAGE_SHAPE, class_names=CLASS_NAMES[:3])
    with pytest.raises(InputError, match=r"opset is 11; expected 18 to 23"):
        export_onnx(model, path, image_shape=IMAGE_SHAPE, class_names=CLASS_NAMES, opset=11)


def test_facts_of_a_broken_file(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x0anot a model")
    with pytest.raises(InputError, match="cannot be read as an ONNX model"):
        read_onnx_facts(path)
    with pytest.raises(InputError, match="cannot be read as an ONNX model"):
        read_onnx_facts(tmp_path / "absent.onnx")


def test_parity_holds_and_is_counted_right(exported):
    model, path = exported
    images_NCHW = make_images()
    parity = check_parity(model, path, images_NCHW)
    with torch.no_grad():
        model.eval()
        expected_NK = model(images_NCHW)
        model.train()
    (file_NK,) = session_of(path).run(None, {"images": images_NCHW.numpy().astype("f4") / 255})
    differences = np.abs(file_NK.astype("f8") - expected_NK.numpy().astype("f8"))
    assert parity.max_abs_difference == pytest.approx(differences.max(), abs=1e-6)
    assert parity.mean_abs_difference == pytest.approx(differences.mean(), abs=1e-6)
    assert parity.tolerance == pytest.approx(1e-4 * max(1.0, float(expected_NK.abs().max())))
    assert parity.num_images == 110
    assert parity.top1_agreement == 1.0
    assert parity.passed
    assert model.training
    json.dumps(parity.to_json(), allow_nan=False)
    require_parity(parity, path)


def tampered(path: Path, target: Path, change) -> Path:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, target)
    return target


def change_weight(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == "network.6.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[3] += 0.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def put_nan(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == "network.6.bias")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[2] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def drop_normalisation(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == "std")
    ones = np.ones_like(onnx.numpy_helper.to_array(tensor))
    tensor.CopyFrom(onnx.numpy_helper.from_array(ones, tensor.name))


@pytest.mark.parametrize("change", [change_weight, drop_normalisation])
def test_a_tampered_file_fails_parity(exported, tmp_path, change):
    model, path = exported
    bad = tampered(path, tmp_path / "bad.onnx", change)
    parity = check_parity(model, bad, make_images())
    assert not parity.passed
    assert parity.max_abs_difference > parity.tolerance
    with pytest.raises(ParityError, match="differs from the trained model by up to"):
        require_parity(parity, bad)


def test_a_file_that_mixes_images_of_a_batch_fails_parity(exported, tmp_path):
    """Whatever a batch does to its members shows where images are run one at a time."""
    model, path = exported

    def centre_over_batch(proto: onnx.ModelProto) -> None:
        proto.graph.node[-1].output[0] = "uncentred"
        axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [0])
        scale = onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [1e-9])
        proto.graph.initializer.extend([axes, scale])
        proto.graph.node.extend(
            [
                onnx.helper.make_node("ReduceMean", ["uncentred", "axes"], ["mean_over_batch"]),
                onnx.helper.make_node("Sub", ["uncentred", "mean_over_batch"], ["logits"]),
            ]
        )

    bad = tampered(path, tmp_path / "bad.onnx", centre_over_batch)
    parity = check_parity(model, bad, make_images())
    assert parity.batch_max_abs_difference > parity.tolerance
    assert not parity.passed


def test_batch_difference_alone_fails_parity():
    parity = Parity(0.0, 0.0, 1.0, 10, 1e-4, False, 0.5)
    with pytest.raises(ParityError, match=r"by 0\.5 between batch 1 and a batch"):
        require_parity(parity, Path("student.onnx"))


def test_non_finite_logits_are_told_apart(exported, tmp_path):
    model, path = exported
    bad = tampered(path, tmp_path / "bad.onnx", put_nan)
    with pytest.raises(ParityError, match="returns NaN or infinity for"):
        check_parity(model, bad, make_images(4))
    broken = make_model()
    with torch.no_grad():
        broken.network[6].bias[0] = torch.nan
    with pytest.raises(ModelError, match="the model returns NaN or infinity for 4 of 4 images"):
        check_parity(broken, path, make_images(4))


def test_parity_needs_fitting_images_and_an_intact_file(exported, tmp_path):
    model, path = exported
    with pytest.raises(InputError, match=r"expected uint8 images"):
        check_parity(model, path, make_images(4).float())
    with pytest.raises(InputError, match=r"expected uint8 images"):
        check_parity(model, path, make_images(0))
    with pytest.raises(ParityError, match="does not run on images of shape"):
        check_parity(model, path, make_images(4)[..., :7])
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match="ONNX Runtime cannot load"):
        check_parity(model, cut, make_images(4))


class SomeImages:
    """The one method of a source that is used here."""

    def __init__(self, images_NCHW: Tensor) -> None:
        self.images_NCHW = images_NCHW

    def iter_images(self, index_batches):
        for indices in index_batches:
            yield self.images_NCHW[indices]


def test_the_file_over_a_split_keeps_order(exported):
    _, path = exported
    images_NCHW = make_images(25)
    indices = torch.tensor([24, 3, 3, 0, 17, 8, 9])
    told: list[tuple[int, int]] = []
    logits_NK = onnx_logits(
        path,
        SomeImages(images_NCHW),
        indices,
        batch_size=3,
        num_threads=1,
        progress=lambda done, total, note="": told.append((done, total)),
    )
    (expected,) = session_of(path).run(
        None, {"images": images_NCHW[indices].numpy().astype("f4") / 255}
    )
    np.testing.assert_allclose(logits_NK.numpy(), expected, atol=1e-6)
    assert told == [(3, 7), (6, 7), (7, 7)]

"""Two tiny networks as ONNX files, and packages of them."""

import dataclasses

import numpy as np
import pytest
from package_samples import CLASS_NAMES, IMAGE_SHAPE, contents, onnx_logits

from understudy.package.writing import write_package


@pytest.fixture(scope="session")
def pictures():
    random = np.random.default_rng(0)
    return random.integers(0, 256, (20, *IMAGE_SHAPE)).astype(np.uint8)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """onnx-float32, and another network under the name onnx-int8."""
    import torch
    from torch import nn

    from understudy.export.target import ExportSource
    from understudy.export.targets import onnx

    made = []
    for seed, precision in enumerate(("float32", "int8")):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 5, 4)
        )
        # Random weights answer alike to everything; these differ from picture to picture.
        with torch.no_grad():
            model[3].weight *= 20
        folder = tmp_path_factory.mktemp(precision)
        source = ExportSource(model.eval(), IMAGE_SHAPE, CLASS_NAMES)
        artifact = onnx.export(source, folder, precision="float32")
        made.append(dataclasses.replace(artifact, precision=precision))
    return made


@pytest.fixture(scope="session")
def packed(artifacts, pictures):
    """The contents of the package."""
    return contents(pictures, onnx_logits(artifacts[0].path, pictures))


@pytest.fixture(scope="session")
def folder_package(artifacts, packed, tmp_path_factory):
    """A package folder. Tests only read it."""
    folder = tmp_path_factory.mktemp("folder") / "garden"
    write_package(folder, artifacts, packed)
    return folder


@pytest.fixture(scope="session")
def zip_package(artifacts, packed, tmp_path_factory):
    """A package as a zip. Tests only read it."""
    path = tmp_path_factory.mktemp("zip") / "garden.zip"
    write_package(path, artifacts, packed)
    return path

"""Small students for the export targets: one trained on scikit-learn's digits, and odd ones."""

import functools
import importlib.util

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from understudy.export.target import ExportSource, find_target, open_artifact, run_artifact
from understudy.models.build import NormalizedModel
from understudy.models.mlp import MLP
from understudy.models.paper import PaperStudent
from understudy.models.resnet import ResNet
from understudy.models.separable import SeparableNet

DIGITS_SHAPE = (1, 8, 8)
SMALL_SHAPE = (3, 16, 16)
NUM_TRAIN = 1200
CLASS_NAMES = tuple("0123456789")
# Target to the package that its tests need.
PACKAGES = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "executorch": "executorch",
    "tflite": "litert_torch",
    "ncnn": "pnnx",
    "c": "emx_onnx_cgen",
    "tflm": "tflite_micro",
}


@functools.cache
def digits():
    """Return uint8 images [1797, 1, 8, 8] and labels, in a fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images_NCHW = torch.tensor(data.images * 255 / 16).round().to(torch.uint8)[order, None]
    return images_NCHW, torch.tensor(data.target)[order]


@functools.cache
def trained_resnet():
    """Return a ResNet-8 with option-A shortcuts that is right on about 97 % of the digits."""
    images_NCHW, labels_N = digits()
    torch.manual_seed(0)
    network = ResNet(num_classes=10, in_channels=1, depth=8, widths=(4, 8, 8))
    model = NormalizedModel(network, mean=(0.3,), std=(0.37,))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=200)
    for step in range(200):
        rows = torch.arange(step * 64, (step + 1) * 64) % NUM_TRAIN
        optimizer.zero_grad()
        F.cross_entropy(model(images_NCHW[rows]), labels_N[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def digits_source(**changes):
    """Return the trained network with calibration images from its training digits."""
    images_NCHW, _ = digits()
    values = {"calibration_NCHW": images_NCHW[:100], **changes}
    return ExportSource(trained_resnet(), DIGITS_SHAPE, CLASS_NAMES, **values)


def digits_test():
    """Return the images and labels that nothing was trained on."""
    images_NCHW, labels_N = digits()
    return images_NCHW[NUM_TRAIN:], labels_N[NUM_TRAIN:]


def small_images(num_images):
    generator = torch.Generator().manual_seed(1)
    shape = (num_images, *SMALL_SHAPE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def separable_source():
    """Return an untrained separable network with running statistics of its own."""
    torch.manual_seed(0)
    network = SeparableNet(num_classes=10, stages=[[8, 1], [16, 2]], depth=2, residual=True)
    model = NormalizedModel(network, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    model(small_images(32))
    return ExportSource(model.eval(), SMALL_SHAPE, CLASS_NAMES, calibration_NCHW=small_images(32))


def paper_source():
    """Return an untrained network of the paper's: leaky ReLU, its own average, FastConv3x3."""
    torch.manual_seed(0)
    network = PaperStudent(num_classes=10, channels=16, hidden=12)
    model = NormalizedModel(network, mean=(0.5,) * 3, std=(0.25,) * 3)
    return ExportSource(model.eval(), SMALL_SHAPE, CLASS_NAMES, calibration_NCHW=small_images(32))


def wide_source():
    """Return a perceptron whose int8 weights take more than 256 KiB."""
    torch.manual_seed(0)
    network = MLP(num_classes=10, image_shape=SMALL_SHAPE, hidden=(400,))
    model = NormalizedModel(network, mean=(0.5,) * 3, std=(0.25,) * 3)
    return ExportSource(model.eval(), SMALL_SHAPE, CLASS_NAMES, calibration_NCHW=small_images(32))


class Applied(nn.Module):
    """A layer that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, features):
        return self.function(features)


class OddNet(nn.Module):
    """A convolution, any function, a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.odd = Applied(function)
        self.last = nn.Linear(4, 10)

    def forward(self, images_NCHW):
        return self.last(self.odd(self.first(images_NCHW)).mean(dim=(2, 3)))


def odd_source(function, **changes):
    torch.manual_seed(0)
    values = {"calibration_NCHW": small_images(16), **changes}
    return ExportSource(OddNet(function).eval(), SMALL_SHAPE, CLASS_NAMES, **values)


def model_logits(source, images_NCHW):
    with torch.inference_mode():
        return source.model(images_NCHW.float() / 255)


def relative_difference(given_NK, wanted_NK):
    return ((given_NK - wanted_NK).abs().max() / wanted_NK.abs().max()).item()


def runtime_logits(name, source, images_NCHW, folder, *, precision):
    """Return the logits of the exported file in its runtime; skip where that is not installed."""
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"the extra '{name}' is not installed")
    artifact = find_target(name).export(source, folder, precision=precision)
    return run_artifact(open_artifact(artifact), images_NCHW)

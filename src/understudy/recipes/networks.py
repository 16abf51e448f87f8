"""Networks as a recipe describes them: built, with normalisation inside, with their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from understudy.artifacts import Record
from understudy.models.build import NormalizedModel, build_network
from understudy.models.foreign import stated_normalization
from understudy.models.load import class_order
from understudy.models.onnx_model import OnnxModel
from understudy.recipes.run import Run
from understudy.recipes.sections import ModelSection, Normalization
from understudy.runtime import derive_seed

WEIGHTS_NAME = "model.safetensors"


def channel_statistics(run: Run) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel over (at most 10,000) training images."""
    indices_N = run.splits.train[:10_000]
    sums = torch.zeros(2, run.source.image_shape[0], dtype=torch.float64)
    count = 0
    for images_NCHW in run.source.iter_images(torch.split(indices_N, 1000)):
        pixels = images_NCHW.double() / 255
        sums += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))])
        count += pixels[:, 0].numel()
    mean, mean_square = sums / count
    deviation = (mean_square - mean.square()).clamp_min(1e-12).sqrt()
    return mean.tolist(), deviation.tolist()


def model_section(run: Run, role: str) -> ModelSection:
    """Return what the recipe says of the network of a role."""
    if role in ("student", "control"):
        return run.recipe.student.model
    if role in run.peers:
        return run.peers[role]
    return run.teachers[role].model


def build_model(run: Run, role: str) -> NormalizedModel:
    """Return a new network with normalisation inside, initialised from the seed of its role.

    Student and control have the same first weights: they differ in the teacher only.
    """
    section = model_section(run, role)
    lineage = "student" if role == "control" else role
    own_seed = derive_seed(run.recipe.seed, "weights", lineage)
    torch.manual_seed(run.seed_for("weights", lineage) if lineage == "student" else own_seed)
    num_classes, image_shape = len(run.source.class_names), run.source.image_shape
    network: nn.Module
    if is_onnx(section):
        network = OnnxModel(Path(section.name), num_classes=num_classes, image_shape=image_shape)
    else:
        network = build_network(
            section.name,
            num_classes=num_classes,
            image_shape=image_shape,
            arguments=section.arguments,
        )
    return NormalizedModel(network, **conversions(run, role))


def conversions(run: Run, role: str) -> dict[str, Any]:
    """Return what the ``NormalizedModel`` around a role's network is made with."""
    normalization = normalization_of(run, role)
    teacher = run.teachers.get(role)
    names = None if teacher is None else teacher.class_names
    return {
        "mean": normalization.mean,
        "std": normalization.std,
        "color_order": "rgb" if teacher is None else teacher.color_order,
        "output_order": None if names is None else class_order(names, run.source.class_names),
        "flip_average": role in ("student", "control") and run.recipe.student.flip_average,
    }


def normalization_of(run: Run, role: str) -> Normalization:
    """Return a network's normalisation: the recipe's, its own, or that of the training split."""
    section = model_section(run, role)
    if section.normalization is not None:
        return section.normalization
    if is_onnx(section):
        # A black box usually holds its normalisation.
        num_channels = run.source.image_shape[0]
        return Normalization(mean=(0.0,) * num_channels, std=(1.0,) * num_channels)
    library, _, folder = section.name.partition(":")
    stated = stated_normalization(Path(folder)) if library == "transformers" else None
    if stated is None:
        mean, std = channel_statistics(run)
        stated = {"mean": mean, "std": std}
    return Normalization.model_validate(stated)


def trained_model(run: Run, role: str, record: Record) -> NormalizedModel:
    """Return teacher, student or control with the weights of its record, in eval mode."""
    model = build_model(run, role)
    if not is_onnx(model_section(run, role)):
        model.load_state_dict(load_file(run.folder / record.kind / WEIGHTS_NAME))
    return model.eval()


def is_onnx(section: ModelSection) -> bool:
    """Return whether the network is a black box in an ONNX file."""
    return section.name.endswith(".onnx")

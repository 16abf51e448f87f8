"""Networks as a recipe describes them: built, with normalisation inside, with their weights."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from understudy.artifacts import Record, content_hash, file_hash
from understudy.errors import ModelError, problem
from understudy.models.build import NormalizedModel, build_network
from understudy.models.catalog import PREFIXES
from understudy.models.foreign import stated_normalization
from understudy.models.load import class_order
from understudy.models.onnx_model import OnnxModel
from understudy.models.own_code import code_hash
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
    """Return teacher, student or control with the weights of its record, in eval mode.

    Raises:
        ModelError: the network is another one by now, and the weights do not fit it.
    """
    model = build_model(run, role)
    if not is_onnx(model_section(run, role)):
        load_stored(run, model, record.kind, name=model_section(run, role).name)
    return model.eval()


def load_stored(run: Run, model: nn.Module, kind: str, *, name: str) -> None:
    """Load the weights in the folder of a stage into the network that they were trained in.

    Args:
        name: the model's, for the error.

    Raises:
        ModelError: the network is another one by now.
    """
    path = run.folder / kind / WEIGHTS_NAME
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:  # of missing, unexpected or misshapen tensors
        whole = run.folder.parents[1] if run.step else run.folder
        found = textwrap.shorten(" ".join(str(error).splitlines()[1:]), 300, placeholder=" ...")
        raise ModelError(
            problem(
                f"{path} does not fit the model '{name}' as it is built now: {found}",
                expected="the network that these weights were trained in",
                mend=f"Run `understudy distill {whole}`, which makes it anew, or take back what "
                "was changed of the model.",
            )
        ) from error


def is_onnx(section: ModelSection) -> bool:
    """Return whether the network is a black box in an ONNX file."""
    return section.name.endswith(".onnx")


# What decides a network besides the recipe and its weights


def code_section(run: Run, roles: Iterable[str]) -> dict[str, Any]:
    """Return what a key says of the user's own code in the networks of these roles.

    Nothing where they are of other kinds. Every stage that builds networks anew has it in its key:
    those of trainings and loaded weights, and the evaluation. The others have those as parents.
    """
    hashes = {role: code_hash(model_section(run, role).name) for role in roles}
    found = {role: value for role, value in hashes.items() if value is not None}
    return {"code": found} if found else {}


def model_folder(section: ModelSection) -> Path | None:
    """Return the folder that timm or transformers makes a network from; None: there is none."""
    library, _, target = section.name.partition(":")
    return Path(target) if library in PREFIXES and Path(target).is_dir() else None


def settings_hash(folder: Path) -> str:
    """Return the hash of a model folder's settings, such as its input size, without its weights."""
    return content_hash([[path.name, file_hash(path)] for path in sorted(folder.glob("*.json"))])

"""``understudy lab paper``: the paper's tables and figures, each an item that is run by itself.

The trainings are ordinary runs in the lab's folder. So the lab may be stopped at any moment, and go
on another day, also to more epochs.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from understudy import stages
from understudy.artifacts import Record, content_hash, file_hash
from understudy.data.sources import ImageSource
from understudy.errors import InputError, problem
from understudy.evaluate.accuracy import predict_logits
from understudy.evaluate.operators import torch_operators
from understudy.lab import trainings
from understudy.lab.paper_recipes import (
    ALPHAS,
    DROPOUT_RATES,
    GRID_LAYERS,
    TEACHER_LAYERS,
    TEMPERATURES,
    Setting,
    alone,
    base_recipe,
    distilled,
    online,
    pretrained,
)
from understudy.lab.timings import gpu_of, inference_seconds, labelling_seconds
from understudy.models.build import build_network
from understudy.recipes.job import open_run
from understudy.recipes.networks import trained_model


@dataclass(frozen=True)
class Lab:
    """What is asked of the lab.

    Attributes:
        setting: data, epochs, dropout.
        folder: of records and runs.
        teacher: the pretrained teacher as a recipe's ``teacher``; None: that item is not run.
        grid_epochs: of each training of the grids over alpha and temperature, and over dropout.
        layers: of the teachers of Table 6.
        rates: of dropout, to find which one is the paper's.
    """

    setting: Setting
    folder: Path
    teacher: dict[str, Any] | None = None
    grid_epochs: int = 100
    layers: tuple[int, ...] = TEACHER_LAYERS
    rates: tuple[float, ...] = DROPOUT_RATES

    def __post_init__(self) -> None:
        if not self.layers or not set(self.layers) <= set(TEACHER_LAYERS):
            raise InputError(
                problem(
                    f"teachers of {', '.join(map(str, self.layers))} layers",
                    expected=f"some of {', '.join(map(str, TEACHER_LAYERS))}",
                    mend="Correct --layers.",
                )
            )
        if not self.rates or not all(0 <= rate < 1 for rate in self.rates):
            raise InputError(
                problem(
                    f"dropout rates {', '.join(f'{rate:g}' for rate in self.rates)}",
                    expected="rates from 0 to below 1",
                    mend="Correct --rates.",
                )
            )

    def run_folder(self, name: str, dropout: float | None = None) -> Path:
        """Return the folder of a training: one for each dropout rate, seed and accelerator.

        A stage whose recipe has changed is made anew in its folder, and hours of training would be
        gone.
        """
        rate = self.setting.dropout if dropout is None else dropout
        name += f"-dropout-{rate:g}-seed-{self.setting.seed}"
        if self.setting.accelerator != "cpu":
            name += f"-{self.setting.accelerator}"
        return self.folder / "runs" / name

    @property
    def grid_setting(self) -> Setting:
        """The setting of the grids."""
        return replace(self.setting, num_epochs=self.grid_epochs)


def parameters(lab: Lab) -> dict[str, Any]:
    """Table 5: parameters of every network."""
    counts: dict[str, int | None] = {"Student": num_params("paper_student")}
    for layers in TEACHER_LAYERS:
        counts[f"Teacher {layers}"] = num_params("paper_teacher", num_layers=layers)
    counts["ViT-B/16, 10 classes"] = vit_params()
    return {"counts": counts}


def num_params(name: str, **arguments: Any) -> int:
    """Return the parameters of a network for CIFAR-10."""
    network = build_network(name, num_classes=10, image_shape=(3, 32, 32), arguments=arguments)
    return sum(parameter.numel() for parameter in network.parameters())


def vit_params() -> int | None:
    """Return the parameters of ViT-B/16 with 10 classes, built from its configuration alone.

    None where transformers is not installed.
    """
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError:
        return None
    with torch.device("meta"):
        network = ViTForImageClassification(ViTConfig(num_labels=10))
    return int(sum(parameter.numel() for parameter in network.parameters()))


def operators(lab: Lab) -> dict[str, Any]:
    """Tables 1 to 4: time and memory of each kind of operator, one batch of 100.

    In training mode, where dropout works: in evaluation mode it does nothing and would have
    neither the paper's time nor its memory.
    """
    source = source_of(lab)
    images = source.images(torch.arange(100))
    tables = {}
    for title, name, arguments in networks():
        network = build_network(
            name,
            num_classes=10,
            image_shape=source.image_shape,
            arguments={**arguments, "dropout": lab.setting.dropout},
        )
        tables[title] = torch_operators(network, images, name=title, training=True).to_json()
    return {"tables": tables}


def networks() -> list[tuple[str, str, dict[str, Any]]]:
    """Return title, name and arguments of the student and the teachers."""
    teachers = [(f"Teacher {n}", "paper_teacher", {"num_layers": n}) for n in TEACHER_LAYERS]
    return [("Student", "paper_student", {}), *teachers]


def accuracy(lab: Lab) -> dict[str, Any]:
    """Table 6, Figures 1 and 2; Table 7 from the same trainings."""
    found: dict[str, Any] = {}
    setting = lab.setting
    student = alone(setting, dropout=setting.dropout)
    folder = lab.run_folder("alone")
    found["Student"] = told(trainings.on_labels(student, folder), student, folder, "teacher")
    for layers in lab.layers:
        found |= teacher_and_student(lab, layers)
    return {
        "networks": found,
        "dropout": setting.dropout,
        "num_samples": num_samples(folder),
    }


def num_samples(folder: Path) -> dict[str, int]:
    """Return how many pictures each split of a run has: what chance is judged by."""
    counts: dict[str, int] = Record.load(folder / "split").payload["num_samples"]
    return counts


def teacher_and_student(lab: Lab, layers: int) -> dict[str, Any]:
    """Return what a teacher and its student reached."""
    recipe, folder = distilled(lab.setting, layers), lab.run_folder(f"ts{layers}")
    student = trainings.distilled(recipe, folder)
    labels = Record.load(folder / "labels")
    teacher = Record.load(folder / "teacher")
    both = {
        f"Teacher {layers}": told(teacher, recipe, folder, "teacher"),
        f"TS {layers}": told(student, recipe, folder, "student"),
    }
    both[f"TS {layers}"]["label_seconds"] = labelling_seconds(labels)
    return both


def told(record: Record, recipe: Mapping[str, Any], folder: Path, role: str) -> dict[str, Any]:
    """Return curve and times of one training, and the GPU that it ran on, if any."""
    return {
        "curve": trainings.curve(record),
        "epoch_seconds": statistics.median(trainings.seconds(record)),
        "inference_seconds": inference_seconds(recipe, folder, role, record),
        "gpu": gpu_of(record),
    }


def dropout(lab: Lab) -> dict[str, Any]:
    """The student alone with each of some dropout rates: the paper does not state its own."""
    curves = {}
    for rate in lab.rates:
        recipe = alone(lab.grid_setting, dropout=rate)
        # The student of Table 6 is one of these, and perhaps trained longer already.
        folder = lab.run_folder("alone", rate)
        curves[f"{rate:g}"] = trainings.curve(trainings.on_labels(longest(recipe, folder), folder))
    return {"curves": curves, "num_samples": num_samples(folder)}


def longest(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the recipe for as many epochs as its folder has, or has begun, at least."""
    try:
        least = trainings.num_epochs_begun(folder / "teacher")
    except InputError:
        return recipe
    training = recipe["teacher"]["training"]
    training["num_epochs"] = max(least, training["num_epochs"])
    return recipe


def grid(lab: Lab, name: str, space: Mapping[str, Any]) -> dict[str, Any]:
    """Return every point of a grid, taught by the finished Teacher 6."""
    teacher = distilled(lab.setting, GRID_LAYERS)
    folder = lab.run_folder(f"ts{GRID_LAYERS}")
    trainings.on_labels(teacher, folder)
    recipe = base_recipe(lab.grid_setting, name)
    recipe["teacher"] = {
        "model": teacher["teacher"]["model"],
        "checkpoint": str((folder / "teacher" / "model.safetensors").resolve()),
    }
    results = stages.search(
        recipe,
        space=space,
        sampler="grid",
        pruner="none",
        # A teacher that was trained on is another one, and its grid another search.
        out=lab.run_folder(f"{name}-{lab.grid_epochs}-of-{lab.setting.num_epochs}"),
    )
    points = []
    for row in results.complete:
        trial = Record.load(Path(results.folder) / "trials" / f"{row.number:04d}" / "student")
        points.append({"settings": row.settings, "curve": trainings.curve(trial)})
    return {"points": points, "num_samples": num_samples(Path(results.folder) / "base")}


def alpha(lab: Lab) -> dict[str, Any]:
    """Figure 3: the weight of the teacher from 0 to 1 at temperature 1."""
    weights = {
        "distillation.kl_weight": list(ALPHAS),
        "distillation.ce_weight": "1 - distillation.kl_weight",
    }
    return grid(lab, "alpha", weights)


def temperature(lab: Lab) -> dict[str, Any]:
    """Figure 4: temperatures from 0.1 to 100 at equal weights."""
    return grid(lab, "temperature", {"distillation.temperature": list(TEMPERATURES)})


def online_figure(lab: Lab) -> dict[str, Any]:
    """Figure 5: teacher and student together; what offline took comes from the same lab."""
    recipe, folder = online(lab.setting), lab.run_folder("online")
    record = trainings.together(recipe, folder)
    offline = teacher_and_student(lab, GRID_LAYERS)
    teacher, student = offline[f"Teacher {GRID_LAYERS}"], offline[f"TS {GRID_LAYERS}"]
    return {
        "curve": trainings.curve(record),
        "epoch_seconds": statistics.median(trainings.seconds(record)),
        "offline_curve": student["curve"],
        "offline_epoch_seconds": teacher["epoch_seconds"] + student["epoch_seconds"],
        "label_seconds": student["label_seconds"],
        "num_samples": num_samples(folder),
    }


def pretrained_figure(lab: Lab) -> dict[str, Any]:
    """Figure 6: a large pretrained teacher, whose outputs are stored."""
    if lab.teacher is None:
        raise InputError(
            problem(
                "the item `pretrained` without a teacher",
                expected="--teacher NAME=FILE, or --vit NAME_OR_FOLDER",
                mend="For example --teacher resnet56=resnet56.th.",
            )
        )
    recipe = pretrained(lab.setting, lab.teacher)
    folder = lab.run_folder(f"pretrained-{teacher_tag(lab.teacher)}")
    record = trainings.distilled(recipe, folder)
    run = open_run(recipe, out=folder)
    teacher = trained_model(run, "teacher", Record.load(folder / "teacher"))
    logits_NK = predict_logits(teacher, run.source, run.splits.validation)
    right = logits_NK.argmax(1) == run.source.labels_N[run.splits.validation]
    return {
        "teacher": lab.teacher["model"]["name"],
        "teacher_params": sum(p.numel() for p in teacher.parameters()),
        "teacher_accuracy": right.double().mean().item(),
        "teacher_confidence": record.payload.get("teacher_confidence"),
        "curve": trainings.curve(record),
        "epoch_seconds": statistics.median(trainings.seconds(record)),
        "label_seconds": labelling_seconds(Record.load(folder / "labels")),
    }


def teacher_tag(teacher: Mapping[str, Any]) -> str:
    """Return a name for the folder of a teacher's student, with a hash of model and weights.

    Another teacher in the same folder would be trained over the first one's student.
    """
    model, checkpoint = teacher["model"], teacher.get("checkpoint")
    if checkpoint is not None and Path(checkpoint).is_file():
        checkpoint = file_hash(Path(checkpoint))  # wherever the file lies
    name = re.sub(r"\W+", "-", Path(model["name"]).name)
    return f"{name}-{content_hash([model, checkpoint])[:8]}"


ITEMS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "parameters": parameters,
    "operators": operators,
    "dropout": dropout,
    "accuracy": accuracy,
    "online": online_figure,
    "pretrained": pretrained_figure,
    "alpha": alpha,
    "temperature": temperature,
}


def source_of(lab: Lab) -> ImageSource:
    """Return the pictures."""
    recipe = base_recipe(lab.setting, "paper") | {"distillation": {"kl_weight": 0, "ce_weight": 1}}
    recipe["teacher"] = alone(lab.setting, dropout=0.0)["teacher"]
    return open_run(recipe, out=lab.run_folder("data")).source

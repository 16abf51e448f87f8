"""The recipes of "Efficient Knowledge Distillation" (Lin and Shen, 2024), as far as it tells them.

Section 4.1: 45,000 training and 5,000 validation pictures, batches of 100, AdamW with its defaults
(learning rate 0.001, betas 0.9 and 0.999, weight decay 0.01), 100 epochs, and the mean of
Kullback-Leibler divergence and cross-entropy at temperature 1. Here a hash of every picture decides
its side, so the split is a tenth only nearly: 44,951 and 5,049 with seed 0. The paper names no
augmentation, so there is none, and states no dropout rate: with 0.5, the default of ``nn.Dropout``,
the student alone ends within chance of its 52.96 % (docs/paper.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEACHER_LAYERS = (4, 6, 8)
GRID_LAYERS = 6  # the teacher of experiments 2 and 3
ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
TEMPERATURES = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
DROPOUT_RATES = (0.0, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Setting:
    """What all experiments share.

    Attributes:
        source: of the data: CIFAR-10, or another one for a rehearsal.
        num_epochs: 100 in the paper.
        dropout: rate of every dropout layer.
        threads: of training; None: all.
        accelerator: that trains: cpu, cuda, or auto.
    """

    source: str
    num_epochs: int = 100
    dropout: float = 0.5
    seed: int = 0
    threads: int | None = None
    accelerator: str = "cpu"


def training(num_epochs: int) -> dict[str, Any]:
    """Return the paper's training."""
    return {
        "num_epochs": num_epochs,
        "batch_size": 100,
        "optimizer": {"name": "adamw", "learning_rate": 0.001, "weight_decay": 0.01},
        "learning_rate_schedule": {"shape": "constant"},
    }


def base_recipe(setting: Setting, name: str) -> dict[str, Any]:
    """Return what all experiments have in common: data, student, training, loss."""
    return {
        "name": name,
        "seed": setting.seed,
        "data": {"source": setting.source, "validation_fraction": 0.1},
        "views": {"num_views": 1, "transforms": []},
        "student": {"model": paper_model("paper_student", setting)},
        "training": training(setting.num_epochs),
        "distillation": {"kl_weight": 0.5, "ce_weight": 0.5, "temperature": 1.0},
        "control": False,
        "device": {"num_threads": setting.threads, "accelerator": setting.accelerator},
    }


def paper_model(name: str, setting: Setting, **arguments: Any) -> dict[str, Any]:
    """Return a network of the paper."""
    return {"name": name, "arguments": {**arguments, "dropout": setting.dropout}}


def distilled(setting: Setting, num_layers: int) -> dict[str, Any]:
    """Return Teacher N and its student, TS N."""
    recipe = base_recipe(setting, f"ts{num_layers}")
    recipe["teacher"] = {
        "model": paper_model("paper_teacher", setting, num_layers=num_layers),
        "training": training(setting.num_epochs),
    }
    return recipe


def online(setting: Setting) -> dict[str, Any]:
    """Return TS Online: Teacher 6 and the student are updated in the same step."""
    recipe = base_recipe(setting, "online")
    recipe["teacher"] = {
        "model": paper_model("paper_teacher", setting, num_layers=GRID_LAYERS),
    }
    recipe["strategy"] = {"name": "online"}
    return recipe


def pretrained(setting: Setting, teacher: dict[str, Any]) -> dict[str, Any]:
    """Return the student of a large pretrained teacher with stored outputs."""
    return base_recipe(setting, "pretrained") | {"teacher": teacher}


def alone(setting: Setting, *, dropout: float) -> dict[str, Any]:
    """Return the student's network trained on labels alone: it stands where a teacher does."""
    recipe = base_recipe(setting, f"alone-{dropout:g}")
    model = paper_model("paper_student", setting)
    model["arguments"]["dropout"] = dropout
    recipe["teacher"] = {"model": model, "training": training(setting.num_epochs)}
    return recipe

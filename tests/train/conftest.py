"""A small real problem for the loop: scikit-learn's digits and a linear network."""

import pytest
import torch
from torch import nn

from understudy.data.sources import load_data
from understudy.train.devices import make_fabric
from understudy.train.feed import Feed, ViewPlan
from understudy.train.objective import LabelObjective
from understudy.train.plan import TrainPlan
from understudy.train.settings import TrainSettings


class Linear(nn.Module):
    """Pixels in [0, 1] to logits, with dropout from torch's own generator."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.norm = nn.BatchNorm1d(10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images_NCHW):
        pixels = images_NCHW.flatten(1).float() / 255
        return self.norm(self.layer(self.dropout(pixels)))


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


@pytest.fixture
def fabric():
    fabric = make_fabric()
    fabric.launch()
    return fabric


@pytest.fixture
def make_network():
    def make(dropout=0.0):
        torch.manual_seed(5)
        return Linear(dropout)

    return make


@pytest.fixture
def make_plan(digits, tmp_path):
    indices_N = torch.arange(256)
    held_out_N = torch.arange(300, 400)

    def validate(network):
        logits = network(digits.images(held_out_N))
        labels = digits.labels_N[held_out_N]
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"accuracy": accuracy, "nll": 0.0, "ece": 0.0}

    def make(folder="run", objective=None, teacher=None, seed=1, **settings):
        values = {
            "num_epochs": 3,
            "batch_size": 32,
            "optimizer": {"learning_rate": 0.5, "weight_decay": 0.0},
            **settings,
        }
        feed = Feed(digits, None, indices_N, values["batch_size"], ViewPlan(1), seed, teacher)
        (tmp_path / folder).mkdir(exist_ok=True)
        return TrainPlan(
            feed,
            objective or LabelObjective(),
            TrainSettings.model_validate(values),
            validate,
            tmp_path / folder,
        )

    return make

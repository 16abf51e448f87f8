"""Every loss is in a shipped recipe, and those recipes train."""

import math

import pytest

from understudy import stages
from understudy.recipes.files import load_recipe
from understudy.train.loss_table import LOSSES

RECIPES = ("logit_losses", "feature_losses", "relation_losses")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Keep the teacher's outputs of the three recipes in one place."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("name", RECIPES)
def test_every_loss_of_the_recipe_falls(name, home, tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(home))
    short = ["views.num_views=2"]
    for training in ("teacher.training", "training"):
        short.append(f"{training}.num_epochs=4")
        short.append(f"{training}.learning_rate_schedule.warmup_epochs=1")
    recipe = load_recipe(name, short)
    stages.teach(recipe, out=tmp_path / "run")
    stages.label(recipe, out=tmp_path / "run")
    student = stages.train(recipe, out=tmp_path / "run")
    rows = student.payload["rows"]
    assert set(recipe.distillation.losses) <= set(rows[0]["losses"])
    for loss in recipe.distillation.losses:
        assert math.isfinite(rows[-1]["losses"][loss])
        assert rows[-1]["losses"][loss] < rows[0]["losses"][loss], loss


def test_every_loss_is_in_a_shipped_recipe():
    used = {loss for name in RECIPES for loss in load_recipe(name).distillation.losses}
    assert used == set(LOSSES)

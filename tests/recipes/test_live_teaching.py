"""A teacher that the store cannot hold can be run on every batch, as the error says."""

import re

import numpy as np
import pytest
import yaml

from tiny_run import TINY_RECIPE
from understudy import stages
from understudy.errors import StoreError
from understudy.recipes.schema import parse_recipe
from understudy.teachers import packing


def test_outputs_beyond_float16_are_taught_live(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    # Whatever is packed has moved too far.
    monkeypatch.setattr(packing, "MAX_ROUNDING", -1)
    monkeypatch.setattr(packing, "MAX_FEATURE_ROUNDING", -1)
    values = yaml.safe_load(TINY_RECIPE)
    values["teacher"]["training"]["num_epochs"] = values["training"]["num_epochs"] = 1
    values |= {"control": False, "distillation": {"losses": {"rkd": {}}}}
    values["labelling"] = {"precision": "float32"}
    recipe = parse_recipe(values)
    stages.teach(recipe, out=tmp_path / "run")
    with pytest.raises(StoreError) as refused:
        stages.label(recipe, out=tmp_path / "run")
    (key, word) = re.search(r"In a recipe set (\w+\.\w+): (\w+)", str(refused.value)).groups()
    section, _, name = key.partition(".")
    values[section][name] = yaml.safe_load(word)
    student = stages.train(parse_recipe(values), out=tmp_path / "run")
    assert "rkd" in student.payload["rows"][0]["losses"]


def test_features_beyond_float16_name_the_same_way_out():
    features = np.full((1, 3), 1e6, dtype="float32")
    with pytest.raises(StoreError, match=r"features of up to 1e\+06 .*labelling\.live: true"):
        packing.FeatureFormat((3,)).pack(features)

"""One rule for pictures of another size: loading's, in the files and in the package alike."""

import pytest
import yaml

from tiny_run import TINY_RECIPE
from understudy.recipes.compressed import Network, export_source, resize_rule
from understudy.recipes.job import open_run
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe


@pytest.mark.parametrize(
    ("image_size", "rule"), [(None, "shorter_side_center_crop"), ([8, 8], "stretch")]
)
def test_training_pictures_that_were_resized_were_stretched(tmp_path, image_size, rule):
    values = yaml.safe_load(TINY_RECIPE)
    values["data"]["image_size"] = image_size
    assert resize_rule(Run(parse_recipe(values), tmp_path, tmp_path)) == rule


def test_every_file_is_exported_with_the_rule(unbroken, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(unbroken.home))
    source = export_source(open_run(unbroken.folder), Network())
    assert source.metadata["resize"] == "shorter_side_center_crop"

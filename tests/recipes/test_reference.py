"""The pages in docs/ that are written from the code are those of this code."""

from pathlib import Path

import pytest

from understudy.recipes.reference import recipe_reference

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


@pytest.mark.skipif(not PAGE.exists(), reason="docs/ is only in the repository")
def test_the_recipe_reference_is_up_to_date():
    assert PAGE.read_text() == recipe_reference(), (
        "run: python -m understudy.recipes.reference > docs/recipe.md"
    )

"""What only the data or the processes tell is found before anything runs, and said once."""

import pytest

from understudy.errors import RecipeError
from understudy.recipes.check import check_recipe
from understudy.recipes.files import load_recipe
from understudy.recipes.run import Run


def problems_of(tmp_path, *changes):
    run = Run(load_recipe("digits", changes), tmp_path / "run", tmp_path / "home")
    with pytest.raises(RecipeError) as caught:
        check_recipe(run)
    return caught.value.problems


def test_a_batch_that_the_processes_cannot_share_is_named_in_both_trainings(tmp_path):
    problems = problems_of(tmp_path, "device.num_processes=3")
    assert [text.split(" is ")[0] for text in problems] == [
        "training.batch_size",
        "teacher.training.batch_size",
    ]
    assert all("expected a multiple of 3" in text for text in problems)


def test_other_class_names_are_one_problem(tmp_path):
    problems = problems_of(tmp_path, "teacher.class_names=[a, b]", "labelling.top_k=99")
    assert len(problems) == 2
    assert "labelling.top_k is 99" in problems[0]
    assert "the teacher has 2 classes and the data 10" in problems[1]


def test_layers_to_leave_in_float_are_looked_for_before_anything_is_trained(tmp_path):
    step = "{name: quantize, method: static, float_layers: [network.nine]}"
    changes = f"compression.steps=[{step}]", "data.calibration_fraction=0.02"
    [problem] = problems_of(tmp_path, *changes)
    assert problem.startswith("the float layer 'network.nine' is not in the model")

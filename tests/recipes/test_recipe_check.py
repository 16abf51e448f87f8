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


PRUNE = "name: prune, num_macs: 9"


def test_batches_of_compression_that_are_too_large_are_found_before_anything_is_trained(tmp_path):
    large, small = "training: {batch_size: 5000}", "training: {batch_size: 99}"
    steps = [f"{{{PRUNE}, {large}}}", f"{{{PRUNE}, {small}}}", f"{{{PRUNE}}}"]
    steps.append(f"{{{PRUNE}, guidance: labels, {large}}}")
    on_labels, guided = problems_of(tmp_path, f"compression.steps=[{', '.join(steps)}]")
    for found, number in ((guided, 0), (on_labels, 3)):
        key = f"compression.steps.{number}.training.batch_size"
        assert found.startswith(f"{key} is 5000 and the training split holds ")
        assert f"Lower {key} or give more" in found


def test_a_step_without_the_teacher_needs_a_batch_of_labelled_pictures(tmp_path):
    few = ("data.labelled_fraction=0.1", "teacher.training.batch_size=50")
    training = "training: {batch_size: 300}"
    steps = [f"{{{PRUNE}, {training}}}", f"{{{PRUNE}, guidance: labels, {training}}}"]
    [problem] = problems_of(tmp_path, *few, f"compression.steps=[{', '.join(steps)}]")
    assert problem.startswith("compression.steps.1.training.batch_size is 300 and the training")
    assert "labelled samples" in problem


def test_a_batch_of_compression_that_the_processes_cannot_share_is_named(tmp_path):
    step = f"{{{PRUNE}, training: {{batch_size: 33}}}}"
    [problem] = problems_of(tmp_path, "device.num_processes=2", f"compression.steps=[{step}]")
    assert problem.startswith("compression.steps.0.training.batch_size is 33 with 2 processes")


def test_a_second_teacher_is_named_by_its_place(tmp_path):
    teacher = "{model: {name: mlp}, training: {batch_size: 5000}}"
    [problem] = problems_of(tmp_path, f"strategy={{name: ensemble, teachers: [{teacher}]}}")
    assert problem.startswith("strategy.teachers.0.training.batch_size is 5000")

"""Assistants are proposed between teacher and student, evenly on a logarithmic scale."""

import itertools
import logging
import math

import pytest

from understudy.errors import InputError
from understudy.models.build import build_network
from understudy.models.catalog import check_model
from understudy.recipes.chain_proposal import GROWN, grown, propose_assistants
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.recipes.sections import ModelSection


def run_with(tmp_path, student, teacher, **strategy):
    values = {
        "strategy": {"name": "progressive", **strategy},
        "teacher": {"model": teacher, "training": {}},
        "student": {"model": student},
    }
    return Run(parse_recipe(values), tmp_path / "run", tmp_path / "home")


def size_of(section):
    network = build_network(
        section.name, num_classes=10, image_shape=(1, 8, 8), arguments=section.arguments
    )
    return sum(parameter.numel() for parameter in network.parameters())


STUDENTS = {
    "separable": {"name": "separable", "arguments": {"stages": [[8, 1], [16, 1], [16, 2]]}},
    "inverted": {
        "name": "inverted",
        "arguments": {"stem": [8, 1], "blocks": [[8, 1, 2, 3], [16, 2, 1, 3]], "head": 16},
    },
    "mlp": {"name": "mlp", "arguments": {"hidden": [6, 4]}},
    "paper_student": {"name": "paper_student", "arguments": {"channels": 8}},
    "paper_teacher": {"name": "paper_teacher", "arguments": {"channels": 8}},
    "resnet8": {"name": "resnet8", "arguments": {"widths": [3, 6, 12]}},
}
TEACHER = {"name": "resnet8", "arguments": {"widths": [16, 32, 64]}}


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_sizes_are_evenly_spaced_in_their_logarithm(tmp_path, student):
    run, num_assistants = run_with(tmp_path, student, TEACHER), 2
    assistants = propose_assistants(run, num_assistants)
    assert len(assistants) == num_assistants
    family = "resnet" if student["name"].startswith("resnet") else student["name"]
    assert {section.name for section in assistants} == {family}
    sections = [ModelSection(**TEACHER), *assistants, ModelSection(**student)]
    sizes = [size_of(section) for section in sections]
    assert sizes == sorted(sizes, reverse=True)
    factors = [math.log(big / small) for big, small in itertools.pairwise(sizes)]
    # Channels come in whole numbers, of the separable family in multiples of 8.
    mean = sum(factors) / len(factors)
    assert factors == pytest.approx([mean] * len(factors), rel=0.35)


def test_each_step_stays_within_a_factor_of_ten(tmp_path):
    run = run_with(tmp_path, {"name": "mlp", "arguments": {"hidden": [2]}}, TEACHER)
    assistants = propose_assistants(run)
    sizes = [size_of(ModelSection(**TEACHER)), *map(size_of, assistants), 160]
    assert len(assistants) == 2  # 75,000 over 160 is between 10^2 and 10^3
    assert all(big / small < 11 for big, small in itertools.pairwise(sizes))


def test_what_is_chosen_and_why_is_logged(tmp_path, caplog):
    run = run_with(tmp_path, STUDENTS["mlp"], TEACHER)
    with caplog.at_level(logging.INFO, logger="understudy"):
        (assistant,) = propose_assistants(run, 1)
    assert "times fewer" in caplog.text
    assert "by equal factors of" in caplog.text
    assert f"hidden={assistant.arguments['hidden']}" in caplog.text
    assert "(aim " in caplog.text


@pytest.mark.parametrize("name", [name for name in GROWN if name != "resnet110"])
def test_every_family_grows(name):
    student = ModelSection(name=name)
    larger = [grown(student, size) for size in (3, 9)]
    assert all(check_model(section.name, section.arguments) == [] for section in larger)
    assert grown(student, 0) == student
    if not name.startswith("resnet"):
        assert size_of(student) < size_of(larger[0]) < size_of(larger[1])


def test_residual_networks_grow_deeper_and_then_wider():
    grown_ones = [grown(ModelSection(name="resnet56"), size).arguments for size in (1, 9, 10)]
    assert grown_ones[0] == {"depth": 62}
    assert grown_ones[1] == {"depth": 110}
    assert grown_ones[2] == {"depth": 110, "widths": [18, 35, 70]}
    assert grown(ModelSection(name="resnet110"), 1).arguments["widths"] == [18, 35, 70]


def test_a_student_nearly_as_large_as_its_teacher_needs_no_assistant(tmp_path):
    run = run_with(tmp_path, {"name": "resnet14"}, {"name": "resnet20"})
    with pytest.raises(InputError, match="leaves no room for an assistant"):
        propose_assistants(run)


def test_a_family_without_a_size_asks_for_names(tmp_path):
    run = run_with(tmp_path, {"name": "torch.nn:Identity"}, TEACHER)
    run.recipe = run.recipe.model_copy(
        update={
            "student": run.recipe.student.model_copy(
                update={"model": ModelSection(name="test_chain_proposal:tiny_network")}
            )
        }
    )
    with pytest.raises(InputError, match=r"Name the assistants in strategy\.assistants"):
        propose_assistants(run)
    run = run_with(tmp_path, {"name": "mlp", "arguments": {"hidden": []}}, TEACHER)
    with pytest.raises(InputError, match="has no width to grow"):
        propose_assistants(run)


def tiny_network(num_classes):
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

"""The shipped recipes with a curriculum or a balance, shrunk; and what is refused beforehand."""

import json
import re

import pytest

from tiny_run import TinyRun
from understudy.errors import RecipeError
from understudy.recipes.check_curriculum import check_balance, check_curriculum
from understudy.recipes.files import load_recipe
from understudy.recipes.run import Run
from understudy.recipes.teaching import student_curriculum

SMALL = (
    "teacher.model={name: mlp, arguments: {hidden: [32]}}",
    "teacher.training.num_epochs=3",
    "student.model={name: mlp, arguments: {hidden: [16]}}",
    "training.num_epochs=4",
    "views.num_views=2",
    "measurement={min_seconds: 0.02, batch_sizes: [1], num_threads: [1]}",
)


def setting(*changes):
    return [part for change in (*SMALL, *changes) for part in ("--set", change)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One store for all: the teacher and its outputs are the same."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("recipe", ["curriculum", "self_paced", "balanced"])
def test_a_shipped_recipe_makes_as_many_updates_as_its_control(warm, tmp_path, home, recipe):
    run = TinyRun(tmp_path / "run", home)
    finished = warm.run("distill", recipe, *setting(), "--out", run.folder, home=home)
    assert finished.code == 0, finished.err
    assert json.loads((run.folder / "report" / "report.json").read_text())
    steps = [[row["step"] for row in run.rows(role)] for role in ("student", "control")]
    assert steps[0] == steps[1]


@pytest.fixture(scope="module")
def labelled(warm, tmp_path_factory, home):
    """A run whose teacher's outputs are stored; tests train students in it."""
    run = TinyRun(tmp_path_factory.mktemp("labelled") / "run", home)
    for command in ("teach", "label"):
        finished = warm.run(command, "curriculum", *setting(), "--out", run.folder, home=home)
        assert finished.code == 0, finished.err
    return run


def trained(warm, run, *changes):
    """Return the rows of a student that is trained anew in the run."""
    changes = setting("control=false", *changes)
    finished = warm.run("train", run.folder, *changes, home=run.home)
    assert finished.code == 0, finished.err
    return run.rows("student")


@pytest.mark.parametrize(
    "settings",
    [
        "{difficulty: entropy, pacing: step}",
        "{difficulty: loss, pacing: linear}",
        "{difficulty: student_loss, pacing: root}",
    ],
)
def test_every_difficulty_and_pacing_trains(warm, labelled, settings):
    rows = trained(warm, labelled, f"distillation.curriculum={settings}")
    assert len(rows) == 4


@pytest.mark.parametrize("method", ["uncertainty", "gradient_norm"])
def test_every_balance_trains(warm, labelled, method):
    losses = "distillation.losses={dist: {weight: 0.2}}"
    rows = trained(warm, labelled, f"distillation.balance={method}", losses)
    names = {"kl", "ce", "dist"} | ({"balance"} if method == "uncertainty" else set())
    assert set(rows[-1]["losses"]) == names


# What is refused


def make_run(tmp_path, recipe, *changes):
    return Run(load_recipe(recipe, changes), tmp_path / "run", tmp_path / "home")


def test_a_method_alone_is_a_balance(tmp_path):
    run = make_run(tmp_path, "digits", "distillation.balance=validation")
    assert run.recipe.distillation.balance.method == "validation"
    with pytest.raises(RecipeError, match="method"):
        make_run(tmp_path, "digits", "distillation.balance=valid")


def test_without_a_curriculum_there_is_nothing_to_check(tmp_path):
    run = make_run(tmp_path, "digits")
    assert check_curriculum(run) == []
    assert check_balance(run) == []
    assert student_curriculum(run) is None


@pytest.mark.parametrize(
    ("recipe", "changes", "expected"),
    [
        ("curriculum", (), []),
        ("self_paced", ("labelling.live=true",), []),
        ("curriculum", ("labelling.live=true",), ["margin and strategy offline runs the teacher"]),
        (
            "curriculum",
            ("strategy={name: mutual}", "teacher=null"),
            ["strategy mutual has no trained teacher.*student_loss"],
        ),
        (
            "curriculum",
            ("views.transforms=[{mixup: {}}]",),
            ["margin together with views that mix two pictures"],
        ),
    ],
)
def test_a_difficulty_that_nobody_knows_is_refused(tmp_path, recipe, changes, expected):
    found = check_curriculum(make_run(tmp_path, recipe, *changes))
    assert len(found) == len(expected)
    for text, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, text), text


def test_the_students_loss_needs_labels(tmp_path):
    run = make_run(tmp_path, "self_paced")
    run.source.labels_N[run.splits.train[:7]] = -1
    (text,) = check_curriculum(run)
    assert "student_loss and 7 training samples have no label" in text
    assert check_curriculum(make_run(tmp_path, "curriculum")) == []


BALANCE = "distillation.balance.method="


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((), []),
        (
            (BALANCE + "uncertainty", "strategy={name: mutual}", "teacher=null"),
            ["uncertainty and strategy mutual has no soft and hard terms"],
        ),
        ((BALANCE + "validation", "strategy={name: ema_teacher}", "teacher=null"), []),
        (
            ("distillation.ce_weight=0", "distillation.teacher_share=1"),
            ["validation and only kl, dist has a weight; expected ce and another"],
        ),
        (
            (
                BALANCE + "gradient_norm",
                "distillation.losses={}",
                "distillation.kl_weight=0",
                "distillation.teacher_share=1",
            ),
            ["gradient_norm and only ce has a weight; expected two terms"],
        ),
        ((BALANCE + "uncertainty", "distillation.losses.vid={}"), ["vid, which can be negative"]),
        (
            (
                BALANCE + "gradient_norm",
                "training.precision=bfloat16",
                "distillation.losses={rkd: {}, pkt: {weight: 1}}",
            ),
            ["gradient_norm with training.precision bfloat16", "rkd has its default weight"],
        ),
        ((BALANCE + "gradient_norm", "training.compile=true"), []),
    ],
)
def test_a_balance_that_cannot_work_is_refused(tmp_path, changes, expected):
    found = check_balance(make_run(tmp_path, "balanced", *changes))
    assert len(found) == len(expected), found
    for text, pattern in zip(found, expected, strict=True):
        assert pattern in text

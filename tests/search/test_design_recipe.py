"""The design command on a tiny recipe: budget kept, going on, what it writes, wrong input."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from tiny_run import TINY_RECIPE
from understudy.errors import InputError, ModelError, TrainingError
from understudy.models.build import build_network
from understudy.recipes import design as recipes_design
from understudy.recipes.design import CANDIDATES_NAME, DesignPlan, fitting_candidates
from understudy.recipes.design_costs import Candidate
from understudy.recipes.design_job import open_design
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.report.design_views import design_document, how
from understudy.search.halving import Rung

OPTIONS = ("--budget", "num_params=2500", "--candidates", "4", "--epochs", "1", "--epochs", "2")


def design(warm, tiny_recipe, folder, *options):
    return warm.run("design", tiny_recipe, "--out", folder / "d", *options, home=folder / "home")


@pytest.fixture(scope="module")
def designed(warm, tiny_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("design")
    finished = design(warm, tiny_recipe, folder, *OPTIONS)
    assert finished.code == 0, finished.err
    return folder, finished, json.loads((folder / "d" / "design.json").read_text())


def test_every_candidate_keeps_the_budget(designed):
    _, _, result = designed
    assert len(result["candidates"]) == 4
    for item in result["candidates"]:
        network = build_network(
            item["name"], num_classes=10, image_shape=(1, 8, 8), arguments=item["arguments"]
        )
        assert sum(p.numel() for p in network.parameters()) == item["num_params"]
        assert 1250 <= item["num_params"] <= 2500
        assert item["latency_ms"] > 0
        assert item["step_ms"] > 0
        assert item["peak_activation_bytes"] > 0


def test_the_best_goes_on_and_is_the_recipe(designed):
    folder, finished, result = designed
    first_round = {s["candidate"]: s for s in result["scores"]}
    assert len(first_round) == 4
    best = result["scores"][0]
    assert best["rung"] == 1
    item = next(c for c in result["candidates"] if c["number"] == best["candidate"])
    recipe = yaml.safe_load((folder / "d" / "best.yaml").read_text())
    model = recipe["student"]["model"]
    assert (model["name"], model["arguments"]) == (item["name"], item["arguments"])
    assert recipe["training"]["num_epochs"] == 4
    assert "The teacher has 2,410 parameters" in finished.out
    assert "Pareto front" in (folder / "d" / "design.html").read_text()
    kinds = {path.parent.name for path in (folder / "d").rglob("record.json")}
    assert kinds == {"split", "teacher", "labels", "student"}


def test_the_same_command_trains_nothing_again(warm, tiny_recipe, designed):
    folder, _, result = designed
    again = design(warm, tiny_recipe, folder, *OPTIONS)
    assert again.code == 0, again.err
    assert json.loads((folder / "d" / "design.json").read_text()) == result
    assert "student: started" not in again.err


def test_a_killed_search_keeps_its_candidates_and_finished_trainings(warm, tiny_recipe, tmp_path):
    def finished():
        return list((tmp_path / "d" / "trainings").glob("*/student/record.json"))

    command = warm.start(
        "design", tiny_recipe, "--out", tmp_path / "d", *OPTIONS, home=tmp_path / "home"
    )
    deadline = time.monotonic() + 240
    while not finished():
        assert command.poll() is None, command.err()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    command.kill()
    assert command.wait().code == -9
    assert not (tmp_path / "d" / "design.json").exists()
    drawn = json.loads((tmp_path / "d" / "candidates.json").read_text())["candidates"]
    kept = {path: path.stat().st_mtime_ns for path in finished()}
    assert 1 <= len(kept) < 5
    again = design(warm, tiny_recipe, tmp_path, *OPTIONS)
    assert again.code == 0, again.err
    result = json.loads((tmp_path / "d" / "design.json").read_text())
    assert result["candidates"] == drawn
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(finished()) == 5


def test_a_search_that_is_killed_while_it_draws_goes_on_after_its_last_candidate(tmp_path):
    values = yaml.safe_load(TINY_RECIPE) | {"control": False}
    values["budget"] = {"num_params": 2500}
    values["measurement"]["min_seconds"] = 0.01
    plan = DesignPlan(families=("separable",), num_candidates=3)

    def run(name):
        return Run(parse_recipe(values), tmp_path / name, tmp_path / "home")

    whole = fitting_candidates(run("whole"), plan)
    path = tmp_path / "broken" / CANDIDATES_NAME
    path.parent.mkdir()
    kept = json.loads((tmp_path / "whole" / CANDIDATES_NAME).read_text())
    path.write_text(json.dumps(kept | {"candidates": kept["candidates"][:1], "complete": False}))
    broken = fitting_candidates(run("broken"), plan)
    assert broken[0] == whole[0]  # its times too: it was not measured again
    assert [(c.number, c.arguments) for c in broken] == [(c.number, c.arguments) for c in whole]
    assert json.loads(path.read_text())["complete"]
    assert fitting_candidates(run("broken"), plan) == broken


def untaught(folder, **changes):
    """Return a run without a teacher, of which no training is needed before its candidates'."""
    values = yaml.safe_load(TINY_RECIPE) | {"control": False, "teacher": None}
    values |= {"strategy": {"name": "ema_teacher"}, "budget": {"num_params": 2500}}
    return Run(parse_recipe(values | changes), folder / "d", folder / "home")


def quickly_timed(run, candidate, folder):
    return replace(candidate, latency_ms=1.0, step_ms=1.0, model_size_bytes=9)


FOUR = DesignPlan(families=("separable",), num_candidates=4, epochs=(1, 2))


def test_a_network_that_cannot_be_measured_or_trained_leaves_the_others(tmp_path, monkeypatch):
    numbers = []

    def timed(run, candidate, folder):
        numbers.append(candidate.number)
        (folder / "left.onnx").touch()
        if len(numbers) == 2:
            raise ModelError("no file")
        return quickly_timed(run, candidate, folder)

    def train_student(run):
        number = int(run.recipe.name.removeprefix("candidate-"))
        if number in (numbers[0], *failing):
            raise TrainingError(f"{number}: the loss is not finite")
        return SimpleNamespace(payload={"rows": [{"validation_accuracy": 1 / number}]})

    failing = []
    monkeypatch.setattr(recipes_design, "timed", timed)
    run = untaught(tmp_path)
    found = recipes_design.design(run, FOUR, train_student)
    assert [item.number for item in found.candidates] == [numbers[0], *numbers[2:]]
    assert {score.candidate for score in found.scores} == set(numbers[2:])
    assert found.scores[0].candidate == numbers[2]
    assert found.failed == {numbers[0]: f"{numbers[0]}: the loss is not finite"}
    assert not list(run.folder.rglob("*.onnx"))
    page = design_document(found, facts=())
    assert f"The training failed of {numbers[0]}:" in str(page)
    failing += numbers
    with pytest.raises(TrainingError, match="the loss is not finite"):
        recipes_design.design(run, FOUR, train_student)


def test_candidates_are_measured_again_with_other_threads(tmp_path, monkeypatch):
    calls = []

    def timed(run, candidate, folder):
        calls.append(candidate.number)
        return quickly_timed(run, candidate, folder)

    monkeypatch.setattr(recipes_design, "timed", timed)
    first = fitting_candidates(untaught(tmp_path), FOUR)
    assert fitting_candidates(untaught(tmp_path), FOUR) == first
    assert len(calls) == 4
    fitting_candidates(untaught(tmp_path, device={"num_threads": 2}), FOUR)
    assert len(calls) == 8


def test_all_drawn_networks_are_counted_where_too_few_keep_the_budget(tmp_path, monkeypatch):
    def timed(run, candidate, folder):
        calls.append(candidate.number)
        return replace(quickly_timed(run, candidate, folder), latency_ms=len(calls))

    calls = []
    monkeypatch.setattr(recipes_design, "timed", timed)
    budget = {"num_params": 2500, "latency_ms": {"at_most": 2}}
    run = untaught(tmp_path, budget=budget)
    found = fitting_candidates(run, FOUR)
    assert [item.number for item in found] == calls[:1]
    assert len(calls) == recipes_design.TIMED_A_CANDIDATE * 4
    told = json.loads((run.folder / CANDIDATES_NAME).read_text())
    assert told["num_drawn"] == calls[-1]


def test_the_best_recipe_keeps_what_candidates_are_trained_without(tmp_path):
    values = yaml.safe_load(TINY_RECIPE)
    values["heads"] = {"parity": {"label_column": "parity"}}
    values["student"]["model"]["normalization"] = {"mean": [0.5], "std": [0.25]}
    run = open_design(
        values, budget=["num_params=2500"], device=None, changes=(), out=tmp_path / "d"
    )
    assert not run.recipe.control
    best = Candidate(7, "separable", {"stages": [[8, 1]]}, 900, 900, 900)
    kept = yaml.safe_load(recipes_design.best_recipe(run, best))
    assert kept["control"] is True
    assert kept["heads"] == parse_recipe(values).model_dump(mode="json")["heads"]
    model = kept["student"]["model"]
    assert (model["name"], model["arguments"]) == ("separable", {"stages": [[8, 1]]})
    assert model["normalization"] == {"mean": [0.5], "std": [0.25]}
    made = recipes_design.training_run(
        run, run.recipe.model_dump(mode="json"), best, Rung(num_candidates=1, num_epochs=1)
    )
    assert made.recipe.student.model.normalization == run.recipe.student.model.normalization
    assert made.recipe.control is False


@pytest.mark.parametrize(("budget", "told"), [({"num_params": 9}, True), ({"macs": 9}, False)])
def test_the_page_tells_the_share_of_the_parameters_where_they_are_limited(budget, told):
    plan = {"families": ["resnet"], "fill": 0.5, "epochs": [1], "factor": 3}
    design = SimpleNamespace(plan=plan, budget=budget, candidates=[], num_drawn=5)
    assert ("of its parameters used" in how(design)) == told


def test_a_limit_with_settings_is_told_in_words():
    latency = {"batch": 100, "threads": 1, "percentile": 95, "at_most": 50.0}
    plan = {"families": ["resnet"], "fill": 0.5, "epochs": [1], "factor": 3}
    design = SimpleNamespace(plan=plan, budget={"latency_ms": latency}, candidates=[], num_drawn=5)
    assert "latency_ms 50 (batch 100 threads 1 percentile 95)" in how(design)


def test_a_limit_on_time_that_nothing_keeps_is_told_after_a_few_measurements(
    warm, tiny_recipe, tmp_path
):
    impossible = design(
        warm, tiny_recipe, tmp_path, "--budget", "latency_ms=0.000001", "--candidates", "1",
        "--family", "paper_student",
    )  # fmt: skip
    assert impossible.code == 2
    assert "drawn networks keeps the budget" in impossible.err
    assert "h of training" in impossible.err
    assert "Traceback" not in impossible.err


@pytest.mark.parametrize("kind", ["mapping", "recipe", "file"])
def test_the_budget_that_is_given_counts_for_every_kind_of_recipe(tmp_path, tiny_recipe, kind):
    values = yaml.safe_load(tiny_recipe.read_text())
    recipe = {"mapping": values, "recipe": parse_recipe(values), "file": tiny_recipe}[kind]
    given = ["num_params=777", "latency_ms=5"]
    run = open_design(recipe, budget=given, device=None, changes=["seed=9"], out=tmp_path / "d")
    assert run.recipe.budget.num_params == 777
    assert run.recipe.budget.latency_ms.at_most == 5
    assert run.recipe.seed == 9
    assert values == yaml.safe_load(tiny_recipe.read_text())


def test_settings_that_name_layers_of_the_student_are_refused_at_the_start(tmp_path):
    def opened(**changes):
        values = yaml.safe_load(TINY_RECIPE) | changes
        return open_design(
            values, budget=["num_params=2500"], device=None, changes=(), out=tmp_path / "d"
        )

    on_layers = {"layers": [{"student": "network.1", "teacher": "embedding"}]}
    on_embedding = {"layers": [{"student": "embedding", "teacher": "network.1"}]}
    losses = {"hint": on_layers, "nst": on_layers, "rkd": on_embedding, "dist": {}}
    with pytest.raises(InputError) as caught:
        opened(distillation={"losses": losses}, exits={"layers": ["network.1"]})
    (text,) = caught.value.problems
    named = "distillation.losses.hint.layers, distillation.losses.nst.layers, exits: of the"
    assert text.startswith(named)
    assert "Drop them" in text
    strategy = {"name": "deep_to_shallow", "layers": ["network.1"]}
    with pytest.raises(InputError, match=r"^strategy\.layers: of the recipe's own student"):
        opened(strategy=strategy, teacher=None)
    weights = tmp_path / "weights.pt"
    weights.touch()
    student = {"model": {"name": "mlp"}, "checkpoint": str(weights)}
    with pytest.raises(InputError, match=r"^student\.checkpoint: of the recipe's own student"):
        opened(student=student, control=False)
    assert not (tmp_path / "d").exists()
    assert opened(distillation={"losses": {"rkd": {}, "dist": {}}}).recipe.budget.num_params == 2500


def test_wrong_input_is_told(warm, tiny_recipe, tmp_path):
    without = design(warm, tiny_recipe, tmp_path)
    assert without.code == 2
    assert "has no budget" in without.err
    unknown = design(warm, tiny_recipe, tmp_path, "--budget", "params=3")
    assert unknown.code == 2
    assert "unknown key `budget.params`" in unknown.err
    family = design(warm, tiny_recipe, tmp_path, "--budget", "num_params=9", "--family", "resnext")
    assert family.code == 2
    assert "resnext" in family.err
    for options, text in (
        (("--epochs", "3", "--epochs", "1"), "epochs that grow"),
        (("--candidates", "0"), "0 candidates"),
        (("--factor", "1"), "factor 1"),
        (("--fill", "2"), "fill 2"),
    ):
        wrong = design(warm, tiny_recipe, tmp_path, "--budget", "num_params=2500", *options)
        assert wrong.code == 2
        assert text in wrong.err
        # Told before anything is trained or measured.
        assert not (tmp_path / "d").exists()
    tight = design(
        warm, tiny_recipe, tmp_path, "--budget", "num_params=20", "--candidates", "1",
        "--family", "paper_student",
    )  # fmt: skip
    assert tight.code == 2
    assert "none of the drawn networks keeps the budget" in tight.err
    assert "the smallest has" in tight.err

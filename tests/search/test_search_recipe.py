"""The command on a tiny recipe: files, going on, several processes, wrong input."""

import contextlib
import json
import time
from dataclasses import replace

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tiny_run import TINY_RECIPE
from understudy.artifacts import file_hash
from understudy.errors import InputError
from understudy.recipes import job, train
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.recipes.search import kept_row, known_ingredients, measured
from understudy.recipes.search_job import open_search
from understudy.search.plan import Attempt
from understudy.stages import train_student


def search(warm, tiny_recipe, folder, *options):
    return warm.run("search", tiny_recipe, "--out", folder / "s", *options, home=folder / "home")


@pytest.fixture(scope="module")
def searched(warm, tiny_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    finished = search(
        warm, tiny_recipe, folder, "--trials", "2", "--space", "training.num_epochs=int:1..3"
    )
    assert finished.code == 0, finished.err
    return folder, finished


def test_it_writes_results_page_and_a_recipe_that_runs(warm, searched):
    folder, finished = searched
    results = json.loads((folder / "s" / "search.json").read_text())
    best = results["trials"][results["best"][0]]
    recipe = yaml.safe_load((folder / "s" / "best.yaml").read_text())
    assert recipe["training"]["num_epochs"] == best["settings"]["training.num_epochs"]
    assert recipe["control"] is True
    assert f"trial {best['number']}" in finished.out
    assert "best.yaml" in finished.out
    page = (folder / "s" / "search.html").read_text()
    assert "training.num_epochs" in page
    assert results["test_was_read"] is False
    # No stage that reads the test split was run.
    kinds = {path.parent.name for path in (folder / "s").rglob("record.json")}
    assert kinds == {"split", "teacher", "labels", "student"}


def test_the_teacher_is_trained_once(searched):
    folder, _ = searched
    teachers = (folder / "s").rglob("teacher/model.safetensors")
    assert len({file_hash(path) for path in teachers}) == 1
    assert len(list((folder / "s").rglob("teacher/checkpoint.pt"))) == 1


def test_the_same_command_goes_on_and_finished_trials_stay(warm, tiny_recipe, searched):
    folder, _ = searched
    before = json.loads((folder / "s" / "search.json").read_text())["trials"]
    space = "training.num_epochs=int:1..3"
    more = search(warm, tiny_recipe, folder, "--trials", "3", "--space", space)
    assert more.code == 0, more.err
    after = json.loads((folder / "s" / "search.json").read_text())["trials"]
    assert after[:2] == before
    assert len(after) == 3
    other = search(warm, tiny_recipe, folder, "--trials", "3", "--space", "seed=int:0..3")
    assert other.code == 2
    assert "is another search: its space" in other.err
    changed = ("--trials", "3", "--space", space, "--set", "training.batch_size=32")
    recipe = search(warm, tiny_recipe, folder, *changed)
    assert recipe.code == 2
    assert "is another search: its recipe" in recipe.err


def files_of(folder):
    """Return every file with its content and time of change."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (file_hash(path), path.stat().st_mtime_ns) for path in paths}


def test_a_teacher_that_would_become_another_one_is_told_before_it_is_trained(
    warm, tiny_recipe, searched
):
    folder, _ = searched
    before = files_of(folder / "s" / "base" / "teacher")
    change = ("--set", "device.num_processes=2")
    other = warm.run("search", folder / "s", *change, home=folder / "home")
    assert other.code == 2
    assert "is a search with another device of the training of the teacher" in other.err
    assert "teacher: started" not in other.err
    assert files_of(folder / "s" / "base" / "teacher") == before


def test_other_weights_of_a_teacher_are_told_before_they_are_taken(
    warm, tiny_recipe, searched, tmp_path
):
    weights = tmp_path / "teacher.safetensors"
    first = next((searched[0] / "s" / "base").rglob("teacher/model.safetensors"))
    weights.write_bytes(first.read_bytes())
    options = ["--sampler", "grid", "--space", "training.num_epochs=1"]
    options += ["--set", "teacher.training=null", "--set", f"teacher.checkpoint={weights}"]
    begun = search(warm, tiny_recipe, tmp_path, *options)
    assert begun.code == 0, begun.err
    before = files_of(tmp_path / "s" / "base" / "teacher")
    state = load_file(weights)
    save_file({name: value + 0.25 for name, value in state.items()}, weights)
    other = search(warm, tiny_recipe, tmp_path, *options)
    assert other.code == 2
    assert "is a search with another weights file of the teacher" in other.err
    assert files_of(tmp_path / "s" / "base" / "teacher") == before
    weights.write_bytes(first.read_bytes())
    again = search(warm, tiny_recipe, tmp_path, *options)
    assert again.code == 0, again.err


def test_the_weights_that_an_online_teacher_starts_with_are_bound(tmp_path):
    values = yaml.safe_load(TINY_RECIPE) | {"strategy": {"name": "online"}, "control": False}
    values["teacher"] = {"model": {"name": "mlp"}, "checkpoint": str(tmp_path / "w.pt")}

    def ingredients(content):
        (tmp_path / "w.pt").write_bytes(content)
        return known_ingredients(Run(parse_recipe(values), tmp_path / "base", tmp_path / "home"))

    first, other = ingredients(b"a"), ingredients(b"b")
    assert set(first) == {"data", "weights file of the teacher"}
    assert first["data"] == other["data"]
    assert first["weights file of the teacher"] != other["weights file of the teacher"]
    values["teacher"] = {"model": {"name": "mlp"}}
    assert set(ingredients(b"a")) == {"data"}


def test_times_are_not_compared_between_processes_side_by_side(tmp_path):
    recipe, space = parse_recipe(yaml.safe_load(TINY_RECIPE)), ["seed=1|2"]

    def opened(workers, *objectives):
        return open_search(
            recipe, changes=(), space=space, options={"objectives": objectives},
            out=tmp_path / "s", workers=workers,
        )  # fmt: skip

    with pytest.raises(InputError, match="2 workers and the objective latency_ms and train_sec"):
        opened(2, "accuracy", "latency_ms", "train_seconds")
    assert opened(1, "accuracy", "latency_ms").plan.objectives == ("accuracy", "latency_ms")
    assert opened(2, "accuracy", "macs").plan.objectives == ("accuracy", "macs")


def test_a_killed_training_is_continued_to_the_same_result(warm, tiny_recipe, tmp_path):
    options = ["--sampler", "grid", "--space", "distillation.temperature=1|4"]
    options += ["--set", "training.num_epochs=40"]

    def results(folder):
        told = json.loads((folder / "s" / "search.json").read_text())
        rows = [(row["number"], row["state"], row["settings"]) for row in told["trials"]]
        weights = sorted((folder / "s" / "trials").rglob("student/model.safetensors"))
        return rows, told["best"], [file_hash(path) for path in weights]

    whole = search(warm, tiny_recipe, tmp_path / "whole", *options)
    assert whole.code == 0, whole.err
    folder = tmp_path / "killed"
    command = warm.start(
        "search", tiny_recipe, "--out", folder / "s", *options, home=folder / "home"
    )
    second = folder / "s" / "trials" / "0001" / "student"
    while not (second / "checkpoint.pt").exists():
        assert command.poll() is None, command.err()
        time.sleep(0.001)
    command.kill()
    assert command.wait().code == -9
    assert not (second / "record.json").exists(), "killed too late to prove anything"
    finished = search(warm, tiny_recipe, folder, *options)
    assert finished.code == 0, finished.err
    assert "trial 1: taken up" in finished.err
    assert "trial 0:" not in finished.err, "a finished trial is not repeated"
    assert results(folder) == results(tmp_path / "whole")


def test_a_half_done_trial_goes_on_with_another_share_of_the_cores(tmp_path, monkeypatch):
    values = yaml.safe_load(TINY_RECIPE) | {"teacher": None, "device": {"num_threads": None}}
    values |= {"strategy": {"name": "ema_teacher"}}
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    threads = []
    # Told and not done: another number of threads may round otherwise.
    monkeypatch.setattr(train, "use_threads", lambda number, **_: threads.append(number))
    monkeypatch.setattr(job, "use_threads", lambda number: None)

    def measures(out, *, share, stop_after=None):
        """Train one trial in this process; return its measures and the epochs that it told."""
        opened = open_search(
            parse_recipe(values), changes=(), space=["seed=3"], options={}, out=out, workers=1
        )
        told = []

        def report(epoch, accuracy):
            told.append(epoch)
            if epoch == stop_after:
                raise KeyboardInterrupt

        attempt = Attempt(0, {"seed": 3}, out / "trials" / "0000", report)
        search = replace(opened, num_threads=share)
        with contextlib.suppress(KeyboardInterrupt):
            found = measured(search, attempt, train_student)
            return {name: found[name] for name in ("accuracy", "nll", "num_steps")}, told
        return None, told

    first, all_epochs = measures(tmp_path / "whole", share=None)
    assert len(all_epochs) == 4
    stopped, begun = measures(tmp_path / "broken", share=2, stop_after=all_epochs[1])
    assert stopped is None
    assert begun == all_epochs[:2]
    last, rest = measures(tmp_path / "broken", share=1)
    assert rest == all_epochs[2:]
    assert last == first
    assert threads == [None, 2, 1]


def row(accuracy, phase=None):
    told = {} if accuracy is None else {"validation_accuracy": accuracy}
    return told if phase is None else told | {"phase": phase}


@pytest.mark.parametrize(
    ("keep", "keep_tuned", "expected"),
    [("last", None, 0.7), ("best", None, 0.9), ("best", "last", 0.4), ("last", "best", 0.6)],
)
def test_a_trial_is_judged_by_the_epoch_whose_weights_it_has(keep, keep_tuned, expected):
    values = yaml.safe_load(TINY_RECIPE)
    values["training"]["keep"] = keep
    rows = [row(0.5), row(0.9), row(0.7)]
    if keep_tuned is not None:
        values["finetuning"] = {"num_epochs": 4, "keep": keep_tuned}
        tuned = [0.5, 0.6, None, 0.4]
        rows += [row(accuracy, "finetuning") for accuracy in tuned]
    assert kept_row(parse_recipe(values), rows)["validation_accuracy"] == expected


def test_accuracy_against_size_is_a_front(warm, tiny_recipe, tmp_path):
    options = ["--sampler", "grid", "--space", "student.model.arguments.hidden=[4]|[32]"]
    options += ["--objective", "accuracy", "--objective", "latency_ms", "--objective", "num_params"]
    finished = search(warm, tiny_recipe, tmp_path, *options)
    assert finished.code == 0, finished.err
    told = json.loads((tmp_path / "s" / "search.json").read_text())
    assert told["plan"]["directions"] == ["maximize", "minimize", "minimize"]
    assert told["plan"]["judged_on"] == "validation"
    small, large = (row["measures"] for row in told["trials"])
    assert small["num_params"] < large["num_params"]
    assert small["latency_ms"] > 0
    assert 0 in told["best"], "nothing is smaller"
    assert "Pareto front" in finished.out


def test_two_processes_finish_a_grid(warm, tiny_recipe, tmp_path):
    grid = ["--sampler", "grid", "--space", "distillation.temperature=1|4", "--workers", "2"]
    finished = search(warm, tiny_recipe, tmp_path, *grid)
    assert finished.code == 0, finished.err
    rows = json.loads((tmp_path / "s" / "search.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["complete"] * 2
    assert [row["settings"]["distillation.temperature"] for row in rows] == [1, 4]
    # How the trials were shared out is no part of what was found.
    best = yaml.safe_load((tmp_path / "s" / "best.yaml").read_text())
    assert best["device"] == yaml.safe_load(TINY_RECIPE)["device"] | {
        "accelerator": "cpu",
        "num_processes": 1,
    }


def test_wrong_input_is_one_message_each_and_starts_nothing(warm, tiny_recipe, tmp_path):
    finished = search(
        warm, tiny_recipe, tmp_path, "--space", "distilation.kl_weight=1|2", "--space", "seed=-1|1"
    )
    assert finished.code == 2
    assert "Did you mean `distillation`" in finished.err
    assert "`seed` is -1" in finished.err
    assert "Traceback" not in finished.err
    assert not (tmp_path / "s" / "base").exists()
    for space, text in (
        ("views.strength=a|b", "`views.strength` is 'a'"),
        ("views.strength=-1..1", "`views.strength` is -1"),
        ("strategy.name=offline|born_again", "strategy born_again, whose students are a chain"),
    ):
        finished = search(warm, tiny_recipe, tmp_path, "--space", space)
        assert finished.code == 2
        assert text in finished.err
        assert "Traceback" not in finished.err
    assert search(warm, tiny_recipe, tmp_path, "--objective", "speed").code == 2
    assert search(warm, tiny_recipe, tmp_path, "--workers", "0").code == 2

"""The paper's lab: counts, trainings that go on, items that are kept, the page, wrong input."""

import copy
from dataclasses import asdict

import pytest
import yaml

from tiny_run import TINY_RECIPE
from understudy.artifacts import Record, file_hash
from understudy.errors import InputError
from understudy.lab import trainings
from understudy.lab.paper import ITEMS, Lab, num_params, vit_params
from understudy.lab.paper_readings import (
    reading_of_accuracy,
    reading_of_dropout,
    reading_of_grid,
    reading_of_online,
    reading_of_pretrained,
    slopes,
)
from understudy.lab.paper_recipes import Setting, alone, distilled, online, pretrained
from understudy.lab.paper_values import ACCURACIES, OPERATORS, PARAMETERS, SECONDS
from understudy.lab.paper_views import PARTS, TITLES, paper_document, provenance
from understudy.lab.timings import gpu_of
from understudy.recipes.schema import parse_recipe
from understudy.report.document import Grid, document_html, document_markdown
from understudy.report.formats import plain
from understudy.train.training import Training


def test_the_networks_have_the_parameters_of_table_5():
    assert num_params("paper_student") == PARAMETERS["Student"]
    for layers in (4, 6, 8):
        assert num_params("paper_teacher", num_layers=layers) == PARAMETERS[f"Teacher {layers}"]


def test_the_vit_of_the_configuration_has_the_parameters_of_table_5():
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert vit_params() == PARAMETERS["ViT-B/16, 10 classes"]


def test_recipes_say_what_the_paper_says():
    setting = Setting("cifar10", dropout=0.3)
    recipe = parse_recipe(distilled(setting, 6))
    assert recipe.training.batch_size == 100
    assert recipe.training.num_epochs == 100
    assert recipe.training.optimizer.name == "adamw"
    assert recipe.training.optimizer.learning_rate == 1e-3
    assert recipe.training.learning_rate_schedule.shape == "constant"
    assert (recipe.distillation.kl_weight, recipe.distillation.ce_weight) == (0.5, 0.5)
    assert recipe.distillation.temperature == 1
    assert recipe.teacher.model.arguments == {"num_layers": 6, "dropout": 0.3}
    assert parse_recipe(online(setting)).strategy.name == "online"
    assert parse_recipe(alone(setting, dropout=0.5)).teacher.model.name == "paper_student"
    given = {"model": {"name": "resnet56"}, "checkpoint": "weights.th"}
    assert parse_recipe(pretrained(setting, given)).teacher.training is None


def constant(num_epochs):
    """Return a recipe whose length can change without changing its first epochs."""
    recipe = copy.deepcopy(yaml.safe_load(TINY_RECIPE))
    for training in (recipe["training"], recipe["teacher"]["training"]):
        training["num_epochs"] = num_epochs
        training["learning_rate_schedule"] = {"shape": "constant"}
    recipe["views"] = {"num_views": 1}
    recipe["control"] = False
    return recipe


def test_a_longer_training_goes_on_from_a_shorter_one_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    short = trainings.on_labels(constant(3), tmp_path / "pieces")
    first = short.payload["rows"]
    long = trainings.on_labels(constant(5), tmp_path / "pieces")
    whole = trainings.on_labels(constant(5), tmp_path / "whole")
    assert long.payload["rows"][:3] == first
    assert long.hash == whole.hash
    weights = [tmp_path / name / "teacher" / "model.safetensors" for name in ("pieces", "whole")]
    assert file_hash(weights[0]) == file_hash(weights[1])
    # The seconds of the epochs before are kept too.
    assert len(trainings.seconds(long)) == 5
    with pytest.raises(InputError, match="was trained for 5 epochs, and 3 are asked for"):
        trainings.on_labels(constant(3), tmp_path / "pieces")


@pytest.mark.parametrize("num_epochs", [3, 5])
def test_an_unfinished_training_goes_on_to_other_epochs(tmp_path, monkeypatch, num_epochs):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    end_epoch, ended = Training.end_epoch, []

    def end_and_stop(training):
        end_epoch(training)
        ended.append(training.at.epoch)
        if len(ended) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "end_epoch", end_and_stop)
    with pytest.raises(KeyboardInterrupt):
        trainings.on_labels(constant(4), tmp_path / "pieces")
    assert trainings.num_epochs_begun(tmp_path / "pieces" / "teacher") == 3
    with pytest.raises(InputError, match="was trained for 3 epochs, and 2 are asked for"):
        trainings.on_labels(constant(2), tmp_path / "pieces")
    other = trainings.on_labels(constant(num_epochs), tmp_path / "pieces")
    assert ended == list(range(1, num_epochs + 1))
    whole = trainings.on_labels(constant(num_epochs), tmp_path / "whole")
    assert other.hash == whole.hash


def test_a_student_goes_on_only_with_the_same_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    recipe = constant(3)
    trainings.distilled(recipe, tmp_path / "run")
    recipe["training"]["num_epochs"] = 4
    longer = trainings.distilled(recipe, tmp_path / "run")
    whole = trainings.distilled(recipe, tmp_path / "whole")
    assert longer.hash == whole.hash
    other = trainings.distilled(constant(5), tmp_path / "run")
    assert other.hash == trainings.distilled(constant(5), tmp_path / "new").hash


def test_another_dropout_seed_or_accelerator_leaves_earlier_trainings_alone(tmp_path):
    def folder(**changes):
        return Lab(Setting("digits", **changes), tmp_path).run_folder("ts6")

    assert len({folder(), folder(dropout=0.0), folder(seed=1), folder(dropout=0.0, seed=1)}) == 4
    assert folder(accelerator="cuda") not in {folder(), folder(accelerator="auto")}
    assert folder(num_epochs=3) == folder(num_epochs=100)  # which goes on from the shorter one


def curve(*validations):
    return [[k + 1, 0.5, value] for k, value in enumerate(validations)]


def test_readings_follow_from_the_numbers():
    networks = {
        "Student": {"curve": curve(0.3, 0.4, 0.5)},
        "Teacher 4": {"curve": curve(0.3, 0.4, 0.6)},
        "Teacher 6": {"curve": curve(0.3, 0.4, 0.55)},
        "TS 4": {"curve": curve(0.3, 0.4, 0.505)},
        "TS 6": {"curve": curve(0.3, 0.6, 0.58)},
    }
    text = plain("\n".join(reading_of_accuracy({"networks": networks})))
    assert "Teacher 6, Teacher 4, not in the paper's order" in text
    assert "TS 4 against the student alone: +0.50 points (within chance)" in text
    assert "TS 6 against the student alone: +8.00 points; the paper has +14.55 points" in text
    assert "3 of 100 epochs: over the last two, 5 of 5 curves still rose" in text
    rates = {"0": curve(*[0.6] * 100), "0.3": curve(*[0.53] * 100)}
    assert "is a rate of 0.3: 53.00 %" in plain(reading_of_dropout({"curves": rates}))
    rates = {"0": curve(0.6), "0.3": curve(0.5)}
    assert "not to be told" in reading_of_dropout({"curves": rates})
    found = [(1.0, curve(0.6)), (5.0, curve(0.5))]
    told = reading_of_grid("distillation.temperature", found, {})
    assert told[0].startswith("Best on validation: 1; within chance of it: 1.")
    assert told[1].startswith("1 of 100 epochs: too few to tell")


def test_rates_are_compared_after_the_epochs_that_all_have():
    curves = {"0": curve(0.4, 0.41), "0.5": curve(0.3, 0.35, 0.5, 0.6)}
    told = plain(reading_of_dropout({"curves": curves}))
    assert "After 2 epochs the rates from best to worst are 0, 0.5, 6.00 % apart" in told


def test_chance_is_that_of_the_validation_pictures_there_are():
    few = {"num_samples": {"validation": 180}}
    networks = {"Student": {"curve": curve(0.9)}, "TS 6": {"curve": curve(0.95)}}
    for counts, expected in (({}, False), (few, True)):
        told = reading_of_accuracy({"networks": networks, **counts})
        assert ("+5.00 points (within chance)" in plain("\n".join(told))) == expected
        told = reading_of_dropout({"curves": {"0": curve(0.9), "0.5": curve(0.95)}, **counts})
        assert ("within chance" in told) == expected
        online = {"curve": curve(0.9), "offline_curve": curve(0.95)}
        seconds = {"epoch_seconds": 1.0, "offline_epoch_seconds": 1.0}
        told = reading_of_online({**online, **seconds, **counts})
        assert ("within chance" in told[0]) == expected
        found = [(1.0, curve(0.95)), (5.0, curve(0.9))]
        told = reading_of_grid("distillation.temperature", found, counts)
        assert ("within chance of it: 1, 5." in told[0]) == expected


def test_curves_are_said_to_rise_or_not_where_they_are_short():
    [told] = slopes([curve(0.3, 0.4, 0.5), curve(0.5, 0.4, 0.3)])
    assert "3 of 100 epochs: over the last two, 1 of 2 curves still rose" in told
    assert told.endswith("with --epochs 100 goes on from here.")
    [anew] = slopes([curve(0.3, 0.4, 0.5)], anew=True)
    assert anew.endswith("with --epochs 100 --grid-epochs 100 trains all anew.")
    assert slopes([curve(*[0.5] * 100)]) == ()
    payload = {
        "curve": curve(0.3, 0.4, 0.5),
        "offline_curve": curve(0.3, 0.4, 0.39),
        "epoch_seconds": 2.0,
        "offline_epoch_seconds": 1.0,
    }
    assert "2 of 2 curves still rose" in reading_of_online(payload)[-1]


def test_tables_of_the_paper_are_whole():
    assert set(ACCURACIES) == set(SECONDS)
    assert set(OPERATORS) == {"Student", "Teacher 4", "Teacher 6", "Teacher 8"}
    assert set(ITEMS) == set(PARTS) == set(TITLES)


def test_the_page_says_what_was_not_run_and_how_to_run_it():
    document = paper_document({})
    text = document_markdown(document)
    for name in ITEMS:
        assert f"`understudy lab paper --only {name} --data FOLDER` runs it" in text
    assert "Not run." in document_html(document)


def test_networks_of_table_6_without_a_result_are_named_as_not_run():
    networks = {
        name: {"curve": curve(0.3, 0.4), "epoch_seconds": 2.0, "inference_seconds": 1.0}
        for name in ("Student", "Teacher 6", "TS 6")
    }
    told, accuracies, *_ = PARTS["accuracy"]({"networks": networks, "dropout": 0.3})
    assert "Not run: Teacher 4, Teacher 8, TS 4, TS 8." in told
    assert "--dropout 0.3 --layers 6 --layers 4 --layers 8" in told
    assert {row[0] for row in accuracies.rows if row[2] == "not run"} == {
        "Teacher 4", "Teacher 8", "TS 4", "TS 8"
    }  # fmt: skip
    every = dict.fromkeys(ACCURACIES, networks["Student"])
    whole = PARTS["accuracy"]({"networks": every, "dropout": 0.3})
    assert not any(isinstance(part, str) for part in whole)


def test_seconds_of_a_gpu_are_marked_and_have_no_ratio_to_the_papers():
    on_cpu = {"curve": curve(0.3), "epoch_seconds": 10.0, "inference_seconds": 1.0, "gpu": None}
    networks = {"Student": on_cpu, "Teacher 6": on_cpu | {"gpu": "NVIDIA H200"}}
    parts = PARTS["accuracy"]({"networks": networks, "dropout": 0.5})
    [times] = [part for part in parts if isinstance(part, Grid) and "Faster" in part.titles]
    rows = {row[0]: row for row in times.rows}
    assert rows["Student"][2:4] == ("10.0 s", "6.3×")
    assert rows["Teacher 6"][2:4] == ("10.0 s (GPU)", "")
    assert rows["Teacher 6"][6] == "60.2×"  # inference is timed on the processor
    assert "trained on NVIDIA H200, so without a ratio" in times.caption
    student = PARTS["accuracy"]({"networks": {"Student": on_cpu}, "dropout": 0.5})
    assert not any("GPU" in part.caption for part in student if isinstance(part, Grid))


@pytest.mark.parametrize(
    ("accelerator", "hardware", "gpu"),
    [
        ("cpu", {"gpu": "NVIDIA H200"}, None),
        ("auto", {"gpu": "NVIDIA H200"}, "NVIDIA H200"),
        ("auto", {}, None),
    ],
)
def test_the_processor_of_a_training_is_what_its_record_says(accelerator, hardware, gpu):
    recipe = {"device": {"accelerator": accelerator}}
    record = Record(kind="teacher", key="k", seed=0, payload={}, recipe=recipe, hardware=hardware)
    assert gpu_of(record) == gpu


def test_the_page_says_what_an_item_ran_on():
    setting = asdict(Setting("cifar10", threads=None, accelerator="cuda"))
    hardware = {"processor": "EPYC", "gpu": "NVIDIA H200"}

    def told(kind, payload=None):
        return provenance(
            Record(
                kind=kind, key="k", seed=3, payload=payload or {}, recipe={"setting": setting},
                hardware=hardware, versions={"torch": "2"}, created="2026-01-01T00:00:00+00:00",
            )
        )  # fmt: skip

    date = "Run 1 January 2026, 00:00 UTC: "
    device = "trained with accelerator cuda (NVIDIA H200), EPYC, threads all, torch 2."
    assert told("lab-online") == f"{date}seed 3, dropout 0.5, {device}"
    assert told("lab-dropout") == f"{date}seed 3, {device}"
    assert told("lab-operators") == f"{date}EPYC, threads 1, torch 2."
    setting["accelerator"] = "cpu"
    assert told("lab-online") == f"{date}seed 3, dropout 0.5, EPYC, threads all, torch 2."


def test_a_teacher_that_is_not_sure_is_not_called_nearly_labels():
    payload = {
        "epoch_seconds": 2.0,
        "label_seconds": 2.0,
        "teacher_accuracy": 0.9,
        "curve": curve(0.5),
    }
    sure = reading_of_pretrained(payload | {"teacher_confidence": 0.999})
    unsure = reading_of_pretrained(payload | {"teacher_confidence": 0.7})
    assert "would take 2.0 times as long" in sure[0]
    assert "nearly the labels" in sure[1]
    assert "not told apart" in sure[1]
    assert unsure[1].endswith("training pictures is 0.7000.")


def test_the_command_keeps_what_it_has_done(warm, tmp_path):
    options = ("lab", "paper", "--only", "parameters", "--out", tmp_path / "lab")
    first = warm.run(*options, home=tmp_path / "home")
    assert first.code == 0, first.err
    assert "| Teacher 8 | 76,436 | 76,436 | equal |" in first.out
    record = Record.load(tmp_path / "lab" / "parameters")
    second = warm.run(*options, home=tmp_path / "home")
    assert second.code == 0
    assert "reused" in second.err
    assert Record.load(tmp_path / "lab" / "parameters").created == record.created


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--only", "tables"), "--only tables; expected some of parameters"),
        (("--epochs", "0"), "at least 1 epoch"),
        (("--dropout", "1"), "below 1"),
        (("--layers", "5"), "some of 4, 6, 8"),
        (("--rates", "1.5"), "dropout rates 1.5; expected rates from 0 to below 1"),
        (("--teacher", "resnet56"), "expected NAME=FILE"),
        (("--only", "pretrained", "--data", "digits"), "without a teacher"),
        (("--only", "operators", "--data", "no/such/folder"), "no/such/folder"),
    ],
)
def test_wrong_input_is_one_message(warm, tmp_path, options, text):
    finished = warm.run("lab", "paper", "--out", tmp_path / "lab", *options, home=tmp_path / "home")
    assert finished.code == 2
    assert text in finished.err
    assert "Traceback" not in finished.err

"""Which teacher makes the best student: the rules on made-up numbers, and a real ranking."""

import itertools
import json
import math
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import yaml
from torch.nn import functional

from tiny_run import TINY_RECIPE, TinyRun
from understudy import stages
from understudy.artifacts import Record
from understudy.data.sources import load_data
from understudy.errors import InputError, UnderstudyError
from understudy.models.build import NormalizedModel, build_network
from understudy.recipes.files import load_recipe
from understudy.recipes.rank import checked_candidates
from understudy.recipes.rank_open import ranking_recipe
from understudy.recipes.rank_probe import probe_run
from understudy.recipes.rank_profile import measure_fresh
from understudy.recipes.rank_rules import (
    Comparison,
    TrainingNoise,
    better_teachers_of_worse_students,
    paired_difference,
    ranked,
    student_difference,
    training_noise,
)
from understudy.recipes.rank_words import in_words
from understudy.recipes.run import Run
from understudy.recipes.sections import TeacherSection
from understudy.report.ranking import Gap, Ranking
from understudy.report.ranking_views import ranking_text
from understudy.report.sampling import Difference

# Rules


def compared(first, second, teacher, student, *, error=0.01):
    return Comparison(first, second, Difference(teacher, error), Difference(student, error))


def test_noise_of_training_is_what_is_left_after_student_and_seed():
    levels, seeds = np.array([0.5, 0.7, 0.6, 0.55]), np.array([0.02, -0.01, 0.0])
    residual = np.random.default_rng(1).normal(0, 0.01, (4, 3))
    table = levels[:, None] + seeds + residual
    found = training_noise({str(k): tuple(row) for k, row in enumerate(table)})
    left = residual - residual.mean(0) - residual.mean(1, keepdims=True) + residual.mean()
    assert found.degrees_of_freedom == 6
    assert found.standard_deviation == pytest.approx(math.sqrt((left**2).sum() / 6))
    exact = training_noise({str(k): tuple(row) for k, row in enumerate(levels[:, None] + seeds)})
    assert exact.standard_deviation == pytest.approx(0, abs=1e-12)
    assert training_noise({"a": (0.5,), "b": (0.6,)}) is None


def test_teachers_are_compared_by_the_pictures_that_only_one_gets_right():
    ours_N = torch.tensor([1] * 50 + [1] * 8 + [0] * 2 + [0] * 40).bool()
    theirs_N = torch.tensor([1] * 50 + [0] * 8 + [1] * 2 + [0] * 40).bool()
    found = paired_difference(ours_N, theirs_N)
    assert found.value == pytest.approx(0.06)
    assert found.standard_error == pytest.approx(math.sqrt(10 - 36 / 100) / 100)
    same = paired_difference(ours_N, ours_N)
    assert same.value == 0
    assert same.is_noise


def test_students_are_compared_by_pictures_and_trainings():
    generator = torch.Generator().manual_seed(0)
    ours_SN, theirs_SN = (torch.rand(2, 3, 400, generator=generator) < 0.7).unbind()
    noise = TrainingNoise(0.02, 6)
    found = student_difference(ours_SN, theirs_SN, noise)
    ours, theirs = ours_SN.double().numpy(), theirs_SN.double().numpy()
    by_picture = (ours - theirs).mean(0)
    quantile = 2.4469118  # Student's t, 6 degrees of freedom, 97.5 %
    variance = by_picture.var() / 400 + 2 * (0.02 * quantile / 2) ** 2 / 3
    assert found.value == pytest.approx(ours.mean() - theirs.mean())
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    assert student_difference(ours_SN, theirs_SN, None).margin < found.margin


def test_equal_students_are_rarely_found_to_differ():
    generator = np.random.default_rng(3)
    num_wrong, num_trials, num_pictures = 0, 300, 300
    for _ in range(num_trials):
        hardness_N = generator.random(num_pictures)
        levels_MS = 0.7 + generator.normal(0, 0.01, (3, 3)) + generator.normal(0, 0.03, 3)
        noisy_MSN = hardness_N + generator.normal(0, 0.1, (3, 3, num_pictures))
        right_MSN = torch.from_numpy(noisy_MSN < levels_MS[..., None])
        table = {str(k): tuple(r.double().mean(1).tolist()) for k, r in enumerate(right_MSN)}
        found = student_difference(right_MSN[0], right_MSN[1], training_noise(table))
        num_wrong += not found.is_noise
    assert num_wrong / num_trials < 0.06


@pytest.mark.parametrize(
    ("teacher", "student", "recognised"),
    [
        (0.05, -0.05, "a"),  # the paper's Teacher 8 against Teacher 6
        (-0.05, 0.05, "b"),
        (0.05, 0.05, None),
        (0.05, -0.015, None),  # students within noise
        (0.015, -0.05, None),  # teachers within noise
        (0.0, 0.0, None),
    ],
)
def test_a_better_teacher_of_a_worse_student_is_recognised(teacher, student, recognised):
    found = better_teachers_of_worse_students([compared("a", "b", teacher, student)])
    assert [pair.first for pair in found] == ([recognised] if recognised else [])
    for pair in found:
        assert pair.teacher.value > 0 > pair.student.value


def pairs_of(accuracies, *, error):
    return [
        compared(a, b, 0.0, accuracies[a] - accuracies[b], error=error)
        for a, b in itertools.combinations(accuracies, 2)
    ]


def test_the_best_student_leads_and_labelling_cost_decides_ties():
    accuracies = {"a": 0.70, "b": 0.69, "c": 0.60, "d": 0.595}
    rates = {"a": 10.0, "b": 100.0, "c": 5.0, "d": 50.0}
    assert ranked(accuracies, rates, pairs_of(accuracies, error=0.01)) == [["b", "a"], ["d", "c"]]
    assert ranked(accuracies, rates, pairs_of(accuracies, error=0.001)) == [
        ["a"],
        ["b"],
        ["c"],
        ["d"],
    ]
    assert ranked(accuracies, rates, pairs_of(accuracies, error=1.0)) == [["b", "d", "a", "c"]]


# A real ranking: a strong teacher that says nearly nothing beyond its answer against a modest one


def strong_teacher(path):
    """Write a network that is right on nearly all digits, with logits that hardly differ.

    Its soft targets are all but uniform, so that a short training learns little of them.
    """
    source = load_data("digits")
    images_NCHW = source.images(torch.arange(source.num_samples))
    torch.manual_seed(0)
    network = build_network(
        "mlp", num_classes=10, image_shape=(1, 8, 8), arguments={"hidden": [96]}
    )
    model = NormalizedModel(network, mean=[0.3], std=[0.4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = functional.cross_entropy(model(images_NCHW), source.labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write_black_box(network.layers, path, mean=0.3, std=0.4, scale=0.01)


def write_black_box(layers, path, *, mean, std, scale):
    """Write an ONNX file of a two-layer perceptron with its normalisation inside."""
    _, first, _, last = layers
    shift = first.bias - first.weight.sum(1) * mean / std
    arrays = {
        "w1": first.weight / std,
        "b1": shift,
        "w2": last.weight * scale,
        "b2": last.bias * scale,
    }
    nodes = [
        onnx.helper.make_node("Flatten", ["images"], ["flat"]),
        onnx.helper.make_node("Gemm", ["flat", "w1", "b1"], ["hidden"], transB=1),
        onnx.helper.make_node("Relu", ["hidden"], ["active"]),
        onnx.helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"], transB=1),
    ]
    value, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "strong",
        [value("images", float32, ["n", 1, 8, 8])],
        [value("logits", float32, ["n", 10])],
        [onnx.numpy_helper.from_array(v.detach().numpy(), k) for k, v in arrays.items()],
    )
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)


@pytest.fixture(scope="module")
def ranking_values(tmp_path_factory):
    strong = tmp_path_factory.mktemp("strong") / "strong.onnx"
    strong_teacher(strong)
    values = yaml.safe_load(TINY_RECIPE)
    modest = values.pop("teacher")
    modest["training"] |= {"num_epochs": 5}
    values["data"] |= {"validation_fraction": 0.3}
    values["views"]["num_views"] = 4
    values["distillation"] = {"kl_weight": 1, "ce_weight": 0, "temperature": 2}
    values["training"] |= {"optimizer": {"name": "adamw", "learning_rate": 0.02}}
    values["student"] = {"model": {"name": "mlp", "arguments": {"hidden": [16]}}}
    values["labelling"] = {"batch_size": 100}
    values["candidates"] = {
        "strong": {"model": {"name": str(strong)}},
        "modest": modest,
    }
    values["probe"] = {"num_epochs": 8, "num_samples": 600, "num_seeds": 2}
    return values


@pytest.fixture(scope="module")
def recipe_path(ranking_values, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "choose.yaml"
    path.write_text(yaml.safe_dump(ranking_values))
    return path


@pytest.fixture(scope="module")
def finished(warm, recipe_path, tmp_path_factory):
    """The finished ranking, and what the command printed. Tests only read it."""
    folder = tmp_path_factory.mktemp("ranking")
    run = TinyRun(folder / "run", folder / "home")
    done = warm.run("teachers", "rank", recipe_path, "--out", run.folder, home=run.home)
    assert done.code == 0, done.err
    return run, done


@pytest.fixture(scope="module")
def ranking(finished):
    return Ranking.from_json((finished[0].folder / "ranking.json").read_text())


def test_a_better_teacher_that_makes_a_worse_student_is_found_and_said(ranking, finished):
    strong, modest = ranking.candidate("strong"), ranking.candidate("modest")
    assert strong.teacher_accuracy > modest.teacher_accuracy + 0.05
    assert strong.student_accuracy < modest.student_accuracy
    assert [(pair.first, pair.second) for pair in ranking.inversions] == [("strong", "modest")]
    assert [row.name for row in ranking.candidates] == ["modest", "strong"]
    assert "better teacher that makes a worse student" in " ".join(strong.reasons)
    assert "strong is a better teacher than modest and makes a worse student" in ranking.headline
    # And what is behind it.
    assert strong.confidence < 0.15
    assert "soft targets are nearly uniform" in " ".join(strong.reasons)
    assert "A better teacher that makes a worse student" in finished[1].out


def test_everything_about_a_candidate_is_measured(ranking):
    for row in ranking.candidates:
        assert row.num_params > 0
        assert row.params_ratio == pytest.approx(row.num_params / ranking.probe.student_params)
        through = row.throughput
        assert through.slowest <= through.images_per_second <= through.fastest
        assert through.num_batches >= 5
        assert row.labelling_seconds == pytest.approx(
            ranking.num_train * 4 / through.images_per_second
        )
        assert row.peak_memory_bytes > row.baseline_memory_bytes > 10e6
        assert row.energy_mj is None
        assert 0.1 < row.confidence <= 1
        assert len(row.student_accuracies) == 2
    assert ranking.candidate("strong").num_params == 64 * 96 + 96 + 96 * 10 + 10
    assert ranking.probe.num_samples == 600
    assert ranking.probe.num_steps == 8 * (600 // 64)
    assert ranking.probe.seeds == (3, 4)
    text = " ".join(ranking.caveats)
    assert "test split was not read" in text
    assert "Energy was not measured" in text
    assert "The weights of strong were given" in text  # it has seen the validation pictures


def test_probes_are_ordinary_runs_that_differ_in_the_teacher_only(finished, ranking):
    run, _ = finished
    folders = sorted(path.name for path in (run.folder / "probes").iterdir())
    names = [f"{name}-{seed}" for name in ("control", "modest", "strong") for seed in (3, 4)]
    assert folders == sorted(names)
    splits = {}
    for name in names:
        folder = run.folder / "probes" / name
        role = "control" if name.startswith("control") else "student"
        record = Record.load(folder / role)
        assert record.payload["num_steps"] == ranking.probe.num_steps
        splits[name] = Record.load(folder / "split").files["splits.safetensors"]
        recipe = load_recipe(folder)
        assert recipe.strategy.name == "offline"
        assert recipe.control == (role == "control")
        assert not (folder / "export").exists()
    assert len(set(splits.values())) == 1, "seeds share splits: no teacher has seen validation"
    # A view is labelled once for all seeds.
    entries = {
        name: set(Record.load(run.folder / "probes" / name / "labels").payload["entries"])
        for name in names
        if not name.startswith("control")
    }
    assert entries["modest-3"] == entries["modest-4"]
    assert not entries["modest-3"] & entries["strong-3"]


def test_the_ranking_is_written_for_people_and_programs(finished, ranking):
    run, done = finished
    assert Ranking.from_json(ranking.to_json()) == ranking
    page = (run.folder / "ranking.html").read_text()
    text = (run.folder / "ranking.md").read_text()
    for words in ("modest", "strong", "not measured", "What this does not show"):
        assert words in page
        assert words in text
    assert "<script" not in page
    assert done.out == ranking_text(ranking)
    damaged = {**json.loads(ranking.to_json()), "headline": 3, "extra": 1}
    with pytest.raises(InputError, match="headline") as caught:
        Ranking.from_values(damaged)
    assert len(caught.value.problems) == 2


def test_a_ranking_again_reuses_everything_and_prints_json(warm, finished, ranking):
    run, _ = finished
    again = warm.run("teachers", "rank", run.folder, "--json", home=run.home)
    assert again.code == 0, again.err
    assert ": started" not in again.err
    found = Ranking.from_json(again.out)
    assert replace(found, created="") == replace(ranking, created="")


def test_a_killed_ranking_continues(warm, recipe_path, finished, ranking, fresh):
    arguments = ["teachers", "rank", recipe_path, "--out", fresh.folder]
    for mark in ("candidate modest", "probe 2 of 6"):
        command = warm.start(*arguments, home=fresh.home)
        while mark not in command.err() and command.poll() is None:
            time.sleep(0.001)
        time.sleep(0.05)
        if command.poll() is None:
            command.kill()
            assert command.wait().code == -9
    done = warm.run(*arguments, home=fresh.home)
    assert done.code == 0, done.err
    found = Ranking.from_json((fresh.folder / "ranking.json").read_text())
    for row in ranking.candidates:
        assert found.candidate(row.name).student_accuracies == row.student_accuracies
        assert found.candidate(row.name).teacher_accuracy == row.teacher_accuracy
    assert found.control_accuracies == ranking.control_accuracies
    hashes = [
        {
            str(p.relative_to(folder)): Record.load(p.parent).hash
            for p in folder.rglob("record.json")
        }
        for folder in (finished[0].folder, fresh.folder)
    ]
    assert hashes[0] == hashes[1]


# Words


def reworded(ranking, **changes):
    row = replace(ranking.candidate("strong"), **changes)
    other = ranking.candidate("modest")
    made = replace(ranking, candidates=(replace(other, place=1), replace(row, place=2)))
    return in_words(made, load_recipe("teachers"))


def test_facts_behind_a_result_are_said(ranking):
    reasons = " ".join(reworded(ranking, confidence=0.999).candidate("strong").reasons)
    assert "little more than labels" in reasons
    reasons = " ".join(reworded(ranking, params_ratio=120.0).candidate("strong").reasons)
    assert "120 times the student's parameters" in reasons
    plain = replace(ranking, inversions=())
    reasons = " ".join(reworded(plain, params_ratio=120.0).candidate("strong").reasons)
    assert "120 times" not in reasons, "a large teacher is no fault by itself"


def test_a_tie_says_what_decides(ranking):
    names = ("modest", "strong")
    rows = [replace(ranking.candidate(n), tied_with=(o,)) for n, o in (names, names[::-1])]
    tied = replace(ranking, candidates=tuple(rows), inversions=())
    worded = in_words(tied, load_recipe("teachers"))
    assert "equally good within noise, and it labels faster than strong" in worded.headline
    assert "comes first as it labels fastest" in " ".join(worded.candidates[0].reasons)
    assert "which labels" in " ".join(worded.candidates[1].reasons)


def test_what_a_probe_does_not_show_is_said(ranking):
    gap = Gap(0.01, 0.05)
    rows = tuple(replace(row, against_control=gap) for row in ranking.candidates)
    found = in_words(
        replace(ranking, candidates=rows, training_deviation=None), load_recipe("multi_level")
    )
    assert "No student is shown to be better than one without a teacher" in found.headline
    text = " ".join(found.caveats)
    assert "One seed" in text
    assert "Losses on layers are left out of the probes: attention_transfer" in text


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["candidates={}"], "names no candidates"),
        (["candidates.modest=null"], "candidates.modest"),
        (
            ["candidates.third={model: {name: resnet8}}"],
            "candidates.third: the network resnet8 has",
        ),
        (["candidates.third={model: {name: resnet9}, checkpoint: no.pt}"], "'resnet9'"),
        (["candidates.third={model: {name: mlp}, checkpoint: no.pt}"], "no.pt, which is not there"),
        (["candidates.third={modle: {name: mlp}}"], "Did you mean `model`?"),
        (["candidates.control={model: {name: mlp}, checkpoint: no.pt}"], "choose another name"),
        (["probe.num_samples=100000"], "100000 training samples are asked for"),
        (["probe.num_samples=20"], "training.batch_size is 64"),
        (["probe={fraction: 0.5, num_samples: 9}"], "not both"),
        (["student.model.name=mpl"], "student: unknown model 'mpl'"),
    ],
)
def test_bad_input_is_one_clear_error(warm, recipe_path, tmp_path, changes, words):
    options = [word for change in changes for word in ("--set", change)]
    out = tmp_path / "run"
    done = warm.run("teachers", "rank", recipe_path, *options, "--out", out, home=tmp_path / "home")
    assert done.code == 2, done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert len([line for line in done.err.splitlines() if line.startswith("error:")]) <= 2
    assert not out.exists()


def test_a_ranking_does_not_write_over_a_run(warm, recipe_path, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: digits")
    arguments = ["teachers", "rank", recipe_path, "--out", tmp_path / "run"]
    done = warm.run(*arguments, home=tmp_path / "home")
    assert done.code == 2
    assert "is the folder of a run" in done.err
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "name: digits"


def test_a_teacher_that_cannot_be_run_alone_is_one_clear_error(finished, monkeypatch):
    run, _ = finished
    monkeypatch.setenv("UNDERSTUDY_HOME", str(run.home))
    candidate = Run(load_recipe(run.folder), run.folder, run.home)
    candidate = checked_candidates(candidate)["modest"]
    with pytest.raises(UnderstudyError, match="measuring the teacher mlp failed") as caught:
        measure_fresh(candidate, candidate.parent("teacher", "teach"), runtime="abacus")
    assert "abacus" in str(caught.value)


# Recipes


def test_the_teachers_of_an_ensemble_can_be_ranked(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    run = Run(load_recipe("ensemble"), tmp_path / "run", tmp_path / "home")
    candidates = checked_candidates(run)
    assert list(candidates) == ["teacher", "teacher-2", "teacher-3"]
    first = candidates["teacher"].recipe
    assert first.strategy.name == "offline"
    assert not first.distillation.losses, "layers have other names in other teachers"


def test_a_recipe_without_a_teacher_takes_the_first_candidate(ranking_values):
    assert "teacher" not in ranking_values
    recipe = ranking_recipe(ranking_values, ())
    assert isinstance(recipe.teacher, TeacherSection)
    with pytest.raises(InputError, match="names no candidates"):
        stages.rank_teachers("digits")


def test_a_probe_is_the_recipes_training_shortened(tmp_path):
    changes = ["probe={num_epochs: 4, fraction: 0.5}", "training.ema_decay=0.9"]
    recipe = load_recipe("teachers", changes)
    run = Run(recipe, tmp_path / "run", tmp_path / "home")
    candidates = checked_candidates(run)
    probe = probe_run(run, candidates["mlp"], "mlp", 2)
    training, given = probe.recipe.training, recipe.training
    assert training.num_epochs == 4
    assert training.learning_rate_schedule.warmup_epochs == pytest.approx(3 * 4 / 40)
    assert training.optimizer == given.optimizer
    assert training.ema_decay is None
    assert probe.recipe.seed == 2
    assert len(probe.splits.train) == round(len(candidates["mlp"].splits.train) / 2)
    assert torch.equal(probe.splits.validation, candidates["mlp"].splits.validation)
    assert probe.recipe.views.num_views == 4
    # What a teacher was trained with stays, though the probe has other samples.
    found = probe.recipe.teacher.model.normalization
    assert found is not None


def test_the_shipped_recipe_runs(warm, tmp_path):
    changes = ["teacher.training.num_epochs=2", "teacher.training.optimizer.learning_rate=0.03"]
    changes += ["teacher.training.learning_rate_schedule.warmup_epochs=0"]
    changes += ["probe={num_epochs: 1, num_samples: 200, num_seeds: 1}"]
    changes += ["measurement.min_seconds=0.05"]
    options = [word for change in changes for word in ("--set", change)]
    done = warm.run(
        "teachers", "rank", "teachers", *options, "--out", tmp_path / "r", home=tmp_path / "home"
    )
    assert done.code == 0, done.err
    found = Ranking.from_json((tmp_path / "r" / "ranking.json").read_text())
    assert {row.name for row in found.candidates} == {"resnet8", "mlp", "separable"}
    assert found.training_deviation is None


def test_fewer_training_samples_are_a_part_of_more(tmp_path):
    def train_of(number):
        recipe = load_recipe("digits", [f"data.num_train_samples={number}"])
        return set(Run(recipe, tmp_path, tmp_path / "home").splits.train.tolist())

    few, more, every = train_of(100), train_of(300), train_of("null")
    assert len(few) == 100
    assert len(more) == 300
    assert few < more < every

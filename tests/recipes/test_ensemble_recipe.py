"""Several teachers as one: whole runs, stages alone and killed, what the report says of them."""

import itertools
import json
import shutil
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny_run import TINY_RECIPE, TinyRun
from understudy import stages
from understudy.artifacts import Record, file_hash
from understudy.errors import InputError
from understudy.recipes.files import load_recipe
from understudy.recipes.outputs import open_entries, stored_outputs
from understudy.recipes.schema import parse_recipe
from understudy.teachers.stored import StoredTeacher

ALONE = ("teach", "label", "train", "evaluate", "export", "report")
# A command of ``ALONE`` to stages of it in which it is killed.
KILLED_IN = {"teach": ("teacher-2", "teacher-3"), "label": ("labels",), "train": ("student",)}


def ensemble_values(**strategy):
    values = yaml.safe_load(TINY_RECIPE)
    training = values["teacher"]["training"]
    quick = {**training, "optimizer": {"name": "adamw", "learning_rate": 0.05}}
    values["training"]["num_epochs"] = 2
    values["views"]["num_views"] = 2
    return {
        **values,
        "strategy": {
            "name": "ensemble",
            "combine": "confidence",
            "teachers": [
                {
                    "model": {"name": "resnet8", "arguments": {"widths": [4, 4, 8]}},
                    "training": quick,
                },
                {
                    "model": {"name": "separable", "arguments": {"stages": [[8, 1], [16, 2]]}},
                    "training": quick,
                },
            ],
            **strategy,
        },
        "distillation": {
            "temperature": 3,
            "losses": {
                "embedding_alignment": {
                    "layers": [
                        {"student": "embedding", "teacher": "1/embedding"},
                        {"student": "embedding", "teacher": "2/layer3"},
                    ]
                }
            },
        },
    }


@pytest.fixture(scope="module")
def ensemble_recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "ensemble.yaml"
    # Plain PyTorch: runs in two homes would each measure and take their own fastest runtime.
    values = {**ensemble_values(), "labelling": {"precision": "float32"}}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def whole(warm, ensemble_recipe, tmp_path_factory):
    """The finished run. Tests only read it."""
    folder = tmp_path_factory.mktemp("whole")
    run = TinyRun(folder / "run", folder / "home")
    finished = warm.run("distill", ensemble_recipe, "--out", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    return run


def decided(run):
    """Return what seed and recipe decide: all records, weights, and the store."""
    records = sorted(run.folder.rglob("record.json"))
    weights = sorted(run.folder.rglob("model.safetensors"))
    return {
        "hashes": {p.parent.name: Record.load(p.parent).hash for p in records},
        "weights": {p.parent.name: file_hash(p) for p in weights},
        "store": run.store_files(),
    }


def results_of(run):
    return json.loads((run.folder / "report" / "report.json").read_text())["results"]


def killed_once(warm, run, command, arguments, stage):
    """Start the command and kill it soon after it began the stage."""
    started = warm.start(command, *arguments, home=run.home)
    while f" {stage}: started" not in started.err() and started.poll() is None:
        time.sleep(0.001)
    time.sleep(0.05)
    if started.poll() is None:
        started.kill()
        started.wait()


def test_commands_alone_killed_and_repeated_give_the_records_of_the_whole_job(
    warm, ensemble_recipe, whole, fresh
):
    for number, command in enumerate(ALONE):
        recipe = fresh.folder if number else ensemble_recipe
        arguments = [recipe, "--out", fresh.folder]
        for stage in KILLED_IN.get(command, ()):
            killed_once(warm, fresh, command, arguments, stage)
        finished = warm.run(command, *arguments, home=fresh.home)
        assert finished.code == 0, finished.err
    assert decided(fresh) == decided(whole)
    assert {"teacher", "teacher-2", "teacher-3"} <= set(decided(whole)["weights"])
    fresh.assert_nothing_is_half_written()


def test_the_teacher_of_the_report_is_all_members_together(whole):
    results = results_of(whole)
    logits = load_file(whole.folder / "evaluation" / "logits.safetensors")
    members = np.stack([logits[f"member-{k}.test"].double().numpy() for k in (1, 2, 3)])

    def softmax(values):
        powers = np.exp(values - values.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    # No label is shown: each member's entropy says how sure it is (CA-MKD, eq. 1 and 2).
    entropies_MN = -(softmax(members) * np.log(softmax(members))).sum(-1)
    shares_MN = np.exp(entropies_MN) / np.exp(entropies_MN).sum(0)
    weights_MN = (1 - shares_MN) / 2
    mixture_NK = (weights_MN[:, :, None] * softmax(members / 3)).sum(0)
    combined_NK = logits["teacher.test"].double().numpy()
    assert np.abs(softmax(combined_NK / 3) - mixture_NK).max() < 1e-6
    confusion = np.array(results["metrics"]["teacher"]["test"]["confusion"])
    assert (combined_NK.argmax(1).tolist()) == mixture_NK.argmax(1).tolist()
    assert confusion.trace() / confusion.sum() == pytest.approx(
        results["metrics"]["teacher"]["test"]["accuracy"]
    )
    # Its agreement is with all of them together, not with the first.
    student = logits["student.test"].argmax(1)
    agreement = (student == logits["teacher.test"].argmax(1)).double().mean().item()
    assert results["metrics"]["student"]["test"]["agreement_with_teacher"] == agreement


def test_members_are_listed_and_costs_added_up(whole):
    results = results_of(whole)
    members, teacher = results["members"], results["models"]["teacher"]
    assert [row["name"] for row in members] == ["teacher", "teacher-2", "teacher-3"]
    assert [row["model"] for row in members] == ["mlp", "resnet8", "separable"]
    assert teacher["name"] == "mlp + resnet8 + separable"
    for cost in ("num_params", "macs"):
        assert teacher[cost] == sum(row[cost] for row in members)
    for number, row in enumerate(members, start=1):
        record = whole.record(row["name"])
        assert row["validation_accuracy"] == pytest.approx(
            record.payload["rows"][-1]["validation_accuracy"]
        )
        test_logits_NK = load_file(whole.folder / "evaluation" / "logits.safetensors")[
            f"member-{number}.test"
        ]
        assert test_logits_NK.shape[1] == 10
    assert "teacher" not in results["curves"], "each member has a curve of its own"
    hours = sum(whole.record(row["name"]).timing["train_seconds"] for row in members) / 3600
    assert results["training_hours"]["teacher"] == pytest.approx(hours)
    stages_listed = [stage["name"] for stage in results["stages"]]
    assert stages_listed[:4] == ["split", "teacher", "teacher-2", "teacher-3"]
    for page in ("report.html", "report.md"):
        text = (whole.folder / "report" / page).read_text()
        assert "teacher-3" in text
        assert "separable" in text


def test_a_change_of_one_member_runs_again_what_depends_on_it(warm, whole, tmp_path):
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    shutil.copytree(whole.folder, run.folder)
    shutil.copytree(whole.home, run.home)
    change = ["--set", "strategy.teachers.1.training.num_epochs=2"]
    stale = warm.run("teach", run.folder, *change, home=run.home)
    assert stale.code == 0, stale.err
    begun = [line for line in stale.err.splitlines() if line.endswith(": started")]
    assert [line.split()[1] for line in begun] == ["teacher-3:"]
    refused = warm.run("report", run.folder, *change, home=run.home)
    assert refused.code == 2
    assert "made from an earlier teacher-3" in refused.err


def color_pictures(folder, *, num_classes=3, num_pictures=60):
    """Write noisy pictures, each class of another colour mixture, as an image folder."""
    generator = np.random.default_rng(0)
    for label, number in itertools.product(range(num_classes), range(num_pictures)):
        color = np.array([60.0 + 50 * label, 200.0 - 60 * label, 40.0 + 30 * (label % 2)])
        pixels = np.clip(color + generator.normal(0, 45, (6, 6, 3)), 0, 255).astype(np.uint8)
        path = folder / f"class{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def in_another_guise(state, *, mean, std, other_mean, other_std, order):
    """Return an MLP's weights for blue first, another normalisation and another class order.

    (x - m) / s = (x - m') / s' * s' / s + (m' - m) / s for each channel; channel c of the data is
    channel 2 - c of a network that sees blue first.
    """
    names = [name for name in state if name.endswith("weight")]
    first, last = names[0], names[-1]
    bias = first.replace("weight", "bias")
    weight_HCP = state[first].double().view(len(state[first]), 3, -1)
    changed, shift = torch.empty_like(weight_HCP), state[bias].double().clone()
    for c in range(3):
        changed[:, 2 - c] = weight_HCP[:, c] * other_std[2 - c] / std[c]
        shift += weight_HCP[:, c].sum(1) * (other_mean[2 - c] - mean[c]) / std[c]
    other = {**state, first: changed.flatten(1).float(), bias: shift.float()}
    for name in (last, last.replace("weight", "bias")):
        other[name] = other[name][torch.tensor(order)].contiguous()
    return other


def test_members_keep_their_own_normalization_color_order_and_class_order(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    other_mean, other_std, order = [0.1, 0.2, 0.6], [0.4, 0.1, 0.5], [2, 0, 1]
    network = {"name": "mlp", "arguments": {"hidden": [12]}}
    values = yaml.safe_load(TINY_RECIPE)
    values["data"]["source"] = str(color_pictures(tmp_path / "pictures"))
    values["teacher"]["model"] = {**network, "normalization": {"mean": mean, "std": std}}
    values["views"] = {"num_views": 2, "transforms": [{"flip": {}}]}
    for section in (values["teacher"]["training"], values["training"]):
        section |= {"batch_size": 16, "num_epochs": 4}
    trained = stages.teach(values, out=tmp_path / "first")
    assert trained.payload["rows"][-1]["validation_accuracy"] > 0.6
    state = load_file(tmp_path / "first" / "teacher" / "model.safetensors")
    state = {name.removeprefix("network."): value for name, value in state.items()}
    statistics = {"mean": mean, "std": std, "other_mean": other_mean, "other_std": other_std}
    save_file(state, tmp_path / "plain.safetensors")
    guise = in_another_guise(state, **statistics, order=order)
    save_file(guise, tmp_path / "guise.safetensors")
    del values["teacher"]["training"]
    values["teacher"]["checkpoint"] = str(tmp_path / "plain.safetensors")
    member = {
        "model": {**network, "normalization": {"mean": other_mean, "std": other_std}},
        "checkpoint": str(tmp_path / "guise.safetensors"),
        "color_order": "bgr",
        "class_names": [f"class{label}" for label in order],
    }
    values["strategy"] = {"name": "ensemble", "teachers": [member]}
    folder = tmp_path / "run"
    for stage in (stages.teach, stages.label, stages.train, stages.evaluate):
        stage(values, out=folder)
    logits = load_file(folder / "evaluation" / "logits.safetensors")
    # One teacher in two guises is one teacher.
    for other in ("member-1", "member-2"):
        torch.testing.assert_close(
            logits["teacher.test"], logits[f"{other}.test"], rtol=1e-4, atol=1e-4
        )
    run = stages.open_run(values, out=folder)
    said_NK = stored_outputs(run, run.splits.train, view=1).logits_NK
    first = StoredTeacher(open_entries(run, "teacher"), run.splits.train)
    alone_NK = first.rows(run.splits.train, view=1).logits_NK
    torch.testing.assert_close(said_NK, alone_NK, rtol=2e-3, atol=2e-3)  # float16 in the store


def problems_of(values, tmp_path):
    with pytest.raises(InputError) as caught:
        stages.open_run(values, out=tmp_path / "run")
    return "\n".join(caught.value.problems)


def test_what_is_wrong_with_a_member_names_the_member(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    values = ensemble_values()
    second, third = values["strategy"]["teachers"]
    del second["training"], third["training"]
    third["checkpoint"] = str(tmp_path / "nowhere.pt")
    text = problems_of(values, tmp_path)
    assert "strategy.teachers.0: give its weights" in text
    second["checkpoint"] = str(tmp_path / "nowhere.pt")
    second["model"]["name"] = "resnet9"
    text = problems_of(values, tmp_path)
    assert "strategy.teachers.0: unknown model 'resnet9'" in text
    assert "strategy.teachers.1.checkpoint is" in text


def test_layers_of_members_are_checked_when_the_run_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    values = ensemble_values()
    pair = values["distillation"]["losses"]["embedding_alignment"]["layers"][1]
    pair["teacher"] = "layer3"
    assert "such as `1/layer3`" in problems_of(values, tmp_path)
    pair["teacher"] = "3/layer3"
    text = problems_of(values, tmp_path)
    assert "teacher-3" in text
    assert "layer3" in text
    pair["teacher"] = "4/layer3"
    assert "number of the teacher" in problems_of(values, tmp_path)


def test_where_a_members_checkpoint_lies_does_not_matter():
    values = ensemble_values()
    teachers = values["strategy"]["teachers"]
    for member in teachers:
        del member["training"]
    sections = []
    for place in ("here", "there"):
        for member in teachers:
            member["checkpoint"] = f"{place}.pt"
        sections.append(parse_recipe(values).section("strategy"))
    assert sections[0] == sections[1]


@pytest.mark.parametrize("combine", ["mean", "validation"])
def test_the_shipped_recipe_runs(warm, tmp_path, combine):
    assert load_recipe("ensemble").strategy.name == "ensemble"
    # The file's teachers share one training section.
    changes = [f"teacher.training.{key}={value}" for key, value in (*SHRUNK, QUICK)]
    changes += [f"training.{key}={value}" for key, value in SHRUNK]
    changes += [f"strategy.combine={combine}", "views.num_views=1"]
    changes += ["measurement={min_seconds: 0.05, batch_sizes: [1], num_threads: [1]}"]
    options = [word for change in changes for word in ("--set", change)]
    commands = ["distill"] if combine == "validation" else ["teach", "label", "train", "evaluate"]
    for command in commands:
        finished = warm.run(
            command, "ensemble", "--out", tmp_path / "run", *options, home=tmp_path / "home"
        )
        assert finished.code == 0, finished.err
    record = Record.load(tmp_path / "run" / "evaluation")
    assert len(record.payload["members"]) == 3


QUICK = ("optimizer.learning_rate", 0.03)
SHRUNK = (("num_epochs", 2), ("learning_rate_schedule.warmup_epochs", 0))

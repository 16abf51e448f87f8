"""Pruning judged in the runtimes of the release: what is timed, when, and what is said of it."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tiny_run import TINY_RECIPE
from understudy.artifacts import Record, write_json
from understudy.compress.settings import PruneStep
from understudy.errors import MissingExtraError, ModelError
from understudy.export.target import find_target, open_artifact, run_artifact
from understudy.models.cost import count_macs
from understudy.models.reshape import channel_shapes
from understudy.recipes import prune_step, pruned_speed
from understudy.recipes.compressed import Network, load_network
from understudy.recipes.networks import build_model
from understudy.recipes.prune_step import speed_of
from understudy.recipes.pruned_speed import browser_speed, pruned_speeds, time_pruned
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe

PRUNE = "compression-1-prune"
FOUND = {"speedup": 2.0, "quartiles": [1.9, 2.1], "num_rounds": 5, "before_ms": 2, "after_ms": 1}
STEP = FOUND | {"speedup": 1.5, "num_rounds": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of which only the student and what pruning left of it are there, with other weights."""
    pytest.importorskip("torch_pruning", reason="needs the extra compress")
    from understudy.compress.prune import PruneGoal, PruneRule, prune_round

    run = opened(tmp_path_factory.mktemp("pruned"))
    student = build_model(run, "student").eval()
    pruned, _ = prune_round(
        student,
        run.source.images(run.splits.train[:2]),
        goal=PruneGoal(num_params=300, num_macs=None, latency_ms=None),
        rule=PruneRule("l1", "global", 1),
        score=lambda model: None,
        measure=None,
    )
    with torch.no_grad():
        pruned.network.linear.bias.fill_(5.0)
    for name, model in (("student", student), (PRUNE, pruned)):
        (run.folder / name).mkdir(parents=True)
        save_file(dict(model.state_dict()), run.folder / name / "model.safetensors")
    write_json(run.folder / PRUNE / "shapes.json", channel_shapes(pruned))
    payload = {"kept": True, "network": Network(PRUNE, PRUNE).to_json()}
    step = Record(kind=PRUNE, key="key", seed=0, payload=payload, timing={"speed": STEP})
    step.save(run.folder / PRUNE)
    return run.folder


def opened(folder, **release):
    values = yaml.safe_load(TINY_RECIPE)
    values["data"]["calibration_fraction"] = 0.1
    stages = {"stages": [[8, 1], [16, 2], [16, 1]]}
    values["student"]["model"] = {"name": "separable", "arguments": stages}
    values["release"] = release
    return Run(parse_recipe(values), folder, folder / "home")


def compression(number=0, **network):
    network = Network(**{"weights": PRUNE, "shapes": PRUNE} | network)
    payload = {"steps": [PRUNE], "network": network.to_json(), "number": number}
    return Record(kind="compression", key="key", seed=0, payload=payload)


@pytest.fixture
def timed(monkeypatch):
    """The files that are handed to the measurement, by what they answer, which takes no time."""
    seen = []

    def speed_against(run, *artifacts, num_rounds):
        images_NCHW = run.source.images(run.splits.test[:20])
        answers = [run_artifact(open_artifact(a), images_NCHW) for a in artifacts]
        seen.append((artifacts[0].target, artifacts[0].precision, *answers))
        return FOUND | {"num_rounds": num_rounds}

    monkeypatch.setattr(pruned_speed, "speed_against", speed_against)
    return seen


def test_the_unpruned_and_the_pruned_student_are_timed_as_they_ship(folder, timed):
    run = opened(folder, targets=["onnx", "onnx/int8"])
    time_pruned(run, compression(precision="int8", aware="not asked for"))
    ((target, precision, before_NK, after_NK),) = timed  # one file, named twice
    assert (target, precision) == ("onnx", "int8")
    images_NCHW = run.source.images(run.splits.test[:20])
    for state, answers_NK in ((Network(), before_NK), (Network(PRUNE, PRUNE), after_NK)):
        with torch.no_grad():
            expected_NK = load_network(run, state)(images_NCHW)
        assert (answers_NK - expected_NK).abs().mean() < 0.2
    assert (before_NK - after_NK).abs().mean() > 2  # of the bias, so that they are two networks


def test_what_the_step_timed_itself_is_not_timed_again(folder, timed):
    run = opened(folder, targets=["onnx"])
    time_pruned(run, compression())
    assert timed == []
    (row,) = pruned_speeds(run, compression())
    assert row == {"target": "onnx", "precision": "float32", "reason": "", **STEP}


def test_of_two_steps_the_whole_is_timed(folder, timed):
    run, whole = opened(folder, targets=["onnx"]), compression(2)
    whole.payload["steps"].append(PRUNE)
    time_pruned(run, whole)
    assert [entry[:2] for entry in timed] == [("onnx", "float32")]
    (row,) = pruned_speeds(run, whole)
    assert (row["speedup"], row["num_rounds"]) == (2.0, pruned_speed.NUM_ROUNDS)


def test_the_devices_runtime_is_judged_beside_the_targets(folder):
    run = opened(folder, targets=["onnx"], device="phone")
    asked = pruned_speed.runtimes_of(run, Network())
    assert asked == [("onnx", "float32"), ("executorch", "int8")]


def test_nothing_is_timed_where_nothing_was_pruned(folder, timed):
    run, unpruned = (
        opened(folder, targets=["onnx/int8"]),
        compression(weights="student", shapes=None),
    )
    time_pruned(run, unpruned)
    assert timed == []
    assert pruned_speeds(run, unpruned) == []


def test_a_missing_extra_is_named_and_tried_again(folder, timed, monkeypatch):
    run, compressed = opened(folder, targets=["ncnn", "coreml"]), compression(3)
    asked = []

    def export(source, place, *, precision):
        asked.append(precision)
        raise MissingExtraError("ncnn", "ncnn")

    with monkeypatch.context() as patch:
        patch.setattr(find_target("ncnn"), "export", export)
        for _ in range(2):
            time_pruned(run, compressed)
    assert asked == ["float32"] * 2
    rows = {row["target"]: row["reason"] for row in pruned_speeds(run, compressed)}
    assert rows == {"ncnn": "needs the extra ncnn", "coreml": "it is not run on this machine"}
    # Installed, it is timed once.
    onnx = find_target("onnx").export
    monkeypatch.setattr(find_target("ncnn"), "export", onnx)
    for _ in range(2):
        time_pruned(run, compressed)
    assert len(timed) == 1
    ncnn, _ = pruned_speeds(run, compressed)
    assert (ncnn["speedup"], ncnn["reason"]) == (2.0, "")


def test_a_target_that_lacks_an_operator_does_not_end_the_run(folder, monkeypatch):
    def export(source, place, *, precision):
        raise ModelError("ncnn has no operator for hard swish; expected others. Replace it.")

    monkeypatch.setattr(find_target("ncnn"), "export", export)
    run, compressed = opened(folder, targets=["ncnn"]), compression(4)
    time_pruned(run, compressed)
    (row,) = pruned_speeds(run, compressed)
    assert row["reason"] == "ncnn has no operator for hard swish; expected others. Replace it"


def test_a_time_of_another_compression_is_not_shown(folder, timed):
    run = opened(folder, targets=["onnx/int8"])
    time_pruned(run, compression(5))
    (row,) = pruned_speeds(run, compression(6))
    assert "speedup" not in row
    assert row["reason"] == f"run `understudy compress {folder}`"


def test_pages_are_timed_in_turns(folder, monkeypatch):
    order = []
    times_ms = {"before": [4.0, 8.0, 6.0], "after": [2.0, 2.0, 2.0]}

    def run_in_browser(artifact, images_NCHW):
        order.append(artifact)
        return SimpleNamespace(latency_p50_ms=times_ms[artifact][order.count(artifact) - 1])

    monkeypatch.setattr(pruned_speed, "run_in_browser", run_in_browser)
    found = browser_speed(opened(folder), ["before", "after"])
    assert order == ["before", "after", "after", "before", "before", "after"]
    # Quartiles of the neighbours' ratios 1/2, 1/4, 1/3, turned round.
    assert found["speedup"] == pytest.approx(3)
    assert found["quartiles"] == pytest.approx([1 / (5 / 12), 1 / (7 / 24)])
    assert (found["before_ms"], found["after_ms"], found["num_rounds"]) == (6, 2, 3)


def test_a_ratio_below_one_is_faster():
    ratio = {"ratio": 0.5, "lower": 0.4, "upper": 0.8, "num_rounds": 5}
    found = speed_of(ratio | {"reference_p50_ms": 2.0, "p50_ms": 1.0})
    assert (found["speedup"], found["quartiles"]) == (2, [1.25, 2.5])


# Going on after a kill


def test_what_is_left_of_a_killed_pruning_has_the_goals_that_it_began_with(tmp_path, monkeypatch):
    """Another process measures other times: here a clock that is slower each time it is asked."""
    pytest.importorskip("torch_pruning", reason="needs the extra compress")
    run = opened(tmp_path)
    step = PruneStep(name="prune", latency_ms=6.0, num_rounds=3)
    stage = SimpleNamespace(folder=tmp_path / PRUNE, kind=PRUNE)
    stage.folder.mkdir()
    model, asked, clock = build_model(run, "student").eval(), [], [0]
    whole = count_macs(model, run.source.image_shape)

    def picture_ms(run, model):
        clock[0] += 1
        return (9 + clock[0]) * count_macs(model, run.source.image_shape) / whole

    def prune_once(run, model, rule, goal, folder, *, measure):
        if len(asked) == 1:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(goal)
        write_json(folder / "round.json", {})

    monkeypatch.setattr(prune_step, "picture_ms", picture_ms)
    monkeypatch.setattr(prune_step, "prune_once", prune_once)
    monkeypatch.setattr(prune_step, "load_network", lambda run, before: model)
    monkeypatch.setattr(prune_step, "pruned_model", lambda run, folder: model)
    monkeypatch.setattr(prune_step, "made", lambda *arguments: None)
    with pytest.raises(KeyboardInterrupt):
        prune_step.prune_step(run, stage, step, Network())
    was_asked = clock[0]
    prune_step.prune_step(run, stage, step, Network())
    assert clock[0] == was_asked > 0
    first, _, again, second, last = (goal and goal.latency_ms for goal in asked)
    assert 10 > first == again > second > last == step.latency_ms

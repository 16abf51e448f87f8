"""From a recipe to a package: steps behind gates, files in their runtimes, budget, resumption."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tiny_run import TINY_RECIPE, TinyRun
from understudy.artifacts import Record
from understudy.compress.settings import PruneStep, QuantizeStep
from understudy.data.splits import Splits
from understudy.export.onnx_run import onnx_logits, open_session
from understudy.package.reading import read_package
from understudy.package.statistics import reference_statistics
from understudy.recipes.artifacts import answers, artifact_of, make_artifacts, release_budget
from understudy.recipes.compress import compress, pictures_section, step_section
from understudy.recipes.compressed import calibration_images, prepared_network
from understudy.recipes.compression_report import compression_values
from understudy.recipes.export import parity_pictures, parity_section
from understudy.recipes.job import open_run
from understudy.recipes.package_contents import (
    limits_of,
    measured_on,
    model_card,
    release_version,
    shipped_metrics,
    summary_of,
)
from understudy.recipes.prune_step import leave_gradients
from understudy.recipes.release_settings import ReleaseSection
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe

pytest.importorskip("torchao", reason="needs the extra compress")
pytest.importorskip("torch_pruning", reason="needs the extra compress")

LOOSE = {"accuracy_drop": 1.0, "worst_class_drop": 1.0, "agreement_drop": 1.0, "ece_rise": 1.0}
FURTHER = {"num_epochs": 1, "batch_size": 64, "optimizer": {"name": "adamw", "learning_rate": 0.01}}
PRUNE = {"name": "prune", "num_macs": 10_000, "num_rounds": 2, "training": FURTHER}
AWARE = {"name": "quantize", "method": "aware", "training": FURTHER}


def small_recipe(**changes):
    values = yaml.safe_load(TINY_RECIPE)
    values["data"]["calibration_fraction"] = 0.1
    values["student"] = {
        "model": {"name": "separable", "arguments": {"stages": [[8, 1], [16, 2], [16, 1]]}}
    }
    values["control"] = False
    values["training"] |= {"num_epochs": 3}
    values["compression"] = {"steps": [PRUNE, AWARE], "gates": LOOSE}
    values["release"] = {"targets": ["onnx", "onnx/float32"]}
    return {**values, **changes}


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(small_recipe(**changes)))
    return path


@pytest.fixture(scope="module")
def released(warm, tmp_path_factory):
    """A finished release. Tests only read it; see ``copied``."""
    folder = tmp_path_factory.mktemp("released")
    run = TinyRun(folder / "run", folder / "home")
    finished = warm.run("release", written(folder), "--out", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    return run, finished


@pytest.fixture
def copied(released, tmp_path):
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    shutil.copytree(released[0].folder, run.folder)
    shutil.copytree(released[0].home, run.home)
    return run


def hashes(folder):
    return {p.parent.name: Record.load(p.parent).hash for p in folder.glob("*/record.json")}


def test_a_release_prunes_quantises_and_packs(released):
    run, finished = released
    prune, quantize = run.record("compression-1-prune"), run.record("compression-2-quantize")
    assert (
        prune.payload["macs"]
        <= 10_000
        < Record.load(run.folder / "evaluation").payload["costs"]["student"]["macs"]
    )
    assert prune.payload["kept"]
    assert quantize.payload["kept"]
    int8, float32 = run.record("artifact-onnx-int8"), run.record("artifact-onnx-float32")
    assert int8.payload["metrics"]["num_samples"] == int8.payload["num_images"] > 500
    assert float32.payload["parity"]["passed"]
    assert "package:" in finished.out
    entries = {e.name: e for e in read_package(run.folder / "release").manifest.artifacts}
    assert set(entries) == {"onnx-int8", "onnx-float32"}
    parity = int8.payload["parity"]
    assert entries["onnx-int8"].measured["mean_abs_difference"] == parity["mean_abs_difference"]


def test_int8_is_scored_against_the_float_state_that_went_into_it(released, monkeypatch):
    run, finished = released
    monkeypatch.setenv("UNDERSTUDY_HOME", str(run.home))
    opened, int8 = open_run(run.folder), run.record("artifact-onnx-int8")
    pruned = run.record("compression-1-prune")
    # In ONNX Runtime, so that it is another way to the same figure.
    logits_NK = onnx_logits(
        run.folder / "compression-1-prune" / "student.onnx", opened.source, opened.splits.test
    )
    right_N = logits_NK.argmax(1) == opened.source.labels_N[opened.splits.test]
    assert int8.payload["float_accuracy"] == right_N.double().mean().item()
    assert int8.parents["compression-1-prune"] == pruned.hash
    assert run.record("artifact-onnx-float32").payload["float_accuracy"] is None
    assert int8.payload["notes"] == run.record("artifact-onnx-float32").payload["notes"]
    results = json.loads((run.folder / "report" / "report.json").read_text())["results"]
    shown = {a["precision"]: a for a in results["compression"]["artifacts"]}
    assert shown["int8"]["float_accuracy"] == int8.payload["float_accuracy"]
    assert shown["int8"]["mean_abs_difference"] == int8.payload["parity"]["mean_abs_difference"]
    assert results["compression"]["max_int8_loss"] == LOOSE["accuracy_drop"]
    assert "US020" not in finished.out  # only what is not fine is told there


def test_the_report_shows_steps_and_files(released):
    run, _ = released
    page = (run.folder / "report" / "report.html").read_text()
    assert '<h2 id="compression">' in page
    assert "quantize (aware)" in page
    results = json.loads((run.folder / "report" / "report.json").read_text())["results"]
    assert [step["kept"] for step in results["compression"]["steps"]] == [True, True]
    assert results["compression"]["artifacts"][0]["budget"] == []


def test_the_package_answers_as_the_artifact_does(released, warm, tmp_path):
    run, _ = released
    picture = tmp_path / "digit.png"
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(picture)
    finished = warm.run("predict", run.folder / "release", picture, "--json", home=run.home)
    assert finished.code == 0, finished.err
    (prediction,) = json.loads(finished.out)["predictions"]
    assert len(prediction["top"]) == 3


def test_the_reference_statistics_are_of_the_files_that_ship(released, monkeypatch):
    run, _ = released
    monkeypatch.setenv("UNDERSTUDY_HOME", str(run.home))
    opened, shipped = open_run(run.folder), run.record("artifact-onnx-int8")
    indices_N = opened.splits.validation
    logits_NK = answers(opened, artifact_of(opened, shipped), indices_N).numpy()
    images_NCHW = opened.source.images(indices_N).numpy()
    expected = reference_statistics(images_NCHW, logits_NK, class_names=opened.source.class_names)
    told = json.loads((run.folder / "release" / "reference_statistics.json").read_text())
    assert told["outputs"] == json.loads(json.dumps(expected["outputs"]))


def test_the_card_scores_the_network_that_ships_where_no_files_were_run(released, monkeypatch):
    run, _ = released
    monkeypatch.setenv("UNDERSTUDY_HOME", str(run.home))
    opened, int8 = open_run(run.folder), run.record("artifact-onnx-int8")
    unrun = dataclasses.replace(int8, payload=int8.payload | {"metrics": None})
    metrics = shipped_metrics(opened, [unrun])
    assert metrics["accuracy"] == pytest.approx(int8.payload["metrics"]["accuracy"], abs=0.01)
    card = model_card(opened, [unrun], {}, {})
    assert card.metrics["measured in"].startswith("PyTorch")
    assert card.data["licence"] is None
    assert card.hardware["memory_bytes"] == run.record("student").hardware["memory_bytes"]


def artifact_record(target, **changes):
    values = {
        "kind": f"artifact-{target}-int8",
        "key": target,
        "seed": 0,
        "payload": {"target": target, "precision": "int8"},
        "versions": {"python": "3.11", "onnxruntime": "1.2"},
        "hardware": {"processor": "Z80", "machine": "z", "num_cores": 2, "memory_bytes": 64_000},
    }
    return Record(**{**values, **changes})


def test_the_version_is_of_all_that_ships():
    one, two = artifact_record("onnx"), artifact_record("c")
    plain = ReleaseSection()
    versions = {
        release_version([one], plain),
        release_version([one, two], plain),
        release_version([one], ReleaseSection(licence="MIT")),
        release_version([one], ReleaseSection(intended_use="Gardens.")),
    }
    assert len(versions) == 4
    other_machine = artifact_record("onnx", hardware={}, versions={})
    assert release_version([other_machine], plain) == release_version([one], plain)


def test_a_card_says_where_the_files_were_measured():
    records = [
        artifact_record("onnx"),
        artifact_record("c"),
        artifact_record("tflm", hardware={"processor": "6502"}),
    ]
    assert measured_on(records) == [
        "onnx-int8, c-int8: measured on Z80, Number of cores 2, Memory 64.0 kB; "
        "python 3.11, onnxruntime 1.2.",
        "tflm-int8: measured on 6502; python 3.11, onnxruntime 1.2.",
    ]


def test_a_summary_says_that_it_is_cut():
    names = [f"c{number}" for number in range(22)]
    assert summary_of((3, 4, 5), names[:20]).endswith(
        "into 20 classes: " + ", ".join(names[:20]) + "."
    )
    assert summary_of((3, 4, 5), names).endswith(", c19 and 2 more.")


def test_limits_name_the_classes_that_no_test_picture_shows():
    limits = limits_of({"per_class_accuracy": [0.5, None, 0.25]}, ("a", "b", "c"))
    assert limits[:2] == [
        "The worst class is c: 25.00% of its test pictures are right.",
        "No test picture shows one of these classes: b.",
    ]
    assert not any(
        "shows one of" in one for one in limits_of({"per_class_accuracy": [1.0]}, ("a",))
    )


def test_files_name_what_made_their_network_and_not_what_ships_beside_it(released):
    run, _ = released
    compression = run.record("compression").key
    named = {
        "export/student.onnx": run.record("student").key,
        "artifact-onnx-int8/student.onnx": compression,
        "artifact-onnx-float32/student.onnx": compression,
    }
    for name, key in named.items():
        metadata = open_session(run.folder / name).get_modelmeta().custom_metadata_map
        assert metadata["understudy.recipe_hash"] == key


def test_what_is_finished_is_not_done_again(copied, warm):
    before = hashes(copied.folder)
    finished = warm.run("release", copied.folder, home=copied.home)
    assert finished.code == 0, finished.err
    assert "compression-2-quantize: unchanged, reused" in finished.err
    assert ": started" not in finished.err
    assert hashes(copied.folder) == before


def test_a_killed_release_ends_as_an_unbroken_one(released, warm, tmp_path):
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    recipe = written(tmp_path)
    expected = hashes(released[0].folder)
    for stage, delay_s in (("compression-1-prune", 0.4), ("compression-2-quantize", 1.5)):
        command = warm.start("release", recipe, "--out", run.folder, home=run.home)
        while f" {stage}: started" not in command.err():
            assert command.poll() is None, command.err()
            time.sleep(0.01)
        time.sleep(delay_s)
        command.kill()
        command.wait()
    finished = warm.run("release", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    assert hashes(run.folder) == expected


def test_a_step_that_loses_too_much_is_taken_back(copied, warm):
    finished = warm.run(
        "compress",
        copied.folder,
        "--set",
        "compression.steps=" + json.dumps([{**PRUNE, "num_macs": 4000, "training": None}, AWARE]),
        "--set",
        "compression.gates=" + json.dumps({**LOOSE, "accuracy_drop": 0.02}),
        home=copied.home,
    )
    assert finished.code == 0, finished.err
    prune = copied.record("compression-1-prune")
    assert not prune.payload["kept"]
    assert "accuracy_drop" in prune.payload["reason"]
    # The next step begins with what was there before.
    quantize = copied.record("compression-2-quantize")
    assert "student" in quantize.parents
    assert quantize.payload["network"]["shapes"] is None
    assert "US016 issue" in finished.out


def test_a_release_for_a_device_keeps_its_limits_and_says_so(copied, warm):
    steps = ["--set", "compression.steps=[]"]
    finished = warm.run(
        "release", copied.folder, "--device", "server-cpu", *steps, home=copied.home
    )
    assert finished.code == 0, finished.err
    assert "package:" in finished.out
    names = {e.name for e in read_package(copied.folder / "release").manifest.artifacts}
    assert names == {"onnx-float32"}  # the device's runtime and precision
    results = json.loads((copied.folder / "report" / "report.json").read_text())["results"]
    assert results["compression"]["device"] == "server-cpu"
    (shown,) = results["compression"]["artifacts"]
    budget = {row["name"]: row for row in shown["budget"]}
    assert {name: row["status"] for name, row in budget.items()} == {
        "latency_ms": "passed",
        "peak_memory_bytes": "passed",
    }
    rows = copied.record("artifact-onnx-float32").timing["latency"]["measurements"]
    single = next(r for r in rows if (r["batch_size"], r["num_threads"]) == (1, 1))
    assert budget["latency_ms"]["measured"] == single["p95_ms"]
    # The same device with a limit that no file keeps: nothing is packed.
    missed = warm.run(
        *("release", copied.folder, "--device", "server-cpu", *steps),
        *("--set", "budget.peak_memory_bytes=1000"),
        home=copied.home,
    )
    assert missed.code == 3
    assert "US018 issue" in missed.out


def test_int8_without_a_step_that_quantizes_says_so_and_is_held_to_the_gate(copied, warm):
    finished = warm.run(
        *("release", copied.folder, "--target", "onnx/int8"),
        *("--set", "compression={steps: [], gates: {accuracy_drop: 0.0}}"),
        home=copied.home,
    )
    assert finished.code == 0, finished.err
    note = copied.record("artifact-onnx-int8").payload["notes"][-1]
    assert note.startswith("Quantised after training with ")
    assert note.endswith("because the recipe has no step that quantizes.")
    assert "because the recipe has no step that quantizes" in finished.out
    evaluation = copied.record("evaluation").payload["metrics"]["student"]["test"]
    int8 = copied.record("artifact-onnx-int8")
    assert int8.payload["float_accuracy"] == evaluation["accuracy"]
    loses = int8.payload["metrics"]["accuracy"] < evaluation["accuracy"]
    assert ("US020 issue" in finished.out) == loses


def test_static_int8_keeps_the_worst_layers_in_float_to_the_file(copied, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(copied.home))
    static = {"name": "quantize", "method": "static", "max_float_layers": 2}
    run = open_run(
        copied.folder,
        changes=["compression.steps=" + json.dumps([static]), 'release.targets=["onnx"]'],
    )
    seen = []

    def refuse_all_int8(judge, logits_NK):
        seen.append(logits_NK)
        return not torch.equal(logits_NK, seen[0])

    monkeypatch.setattr("understudy.recipes.compress.Judge.passes", refuse_all_int8)
    compressed = compress(run)
    step = copied.record("compression-1-quantize").payload
    assert step["kept"], step["reason"]
    layers = step["float_layers"]
    assert 1 <= len(layers) <= 2
    ranked = [row["name"] for row in step["details"]["sensitivity"]]
    assert layers == ranked[: len(layers)]
    assert len(ranked) > 2
    assert copied.record("compression").payload["network"]["float_layers"] == layers
    # What is judged, and what ships, is the file with those layers in float.
    (shipped,) = make_artifacts(run, compressed)
    assert shipped.payload["precision"] == "int8"
    logits_NK = answers(run, artifact_of(run, shipped), run.splits.validation)
    assert torch.equal(logits_NK, seen[-1])
    assert not torch.equal(logits_NK, seen[0])
    (told,) = compression_values(run)["steps"]
    assert told["float_layers"] == layers


def sorted_folder(num_each):
    """What a run is asked of its pictures: ten classes, one after the other; picture i shows i."""
    indices_N = torch.arange(10 * num_each)
    labels_N, shown = indices_N // num_each, []

    def images(some_N):
        shown.append(labels_N[some_N])
        return some_N.float().view(-1, 1, 1, 1)

    return SimpleNamespace(
        splits=Splits(*[indices_N] * 4),
        labelled_train_N=indices_N,
        source=SimpleNamespace(images=images, labels_N=labels_N),
        recipe=parse_recipe(small_recipe()),
        seed_for=lambda *_: 0,
        shown=shown,
    )


def test_pictures_of_a_sorted_folder_are_of_every_class(monkeypatch):
    monkeypatch.setattr("understudy.compress.quantize.prepare_qat", lambda *_, **__: None)
    run = sorted_folder(300)
    calibration_images(run)
    prepared_network(run, torch.nn.Identity(), ())
    run.source.images(parity_pictures(run))
    counts = [torch.bincount(labels_N).tolist() for labels_N in run.shown]
    assert [(sum(count), set(count)) for count in counts] == [
        (512, {51, 52}),
        (256, {25, 26}),
        (1000, {100}),
    ]
    run.shown.clear()
    leave_gradients(run, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 10)))
    assert set(torch.bincount(torch.cat(run.shown)).tolist()) == {102, 103}


def test_a_stage_is_done_again_only_where_its_pictures_are_others():
    steps = (
        PruneStep(name="prune", num_macs=1, importance="taylor"),
        PruneStep(name="prune", num_macs=1),
        QuantizeStep(name="quantize", method="aware", training=FURTHER),
        QuantizeStep(name="quantize", method="static"),
    )

    def marked(num_each):
        run = sorted_folder(num_each)
        return [bool(pictures_section(run, step)) for step in steps] + [bool(parity_section(run))]

    assert marked(25) == [False, False, False, False, False]
    assert marked(26) == [False, False, True, False, False]
    assert marked(60) == [False, False, True, True, False]
    assert marked(101) == [False, False, True, True, True]
    assert marked(103) == [True, False, True, True, True]


def test_a_missed_budget_ends_with_code_3_and_without_a_package(copied, warm):
    shutil.rmtree(copied.folder / "release")
    finished = warm.run(
        "release", copied.folder, "--set", "budget.train_hours=1e-9", home=copied.home
    )
    assert finished.code == 3
    assert not (copied.folder / "release").exists()
    assert "US018 issue" in finished.out


def test_the_limits_of_a_release_are_those_of_what_ships(copied, warm):
    size = copied.record("artifact-onnx-float32").payload["size_bytes"]
    assert size < (copied.folder / "export" / "student.onnx").stat().st_size
    changes = ["--target", "onnx/float32", "--set", f"budget.model_size_bytes={size}"]
    finished = warm.run("release", copied.folder, *changes, home=copied.home)
    assert finished.code == 0, finished.err
    assert "package:" in finished.out
    results = json.loads((copied.folder / "report" / "report.json").read_text())["results"]
    (row,) = [row for row in results["budget"] if row["name"] == "model_size_bytes"]
    assert (row["measured"], row["status"]) == (size, "passed")
    assert row["detail"].endswith("onnx-float32")


def test_a_device_is_as_strict_as_it_says_and_its_batch_is_the_limits(tmp_path):
    limits = {"strict": True, "latency_ms": {"batch": 10, "at_most": 5}}
    profile = {"title": "mine", "runtime": "onnx", "precision": "float32", "limits": limits}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(profile))
    recipe = parse_recipe(small_recipe(release={"device": str(path)}))
    budget = release_budget(Run(recipe, tmp_path, tmp_path))
    assert budget.strict
    assert budget.latency_ms.batch == 10


def test_what_a_strict_budget_asks_for_must_be_measured(copied, warm):
    limits = ["--set", "budget.energy_mj=1000"]
    finished = warm.run("release", copied.folder, *limits, home=copied.home)
    energy = copied.record("artifact-onnx-int8").timing["energy"]
    if energy["method"] == "counter":
        pytest.skip("this machine has energy counters")
    assert finished.code == 0, finished.err
    finished = warm.run(
        "release", copied.folder, *limits, "--set", "budget.strict=true", home=copied.home
    )
    assert finished.code == 3


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--target", "onx"], ["no target 'onx'", "expected one of onnx"]),
        (["--target", "onnx/int4"], ["no precision 'int4'"]),
        (["--target", "ncnn/int8"], ["ncnn cannot be int8", "ncnn/float32"]),
        (["--target", "ncnn"], ["int8, which the target ncnn cannot be"]),
        (["--package", f"{__file__}/p"], ["cannot be a package", "is a file"]),
        (
            [
                *("--set", "distillation.kl_weight=0", "--set", "distillation.ce_weight=0"),
                *("--set", "distillation.losses={embedding_alignment: {}}"),
            ],
            ["features alone (embedding_alignment)", "guidance: labels"],
        ),
        (["--device", "toaster"], ["there is no device 'toaster'", "cortex-m4"]),
        (["--target", "onnx/int8", "--set", "data.calibration_fraction=0"], ["calibration_frac"]),
        (["--set", 'compression.steps=[{"name":"prune"}]'], ["give num_params, num_macs or"]),
        (
            ["--set", "compression.steps=" + json.dumps([AWARE, PRUNE])],
            ["quantize is the last step"],
        ),
    ],
)
def test_bad_input_is_said_before_anything_runs(warm, tmp_path, arguments, texts):
    run = tmp_path / "run"
    finished = warm.run(
        "release", written(tmp_path), "--out", run, *arguments, home=tmp_path / "home"
    )
    assert finished.code == 2
    assert all(text in finished.err for text in texts), finished.err
    assert "Traceback" not in finished.err
    assert not Path(run / "split").exists()


def test_a_limit_below_what_pruning_can_reach_is_an_error(copied, warm):
    steps = json.dumps([{**PRUNE, "num_macs": 10}])
    finished = warm.run(
        "compress", copied.folder, "--set", f"compression.steps={steps}", home=copied.home
    )
    assert finished.code == 2
    assert "lower round_to, or train a smaller network" in finished.err


def sections(folder, **changes):
    """Return what every step of the recipe depends on besides its parents."""
    recipe = parse_recipe(small_recipe(**changes))
    run = Run(recipe, folder, folder)
    return [step_section(run, step, recipe.compression.gates) for step in recipe.compression.steps]


def test_steps_depend_on_the_settings_that_they_read_and_on_no_others(tmp_path):
    seconds = {"min_seconds": 0.05}
    before = sections(tmp_path, measurement=seconds)
    # Setting nothing leaves the keys of steps that were made when the whole section was in them.
    recipe = parse_recipe(small_recipe(measurement=seconds))
    assert [s["measurement"] for s in before] == [recipe.section("measurement")["measurement"]] * 2
    others = {"batch_sizes": [1, 7], "num_threads": [2]}
    assert sections(tmp_path, measurement=seconds | others) == before
    assert sections(tmp_path, export={"parity_tolerance": 0.1}) == sections(tmp_path)
    for changed in ({"measurement": {"min_seconds": 2}}, {"export": {"opset": 20}}):
        after = sections(tmp_path, **{"measurement": seconds} | changed)
        assert [new == old for new, old in zip(after, before, strict=True)] == [False, False]

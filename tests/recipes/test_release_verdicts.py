"""What a release says of its files beyond the figures: reasons, what is counted, what is lost."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml

from tiny_run import TINY_RECIPE
from understudy.artifacts import Record
from understudy.compress.settings import CompressionSection
from understudy.evaluate.budget import BUDGET_UNITS, Budget, BudgetFacts, check_budget
from understudy.evaluate.latency import Latency, Measurement
from understudy.evaluate.microcontroller import NEWLIB_PACKAGE, TOOLS
from understudy.export.artifact_parity import ArtifactParity
from understudy.export.divergence import Divergence
from understudy.export.targets import web
from understudy.recipes import artifacts, measuring_tools
from understudy.recipes.artifact_budget import artifact_budget, artifact_budgets, shipped_budget
from understudy.recipes.check import problems_of
from understudy.recipes.compressed import Network
from understudy.recipes.compression_report import compressed_budget
from understudy.recipes.int8_loss import float_state, most_int8_may_lose, quantised_afterwards
from understudy.recipes.release import check_release
from understudy.recipes.report import budget_rows
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe


def parity(precision):
    return ArtifactParity(
        target="tflite",
        precision=precision,
        max_abs_difference=0.5,
        mean_abs_difference=0.1,
        top1_agreement=0.9,
        num_images=100,
        tolerance=1e-4,
        min_agreement=0.95,
        passed=False,
        batch_max_abs_difference=0.0,
    )


def divergence(precision, first):
    return Divergence("tflite", precision, (), first, 0.2, 32)


def test_the_layer_that_differs_is_named():
    text = str(artifacts.parity_error(parity("int8"), divergence("int8", "stages.0.conv")))
    assert "the first layer that differs is stages.0.conv; expected the same answer for 95%" in text
    assert "keep that layer in float" in text


@pytest.mark.parametrize(
    ("precision", "loosen"),
    [("float32", "export.parity_tolerance"), ("int8", "release.min_agreement")],
)
def test_where_no_layer_differs_by_itself_it_says_so(precision, loosen):
    text = str(artifacts.parity_error(parity(precision), divergence(precision, None)))
    assert "None" not in text
    assert "no single layer differs by more than 0.2 of its output" in text
    assert f"change {loosen}" in text
    assert "that layer" not in text
    assert ("method: aware" in text) == (precision == "int8")


# What int8 is compared with


def step(kind, *, precision, kept):
    network = {"precision": precision, "weights": kind}
    payload = {"network": network, "kept": kept, "name": kind, "reason": "accuracy_drop: lost"}
    return Record(kind=kind, key="key", seed=0, payload=payload)


def compressed_run(folder, *steps, precision):
    """A run whose compression consists of these steps and ended in this precision."""
    for record in steps:
        record.save(folder / record.kind)
    network = {"weights": "x", "shapes": None, "aware": None, "float_layers": []}
    payload = {"steps": [s.kind for s in steps], "network": network | {"precision": precision}}
    student = Record(kind="student", key="key", seed=0, payload={})
    run = SimpleNamespace(
        folder=folder,
        parent=lambda kind, command: student,
        splits=SimpleNamespace(calibration=range(40)),
        source=SimpleNamespace(images=list),
    )
    return run, Record(kind="compression", key="key", seed=0, payload=payload)


def test_int8_is_compared_with_the_last_float_state(tmp_path):
    prune = step("compression-1-prune", precision="float32", kept=True)
    lost = step("compression-2-prune", precision="float32", kept=False)
    for kept in (True, False):
        int8 = step("compression-3-quantize", precision="int8", kept=kept)
        run, compressed = compressed_run(tmp_path, prune, lost, int8, precision="int8")
        assert float_state(run, compressed).kind == "compression-1-prune"
    int8 = step("compression-1-quantize", precision="int8", kept=True)
    run, compressed = compressed_run(tmp_path, int8, precision="int8")
    assert float_state(run, compressed).kind == "student"


def test_int8_of_a_step_that_was_taken_back_is_said_to_be_made_afterwards(tmp_path):
    lost = step("compression-1-quantize", precision="int8", kept=False)
    run, compressed = compressed_run(tmp_path, lost, precision="float32")
    assert quantised_afterwards(run, compressed, "onnx") == (
        "Quantised after training with 40 calibration pictures, because compression-1-quantize "
        "was taken back (accuracy_drop: lost)."
    )
    run, compressed = compressed_run(tmp_path, precision="float32")
    told = quantised_afterwards(run, compressed, "onnx")
    assert told.endswith("has no step that quantizes.")
    # Core ML has no ranges to set, and so no use for pictures.
    assert quantised_afterwards(run, compressed, "coreml") == (
        "Quantised after training, the weights alone, because the recipe has no step that "
        "quantizes."
    )
    kept = step("compression-1-quantize", precision="int8", kept=True)
    run, compressed = compressed_run(tmp_path, kept, precision="int8")
    assert quantised_afterwards(run, compressed, "onnx") == ""


@pytest.mark.parametrize(
    ("section", "limit"),
    [
        ({}, 0.01),
        ({"gates": {"accuracy_drop": 0.2}}, 0.2),
        ({"steps": [{"name": "quantize", "gates": {"accuracy_drop": 0.3}}]}, 0.3),
        ({"steps": [{"name": "quantize"}], "gates": {"accuracy_drop": None}}, None),
        (
            {"steps": [{"name": "prune", "num_params": 9, "gates": {"accuracy_drop": 0.3}}]},
            0.01,
        ),
    ],
)
def test_the_gate_of_the_step_that_quantizes_is_the_limit(section, limit):
    compression = CompressionSection.model_validate(section)
    run = SimpleNamespace(recipe=SimpleNamespace(compression=compression))
    assert most_int8_may_lose(run) == limit


# Limits on time of files that take one picture at a time


class Recorder:
    """Stands in for the measurement: notes what is asked for, and takes no time."""

    def __init__(self, single_ms):
        self.single_ms, self.asked = single_ms, []

    def __call__(self, artifact, images, *, batch_sizes, num_threads, min_seconds):
        settings = [(size, count) for count in num_threads for size in batch_sizes]
        self.asked += settings
        row = dict.fromkeys(("p95_ms", "p99_ms", "mean_ms", "images_per_second", "load_ms"), 1.0)
        row |= {"p50_ms": self.single_ms, "num_runs": 50, "num_warmup": 10}
        return Latency(
            tuple(Measurement(batch_size=size, num_threads=n, **row) for size, n in settings), {}
        )


def timed(monkeypatch, target, *, single_ms, strict, batch=100, batch_kind="one"):
    """Return the settings that are measured of an artifact, and what is said of the others."""
    limit = {"batch": batch, "threads": 2, "at_most": 10}
    recorder = Recorder(single_ms)
    nothing = SimpleNamespace(to_json=dict)
    monkeypatch.setattr(artifacts, "measure_latency", recorder)
    monkeypatch.setattr(artifacts, "measure_memory", lambda *arguments: nothing)
    monkeypatch.setattr(artifacts, "energy_of", lambda *arguments: nothing)
    monkeypatch.setattr(artifacts, "count_instructions", lambda *arguments: "no reason")
    run = SimpleNamespace(
        recipe=SimpleNamespace(
            release=SimpleNamespace(device=None),
            budget=Budget.model_validate({"latency_ms": limit, "strict": strict}),
            measurement=SimpleNamespace(batch_sizes=(1,), num_threads=(1,), min_seconds=0),
        ),
        splits=SimpleNamespace(test=range(3)),
        source=SimpleNamespace(images=lambda rows: torch.zeros(3, 1, 8, 8, dtype=torch.uint8)),
    )
    files = SimpleNamespace(target=target, batch=batch_kind, folder=None, path=None)
    timing = artifacts.measured(run, None, files)
    rows = timing["latency"]["measurements"]
    assert [(row["batch_size"], row["num_threads"]) for row in rows] == recorder.asked
    return recorder.asked, timing.get("expected_ms", "")


def test_a_batch_of_single_pictures_is_measured_for_its_limit(monkeypatch):
    for target, strict in (("executorch", False), ("tflm", True)):
        asked, expected = timed(monkeypatch, target, single_ms=15.0, strict=strict)
        assert asked == [(1, 1), (1, 2), (100, 2)]
        assert expected == ""


def test_an_interpreter_is_timed_for_a_strict_budget_alone(monkeypatch):
    asked, expected = timed(monkeypatch, "tflm", single_ms=15.0, strict=False)
    assert asked == [(1, 1)]
    assert expected.startswith("100 pictures one by one of 15 ms are 1500 ms in the interpreter")
    asked, expected = timed(monkeypatch, "tflm", single_ms=15.0, strict=True, batch=1)
    assert (asked, expected) == ([(1, 1), (1, 2)], "")


def test_a_batch_that_takes_too_long_is_not_measured_and_says_why(monkeypatch):
    asked, expected = timed(monkeypatch, "tflm", single_ms=200.0, strict=True)
    assert (100, 2) not in asked
    assert expected.endswith("and measuring them would take 1200 s")


def test_files_that_take_batches_are_measured_at_the_limits_one(monkeypatch):
    asked, expected = timed(
        monkeypatch, "onnx", single_ms=200.0, strict=False, batch=10, batch_kind="any"
    )
    assert (10, 2) in asked
    assert expected == ""


# Rows of the budget


@pytest.fixture
def judged(monkeypatch):
    """Return the budget's rows of a record, for limits that the test gives."""

    def rows(record, **limits):
        run = SimpleNamespace(
            recipe=SimpleNamespace(
                release=SimpleNamespace(device=None), budget=Budget.model_validate(limits)
            ),
            parent=lambda kind, command: SimpleNamespace(timing={"train_seconds": 1.0}),
        )
        monkeypatch.setattr("understudy.recipes.artifact_budget.earlier_seconds", lambda run: 0.0)
        return artifact_budget(run, record)

    return rows


def record_of(target, timing, **facts):
    payload = {"target": target, "size_bytes": 1_000_000, "num_params": 9, "facts": facts}
    return Record(kind=f"artifact-{target}", key="k", seed=0, payload=payload, timing=timing)


@pytest.mark.parametrize(
    ("timing", "measured", "counted"),
    [
        (
            {
                "compiled_bytes": 3000,
                "microcontrollers": {
                    "cortex-m4": {
                        "cpu": "cortex-m4",
                        "flash_bytes": 4000,
                        "ram_bytes": 1,
                        "input_bytes": 1,
                        "peak_stack_bytes": 1,
                    }
                },
            },
            4000,
            "flash of a cortex-m4",
        ),
        ({"compiled_bytes": 3000}, 3000, "code and weights as compiled here"),
        ({"compiled_bytes": None}, 2000, "weights alone, the code was not compiled"),
        ({}, 2000, "weights alone, the code was not compiled"),
    ],
)
def test_c_code_counts_what_reaches_the_device(judged, timing, measured, counted):
    (row,) = judged(record_of("c", timing, weight_bytes=2000), model_size_bytes=5000)
    assert (row.measured, row.status) == (measured, "passed")
    assert row.detail.startswith(f"{counted}: ")


def test_a_page_is_judged_at_every_percentile(judged):
    times = {"p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0, "load_ms": 9.0, "num_runs": 50}
    for share in (50, 95, 99):
        limit = {"percentile": share, "at_most": 2.5}
        (row,) = judged(record_of("web", {"browser": times}), latency_ms=limit)
        assert row.measured == times[f"p{share}_ms"]


def test_other_files_count_whole(judged):
    (row,) = judged(record_of("onnx", {}), model_size_bytes=500_000)
    assert (row.measured, row.status) == (1_000_000, "failed")
    assert row.detail == "100.0% over the limit"
    (row,) = judged(record_of("web", {}), model_size_bytes=2_000_000)
    assert row.detail == "page, network and runtime: 50.0% of the limit"


def test_what_a_batch_is_expected_to_take_proves_nothing(judged):
    record = record_of("tflm", {"expected_ms": "100 pictures one by one"})
    limit = {"batch": 100, "at_most": 1e9}
    (row,) = judged(record, latency_ms=limit)
    assert row.status == "not_measured"
    assert row.detail.endswith("not measured (estimate: 100 pictures one by one)")
    (row,) = judged(record, latency_ms=limit, strict=True)
    assert row.status == "failed"


# Of which student


@pytest.fixture
def shipped(tmp_path):
    """A run of which only the records are there: student, a compression without steps, one file."""
    recipe = TINY_RECIPE + "budget: {num_params: 1000}\nrelease: {targets: [onnx]}\n"
    run = Run(parse_recipe(yaml.safe_load(recipe)), tmp_path, tmp_path)
    student = trained(run, num_steps=1)
    compressed = Record(
        kind="compression",
        key="key",
        seed=0,
        parents={"student": student.hash},
        recipe=run.recipe.section("compression"),
        payload={"steps": [], "network": Network().to_json()},
    ).save(tmp_path / "compression")
    payload = {"target": "onnx", "size_bytes": 9, "num_params": 2000, "facts": {}}
    parents, kind = {"compression": compressed.hash}, "artifact-onnx-float32"
    record = Record(kind=kind, key="key", seed=0, parents=parents, payload=payload)
    record.save(tmp_path / record.kind)
    return run


def trained(run, num_steps):
    payload, timing = {"num_steps": num_steps}, {"train_seconds": 1.0}
    record = Record(kind="student", key="key", seed=0, payload=payload, timing=timing)
    return record.save(run.folder / "student")


def test_files_of_a_student_that_was_trained_anew_since_do_not_decide_its_budget(shipped):
    assert shipped_budget(shipped)["num_params"]["status"] == "failed"
    trained(shipped, num_steps=2)
    assert artifact_budgets(shipped) == shipped_budget(shipped) == {}


def with_limits(run, folder, *, own, **limits):
    """Return the run with these limits of its own, for a device with others."""
    path = folder / "board.yaml"
    board = {"title": "board", "runtime": "onnx", "precision": "float32", "limits": limits}
    path.write_text(yaml.safe_dump(board))
    release = run.recipe.release.model_copy(update={"device": str(path)})
    changes = {"release": release, "budget": Budget.model_validate(own)}
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update=changes))


def report_rows(run):
    """Return the report's rows of the budget, by limit; the file of training keeps them all."""
    exported = Record(
        kind="export",
        key="key",
        seed=0,
        payload={"facts": {"size_bytes": 5}},
        timing={
            "latency": {
                "measurements": [{"batch_size": 1, "num_threads": 1, "p95_ms": 1e-6}],
            },
            "memory": {"peak_memory_bytes": 1},
        },
    )
    costs = {"costs": {"student": {"num_params": 5, "macs": 5}}}
    evaluation = Record(kind="evaluation", key="key", seed=0, payload=costs)
    records = {"export": exported, "evaluation": evaluation}
    rows = budget_rows(run, records, {"student": 0.0})
    assert [row["name"] for row in rows] == sorted(
        (row["name"] for row in rows), key=list(BUDGET_UNITS).index
    )
    return {row["name"]: row for row in rows}


def test_a_limit_that_only_the_device_has_is_in_the_report(shipped, tmp_path):
    run = with_limits(shipped, tmp_path, own={"num_params": 3000}, model_size_bytes=8)
    rows = report_rows(run)
    assert {name: row["status"] for name, row in rows.items()} == {
        "num_params": "passed",
        "model_size_bytes": "failed",
    }
    assert rows["model_size_bytes"]["measured"] == 9


@pytest.mark.parametrize(("strict", "status"), [(False, "not_measured"), (True, "failed")])
def test_a_limit_that_no_file_was_measured_for_is_not_kept_by_the_file_of_training(
    shipped, tmp_path, strict, status
):
    own = {"latency_ms": {"at_most": 5}, "peak_memory_bytes": 10, "strict": strict}
    rows = report_rows(with_limits(shipped, tmp_path, own=own, num_params=2000))
    assert {name: row["status"] for name, row in rows.items()} == {
        "num_params": "passed",
        "latency_ms": status,
        "peak_memory_bytes": status,
    }
    assert rows["latency_ms"]["measured"] is None
    assert rows["latency_ms"]["detail"].startswith("p95 at batch 1, threads 1: not measured")


def test_of_several_files_the_one_that_was_measured_decides(shipped, tmp_path):
    """What one target cannot tell is no word against another's figure, a limit missed is."""
    release = shipped.recipe.release.model_copy(update={"targets": ["onnx", "openvino"]})
    both = dataclasses.replace(
        shipped, recipe=shipped.recipe.model_copy(update={"release": release})
    )
    compressed = Record.load(shipped.folder / "compression")
    measurements = [{"batch_size": 1, "num_threads": 1, "p95_ms": 4.0}]
    record = Record(
        kind="artifact-openvino-float32",
        key="key",
        seed=0,
        parents={"compression": compressed.hash},
        payload={"target": "openvino", "size_bytes": 9, "num_params": 2000, "facts": {}},
        timing={"latency": {"measurements": measurements}},
    )
    record.save(shipped.folder / record.kind)
    for at_most, status in ((5, "passed"), (3, "failed")):
        budget = Budget.model_validate({"latency_ms": {"at_most": at_most}})
        run = dataclasses.replace(both, recipe=both.recipe.model_copy(update={"budget": budget}))
        row = shipped_budget(run)["latency_ms"]
        assert (row["status"], row["measured"]) == (status, 4.0)
        assert row["detail"].endswith(", openvino-float32")


def judged_anew(run, **limits):
    """Return the rows of a compressed run whose budget was changed since, by limit."""
    budget = Budget.model_validate(limits)
    changed = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"budget": budget}))
    return compressed_budget(changed)


def test_what_compression_left_is_held_against_the_limits_as_they_are_now(shipped):
    limit = {"batch": 1, "threads": 1, "percentile": 95, "at_most": 5}
    network = Network(weights="compression-1-prune").to_json()
    measurements = [{"batch_size": 1, "num_threads": 1, "p95_ms": 4.0}]
    asked = Budget.model_validate({"num_params": 800, "latency_ms": limit})
    told = check_budget(asked, facts=BudgetFacts(num_params=700, measurements=measurements))
    step = Record(
        kind="compression-1-prune",
        key="key",
        seed=0,
        recipe={"budget": {"latency_ms": limit}},
        payload={"kept": True, "num_params": 700, "macs": 80, "file_bytes": 9, "network": network},
        timing={"budget": [row.to_json() for row in told]},
    ).save(shipped.folder / "compression-1-prune")
    compressed = Record.load(shipped.folder / "compression")
    payload = {"steps": [step.kind], "network": network}
    parents = {**compressed.parents, step.kind: step.hash}
    dataclasses.replace(compressed, payload=payload, parents=parents).save(
        shipped.folder / "compression"
    )

    rows = judged_anew(shipped, num_params=700, latency_ms=limit)
    assert {name: row["status"] for name, row in rows.items()} == {
        "num_params": "passed",
        "latency_ms": "passed",
    }
    assert rows["num_params"]["detail"] == "100.0% of the limit, after compression"
    rows = judged_anew(shipped, num_params=699, latency_ms=limit | {"at_most": 3})
    assert {(row["limit"], row["status"]) for row in rows.values()} == {
        (699, "failed"),
        (3, "failed"),
    }
    # A time of another setting says nothing, and what nobody asked for was not measured.
    rows = judged_anew(shipped, latency_ms=limit | {"percentile": 50}, peak_memory_bytes=1)
    assert {row["status"] for row in rows.values()} == {"not_measured"}
    rows = judged_anew(shipped, latency_ms=limit | {"batch": 2}, strict=True)
    assert rows["latency_ms"]["status"] == "failed"

    # Another command began the step with other settings, and was killed in it or after it.
    dataclasses.replace(step, payload=step.payload | {"macs": 79}).save(shipped.folder / step.kind)
    assert judged_anew(shipped, num_params=700) == {}
    assert artifact_budgets(shipped) == {}
    (shipped.folder / step.kind / "record.json").unlink()
    assert judged_anew(shipped, num_params=700) == {}
    step.save(shipped.folder / step.kind)
    assert set(judged_anew(shipped, num_params=700)) == {"num_params"}


# Tools that were installed after a release


@pytest.fixture
def tools(monkeypatch):
    """The tools that are installed, as a set that the test changes."""
    found = set()
    which = SimpleNamespace(which=lambda name: name if name in found else None)
    monkeypatch.setattr(measuring_tools, "shutil", which)
    monkeypatch.setattr(measuring_tools, "has_newlib", lambda: NEWLIB_PACKAGE in found)
    return found


@pytest.mark.parametrize(
    ("target", "name", "needed"),
    [
        ("c", "microcontrollers", {*TOOLS, NEWLIB_PACKAGE}),
        ("c", "compiled_bytes", {"size"}),
        ("tflm", "instructions", {"valgrind"}),
    ],
)
def test_a_measurement_is_made_once_its_tools_are_there(shipped, tools, target, name, needed):
    compressed = Record.load(shipped.folder / "compression")
    measured = {"microcontrollers": {"cortex-m4": {}}, "compiled_bytes": 9, "instructions": {}}
    measured["instructions"]["machine"] = "x86_64"

    def is_reused():
        return artifacts.artifact_stage(shipped, compressed, target, "float32").record is not None

    def finished(**timing):
        stage = artifacts.artifact_stage(shipped, compressed, target, "float32")
        return stage.finish({"target": target}, timing=timing)

    def without():
        return {other: value for other, value in measured.items() if other != name}

    before = finished(**without(), tools=measuring_tools.tools_here(target))
    assert is_reused()
    tools |= set(sorted(needed)[1:])  # one is still missing
    assert is_reused()
    tools |= needed
    assert not is_reused()
    # What fails although its tools are there is not tried for ever.
    again = finished(**without(), tools=measuring_tools.tools_here(target))
    assert again.hash == before.hash
    assert is_reused()
    # Earlier records do not tell which tools there were.
    shutil.rmtree(shipped.folder / again.kind)
    finished(**without())
    assert not is_reused()
    finished(**measured)
    assert is_reused()


# What is sure to fail


def checked(folder, *targets, class_names=("a", "b")):
    """Return the problems of a release to these targets that are told before anything runs."""
    recipe = parse_recipe(yaml.safe_load(TINY_RECIPE) | {"release": {"targets": targets}})
    run = SimpleNamespace(recipe=recipe, source=SimpleNamespace(class_names=class_names))
    return problems_of(lambda: check_release(run, folder / "release"))


def test_what_a_page_needs_is_looked_for_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path))
    monkeypatch.delenv(web.NODE_MODULES_VARIABLE, raising=False)
    told = " ".join(checked(tmp_path, "web"))
    assert "no browser is installed" in told
    assert "npm is not installed" in told
    monkeypatch.setenv(web.NODE_MODULES_VARIABLE, str(tmp_path))
    assert "there is no " in " ".join(checked(tmp_path, "web"))
    # Found, npm is not asked for.
    monkeypatch.delenv(web.NODE_MODULES_VARIABLE)
    monkeypatch.setattr(web, "_fault", lambda package: "")
    told = " ".join(checked(tmp_path, "web"))
    assert "no browser is installed" in told
    assert "npm" not in told
    assert checked(tmp_path, "onnx") == []


def test_class_names_that_a_package_cannot_hold_are_told_before_anything_runs(tmp_path):
    long, fits = 201 * "x", 200 * "x"
    names = (
        "\u0645\u06cc\u200c\u0631\u0648\u0645",
        "a\u00a0b",
        "a\tb",
        long,
        "",
        fits,
        "Äpfel, rote",
    )
    told = checked(tmp_path, "onnx", class_names=names)
    assert len(told) == 5
    assert r"\u200c" in told[0]
    assert "of 201 characters" in told[3]
    assert all("Rename the class" in text for text in told)

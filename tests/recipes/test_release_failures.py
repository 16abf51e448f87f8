"""A target that fails leaves the others alone; limits on shipped files; another's compression."""

import errno
import json
import shutil
import sys

import pytest
import yaml
from test_release_recipe import AWARE, LOOSE, PRUNE, small_recipe, written

from tiny_run import TinyRun
from understudy import cli, stages
from understudy.artifacts import Record
from understudy.errors import InputError, MissingExtraError, ParityError, RecipeError
from understudy.export.targets import onnx as onnx_target
from understudy.package.reading import read_package
from understudy.progress import log
from understudy.recipes import compress as compress_module
from understudy.recipes import prune_step as prune_module
from understudy.recipes import step_limits
from understudy.recipes.artifacts import failure_of
from understudy.recipes.compress import compress
from understudy.recipes.compression_of import with_compression_of
from understudy.recipes.compression_report import compression_values
from understudy.recipes.job import open_run

pytest.importorskip("torchao", reason="needs the extra compress")
pytest.importorskip("torch_pruning", reason="needs the extra compress")


@pytest.fixture(scope="module")
def distilled(warm, tmp_path_factory):
    """A run that was trained by a recipe without compression. Tests only read it."""
    folder = tmp_path_factory.mktemp("distilled")
    run = TinyRun(folder / "run", folder / "home")
    recipe = written(folder, compression={}, release={"targets": ["onnx"]})
    finished = warm.run("distill", recipe, "--out", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    return run


def without_speed(patch):
    """Leave out what is only timed for the report: whether pruning saves time."""
    speed = {"speedup": 1.0, "quartiles": [1.0, 1.0], "num_rounds": 1}
    patch.setattr(prune_module, "speed_against", lambda *arguments, **options: speed)
    patch.setattr(compress_module, "time_pruned", lambda run, compressed: None)


@pytest.fixture(autouse=True)
def _without_speed(monkeypatch):
    without_speed(monkeypatch)


@pytest.fixture(scope="module")
def compressed(distilled, tmp_path_factory):
    """The same run, compressed by the recipe of another file, and what was said meanwhile."""
    folder = tmp_path_factory.mktemp("compressed")
    other = written(folder, budget={"num_params": 5}, seed=9)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        run = copy_of(distilled, folder, patch)
        without_speed(patch)
        patch.setattr(log, "info", lambda text, *values: said.append(text % values))
        stages.compress(run.folder, steps_of=other)
    return run, "\n".join(said)


def copy_of(run, folder, monkeypatch):
    shutil.copytree(run.folder, folder / "run")
    shutil.copytree(run.home, folder / "home")
    monkeypatch.setenv("UNDERSTUDY_HOME", str(folder / "home"))
    return TinyRun(folder / "run", folder / "home")


@pytest.fixture
def trained(distilled, tmp_path, monkeypatch):
    return copy_of(distilled, tmp_path, monkeypatch)


@pytest.fixture
def copied(compressed, tmp_path, monkeypatch):
    return copy_of(compressed[0], tmp_path, monkeypatch)


def command(monkeypatch, *arguments):
    """Run ``understudy ARGUMENTS`` in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["understudy", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


# A target that fails

TWO = ['release.targets=["onnx/int8", "onnx/float32"]']


@pytest.fixture
def int8_fails(monkeypatch):
    """Make the export of int8 ONNX files fail until the function that this is, is called."""
    export = onnx_target.export

    def broken(source, folder, *, precision):
        if precision == "int8":
            raise RuntimeError("the converter gave up\nand said more")
        return export(source, folder, precision=precision)

    monkeypatch.setattr(onnx_target, "export", broken)
    return lambda: monkeypatch.setattr(onnx_target, "export", export)


def test_a_target_that_fails_leaves_the_others_finished_and_is_told_at_the_end(
    copied, int8_fails, monkeypatch, capsys
):
    arguments = ("release", copied.folder, "--set", TWO[0])
    assert command(monkeypatch, *arguments) == 2
    told = capsys.readouterr()
    reason = "RuntimeError: the converter gave up"
    assert f"error: onnx/int8 was not made: {reason}" in told.err
    assert "nothing is packed" in told.err
    assert "--skip-failed" in told.err
    assert "Traceback" not in told.err
    assert f"US019 issue: Not made: onnx/int8 ({reason})" in told.out
    assert "not made" in told.out
    assert not (copied.folder / "release").exists()
    # The second target came after it.
    made = copied.record("artifact-onnx-float32")
    assert made.payload["parity"]["passed"]
    failure = json.loads((copied.folder / "artifact-onnx-int8" / "failure.json").read_text())
    assert "said more" in "".join(failure["traceback"])
    page = (copied.folder / "report" / "report.html").read_text()
    assert f"onnx/int8 was not made: {reason}" in page
    assert "✕</span> Not made: onnx/int8. " in page
    # Mended, only it is made.
    int8_fails()
    released = stages.release(copied.folder)
    assert released.failed == {}
    assert released.package == copied.folder / "release"
    assert not (copied.folder / "artifact-onnx-int8" / "failure.json").exists()
    assert Record.load(copied.folder / "artifact-onnx-float32") == made
    assert released.outcome.results.compression.failed == ()


def test_what_was_made_is_packed_where_the_user_says_so(copied, int8_fails, monkeypatch, capsys):
    arguments = ("release", copied.folder, "--set", TWO[0], "--skip-failed")
    assert command(monkeypatch, *arguments) == 0
    assert "packed without what was not made: onnx/int8" in capsys.readouterr().err
    entries = read_package(copied.folder / "release").manifest.artifacts
    assert [entry.name for entry in entries] == ["onnx-float32"]
    card = (copied.folder / "release" / "MODEL_CARD.md").read_text()
    reason = "RuntimeError: the converter gave up"
    assert f"onnx/int8 was asked for and is not here: {reason}" in card.replace("\\", "")
    # Nothing at all is no package.
    shutil.rmtree(copied.folder / "release")
    arguments = ("release", copied.folder, "--target", "onnx/int8", "--skip-failed")
    assert command(monkeypatch, *arguments) == 2
    assert not (copied.folder / "release").exists()


def test_a_budget_that_is_missed_as_well_does_not_hide_what_failed(
    copied, int8_fails, monkeypatch, capsys
):
    arguments = ("release", copied.folder, "--set", TWO[0], "--set", "budget.train_hours=1e-9")
    assert command(monkeypatch, *arguments) == 2
    assert "US018 issue" in capsys.readouterr().out
    assert command(monkeypatch, *arguments, "--skip-failed") == 3
    assert not (copied.folder / "release").exists()


def test_reasons_are_one_line_and_a_full_disk_is_no_targets_fault():
    assert failure_of(ParityError("a; expected b. Mend.", "c")) == "a; expected b. Mend. c"
    assert "pip install" in failure_of(MissingExtraError("ncnn", "ncnn"))
    assert failure_of(ValueError()) == "ValueError: it said nothing"
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space") as raised:
        failure_of(full)
    assert raised.value is full
    wrapped = RuntimeError("cannot write the model")
    wrapped.__cause__ = ValueError("tool")
    wrapped.__cause__.__context__ = full
    with pytest.raises(OSError, match="No space"):
        failure_of(wrapped)


def test_what_is_sure_to_fail_is_said_at_once_before_anything_runs(trained, monkeypatch, tmp_path):
    for module in ("litert_torch", "ai_edge_litert", "emx_onnx_cgen", "torch_pruning"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as raised:
        stages.release(
            trained.folder,
            package=tmp_path / "file" / "package",
            changes=[
                'release.targets=["tflite", "c", "onnx", "tflm/float32"]',
                "compression.steps=" + json.dumps([PRUNE]),
            ],
        )
    told = raised.value.problems
    assert len(told) == 6, told
    assert "cannot be a package" in told[0]
    assert "'torch-pruning'" in told[1]
    extras = [text.split("extra '")[1].split("'")[0] for text in told[2:]]
    assert extras == ["tflite", "tflite", "c", "tflm"]
    # Nothing ran, and the run is as it was.
    assert not (trained.folder / "compression").exists()
    assert open_run(trained.folder).recipe.release.targets == ("onnx",)


# The compression of another recipe


def test_a_run_is_compressed_by_another_recipe_without_training_it_again(compressed, distilled):
    run, said = compressed
    for kind in ("teacher", "student", "evaluation", "export"):
        assert f"{kind}: unchanged, reused" in said
        assert run.record(kind).hash == distilled.record(kind).hash
    values = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert [step["name"] for step in values["compression"]["steps"]] == ["prune", "quantize"]
    # Nothing else is taken, and that is said.
    assert values["seed"] == small_recipe()["seed"]
    assert values["budget"]["num_params"] is None
    assert "the compression alone is taken; its budget, release may be set" in said


def test_a_later_release_has_the_same_compression(copied, monkeypatch):
    before = {kind: copied.record(kind).hash for kind in ("compression-1-prune", "compression")}
    released = stages.release(copied.folder)
    assert released.package is not None
    assert {kind: copied.record(kind).hash for kind in before} == before
    assert [a.name for a in released.outcome.results.compression.artifacts] == ["onnx/int8"]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ("nothing.yaml", "there is no recipe at"),
        ("[1, 2]", "has no steps of compression"),
        ("a: [", "is not YAML"),
        ("seed: 1", "has no steps of compression"),
        ("compression: {steps: []}", "has no steps of compression"),
        ("compression: {steps: [{name: prune, num_mac: 3}]}", "Did you mean `num_macs`?"),
        ("compression: {steps: 3}", "with the compression of"),
    ],
)
def test_what_is_no_compression_is_said_and_the_run_stays_as_it_was(trained, tmp_path, other, text):
    path = tmp_path / "other.yaml"
    if other.endswith(".yaml"):
        path = tmp_path / other
    else:
        path.write_text(other)
    before = (trained.folder / "recipe.yaml").read_text()
    with pytest.raises(RecipeError) as raised:
        stages.compress(trained.folder, steps_of=path)
    assert text in str(raised.value)
    assert path.name in str(raised.value)
    assert (trained.folder / "recipe.yaml").read_text() == before


@pytest.mark.parametrize(
    ("recipe", "changes", "text"),
    [
        ("", [], "recipe.yaml holds NoneType; expected a mapping"),
        ("[1, 2]", [], "recipe.yaml holds list; expected a mapping"),
        ("seed: 1", ["data=5"], "`data`"),
    ],
)
def test_a_runs_own_recipe_that_is_none_is_said(tmp_path, recipe, changes, text):
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(RecipeError, match=text):
        with_compression_of("edge", tmp_path, changes)


@pytest.mark.parametrize("run", [None, "digits", "no_such_folder"])
def test_another_compression_is_for_a_run_that_is_there(run):
    with pytest.raises(InputError, match="is not a run folder"):
        stages.compress(run, steps_of="edge")


def test_int8_for_a_run_without_calibration_pictures_does_not_train_it_anew(trained, tmp_path):
    recipe = trained.folder / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    values["data"]["calibration_fraction"] = 0
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match="was trained without a calibration split"):
        stages.compress(trained.folder, steps_of=written(tmp_path))


# Limits that only shipped files can be asked for


def device(tmp_path, name="mine", *, runtime="onnx", **limits):
    path = tmp_path / f"{name}.yaml"
    profile = {"title": name, "runtime": runtime, "precision": "float32", "limits": limits}
    path.write_text(yaml.safe_dump(profile))
    return path


def compressed_for(run, profile, monkeypatch, targets=("onnx",), **more):
    """Return the run and its compression for a device; nothing is timed for its own sake."""
    monkeypatch.setattr(compress_module, "time_pruned", lambda run, compressed: None)
    changes = [f"release.device={profile}", f"release.targets={json.dumps(targets)}"]
    changes += [f"{name}={json.dumps(value)}" for name, value in more.items()]
    opened = open_run(run.folder, changes=changes)
    return opened, compress(opened)


def test_a_step_that_breaks_a_limit_of_the_device_is_taken_back(copied, tmp_path, monkeypatch):
    pruned = copied.record("compression-1-prune").payload["file_bytes"]
    int8 = copied.record("compression-2-quantize").payload["file_bytes"]
    assert pruned < int8  # nodes that round take more than such small weights
    trained_before = copied.record("compression-2-quantize")
    limit = (pruned + int8) // 2
    run, record = compressed_for(
        copied, device(tmp_path, model_size_bytes=limit, latency_ms={"at_most": 9}), monkeypatch
    )
    assert record.payload["network"]["precision"] == "float32"
    prune, quantize = compression_values(run)["steps"]
    assert prune["kept"]
    assert not quantize["kept"]
    assert f"budget.model_size_bytes of onnx: {prune_size(run)}" in quantize["reason"]
    assert f"at most {limit} is allowed" in quantize["reason"]
    # Times of this machine are not the device's: that is left to the release, and said.
    assert quantize["judged_later"] == ["latency_ms of onnx"]
    # Another device trains nothing, and what it allows is kept.
    run, record = compressed_for(
        copied, device(tmp_path, "larger", model_size_bytes=2 * int8), monkeypatch
    )
    assert record.payload["network"]["precision"] == "int8"
    assert [step["kept"] for step in compression_values(run)["steps"]] == [True, True]
    assert copied.record("compression-2-quantize") == trained_before


def prune_size(run):
    (row,) = [
        row
        for row in Record.load(run.folder / "compression-1-limits").timing["rows"]
        if row["name"] == "model_size_bytes of onnx"
    ]
    return row["measured"]


def test_the_device_that_measures_is_asked_for_its_time_too(copied, tmp_path, monkeypatch):
    profile = device(tmp_path, latency_ms={"at_most": 1000})
    profile.write_text(profile.read_text() + "is_this_machine: true\n")
    run, _ = compressed_for(copied, profile, monkeypatch)
    step = compression_values(run)["steps"][-1]
    assert step["judged_later"] == []
    (row,) = [gate for gate in step["gates"] if gate["name"] == "budget.latency_ms of onnx"]
    assert row["status"] == "passed"
    assert row["after"] > 0


def test_without_limits_on_shipped_files_or_with_the_gate_off_nothing_is_made(
    copied, tmp_path, monkeypatch
):
    assert not list(copied.folder.glob("compression-*-limits"))
    profile = device(tmp_path, model_size_bytes=1000)
    steps = [{**step, "gates": {**LOOSE, "budget": False}} for step in (PRUNE, AWARE)]
    run, _ = compressed_for(copied, profile, monkeypatch, **{"compression.steps": steps})
    assert not list(copied.folder.glob("compression-*-limits"))
    assert compression_values(run)["steps"][0]["judged_later"] == []


def test_flash_of_a_file_that_cannot_be_made_is_left_to_the_release_with_its_reason(
    copied, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "emx_onnx_cgen", None)
    monkeypatch.setitem(sys.modules, "emx_onnx_cgen.compiler", None)
    profile = device(tmp_path, runtime="c", flash_bytes=10**6, ram_bytes=10**6)
    run, record = compressed_for(copied, profile, monkeypatch, targets=("c",))
    assert record.payload["network"]["precision"] == "int8"
    later = compression_values(run)["steps"][0]["judged_later"]
    assert [text.split(" (")[0] for text in later] == ["flash_bytes of c", "ram_bytes of c"]
    assert "the extra 'c'" in later[0]


def test_what_cannot_be_told_after_a_step_takes_nothing_back_and_is_tried_again(
    copied, tmp_path, monkeypatch, int8_fails
):
    # A strict budget fails what was not measured; the release says so, not the step.
    profile = device(tmp_path, model_size_bytes=10**7, strict=True)
    run, record = compressed_for(copied, profile, monkeypatch)
    assert record.payload["network"]["precision"] == "int8"
    reason = "not made: RuntimeError: the converter gave up"
    quantize = compression_values(run)["steps"][-1]
    assert quantize["judged_later"] == [f"model_size_bytes of onnx ({reason})"]
    limits = copied.record("compression-2-limits")
    # Another tool makes other files, and what could not be made is tried once more.
    assert {"largest_weight", "files"} <= set(limits.recipe)
    int8_fails()
    run, again = compressed_for(copied, profile, monkeypatch)
    quantize = compression_values(run)["steps"][-1]
    assert quantize["judged_later"] == []
    assert [row["status"] for row in quantize["gates"] if " of onnx" in row["name"]] == ["passed"]
    # Nothing that ships is made from anything else than before.
    assert again.hash == record.hash
    assert "largest_weight" not in copied.record("compression-1-limits").recipe


def test_a_measurement_that_fails_is_not_called_a_file_that_was_not_made(
    copied, tmp_path, monkeypatch
):
    def refused(*arguments, **options):
        raise InputError("it took too long.")

    monkeypatch.setattr(step_limits, "measure_latency", refused)
    profile = device(tmp_path, latency_ms={"at_most": 1000}, model_size_bytes=10**7)
    profile.write_text(profile.read_text() + "is_this_machine: true\n")
    run, record = compressed_for(copied, profile, monkeypatch)
    assert record.payload["network"]["precision"] == "int8"
    step = compression_values(run)["steps"][-1]
    assert step["judged_later"] == ["latency_ms of onnx (not measured: it took too long.)"]
    # What can be told of the same file is.
    assert [row["name"] for row in step["gates"] if " of onnx" in row["name"]] == [
        "budget.model_size_bytes of onnx"
    ]

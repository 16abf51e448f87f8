"""The command line: what it lists, shows and copies; exit codes of wrong use; a quick --help."""

import subprocess
import sys

import pytest

import understudy

COMMANDS = ("distill", "resume", "teach", "label", "train", "evaluate", "export", "report")
OTHER_COMMANDS = ("doctor", "recipes", "store")


@pytest.fixture
def run(warm, tmp_path):
    """Run the command and expect this exit code."""

    def run(*arguments, code=0):
        finished = warm.run(*arguments, home=tmp_path / "home", cwd=tmp_path)
        assert finished.code == code, finished.err
        assert "Traceback" not in finished.err
        return finished

    return run


def test_help_lists_every_command(run):
    text = run("--help").out
    for command in (*COMMANDS, *OTHER_COMMANDS):
        assert f" {command} " in text
    for command in COMMANDS:
        assert "RUN" in run(command, "--help").out.replace("RECIPE", "RUN")


def test_help_does_not_import_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "understudy", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in imported
    assert not imported & {"torch", "numpy", "pydantic", "datasets", "understudy.stages"}


def test_importing_the_package_does_not_import_torch():
    code = "import sys, understudy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version(run):
    assert run("--version").out == f"understudy {understudy.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distil"], "No such command 'distil'. Did you mean 'distill'?"),
        (["distill", "--sett", "seed=1"], "No such option: --sett"),
        (["distill", "digits", "cifar10"], "unexpected extra argument"),
        (["resume"], "Missing argument 'RUN'"),
        (["label"], "Missing argument 'RUN'"),
        (["recipes", "show"], "Missing argument"),
        (["store", "gc", "--older-than-days", "x"], "--older-than-days"),
        (["distill", "--out"], "--out"),
    ],
)
def test_wrong_use_is_exit_code_2(run, arguments, words):
    assert words in run(*arguments, code=2).err


def test_recipes_are_listed_shown_and_copied(run, tmp_path):
    listed = run("recipes", "list").out
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == sorted(names)
    assert {"cifar10", "digits", "multi_level", "ensemble", "early_exits"} <= set(names)
    shown = run("recipes", "show", "digits").out
    assert "source: digits" in shown
    assert run("recipes", "copy", "digits").out == "digits.yaml\n"
    assert (tmp_path / "digits.yaml").read_text() == shown
    assert "exists" in run("recipes", "copy", "digits", code=2).err
    (tmp_path / "folder").mkdir()
    assert run("recipes", "copy", "cifar10", "folder").out == "folder/cifar10.yaml\n"
    assert run("recipes", "copy", "cifar10", "mine.yaml").out == "mine.yaml\n"


def test_doctor_names_machine_versions_and_missing_extras(run):
    text = run("doctor").out
    for words in ("processor", "cores", "memory", "GPU", "torch ", "onnxruntime ", "resnet56"):
        assert words in text
    for extra in ("timm", "transformers"):
        try:
            __import__(extra)
        except ImportError:
            assert f'missing: pip install "understudy[{extra}]"' in text


def test_store_is_listed_verified_and_cleaned(warm, copied):
    listed = warm.run("store", "list", home=copied.home)
    assert listed.code == 0
    assert listed.out.count("complete") == 3
    assert "3 entries" in listed.out
    verified = warm.run("store", "verify", home=copied.home)
    assert verified.out == "3 entries: every file is as it was written\n"
    for options, num_left in (
        (["--incomplete"], 3),
        (["--older-than-days", "1"], 3),
        (["--older-than-days", "0", "--dry-run"], 3),
        (["--older-than-days", "0"], 0),
    ):
        finished = warm.run("store", "gc", *options, home=copied.home)
        assert finished.code == 0, finished.err
        assert len(list((copied.home / "outputs").glob("*/entry.json"))) == num_left
    assert "0 entries" in warm.run("store", "list", home=copied.home).out


def test_the_result_table_is_on_stdout_and_the_log_is_not(warm, copied):
    finished = warm.run("report", copied.folder, home=copied.home)
    assert finished.code == 0
    assert "Accuracy" in finished.out
    assert finished.out.endswith(f"report: {copied.folder}/report/report.html\n")
    assert "Accuracy" not in finished.err

"""Ctrl-C: the run ends quickly, says how to go on, and goes on bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest

SECONDS_TO_EXIT = 5.0


def wait_until(condition, command, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert command.poll() is None, f"it ended before it could be interrupted\n{command.err()}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def has_trained_an_epoch(run, role):
    path = run.folder / role / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def interrupt(command, run, number=signal.SIGINT):
    """Send the signal; check code, message and time."""
    started = time.monotonic()
    command.kill(number)
    finished = command.wait()
    assert time.monotonic() - started < SECONDS_TO_EXIT
    assert finished.code == 130, finished.err
    assert "`understudy resume" in finished.err
    assert "Traceback" not in finished.err
    run.assert_nothing_is_half_written()


@pytest.mark.parametrize(
    ("role", "number"), [("teacher", signal.SIGINT), ("student", signal.SIGTERM)]
)
def test_a_signal_in_training_saves_where_it_was(warm, tiny_recipe, unbroken, fresh, role, number):
    command = warm.start("distill", tiny_recipe, "--out", fresh.folder, home=fresh.home)
    wait_until(lambda: has_trained_an_epoch(fresh, role), command)
    interrupt(command, fresh, number)
    assert (fresh.folder / role / "interrupted.pt").exists()
    finished = warm.run("resume", fresh.folder, home=fresh.home)
    assert finished.code == 0, finished.err
    assert "resumed at epoch" in finished.err
    assert fresh.results() == unbroken.results()


def test_ctrl_c_in_labelling_keeps_whole_chunks(warm, tiny_recipe, fresh, tmp_path):
    many = ("--set", "views.num_views=40")
    command = warm.start("teach", tiny_recipe, *many, "--out", fresh.folder, home=fresh.home)
    assert command.wait().code == 0
    command = warm.start("label", fresh.folder, home=fresh.home)
    chunks = fresh.home / "outputs"
    wait_until(lambda: any(chunks.glob("*/c.0.0")), command)
    interrupt(command, fresh)
    num_kept = len(list(chunks.glob("*/c.*")))
    assert num_kept > 0
    finished = warm.run("label", fresh.folder, home=fresh.home)
    assert finished.code == 0, finished.err
    assert fresh.record("labels").timing["teacher"]["num_reused"] > 0
    # Labelled once more in another store, nothing differs.
    other_home = tmp_path / "other"
    assert warm.run("label", fresh.folder, home=other_home).code == 0
    assert type(fresh)(fresh.folder, other_home).store_files() == fresh.store_files()


@pytest.mark.slow
def test_ctrl_c_of_a_whole_process_group(tiny_recipe, fresh, unbroken, warm):
    """As a terminal sends it, to an ordinary ``python -m understudy``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "understudy", "distill", tiny_recipe, "--out", fresh.folder],
        env={**os.environ, "UNDERSTUDY_HOME": str(fresh.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not has_trained_an_epoch(fresh, "student"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < SECONDS_TO_EXIT
    assert process.returncode == 130, err
    assert f"understudy resume {fresh.folder}" in err
    assert "Traceback" not in err
    assert warm.run("resume", fresh.folder, home=fresh.home).code == 0
    assert fresh.results() == unbroken.results()

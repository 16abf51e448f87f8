"""SIGKILL at random moments in all stages: what is resumed ends as an unbroken run does."""

import random
import time
from collections import Counter

import pytest
import torch

from tiny_run import STAGES, TinyRun
from understudy.teachers.maintenance import verify_store
from understudy.teachers.store import OutputStore

NUM_KILLS = 24
REPORT_SECONDS = 0.3


def assert_no_half_files(run):
    run.assert_nothing_is_half_written()
    assert verify_store(OutputStore(run.home / "outputs")) == []
    for path in run.folder.glob("*/*.pt"):
        torch.load(path, weights_only=True)


def has_begun(command, run, stage):
    if stage == "report":
        return (run.folder / "export" / "record.json").exists()
    return f" {stage}: started" in command.err()


def kill_in(command, run, stage, delay_s):
    """Kill the command so long after the stage has begun; return where that was, None if done."""
    while not has_begun(command, run, stage):
        if command.poll() is not None:
            return None
        time.sleep(0.001)
    time.sleep(delay_s)
    if command.poll() is not None:
        return None
    command.kill()
    begun = [stage for stage in STAGES if has_begun(command, run, stage)]
    code = command.wait().code
    if code == 0:  # it ended by itself just before the signal came
        return None
    assert code == -9
    done = run.finished_stages()
    if len(done) == len(STAGES):
        return "report"
    return next((stage for stage in begun if stage not in done), "between stages")


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_bit_for_bit_as_unbroken_ones(
    warm, tiny_recipe, unbroken, tmp_path
):
    expected = unbroken.results()
    seconds = {kind: unbroken.record(kind).timing["stage_seconds"] for kind in STAGES}
    seconds["report"] = REPORT_SECONDS
    generator = random.Random(7)
    hits, num_runs = [], 0
    while len(hits) < NUM_KILLS:
        num_runs += 1
        run = TinyRun(tmp_path / f"run{num_runs}", tmp_path / f"home{num_runs}")
        start = ["distill", tiny_recipe, "--out", run.folder]
        while len(hits) < NUM_KILLS:
            # One of the stages that come next, so that one run is killed several times.
            left = [s for s in STAGES if s not in run.finished_stages()] + ["report"]
            stage = generator.choice(left[:3])
            command = warm.start(*start, home=run.home)
            hit = kill_in(command, run, stage, generator.random() * seconds[stage])
            if hit is None:
                break
            hits.append(hit)
            assert_no_half_files(run)
            if hit == "report":
                break
            if (run.folder / "recipe.yaml").exists():
                start = ["resume", run.folder]
        finished = warm.run(*start, home=run.home)
        assert finished.code == 0, finished.err
        assert run.results() == expected, hits
        assert (run.folder / "report" / "report.html").exists()
        assert not list(run.folder.rglob("*.part")), "what killed writers left is cleared away"
    counts = Counter(hits)
    print(f"{num_runs} runs, killed in: {dict(counts)}")
    assert len(counts) >= 5, counts
    assert {"student", "export"} <= set(counts)

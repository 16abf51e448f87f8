"""What is stored of a run's teachers while other commands work on the same store."""

import json
import os
import shutil
import time

import pytest
import yaml

from understudy import stages
from understudy.artifacts import Record
from understudy.errors import InputError, StoreError
from understudy.recipes import label as labelling
from understudy.recipes.job import open_run
from understudy.recipes.outputs import stored_teacher
from understudy.recipes.store import remove, verify


@pytest.fixture
def here(copied, monkeypatch):
    """The copied run, for this process."""
    monkeypatch.setenv("UNDERSTUDY_HOME", str(copied.home))
    return copied


def remove_chunk(run):
    chunk = min((run.home / "outputs").glob("*/c.0.0"))
    chunk.unlink()
    (chunk.parent / "seal.json").unlink(missing_ok=True)
    return chunk


def test_outputs_that_are_removed_during_the_labelling_are_an_error(here, unbroken, monkeypatch):
    remove_chunk(here)
    label_with = labelling.label_with

    def with_another_process(run, role, folder):
        done = label_with(run, role, folder)
        remove_chunk(here)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(labelling, "label_with", with_another_process)
        with pytest.raises(StoreError, match="lacks 1 of 2 chunks"):
            stages.label(here.folder)
    assert not (here.folder / "labels" / "record.json").exists()
    assert stages.label(here.folder).hash == unbroken.record("labels").hash


def test_a_record_of_fewer_outputs_than_there_are_views_is_not_reused(here, unbroken):
    chunk = remove_chunk(here)
    values = json.loads((here.folder / "labels" / "record.json").read_text())
    del values["hash"]
    del values["payload"]["entries"][chunk.parent.name]
    Record(**values).save(here.folder / "labels")
    assert stages.label(here.folder).hash == unbroken.record("labels").hash
    assert chunk.exists()


def test_gc_does_not_take_what_was_labelled_a_moment_ago(warm, here):
    chunk = remove_chunk(here)
    finished = warm.run("store", "gc", "--incomplete", home=here.home)
    assert finished.code == 0, finished.err
    assert "0 entries" in finished.out
    assert chunk.parent.exists()


def test_a_run_whose_outputs_are_not_stored_is_not_well(here):
    outputs = here.home / "outputs"
    remove_chunk(here)
    with pytest.raises(StoreError, match=r"not labelled: 1 of 2 chunks \(run `understudy label"):
        verify(None, run_folder=str(here.folder), repair=False)
    shutil.rmtree(outputs)
    shutil.rmtree(here.folder / "labels")
    with pytest.raises(StoreError) as caught:
        verify(None, run_folder=str(here.folder), repair=False)
    assert len(caught.value.problems) == 3
    assert all("not labelled: 0 of 2 chunks" in line for line in caught.value.problems)
    assert not outputs.exists()
    assert not (here.folder / "labels").exists()


def test_a_run_that_stores_nothing_is_said_to(here):
    path = here.folder / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    values["labelling"]["live"] = True
    path.write_text(yaml.safe_dump(values))
    said = verify(None, run_folder=str(here.folder), repair=False)
    assert f"3 entries, nothing stored of {here.folder} (labelling.live)" in said


def test_outputs_that_are_read_are_in_use(here):
    days_ago = time.time() - 10 * 86_400
    for path in (here.home / "outputs").glob("*/*"):
        os.utime(path, (days_ago, days_ago))
    for path in (here.home / "outputs").glob("*/.lock"):
        os.utime(path, (days_ago, days_ago))
    verify(None, run_folder=None, repair=False)
    assert "3 entries" in remove(None, older_than_days=5, incomplete=False, dry_run=True)
    run = open_run(here.folder)
    stored_teacher(run).rows(run.splits.train[:3], view=1)
    assert "2 entries" in remove(None, older_than_days=5, incomplete=False, dry_run=False)


@pytest.mark.parametrize("age", [-1.0, float("nan"), float("inf")])
def test_an_age_that_is_none_removes_nothing(here, age):
    with pytest.raises(InputError, match="is no age"):
        remove(None, older_than_days=age, incomplete=False, dry_run=False)
    assert len(list((here.home / "outputs").glob("*/entry.json"))) == 3

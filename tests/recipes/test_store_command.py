"""What is stored of a run's teachers while other commands work on the same store."""

import json

import pytest

from understudy import stages
from understudy.artifacts import Record
from understudy.errors import StoreError
from understudy.recipes import label as labelling


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

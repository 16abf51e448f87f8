"""Records and atomic files: reuse only what is whole and unchanged."""

import multiprocessing
import os
import signal

import pytest

from understudy.artifacts import (
    ASIDE_NAME,
    Record,
    atomic_path,
    clear_part,
    content_hash,
    exclusive,
    hash_files,
    reusable_record,
    stage_key,
    write_json,
    write_text,
)
from understudy.errors import InputError


def make_record(folder, **changes):
    write_text(folder / "weights.bin", "weights")
    values = {"kind": "student", "key": "k", "seed": 0, "payload": {"accuracy": 0.5}} | changes
    return Record(**values, files=hash_files(folder, ["weights.bin"])).save(folder)


def test_a_record_comes_back_equal_and_its_hash_ignores_time_and_machine(tmp_path):
    record = make_record(tmp_path)
    assert Record.load(tmp_path) == record
    later = make_record(tmp_path, created="2000-01-01", hardware={}, timing={"seconds": 3.0})
    assert later.hash == record.hash
    assert make_record(tmp_path, payload={"accuracy": 0.6}).hash != record.hash


def test_reuse_needs_the_key_and_intact_files(tmp_path):
    make_record(tmp_path)
    assert reusable_record(tmp_path, "k") is not None
    assert reusable_record(tmp_path, "other") is None
    (tmp_path / "weights.bin").write_text("weightz")
    assert reusable_record(tmp_path, "k") is None
    (tmp_path / "weights.bin").unlink()
    assert reusable_record(tmp_path, "k") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"hash": "x"}', '{"kind": 1, "hash": "x"}'])
def test_a_damaged_record_is_an_input_error(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(InputError, match="not a readable record"):
        Record.load(tmp_path)


def test_an_edited_record_is_found(tmp_path):
    make_record(tmp_path)
    path = tmp_path / "record.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(InputError, match="was changed after it was written"):
        Record.load(tmp_path)


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_is_cleared_and_what_it_set_aside_comes_back(tmp_path):
    (tmp_path / ".a.json.x1y2.part").write_text("half")
    for name, has_new in (("old", False), ("new", True)):
        part = tmp_path / f".{name}.v1.x1y2.part"
        (part / "package").mkdir(parents=True)
        (part / ASIDE_NAME).mkdir()
        (part / ASIDE_NAME / "manifest").write_text("before")
        if has_new:
            (tmp_path / f"{name}.v1").mkdir()
            (tmp_path / f"{name}.v1" / "manifest").write_text("after")
    for part in list(tmp_path.glob(".*.part")):
        clear_part(part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.v1", "old.v1"]
    assert (tmp_path / "old.v1" / "manifest").read_text() == "before"
    assert (tmp_path / "new.v1" / "manifest").read_text() == "after"


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_keys_depend_on_all_parts_and_not_on_order():
    key = stage_key("student", {"a": 1, "b": 2}, {"labels": "h"})
    assert key == stage_key("student", {"b": 2, "a": 1}, {"labels": "h"})
    assert key != stage_key("control", {"a": 1, "b": 2}, {"labels": "h"})
    assert key != stage_key("student", {"a": 1, "b": 3}, {"labels": "h"})
    assert key != stage_key("student", {"a": 1, "b": 2}, {"labels": "g"})
    assert content_hash({"a": (1, 2)}) == content_hash({"a": [1, 2]})


def _hold(folder, ready):
    with exclusive(folder):
        ready.set()
        signal.pause()


def test_a_run_folder_has_one_process_and_a_killed_one_lets_go(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another process is working"), exclusive(tmp_path):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with exclusive(tmp_path):
        pass

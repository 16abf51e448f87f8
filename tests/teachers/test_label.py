import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from understudy.data.batches import iter_view_batches
from understudy.data.images import DataFacts, InMemoryImages
from understudy.data.views import Views
from understudy.errors import ModelError, StoreError
from understudy.teachers.label import label_views, view_keys
from understudy.teachers.maintenance import verify_store
from understudy.teachers.store import CHUNK_ROWS, OutputStore
from understudy.teachers.stored import StoredTeacher, load_view

NUM_SAMPLES = 3 * CHUNK_ROWS
NUM_CLASSES = 5
NUM_VIEWS = 2
SPEC = [{"pad_crop": {"padding": 1}}, {"flip": {"probability": 0.5}}, {"mixup": {"alpha": 0.4}}]


def new_source() -> InMemoryImages:
    generator = torch.Generator().manual_seed(0)
    pixels_NCHW = torch.randint(256, (NUM_SAMPLES, 1, 4, 4), dtype=torch.uint8, generator=generator)
    facts = DataFacts(
        image_shape=(1, 4, 4),
        class_names=tuple("abcde"),
        labels_N=torch.arange(NUM_SAMPLES) % NUM_CLASSES,
        sample_ids=tuple(map(str, range(NUM_SAMPLES))),
        given_splits=("train",) * NUM_SAMPLES,
        fingerprint="f" * 64,
    )
    return InMemoryImages(facts, pixels_NCHW)


def new_indices() -> torch.Tensor:
    """Two of three samples: two chunks and a bit."""
    indices_N = torch.arange(NUM_SAMPLES)
    return indices_N[indices_N % 3 != 1]


def new_views() -> Views:
    return Views(SPEC, seed=3, partner_pool=new_indices())


def teacher(images_NCHW: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, 16 * NUM_CLASSES).reshape(16, NUM_CLASSES)
    return images_NCHW.flatten(1).float() / 64 @ weights


def new_entries(root: Path, views: Views | None, **changes):
    keys = view_keys(new_source(), views, teacher="t", num_views=NUM_VIEWS, precision="float32")
    return [
        OutputStore(root).entry(
            key, sample_indices_N=new_indices(), num_classes=NUM_CLASSES, **changes
        )
        for key in keys
    ]


def contents(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_stored_outputs_are_the_teachers_on_the_very_pictures_the_student_sees(tmp_path):
    source, views, indices_N = new_source(), new_views(), new_indices()
    entries = new_entries(tmp_path, views)
    seen = []
    report = label_views(
        teacher,
        source,
        views,
        indices_N,
        entries=entries,
        batch_size=300,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = NUM_VIEWS * len(indices_N)
    assert (report.num_computed, report.num_reused, report.num_repaired) == (total, 0, 0)
    assert report.images_per_second > 0
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    stored = StoredTeacher(entries, indices_N)
    shuffled_N = indices_N[torch.randperm(len(indices_N))]
    for view in (0, 1, 0):
        # Batches of another size and order, as the student's are.
        for batch in iter_view_batches(source, views, shuffled_N.split(77), view=view):
            expected_NK = teacher(batch.images_NCHW)
            outputs = stored.outputs(batch, view=view)
            assert (outputs.features, outputs.top_k) == ({}, None)
            got_NK = outputs.logits_NK
            assert got_NK.dtype == torch.float32
            assert torch.allclose(got_NK, expected_NK, atol=2**-8)
    assert not torch.equal(load_view(entries[0]), load_view(entries[1]))
    assert load_view(entries[0]).dtype == torch.float16


def test_untouched_pictures_have_one_view(tmp_path):
    source, indices_N = new_source(), new_indices()
    [entry] = new_entries(tmp_path, None)
    label_views(teacher, source, None, indices_N, entries=[entry])
    expected_NK = teacher(source.images(indices_N))
    assert torch.allclose(load_view(entry).float(), expected_NK, atol=2**-8)


def test_labelling_again_computes_nothing(tmp_path):
    given = (teacher, new_source(), new_views(), new_indices())
    entries = new_entries(tmp_path, given[2])
    label_views(*given, entries=entries)
    before = contents(tmp_path)
    report = label_views(*given, entries=new_entries(tmp_path, given[2]))
    assert (report.num_computed, report.images_per_second) == (0, 0)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("bytes_kept", [None, 10])
def test_a_damaged_chunk_alone_is_computed_again(tmp_path, caplog, bytes_kept):
    given = (teacher, new_source(), new_views(), new_indices())
    entries = new_entries(tmp_path, given[2])
    label_views(*given, entries=entries)
    before = contents(tmp_path)
    path = entries[1].chunk_path(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data[:bytes_kept]))
    with pytest.raises(StoreError, match=r"c\.1\.0 is damaged"):
        StoredTeacher(entries, given[3]).rows(given[3], view=1)
    with caplog.at_level(logging.WARNING, logger="understudy"):
        report = label_views(*given, entries=entries)
    assert (report.num_computed, report.num_repaired) == (1024, 1)
    assert "c.1.0 is damaged and computed again" in caplog.text
    assert contents(tmp_path) == before
    assert verify_store(OutputStore(tmp_path)) == []


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopError])
@pytest.mark.parametrize("num_batches", [1, 5, 9])
def test_stopped_labelling_continues_to_the_same_bytes(tmp_path, stop, num_batches):
    source, views, indices_N = new_source(), new_views(), new_indices()
    calls = []

    def stops(images_NCHW: torch.Tensor) -> torch.Tensor:
        calls.append(len(images_NCHW))
        if len(calls) > num_batches:
            raise stop
        return teacher(images_NCHW)

    entries = new_entries(tmp_path / "stopped", views)
    with pytest.raises(stop):
        label_views(stops, source, views, indices_N, entries=entries, batch_size=256)
    with pytest.raises(StoreError, match="Run the labelling stage"):
        StoredTeacher(entries, indices_N)
    report = label_views(teacher, source, views, indices_N, entries=entries)
    # Whole chunks are kept: four batches each, two chunks and a bit a view.
    assert report.num_reused == 1024 * (num_batches // 4)
    label_views(
        teacher, source, views, indices_N, entries=new_entries(tmp_path / "unbroken", views)
    )
    assert contents(tmp_path / "stopped") == contents(tmp_path / "unbroken")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import understudy.artifacts as artifacts
import understudy.teachers.entry as entry_module
from test_label import *

whole_write = artifacts.write_bytes

def write_and_die(path, data):
    # The moment of the kill lies inside a commit: half the bytes are on disk, nothing is renamed.
    if path.name != "c.1.0":
        return whole_write(path, data)
    with artifacts.atomic_path(path) as temporary:
        temporary.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

entry_module.write_bytes = write_and_die
views = new_views()
entries = new_entries(Path(sys.argv[1]), views)
label_views(teacher, new_source(), views, new_indices(), entries=entries)
"""


def test_labelling_killed_inside_a_commit_continues_to_the_same_bytes(tmp_path):
    source, views, indices_N = new_source(), new_views(), new_indices()
    folder = str(Path(__file__).parent)
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), folder]
    assert subprocess.run(arguments).returncode == -9
    entries = new_entries(tmp_path / "killed", views)
    assert entries[0].missing_chunks() == [1]
    assert not entries[0].complete
    [leftover] = entries[0].path.glob("*.part")
    leftover.unlink()
    report = label_views(teacher, source, views, indices_N, entries=entries)
    assert report.num_reused == 1024
    label_views(
        teacher, source, views, indices_N, entries=new_entries(tmp_path / "unbroken", views)
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")
    assert verify_store(OutputStore(tmp_path / "killed")) == []


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    entries = new_entries(tmp_path, None)
    with pytest.raises(ModelError, match=r"\(100, 4\); expected \[N, 5\]"):
        label_views(
            lambda images: teacher(images)[:, :4],
            new_source(),
            None,
            new_indices(),
            entries=entries,
        )


def test_outputs_that_do_not_fit_are_refused_with_the_way_out(tmp_path):
    def loud(images_NCHW: torch.Tensor) -> torch.Tensor:
        return 1e4 * teacher(images_NCHW)

    given = (loud, new_source(), None, new_indices())
    with pytest.raises(StoreError, match=r"does not fit float16.*dtype='float32'"):
        label_views(*given, entries=new_entries(tmp_path, None))
    [entry] = new_entries(tmp_path, None, dtype="float32")
    label_views(*given, entries=[entry])
    assert torch.equal(load_view(entry), loud(new_source().images(new_indices())))


def test_entries_and_questions_for_other_samples_are_refused(tmp_path):
    source, indices_N = new_source(), new_indices()
    entries = new_entries(tmp_path, None)
    with pytest.raises(StoreError, match="holds other samples"):
        label_views(teacher, source, None, indices_N[:-1], entries=entries)
    label_views(teacher, source, None, indices_N, entries=entries)
    stored = StoredTeacher(entries, indices_N)
    with pytest.raises(StoreError, match="not in the labelled split"):
        stored.rows(torch.tensor([0, 1]), view=0)
    with pytest.raises(StoreError, match="not in the labelled split"):
        stored.rows(torch.tensor([NUM_SAMPLES + 9]), view=0)
    with pytest.raises(StoreError, match="view 4 is not stored"):
        stored.rows(torch.tensor([0]), view=4)


def test_top_k_outputs_are_answered_as_full_logits(tmp_path):
    source, indices_N = new_source(), new_indices()
    entries = new_entries(tmp_path, None, top_k=2)
    label_views(teacher, source, None, indices_N, entries=entries)
    outputs = StoredTeacher(entries, indices_N).rows(indices_N[:50], view=0)
    got_NK = outputs.logits_NK
    expected_NK = teacher(source.images(indices_N[:50]))
    probabilities, expected = got_NK.softmax(1), expected_NK.softmax(1)
    classes_Nk = expected.topk(2).indices
    assert torch.allclose(
        probabilities.gather(1, classes_Nk), expected.gather(1, classes_Nk), atol=0.005
    )
    assert torch.equal(load_view(entries[0])[:50], got_NK)
    # What was stored, for losses that use nothing else.
    values_Nk, stored_classes_Nk = outputs.top_k
    assert torch.equal(stored_classes_Nk, classes_Nk.sort(dim=1).values)
    assert torch.equal(values_Nk, expected_NK.gather(1, stored_classes_Nk).half().float())


def test_keys_differ_in_all_that_changes_outputs():
    source, views = new_source(), new_views()

    def keys(teacher="t", precision="float32", views=views):
        return view_keys(source, views, teacher=teacher, num_views=2, precision=precision)

    other = Views(SPEC[:2], seed=3, partner_pool=new_indices())
    all_keys = [*keys(), *keys("u"), *keys(precision="int8"), *keys(views=other), *keys(views=None)]
    assert len(set(all_keys)) == 9

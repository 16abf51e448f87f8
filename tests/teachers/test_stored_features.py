import resource
import subprocess
import sys
from pathlib import Path

import feature_samples
import numpy as np
import pytest
import torch
from feature_samples import (
    NUM_ROWS,
    NUM_VIEWS,
    ROW_SHAPES,
    contents,
    entry_of,
    infer,
    new_entries,
    new_indices,
    new_views,
)
from test_label import new_source, teacher

from understudy.data.batches import iter_view_batches
from understudy.errors import InputError, ModelError, StoreError
from understudy.teachers import store as store_module
from understudy.teachers.label import label_views
from understudy.teachers.maintenance import collect_garbage, list_entries, verify_store
from understudy.teachers.outputs import TeacherOutputs
from understudy.teachers.packing import FeatureFormat
from understudy.teachers.store import OutputStore, StoreKey
from understudy.teachers.stored import StoredTeacher, load_view

LOGITS_KEY = StoreKey(teacher="t" * 64, data="d" * 64, transform="v" * 64, seed=0, view=0)
FEATURE_KEY = StoreKey(**{**vars(LOGITS_KEY), "output": "layer:map"})


@pytest.fixture(name="small_chunks")
def with_small_chunks(monkeypatch):
    """Give rows of 48 values chunks of 64 rows, as large maps have."""
    monkeypatch.setattr(store_module, "MAX_FEATURE_CHUNK_BYTES", 6200)


def label(root: Path, *, views=None, infer=infer, batch_size=300, **changes):
    entries = new_entries(root, views, **changes)
    report = label_views(
        infer, new_source(), views, new_indices(), entries=entries, batch_size=batch_size
    )
    return entries, report


@pytest.mark.parametrize(
    ("changes", "address"),
    [
        ({}, "45bd0f57fa5ae6d192a4bd825f32c825"),
        ({"top_k": 3}, "3d273db6a9700c473bdfa6a1effe4431"),
        ({"dtype": "float32"}, "08385b9afac5675dd7be7fb38b84c62b"),
    ],
)
def test_logits_stored_before_there_were_features_stay_where_they_are(tmp_path, changes, address):
    store = OutputStore(tmp_path)
    given = {"sample_indices_N": torch.arange(2148) * 3, "num_classes": 10} | changes
    entry = store.entry(LOGITS_KEY, **given)
    assert entry.entry_id == address
    assert '"output"' not in (entry.path / "entry.json").read_text()
    assert store.open(address).key == LOGITS_KEY


def test_the_address_depends_on_the_output_and_its_shape(tmp_path):
    store, rows_N = OutputStore(tmp_path), torch.arange(10)
    other = StoreKey(**{**vars(LOGITS_KEY), "output": "layer:pooled"})
    entries = [
        store.entry(LOGITS_KEY, sample_indices_N=rows_N, num_classes=4),
        store.feature_entry(FEATURE_KEY, sample_indices_N=rows_N, row_shape=(4,)),
        store.feature_entry(FEATURE_KEY, sample_indices_N=rows_N, row_shape=(2, 2)),
        store.feature_entry(FEATURE_KEY, sample_indices_N=rows_N, row_shape=(4,), dtype="float32"),
        store.feature_entry(other, sample_indices_N=rows_N, row_shape=(4,)),
    ]
    assert len({entry.entry_id for entry in entries}) == 5
    assert store.open(entries[2].entry_id).format == FeatureFormat((2, 2))
    with pytest.raises(InputError, match="whose output is 'layer:map'"):
        store.entry(FEATURE_KEY, sample_indices_N=rows_N, num_classes=4)
    with pytest.raises(InputError, match="whose output is 'logits'"):
        store.feature_entry(LOGITS_KEY, sample_indices_N=rows_N, row_shape=(4,))
    with pytest.raises(InputError) as caught:
        store.feature_entry(FEATURE_KEY, sample_indices_N=rows_N, row_shape=(), dtype="float8")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("memory_limit_bytes", [1 << 30, 100_000, 0])
def test_features_are_those_of_the_very_pictures_the_student_sees(
    tmp_path, small_chunks, memory_limit_bytes
):
    source, views, indices_N = new_source(), new_views(), new_indices()
    entries, report = label(tmp_path, views=views)
    assert (report.num_computed, report.num_reused) == (NUM_VIEWS * NUM_ROWS, 0)
    assert entry_of(entries, "layer:map").chunk_rows == 64
    assert entry_of(entries, "layer:map").num_chunks == 40
    assert entry_of(entries, "embedding:pooled").chunk_rows == 256
    before = contents(tmp_path)
    stored = StoredTeacher(entries, indices_N, memory_limit_bytes=memory_limit_bytes)
    shuffled_N = indices_N[torch.randperm(len(indices_N))]
    for view in (0, 1, 0):
        for batch in iter_view_batches(source, views, shuffled_N.split(777), view=view):
            got, expected = stored.outputs(batch, view=view), infer(batch.images_NCHW)
            assert list(got.features) == list(ROW_SHAPES)
            assert torch.allclose(got.logits_NK, expected.logits_NK, atol=2**-8)
            for key, values in got.features.items():
                assert values.dtype == torch.float32
                assert values.shape[1:] == ROW_SHAPES[key]
                assert torch.equal(values, expected.features[key].half().float())
    # Large outputs were decoded to a file that has no name.
    assert contents(tmp_path) == before
    assert load_view(entries[-1]).shape == (NUM_ROWS, 7)


def test_large_outputs_are_mapped_from_disk_and_small_ones_held(tmp_path):
    entries, _ = label(tmp_path)
    stored = StoredTeacher(entries, new_indices(), memory_limit_bytes=200_000)
    stored.rows(new_indices()[:1], view=0)
    mapped = {output for output, words in stored._words.items() if words.base is not None}
    # 25 kB of logits, 35 and 80 kB of features are held; 240 kB are not.
    assert {o for o in mapped if isinstance(stored._words[o].base, np.memmap)} == {"layer:map"}


def test_logits_of_all_samples_do_not_read_the_features(tmp_path):
    entries, _ = label(tmp_path)
    stored = StoredTeacher(entries, new_indices())
    for chunk in (0, 1, 2):
        entry_of(entries, "layer:map").chunk_path(chunk).unlink()
    outputs = stored.rows(new_indices(), view=0, with_features=False)
    assert (len(outputs.logits_NK), outputs.features) == (NUM_ROWS, {})
    with pytest.raises(StoreError, match=r"c\.0\.0 does not exist: layer:map of rows 0"):
        stored.rows(new_indices()[:1], view=0)


def test_one_forward_pass_a_picture_whatever_is_stored(tmp_path):
    seen = []

    def counting(images_NCHW):
        seen.append(len(images_NCHW))
        return infer(images_NCHW)

    label(tmp_path, views=new_views(), infer=counting)
    assert sum(seen) == NUM_VIEWS * NUM_ROWS


def test_what_is_missing_of_one_output_alone_is_written(tmp_path, small_chunks):
    entries, _ = label(tmp_path)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("c.*")}
    lost = entry_of(entries, "layer:map").chunk_path(17)
    lost.unlink()
    assert not entry_of(entries, "layer:map").complete
    with pytest.raises(StoreError, match=r"lacks 1 of 40 chunks .*layer:map"):
        StoredTeacher(entries, new_indices())
    _, report = label(tmp_path)
    # The whole second block is computed, in the batches of the first time.
    assert (report.num_computed, report.num_reused) == (1024, NUM_ROWS - 1024)
    assert contents(tmp_path) == before
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("c.*")}
    assert [path for path in again if again[path] != times[path]] == [lost]


def test_features_are_added_to_logits_that_are_there(tmp_path):
    logits_only = [e for e in new_entries(tmp_path, None) if e.key.output == "logits"]
    label_views(teacher, new_source(), None, new_indices(), entries=logits_only, batch_size=300)
    before = contents(logits_only[0].path)
    entries, report = label(tmp_path)
    assert report.num_computed == NUM_ROWS
    assert contents(logits_only[0].path) == before
    assert all(entry.complete for entry in entries)
    # And logits alone are answered from the same store.
    assert StoredTeacher(logits_only, new_indices()).rows(new_indices(), view=0).features == {}


@pytest.mark.parametrize("bit", [7, 5000, -1])
def test_a_flipped_bit_in_features_is_found_named_and_mended(tmp_path, small_chunks, bit):
    entries, _ = label(tmp_path)
    store, intact = OutputStore(tmp_path), contents(tmp_path)
    assert verify_store(store) == []
    entry = entry_of(entries, "layer:map")
    path = entry.chunk_path(3)
    data = bytearray(path.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)
    for limit in (1 << 30, 0):
        stored = StoredTeacher(entries, new_indices(), memory_limit_bytes=limit)
        with pytest.raises(StoreError, match=r"c\.3\.0 is damaged.*verify --repair"):
            stored.rows(new_indices(), view=0)
    [finding] = verify_store(store)
    assert (finding.entry_id, finding.file) == (entry.entry_id, "c.3.0")
    _, report = label(tmp_path)
    assert (report.num_computed, report.num_repaired) == (1024, 1)
    assert contents(tmp_path) == intact
    assert verify_store(store) == []


@pytest.mark.parametrize("name", ["entry.json", "zarr.json", "seal.json"])
def test_damaged_metadata_of_features_is_mended(tmp_path, name):
    entries, _ = label(tmp_path)
    store, intact = OutputStore(tmp_path), contents(tmp_path)
    path = entry_of(entries, "layer:attention").path / name
    data = bytearray(path.read_bytes())
    data[100] ^= 8
    path.write_bytes(data)
    [finding] = verify_store(store, repair=True)
    assert (finding.file, finding.repaired) == (name, True)
    label(tmp_path)
    assert contents(tmp_path) == intact


def test_recomputation_finds_features_that_were_stored_wrongly(tmp_path):
    pictures_NCHW = new_source().images(new_indices())
    right = infer(pictures_NCHW)

    def recompute(key: StoreKey, rows_N: torch.Tensor) -> torch.Tensor:
        values = right.logits_NK if key.output == "logits" else right.features[key.output]
        return values[rows_N]

    def wrong(images_NCHW):
        outputs = infer(images_NCHW)
        if torch.equal(images_NCHW[0], pictures_NCHW[1024]):
            outputs.features["layer:attention"][17] *= 1.05
        return outputs

    entries, _ = label(tmp_path, infer=wrong)
    store = OutputStore(tmp_path)
    assert verify_store(store) == []
    [finding] = verify_store(store, recompute=recompute, num_rows=NUM_ROWS, repair=True)
    attention = entry_of(entries, "layer:attention")
    assert (finding.entry_id, finding.file) == (attention.entry_id, "c.1.0")
    assert f"[{1024 + 17}]" in finding.message
    label(tmp_path)
    assert verify_store(store, recompute=recompute, num_rows=NUM_ROWS) == []


def test_list_and_gc_know_features(tmp_path):
    entries, _ = label(tmp_path)
    store = OutputStore(tmp_path)
    by_output = {summary.key.output: summary for summary in list_entries(store)}
    summary = by_output["layer:map"]
    assert (summary.row_shape, summary.num_classes, summary.dtype) == ((3, 4, 4), None, "float16")
    assert (summary.complete, summary.num_rows) == (True, NUM_ROWS)
    assert (by_output["logits"].row_shape, by_output["logits"].num_classes) == (None, 5)
    kept = [entry.entry_id for entry in entries if entry.key.output == "logits"]
    assert len(collect_garbage(store, keep=kept)) == len(ROW_SHAPES)
    assert store.entry_ids() == kept


class StopError(Exception):
    pass


@pytest.mark.parametrize("num_batches", [1, 6])
def test_stopped_labelling_with_features_continues_to_the_same_bytes(
    tmp_path, small_chunks, num_batches
):
    calls = []

    def stops(images_NCHW):
        calls.append(len(images_NCHW))
        if len(calls) > num_batches:
            raise StopError
        return infer(images_NCHW)

    with pytest.raises(StopError):
        label(tmp_path / "stopped", infer=stops)
    # Chunks of features are written as soon as they are whole.
    [entry] = [e for e in new_entries(tmp_path / "stopped", None) if e.key.output == "layer:map"]
    assert 0 < len(entry.missing_chunks()) < entry.num_chunks
    label(tmp_path / "stopped")
    label(tmp_path / "unbroken")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "unbroken")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import understudy.artifacts as artifacts
import understudy.teachers.entry as entry_module
from feature_samples import *
from understudy.teachers.label import label_views

whole_write = artifacts.write_bytes
entries = new_entries(Path(sys.argv[1]), None)
fatal = entry_of(entries, "layer:attention").chunk_path(1)

def write_and_die(path, data):
    # The logits of the chunk are there, these features half, the others not at all.
    if path != fatal:
        return whole_write(path, data)
    with artifacts.atomic_path(path) as temporary:
        temporary.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

entry_module.write_bytes = write_and_die
label_views(infer, new_source(), None, new_indices(), entries=entries, batch_size=300)
"""


def test_labelling_killed_between_outputs_continues_to_the_same_bytes(tmp_path):
    folder = str(Path(feature_samples.__file__).parent)
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), folder]
    assert subprocess.run(arguments).returncode == -9
    entries = new_entries(tmp_path / "killed", None)
    assert not entry_of(entries, "logits").has_chunk(2)
    assert entry_of(entries, "logits").has_chunk(1)
    assert entry_of(entries, "layer:map").has_chunk(1)
    assert entry_of(entries, "layer:attention").missing_chunks() == [1, 2]
    assert entry_of(entries, "embedding:pooled").missing_chunks() == [1, 2]
    [leftover] = entry_of(entries, "layer:attention").path.glob(".*.part")
    leftover.unlink()
    _, report = label(tmp_path / "killed")
    assert report.num_reused == 1024
    label(tmp_path / "unbroken")
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("factor", [1e6, 1e-9])
def test_features_outside_the_range_of_float16_are_refused_and_float32_takes_them(tmp_path, factor):
    def loud(images_NCHW):
        outputs = infer(images_NCHW)
        outputs.features["layer:map"].mul_(factor)
        return outputs

    with pytest.raises(StoreError, match=r"do not fit float16.*dtype='float32'"):
        label(tmp_path, infer=loud)
    entries, _ = label(tmp_path, infer=loud, dtype="float32")
    expected = loud(new_source().images(new_indices())).features["layer:map"]
    got = StoredTeacher(entries, new_indices()).rows(new_indices(), view=0)
    assert torch.equal(got.features["layer:map"], expected)


def test_features_that_are_not_finite_are_refused_with_their_row():
    features = np.ones((5, 2, 3), dtype=np.float32)
    features[3, 1, 2] = np.inf
    with pytest.raises(StoreError, match="NaN or infinite in 1 rows, the first is row 13"):
        FeatureFormat((2, 3)).pack(features, first_row=10)


def test_features_that_are_all_zero_are_stored(tmp_path):
    def dead(images_NCHW):
        outputs = infer(images_NCHW)
        outputs.features["layer:map"].zero_()
        return outputs

    entries, _ = label(tmp_path, infer=dead)
    assert not load_view(entry_of(entries, "layer:map")).any()


def test_a_teacher_without_the_features_is_refused(tmp_path):
    with pytest.raises(ModelError, match="without the features 'layer:map'; expected only logits"):
        label(tmp_path, infer=teacher)

    def other(images_NCHW):
        return TeacherOutputs(teacher(images_NCHW), {"stem:map": images_NCHW.float()})

    with pytest.raises(ModelError, match=r"expected features \['stem:map'\]"):
        label(tmp_path, infer=other)
    with pytest.raises(StoreError, match=r"layer:map was given shape .*4, 4\); expected .*2, 2"):
        label(tmp_path, row_shape=(2, 2))


def test_views_without_their_logits_or_features_are_listed_together(tmp_path):
    entries = new_entries(tmp_path, new_views())
    wanted = [e for e in entries if (e.key.output, e.key.view) != ("layer:map", 1)]
    wanted = [e for e in wanted if (e.key.output, e.key.view) != ("logits", 0)]
    with pytest.raises(StoreError) as caught:
        StoredTeacher(wanted, new_indices())
    assert sorted(text.split(";")[0] for text in caught.value.problems) == [
        "view 0 was given no entry for logits",
        "view 1 was given no entry for layer:map",
    ]
    with pytest.raises(StoreError, match="two entries for logits"):
        StoredTeacher([*entries, entries[0]], new_indices())


def test_no_room_to_decode_large_features_is_a_clear_error(tmp_path):
    entries, _ = label(tmp_path)
    stored = StoredTeacher(entries, new_indices(), memory_limit_bytes=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        with pytest.raises(StoreError, match="no space left"):
            stored.rows(new_indices(), view=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(stored.rows(new_indices(), view=0).features) == 3

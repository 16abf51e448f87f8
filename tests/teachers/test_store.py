import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest
import torch

from understudy.errors import InputError, StoreError
from understudy.teachers.entry_files import decoded_bytes, locked
from understudy.teachers.maintenance import collect_garbage, list_entries, verify_store
from understudy.teachers.store import CHUNK_ROWS, Entry, OutputStore, StoreKey

KEY = StoreKey(teacher="t" * 64, data="d" * 64, transform="v" * 64, seed=0, view=0)
NUM_ROWS = 2 * CHUNK_ROWS + 100
NUM_CLASSES = 10


def teacher_outputs(rows_N: torch.Tensor) -> torch.Tensor:
    """Stand for a teacher: a pure function of the row."""
    angles = rows_N.double()[:, None] * torch.arange(1, NUM_CLASSES + 1)
    return (10 * torch.sin(angles)).float()


def new_entry(root: Path, **changes) -> Entry:
    given = {"sample_indices_N": torch.arange(NUM_ROWS) * 3, "num_classes": NUM_CLASSES} | changes
    return OutputStore(root).entry(KEY, **given)


def fill(entry: Entry) -> Entry:
    for chunk in entry.missing_chunks():
        entry.write_chunk(chunk, teacher_outputs(torch.arange(*entry.chunk_range(chunk))))
    return entry


def recompute(key: StoreKey, rows_N: torch.Tensor) -> torch.Tensor:
    return teacher_outputs(rows_N)


def contents(entry: Entry) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(entry.path.iterdir())
    }


def files_of(entry: Entry) -> list[Path]:
    return [path for path in sorted(entry.path.iterdir()) if path.stat().st_size]


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("top_k", [None, 3, NUM_CLASSES])
def test_rows_come_back_in_any_order(tmp_path, top_k):
    entry = fill(new_entry(tmp_path, top_k=top_k))
    assert entry.complete
    rows_N = torch.tensor([NUM_ROWS - 1, 0, CHUNK_ROWS, 7, 7])
    expected_NK = teacher_outputs(rows_N)
    got_NK = OutputStore(tmp_path).open(entry.entry_id).read(rows_N)
    assert got_NK.dtype == torch.float32
    classes_Nk = expected_NK.topk(top_k or NUM_CLASSES).indices
    assert torch.allclose(
        got_NK.gather(1, classes_Nk), expected_NK.gather(1, classes_Nk), atol=2**-8
    )


def test_the_address_depends_on_everything_that_changes_the_outputs(tmp_path):
    changed_keys = [
        StoreKey(**{**KEY.__dict__, name: value})
        for name, value in [
            ("teacher", "x"),
            ("data", "x"),
            ("transform", "x"),
            ("seed", 1),
            ("view", 1),
            ("precision", "int8"),
        ]
    ]
    changes = [{"sample_indices_N": torch.arange(NUM_ROWS)}, {"top_k": 3}, {"dtype": "float32"}]
    store = OutputStore(tmp_path)
    entries = [new_entry(tmp_path)] + [new_entry(tmp_path, **change) for change in changes]
    entries += [
        store.entry(key, sample_indices_N=torch.arange(5), num_classes=3) for key in changed_keys
    ]
    assert len({entry.entry_id for entry in entries}) == 1 + 3 + 6
    assert new_entry(tmp_path).entry_id == entries[0].entry_id
    assert store.entry_ids() == sorted(entry.entry_id for entry in entries)


def test_outputs_that_are_all_zero_are_stored(tmp_path):
    entry = new_entry(tmp_path)
    for chunk in entry.missing_chunks():
        start, stop = entry.chunk_range(chunk)
        entry.write_chunk(chunk, torch.zeros(stop - start, NUM_CLASSES))
    assert entry.complete
    assert not entry.read(torch.arange(NUM_ROWS)).any()


def test_reading_needs_only_the_chunks_asked_for(tmp_path):
    entry = fill(new_entry(tmp_path))
    entry.chunk_path(0).unlink()
    assert len(entry.read(torch.tensor([CHUNK_ROWS, NUM_ROWS - 1]))) == 2
    with pytest.raises(StoreError, match=r"c\.0\.0 does not exist.*computes only what is missing"):
        entry.read(torch.tensor([3]))
    with pytest.raises(StoreError, match=r"c\.0\.0 does not exist"):
        entry.load_words()
    assert not entry.complete


def test_wrong_shapes_and_orders_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"given shape \(5, 10\); expected \(1024, 10\)"):
        new_entry(tmp_path).write_chunk(0, torch.zeros(5, NUM_CLASSES))
    for indices in ([], [2, 1], [1, 1]):
        with pytest.raises(InputError, match="ascending"):
            new_entry(tmp_path, sample_indices_N=torch.tensor(indices, dtype=torch.int64))


@pytest.mark.parametrize("top_k", [None, 2])
def test_every_flipped_bit_is_found(tmp_path, top_k):
    """One bit of every byte of the small files, a spread of bits of every chunk."""
    entry = fill(new_entry(tmp_path, top_k=top_k))
    store = OutputStore(tmp_path)
    assert verify_store(store) == []
    names = {path.name for path in files_of(entry)}
    assert names == {"entry.json", "zarr.json", "seal.json", "c.0.0", "c.1.0", "c.2.0"}
    for path in files_of(entry):
        intact = path.read_bytes()
        num_bits = 8 * len(intact)
        step = max(9, num_bits // 30 // 8 * 8 + 1)
        for bit in {0, num_bits - 1, *range(3, num_bits, step)}:
            flip_bit(path, bit)
            findings = verify_store(store)
            assert [finding.file for finding in findings] == [path.name], (path.name, bit)
            path.write_bytes(intact)
    assert verify_store(store) == []


def test_every_single_bit_of_the_manifests_counts(tmp_path):
    entry = fill(new_entry(tmp_path))
    for name in ("entry.json", "seal.json"):
        path = entry.path / name
        intact = path.read_bytes()
        assert decoded_bytes(intact, path)
        for bit in range(8 * len(intact)):
            data = bytearray(intact)
            data[bit // 8] ^= 1 << (bit % 8)
            with pytest.raises(StoreError, match=name):
                decoded_bytes(bytes(data), path)


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_truncated_chunk_is_named_with_the_mend(tmp_path, keep):
    entry = fill(new_entry(tmp_path))
    path = entry.chunk_path(1)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    message = r"c\.1\.0 is damaged.*understudy store verify --repair"
    with pytest.raises(StoreError, match=message):
        entry.read(torch.tensor([CHUNK_ROWS]))
    with pytest.raises(StoreError, match=message):
        entry.load_words()
    assert [finding.file for finding in verify_store(OutputStore(tmp_path))] == ["c.1.0"]


def test_swapped_chunks_are_found_though_their_checksums_hold(tmp_path):
    entry = fill(new_entry(tmp_path))
    first, second = entry.chunk_path(0), entry.chunk_path(1)
    first_data, second_data = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_data)
    second.write_bytes(first_data)
    assert len(verify_store(OutputStore(tmp_path))) == 2


@pytest.mark.parametrize("name", ["c.1.0", "zarr.json", "seal.json", "entry.json"])
def test_repair_and_labelling_again_restore_the_same_bytes(tmp_path, name):
    entry = fill(new_entry(tmp_path))
    store, intact = OutputStore(tmp_path), contents(entry)
    untouched = entry.chunk_path(0).stat().st_mtime_ns
    flip_bit(entry.path / name, 100)
    [finding] = verify_store(store, repair=True)
    assert finding.repaired
    again = fill(new_entry(tmp_path))
    assert contents(again) == intact
    assert verify_store(store) == []
    assert again.chunk_path(0).stat().st_mtime_ns == untouched


def test_labelling_mends_metadata_without_being_asked(tmp_path):
    for name in ("zarr.json", "entry.json"):
        entry = fill(new_entry(tmp_path))
        intact = contents(entry)
        flip_bit(entry.path / name, 50)
        assert new_entry(tmp_path).complete
        assert contents(entry) == intact


def test_a_deleted_chunk_of_a_sealed_entry_is_found(tmp_path):
    entry = fill(new_entry(tmp_path))
    entry.chunk_path(2).unlink()
    [finding] = verify_store(OutputStore(tmp_path))
    assert (finding.file, finding.message) == ("c.2.0", "it was deleted after sealing")
    fill(entry)
    assert verify_store(OutputStore(tmp_path)) == []


def test_recomputation_finds_a_row_that_was_stored_wrongly(tmp_path):
    entry = new_entry(tmp_path)
    for chunk in entry.missing_chunks():
        logits_NK = teacher_outputs(torch.arange(*entry.chunk_range(chunk)))
        if chunk == 1:
            logits_NK[17] = logits_NK[18].clone()
        entry.write_chunk(chunk, logits_NK)
    store = OutputStore(tmp_path)
    assert verify_store(store) == []
    [finding] = verify_store(store, recompute=recompute, num_rows=NUM_ROWS, repair=True)
    assert finding.file == "c.1.0"
    assert f"[{CHUNK_ROWS + 17}]" in finding.message
    fill(entry)
    assert verify_store(store, recompute=recompute, num_rows=NUM_ROWS) == []


def test_recomputation_takes_another_sample_for_another_seed(tmp_path):
    fill(new_entry(tmp_path))
    asked = []

    def remember(key: StoreKey, rows_N: torch.Tensor) -> torch.Tensor:
        asked.append(rows_N)
        return teacher_outputs(rows_N)

    samples = []
    for seed in (0, 0, 1):
        asked.clear()
        assert verify_store(OutputStore(tmp_path), recompute=remember, num_rows=20, seed=seed) == []
        samples.append(torch.cat(asked))
    assert len(samples[0]) == 20
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_a_flipped_bit_is_found_beside_recomputation(tmp_path):
    entry = fill(new_entry(tmp_path))
    flip_bit(entry.chunk_path(0), 1000)
    findings = verify_store(OutputStore(tmp_path), recompute=recompute, num_rows=500)
    assert [finding.file for finding in findings] == ["c.0.0"]


def test_list_says_what_is_there(tmp_path):
    assert list_entries(OutputStore(tmp_path / "none")) == []
    entry = new_entry(tmp_path)
    entry.write_chunk(1, teacher_outputs(torch.arange(*entry.chunk_range(1))))
    [summary] = list_entries(OutputStore(tmp_path))
    assert (summary.num_chunks_present, summary.num_chunks, summary.complete) == (1, 3, False)
    fill(entry)
    [summary] = list_entries(OutputStore(tmp_path))
    assert (summary.key, summary.num_rows, summary.num_classes) == (KEY, NUM_ROWS, NUM_CLASSES)
    assert summary.complete
    assert summary.size_bytes == sum(path.stat().st_size for path in entry.path.iterdir())
    flip_bit(entry.path / "zarr.json", 9)
    [summary] = list_entries(OutputStore(tmp_path))
    assert "zarr.json is damaged" in (summary.damage or "")


def test_gc_deletes_what_meets_every_condition(tmp_path):
    store = OutputStore(tmp_path)
    whole, part, kept = (
        fill(new_entry(tmp_path)),
        new_entry(tmp_path, top_k=3),
        new_entry(tmp_path, top_k=4),
    )
    with pytest.raises(InputError, match="no condition"):
        collect_garbage(store)
    assert collect_garbage(store, unused_for_s=3600) == []
    leftover = kept.path / ".c.0.0.abc.part"
    leftover.write_bytes(b"half")
    os.utime(leftover, (time.time() - 7200, time.time() - 7200))
    keep = {kept.entry_id}
    doomed = collect_garbage(store, keep=keep, incomplete=True, dry_run=True)
    assert [summary.entry_id for summary in doomed] == [part.entry_id]
    assert part.path.exists()
    assert leftover.exists()
    collect_garbage(store, keep=keep, incomplete=True)
    assert store.entry_ids() == sorted([whole.entry_id, kept.entry_id])
    assert not leftover.exists()
    collect_garbage(store, keep=keep)
    assert store.entry_ids() == [kept.entry_id]


def test_gc_of_the_incomplete_leaves_what_is_being_labelled(tmp_path):
    store = OutputStore(tmp_path)
    held, young, left = (new_entry(tmp_path, top_k=top_k) for top_k in (2, 3, 4))
    for entry in (held, left):
        age(entry, 7200)
    with locked(held.path):
        age(held, 7200)
        for dry_run in (True, False):
            gone = collect_garbage(store, incomplete=True, idle_for_s=3600, dry_run=dry_run)
            assert [summary.entry_id for summary in gone] == [left.entry_id]
    assert store.entry_ids() == sorted([held.entry_id, young.entry_id])
    age(held, 7200)
    assert len(collect_garbage(store, incomplete=True, idle_for_s=3600)) == 1


def age(entry: Entry, seconds: float) -> None:
    for path in entry.path.iterdir():
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_files_that_go_away_meanwhile_are_no_error(tmp_path, monkeypatch):
    new_entry(tmp_path)
    listed = Path.iterdir

    def with_a_file_that_is_gone(folder):
        return [*listed(folder), folder / ".c.0.0.abcdefgh.part"]

    monkeypatch.setattr(Path, "iterdir", with_a_file_that_is_gone)
    assert len(list_entries(OutputStore(tmp_path))) == 1


def write_all(root: Path, offset: float, barrier) -> None:
    """One of two writers, alike for one entry and of slightly other arithmetic for the other."""
    same, different = new_entry(root / "same"), new_entry(root / "different")
    barrier.wait()
    for chunk in range(same.num_chunks):
        logits_NK = teacher_outputs(torch.arange(*same.chunk_range(chunk)))
        same.write_chunk(chunk, logits_NK)
        different.write_chunk(chunk, logits_NK + offset)


def test_two_writers_at_once_leave_one_valid_entry(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    writers = [
        spawn.Process(target=write_all, args=(tmp_path, offset, barrier)) for offset in (0, 0.01)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    for name in ("same", "different"):
        store = OutputStore(tmp_path / name)
        [summary] = list_entries(store)
        assert summary.complete
        assert verify_store(store, recompute=recompute, num_rows=NUM_ROWS) == []
        assert not list((store.root / summary.entry_id).glob("*.part"))
    assert contents(new_entry(tmp_path / "same")) == contents(fill(new_entry(tmp_path / "alone")))


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_chunk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = "size=40k,nr_inodes=64"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        entry = new_entry(disk)
        with pytest.raises(StoreError, match=r"no space left .*understudy store gc"):
            fill(entry)
        written = [chunk for chunk in range(entry.num_chunks) if entry.has_chunk(chunk)]
        assert 0 < len(written) < entry.num_chunks
        assert not list(entry.path.glob("*.part"))
        assert verify_store(OutputStore(disk)) == []
        remount = ["mount", "-o", "remount,size=1m", str(disk)]
        assert subprocess.run(remount, capture_output=True).returncode == 0
        assert fill(entry).complete
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_is_a_clear_error_and_leaves_no_half_chunk(tmp_path):
    """The same fault from another limit of the system, which needs no mount."""
    entry = new_entry(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreError, match="no space left"):
            fill(entry)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entry.missing_chunks() == [0, 1, 2]
    assert not list(entry.path.glob("*.part"))
    assert fill(entry).complete


def test_the_manifest_says_what_the_entry_is(tmp_path):
    manifest = json.loads((new_entry(tmp_path, top_k=3).path / "entry.json").read_text())
    assert manifest["key"]["precision"] == "float32"
    assert manifest["format"] == {"num_classes": 10, "top_k": 3, "dtype": "float16"}
    assert manifest["num_rows"] == NUM_ROWS

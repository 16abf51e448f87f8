"""Pictures without labels: every kind of source, joined to labelled ones, and hidden labels."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from understudy.data.batches import iter_view_batches
from understudy.data.sources import images_from_tensors, load_data
from understudy.data.unlabelled import (
    hidden_labels,
    hide_labels,
    join_unlabelled,
    load_unlabelled,
)
from understudy.data.views import Views
from understudy.errors import DataError

STREAMED = 1  # a memory limit of one byte


def pictures(seed, num=6, shape=(5, 4, 3)):
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def as_images(array_NHWC):
    return torch.from_numpy(array_NHWC).permute(0, 3, 1, 2).contiguous()


@pytest.fixture
def labelled():
    array = pictures(1, num=8)
    splits = ["train"] * 5 + ["validation"] + ["test"] * 2
    return images_from_tensors(
        as_images(array),
        torch.arange(8) % 2,
        class_names=["a", "b"],
        given_splits=splits,
        metadata={"place": list("stuvwxyz")},
    )


@pytest.fixture
def flat_folder(tmp_path):
    """Pictures in no class folder, some deeper, beside a file that is none."""
    folder = tmp_path / "flat"
    (folder / "deeper").mkdir(parents=True)
    for number, pixels_HWC in enumerate(pictures(2)):
        where = folder / "deeper" if number >= 4 else folder
        Image.fromarray(pixels_HWC).save(where / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def parquet_file(tmp_path):
    import io

    encoded = []
    for pixels_HWC in pictures(2):
        file = io.BytesIO()
        Image.fromarray(pixels_HWC).save(file, "PNG")
        encoded.append(file.getvalue())
    path = tmp_path / "pictures.parquet"
    pq.write_table(pa.table({"picture": encoded, "number": list(range(6))}), path)
    return path


def pixels_of(source):
    return source.images(torch.arange(source.num_samples))


@pytest.mark.parametrize("limit", [1 << 30, STREAMED])
@pytest.mark.parametrize("kind", ["flat_folder", "parquet_file"])
def test_pictures_are_read_from_every_kind_of_source(kind, limit, request, tmp_path):
    path = request.getfixturevalue(kind)
    expected = as_images(pictures(2))
    for _ in range(2):  # the second time from the cache
        source = load_unlabelled(str(path), memory_limit_bytes=limit, cache=tmp_path / "cache")
        assert torch.equal(pixels_of(source), expected)
        assert source.labels_N.tolist() == [-1] * 6
        assert source.class_names == ()
        assert set(source.given_splits) == {"train"}
    batches = [torch.tensor([5, 0]), torch.tensor([2])]
    read = list(source.iter_images(batches))
    assert all(torch.equal(a, expected[b]) for a, b in zip(read, batches, strict=True))


def test_labels_of_a_labelled_source_are_ignored_and_its_test_part_left_alone(tmp_path):
    array = pictures(3, num=4)
    for number, pixels_HWC in enumerate(array):
        part = "test" if number == 3 else "train"
        folder = tmp_path / "data" / part / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HWC).save(folder / f"{number}.png")
    source = load_unlabelled(str(tmp_path / "data"))
    assert source.num_samples == 3
    assert source.labels_N.tolist() == [-1] * 3
    known = load_data(str(tmp_path / "data"))
    rows = zip(known.sample_ids, known.given_splits, strict=True)
    assert set(source.sample_ids) == {sample for sample, part in rows if part == "train"}
    assert load_unlabelled("digits").num_samples == 1797


def test_a_broken_picture_stops_or_is_skipped(flat_folder):
    (flat_folder / "1.png").write_bytes(b"no picture at all")
    with pytest.raises(DataError, match=r"1\.png"):
        load_unlabelled(str(flat_folder))
    source = load_unlabelled(str(flat_folder), on_bad="skip")
    assert source.num_samples == 5
    assert [(issue.kind, issue.split) for issue in source.issues] == [
        ("broken_image", "unlabelled")
    ]


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no data"):
        load_unlabelled(str(tmp_path))


@pytest.mark.parametrize("limit", [1 << 30, STREAMED])
def test_joined_sources_answer_under_the_labelled_numbers(labelled, flat_folder, limit):
    unlabelled = load_unlabelled(str(flat_folder), memory_limit_bytes=limit)
    joined = join_unlabelled(labelled, unlabelled)
    everything = torch.cat([as_images(pictures(1, num=8)), as_images(pictures(2))])
    assert joined.num_samples == 14
    assert joined.labels_N.tolist() == [*(torch.arange(8) % 2).tolist(), *[-1] * 6]
    assert joined.class_names == ("a", "b")
    assert joined.given_splits[8:] == ("train",) * 6
    assert joined.metadata["place"] == [*"stuvwxyz", *[None] * 6]
    batches = [torch.tensor([13, 0, 8, 8]), torch.tensor([1, 2]), torch.tensor([9])]
    for indices_N in batches:
        assert torch.equal(joined.images(indices_N), everything[indices_N])
    read = list(joined.iter_images(iter(batches)))
    assert all(torch.equal(a, everything[b]) for a, b in zip(read, batches, strict=True))


def test_views_mix_pictures_of_both_parts(labelled, flat_folder):
    joined = join_unlabelled(labelled, load_unlabelled(str(flat_folder)))
    views = Views([{"mixup": {}}], seed=3, partner_pool=torch.arange(14))
    (batch,) = iter_view_batches(joined, views, [torch.arange(14)], view=1)
    assert batch.labels_N.tolist() == joined.labels_N.tolist()
    assert (batch.partner_labels_N == -1).any()


def test_fingerprints_tell_the_parts(labelled, flat_folder):
    unlabelled = load_unlabelled(str(flat_folder))
    joined = join_unlabelled(labelled, unlabelled)
    (flat_folder / "0.png").unlink()
    fewer = join_unlabelled(labelled, load_unlabelled(str(flat_folder)))
    assert len({labelled.fingerprint, joined.fingerprint, fewer.fingerprint}) == 3
    again = join_unlabelled(labelled, unlabelled)
    assert again.fingerprint == joined.fingerprint


def test_pictures_that_are_labelled_somewhere_are_left_out(labelled, caplog):
    known, new = as_images(pictures(1, num=8)), as_images(pictures(2))
    both = torch.cat([new[:2], known[6:], new[2:]])  # 6 and 7 are test pictures
    unlabelled = hide_labels(
        images_from_tensors(both, torch.zeros(8, dtype=torch.int64), class_names=["x"]),
        torch.ones(8, dtype=torch.bool),
    )
    joined = join_unlabelled(labelled, unlabelled)
    assert joined.num_samples == 8 + 6
    assert torch.equal(joined.images(torch.arange(8, 14)), new)
    assert "2 unlabelled images are in the labelled data too" in caplog.text
    with pytest.raises(DataError, match="holds all 8 unlabelled images already"):
        join_unlabelled(labelled, labelled)


def test_another_shape_is_an_error(labelled):
    gray = images_from_tensors(
        torch.zeros(2, 1, 5, 4, dtype=torch.uint8), torch.zeros(2).long(), class_names=["x"]
    )
    with pytest.raises(DataError, match=r"are \[1, 5, 4\].*and the labelled ones \[3, 5, 4\]"):
        join_unlabelled(labelled, gray)


def test_a_fraction_of_each_class_keeps_its_labels():
    digits = load_data("digits")
    train_N = torch.arange(0, 1797, 2)
    hidden_N = hidden_labels(digits, train_N, fraction=0.1, seed=4)
    counts = torch.bincount(digits.labels_N[train_N])
    kept = train_N[~hidden_N[train_N]]
    assert torch.bincount(digits.labels_N[kept]).tolist() == [-(-int(n) // 10) for n in counts]
    assert not hidden_N[1::2].any(), "only training labels are hidden"
    again = hidden_labels(digits, train_N, fraction=0.1, seed=4)
    other = hidden_labels(digits, train_N, fraction=0.1, seed=5)
    assert torch.equal(hidden_N, again)
    assert not torch.equal(hidden_N, other)
    # More labels are a superset of fewer.
    more_N = hidden_labels(digits, train_N, fraction=0.3, seed=4)
    assert not (more_N & ~hidden_N).any()
    few_N = hidden_labels(digits, train_N, fraction=1e-9, seed=4)
    assert (~few_N[train_N]).sum() == 10
    hidden = hide_labels(digits, hidden_N)
    assert hidden.fingerprint != digits.fingerprint
    assert torch.equal(hidden.labels_N[hidden_N], torch.full((int(hidden_N.sum()),), -1))
    assert torch.equal(pixels_of(hidden), pixels_of(digits))


def test_a_fraction_that_floating_point_puts_over_a_whole_number_is_that_number():
    digits = load_data("digits")
    [members] = torch.nonzero(digits.labels_N == 3, as_tuple=True)
    for fraction, num_kept in ((0.07, 7), (2 / 3, 67), (0.071, 8), (0.5, 50)):
        hidden_N = hidden_labels(digits, members[:100], fraction=fraction, seed=1)
        assert int(100 - hidden_N.sum()) == num_kept

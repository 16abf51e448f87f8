"""Every kind of source against the same pixels, and every fault against its message."""

import datetime
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from understudy.data.sources import (
    InMemoryImages,
    StreamedImages,
    images_from_tensors,
    load_data,
)
from understudy.errors import DataError

CLASSES = ("ant", "bee", "cow")
STREAMED = 1  # a memory limit of one byte


def pictures(seed, num=12, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def encode(pixels_HWC, **options):
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def labels():
    return [number for number in range(len(CLASSES)) for _ in range(4)]


def as_dataset(images, numbers=None, **columns):
    encoded = [image if isinstance(image, bytes | None) else encode(image) for image in images]
    numbers = labels() if numbers is None else numbers
    features = {"picture": datasets.Image(), "label": datasets.Value("int64")}
    features |= {name: datasets.Value("string") for name in columns}
    rows = datasets.Dataset.from_dict(
        {"picture": [{"bytes": e, "path": None} if e else None for e in encoded]}
        | {"label": numbers}
        | columns,
        features=datasets.Features(features),
    )
    # Class names are put on last: the library would refuse labels out of range, files do not.
    named = datasets.Features({**rows.features, "label": datasets.ClassLabel(names=list(CLASSES))})
    table = rows.data.table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": named.to_dict()}})}
    )
    return datasets.Dataset(table)


def write_parquet(path, images, numbers=None, **columns):
    pq.write_table(as_dataset(images, numbers, **columns).data.table, path)


def write_folder(root, images):
    for row, (image, number) in enumerate(zip(images, labels(), strict=True)):
        path = root / CLASSES[number] / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image))


@pytest.fixture(autouse=True)
def _own_library_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")


@pytest.fixture
def parquet(tmp_path):
    """A folder of train.parquet and test.parquet."""
    folder = tmp_path / "tables"
    folder.mkdir()
    write_parquet(folder / "train.parquet", pictures(1), subtype=[f"s{n % 5}" for n in range(12)])
    write_parquet(folder / "test.parquet", pictures(2))
    return folder


def expected_images():
    both = np.concatenate([pictures(1), pictures(2)])
    return torch.from_numpy(both).permute(0, 3, 1, 2)


def everything(source):
    return source.images(torch.arange(source.num_samples))


def test_digits_are_scaled_and_have_no_test_rows():
    from sklearn.datasets import load_digits

    source = load_data("digits")
    assert isinstance(source, InMemoryImages)
    assert (source.num_samples, source.image_shape) == (1797, (1, 8, 8))
    assert source.class_names == tuple("0123456789")
    assert set(source.given_splits) == {"train"}
    reference = np.floor(load_digits().images * 255 / 16 + 0.5)
    assert np.array_equal(everything(source)[:, 0].numpy(), reference)
    assert everything(source).max() == 255
    assert source.fingerprint == load_data("digits").fingerprint


def test_parquet_folder(parquet):
    source = load_data(str(parquet))
    assert torch.equal(everything(source), expected_images())
    assert source.labels_N.tolist() == labels() * 2
    assert source.class_names == CLASSES
    assert source.given_splits == ("train",) * 12 + ("test",) * 12
    assert source.metadata == {"subtype": [f"s{n % 5}" for n in range(12)] + [None] * 12}
    assert source.issues == ()
    order = torch.tensor([5, 0, 23, 5])
    assert torch.equal(source.images(order), expected_images()[order])


def test_every_storage_gives_the_same_data(parquet, tmp_path):
    reference = load_data(str(parquet))
    train, test = as_dataset(pictures(1)), as_dataset(pictures(2))
    write_folder(tmp_path / "folder" / "train", pictures(1))
    write_folder(tmp_path / "folder" / "test", pictures(2))
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    (tmp_path / "arrow").mkdir()
    for name, rows in (("train", train), ("test", test)):
        with pa.OSFile(str(tmp_path / "arrow" / f"{name}.arrow"), "wb") as file:
            new = pa.ipc.new_file if name == "test" else pa.ipc.new_stream
            with new(file, rows.data.table.schema) as writer:
                writer.write_table(rows.data.table)
    tensors = images_from_tensors(
        expected_images(),
        torch.tensor(labels() * 2),
        class_names=CLASSES,
        given_splits=reference.given_splits,
    )
    others = [load_data(str(tmp_path / name)) for name in ("folder", "saved", "arrow")]
    for other in [*others, tensors]:
        assert other.fingerprint == reference.fingerprint
        assert other.sample_ids == reference.sample_ids
        assert torch.equal(everything(other), everything(reference))


@pytest.mark.parametrize("change", ["pixel", "label", "name", "split", "order"])
def test_whatever_changes_the_data_changes_the_fingerprint(change):
    images, numbers, names = expected_images().clone(), torch.tensor(labels() * 2), list(CLASSES)
    splits = ["train"] * 12 + ["test"] * 12

    def fingerprint():
        return images_from_tensors(
            images, numbers, class_names=names, given_splits=splits
        ).fingerprint

    before = fingerprint()
    if change == "pixel":
        images[7, 1, 2, 3] ^= 1
    elif change == "label":
        numbers[0] = 2
    elif change == "name":
        names[0] = "wasp"
    elif change == "split":
        splits[0] = "validation"
    else:
        images[:2] = images[:2].flip(0).clone()
    assert fingerprint() != before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_is_in_memory_bit_for_bit(parquet, tmp_path, num_workers):
    in_memory = load_data(str(parquet))
    streamed = load_data(str(parquet), memory_limit_bytes=STREAMED, cache=tmp_path / "cache")
    assert isinstance(streamed, StreamedImages)
    streamed = StreamedImages(streamed.facts, streamed.batches, streamed.rows_N, num_workers)
    for name in ("sample_ids", "fingerprint", "given_splits", "metadata", "class_names"):
        assert getattr(streamed, name) == getattr(in_memory, name)
    assert torch.equal(streamed.labels_N, in_memory.labels_N)
    batches = [torch.tensor([3, 3, 20]), torch.tensor([0]), torch.arange(23, -1, -1)]
    random_state = torch.get_rng_state()
    found = list(streamed.iter_images(iter(batches)))
    assert torch.equal(torch.get_rng_state(), random_state)
    for one, other, batch in zip(found, in_memory.iter_images(batches), batches, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, streamed.images(batch))
    assert streamed.images(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 6, 5)


def test_streamed_image_folder_can_be_sent_to_another_process(tmp_path):
    write_folder(tmp_path / "folder", pictures(1))
    streamed = load_data(str(tmp_path / "folder"), memory_limit_bytes=STREAMED)
    copy = pickle.loads(pickle.dumps(streamed))
    assert torch.equal(everything(copy), expected_images()[:12])


def test_a_file_that_changes_after_the_check_is_named(tmp_path):
    write_folder(tmp_path / "folder", pictures(1))
    streamed = load_data(str(tmp_path / "folder"), memory_limit_bytes=STREAMED)
    (tmp_path / "folder" / "ant" / "000.png").write_bytes(b"gone")
    with pytest.raises(DataError, match="could be read before"):
        everything(streamed)


# Columns


def test_columns_are_found_by_type_or_named(tmp_path):
    rows = as_dataset(pictures(1), subtype=["x", "y", "z"] * 4)
    table = rows.data.table.append_column("day", pa.array([datetime.date(2020, 1, 2)] * 12))
    table = table.append_column("weight", pa.array([float("nan")] + [0.5] * 11))
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "plain.parquet")
    path = str(tmp_path / "plain.parquet")
    source = load_data(path)
    assert source.class_names == ("0", "1", "2")
    assert source.metadata["day"][0] == "2020-01-02"
    assert source.metadata["weight"][:2] == [None, 0.5]
    by_text = load_data(path, label_column="subtype", image_column="picture")
    assert by_text.class_names == ("x", "y", "z")
    assert by_text.labels_N.tolist() == [0, 1, 2] * 4
    assert by_text.metadata["label"] == labels()


def test_ambiguous_and_unknown_columns_are_listed_together(tmp_path):
    rows = as_dataset(pictures(1), other=["a"] * 12)
    rows = rows.add_column("coarse", labels()).cast_column(
        "coarse", datasets.ClassLabel(names=list(CLASSES))
    )
    rows.to_parquet(tmp_path / "two.parquet")
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path / "two.parquet"), image_column="pictures")
    first, second = caught.value.problems
    assert "data.image_column is 'pictures'" in first
    assert "Did you mean 'picture'?" in first
    assert "several columns may be the label: label, coarse" in second
    assert load_data(str(tmp_path / "two.parquet"), label_column="coarse").num_samples == 12
    with pytest.raises(DataError, match="'label', which holds ClassLabel"):
        load_data(str(tmp_path / "two.parquet"), image_column="label", label_column="label")


def test_parts_with_other_classes_or_columns_are_refused(parquet):
    rows = as_dataset(pictures(2)).cast_column("label", datasets.ClassLabel(names=["b", "a", "c"]))
    rows.to_parquet(parquet / "test.parquet")
    with pytest.raises(DataError, match="the test part has the classes"):
        load_data(str(parquet))
    rows.rename_column("label", "answer").to_parquet(parquet / "test.parquet")
    with pytest.raises(DataError, match="the test part has no column 'label'"):
        load_data(str(parquet))


def test_parts_can_be_named(parquet):
    (parquet / "test.parquet").rename(parquet / "held-back.parquet")
    assert set(load_data(str(parquet)).given_splits) == {"train"}
    named = load_data(str(parquet), splits={"train": "train*", "validation": "held-back*"})
    assert set(named.given_splits) == {"train", "validation"}
    with pytest.raises(DataError, match=r"which .*tables does not have"):
        load_data(str(parquet), splits={"train": "train*", "test": "test.parquet"})
    with pytest.raises(DataError, match="'dev'"):
        load_data(str(parquet), splits={"dev": "x"})


# Pictures


def test_grey_alpha_sixteen_bit_palette_and_rotated_pictures(tmp_path):
    grey = pictures(3, 1, (4, 6))[0]
    colour = pictures(4, 1, (4, 6, 3))[0]
    alpha = np.full((4, 6), 255, np.uint8)
    alpha[0] = 0
    transparent = np.dstack([colour, alpha])
    palette = Image.fromarray(colour).quantize(4)
    turned = Image.fromarray(colour).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    files = {
        "a/grey.png": (Image.fromarray(grey), {}),
        "a/alpha.png": (Image.fromarray(transparent), {}),
        "a/sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "b/palette.png": (palette, {}),
        "b/turned.png": (turned, {"exif": exif}),
        "b/turned.webp": (turned, {"exif": exif, "lossless": True}),
    }
    for name, (image, options) in files.items():
        (tmp_path / "mixed" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "mixed" / name, **options)
    source = load_data(str(tmp_path / "mixed"))
    assert source.image_shape == (3, 4, 6)
    found = dict(zip(sorted(files), everything(source).permute(0, 2, 3, 1).numpy(), strict=True))
    assert np.array_equal(found["a/grey.png"], np.dstack([grey] * 3))
    assert np.array_equal(found["a/sixteen.png"], np.dstack([grey] * 3))
    assert not found["a/alpha.png"][0].any()
    assert np.array_equal(found["a/alpha.png"][1:], colour[1:])
    assert np.array_equal(found["b/palette.png"], np.asarray(palette.convert("RGB")))
    assert np.array_equal(found["b/turned.png"], colour)
    assert np.array_equal(found["b/turned.webp"], colour)


def test_grey_pictures_have_one_channel(tmp_path):
    grey = pictures(3, shape=(4, 6))
    write_parquet(tmp_path / "grey.parquet", grey)
    source = load_data(str(tmp_path / "grey.parquet"))
    assert np.array_equal(everything(source)[:, 0].numpy(), grey)


def test_mixed_sizes_are_named_or_resized(parquet):
    small = pictures(1)
    write_parquet(parquet / "train.parquet", [pictures(9, 1, (8, 9, 3))[0], *small[1:]])
    with pytest.raises(DataError) as caught:
        load_data(str(parquet))
    [message] = caught.value.problems
    assert "2 sizes" in message
    assert "8x9 (1 images, for instance row 0 of train)" in message
    assert "data.image_size, for instance [6, 5]" in message
    for limit in (4 << 30, STREAMED):
        source = load_data(str(parquet), image_size=(6, 5), memory_limit_bytes=limit)
        reference = Image.fromarray(pictures(9, 1, (8, 9, 3))[0])
        reference = np.asarray(reference.resize((5, 6), Image.Resampling.BILINEAR))
        pixels = everything(source)
        assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), reference)
        assert torch.equal(pixels[1:], expected_images()[1:])


def bomb():
    """A PNG of a few bytes that says it holds 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


# Bad rows


@pytest.mark.parametrize("limit", [4 << 30, STREAMED], ids=["in memory", "streamed"])
def test_broken_files_in_an_image_folder(tmp_path, limit):
    write_folder(tmp_path / "folder", pictures(1))
    whole = (tmp_path / "folder" / "bee" / "005.png").read_bytes()
    (tmp_path / "folder" / "bee" / "005.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder" / "cow" / "009.png").write_bytes(b"not a picture")
    (tmp_path / "folder" / "cow" / "010.png").write_bytes(bomb())
    (tmp_path / "folder" / "cow" / "readme.txt").write_text("no picture, and not taken for one")
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path / "folder"), memory_limit_bytes=limit)
    head, *lines = caught.value.problems
    assert "3 of kind 'broken image'" in head
    assert "data.on_bad: skip" in head
    assert lines[0].startswith("row 5 of train: bee/005.png: broken image")
    assert lines[1].startswith("row 9 of train: cow/009.png: broken image: it is not an image")
    assert lines[2].startswith("row 10 of train: cow/010.png: broken image")
    source = load_data(str(tmp_path / "folder"), on_bad="skip", memory_limit_bytes=limit)
    assert [(i.kind, i.row, i.split) for i in source.issues] == [
        ("broken_image", row, "train") for row in (5, 9, 10)
    ]
    kept = [row for row in range(12) if row not in (5, 9, 10)]
    assert torch.equal(everything(source), expected_images()[kept])
    assert source.labels_N.tolist() == [labels()[row] for row in kept]


@pytest.mark.parametrize("limit", [4 << 30, STREAMED], ids=["in memory", "streamed"])
def test_labels_out_of_range_missing_labels_and_missing_images(parquet, limit):
    images = [None, *pictures(1)[1:]]
    numbers = labels()
    numbers[3], numbers[4], numbers[5] = 12, None, -1
    write_parquet(parquet / "train.parquet", images, numbers)
    with pytest.raises(DataError) as caught:
        load_data(str(parquet), memory_limit_bytes=limit)
    assert caught.value.problems[1:] == (
        "row 0 of train: broken image: there is no image",
        "row 3 of train: label 12 is out of range, the 3 classes being 0 to 2",
        "row 4 of train: the label is missing",
        "row 5 of train: the label is missing",
    )
    source = load_data(str(parquet), on_bad="skip", memory_limit_bytes=limit)
    assert source.num_samples == 20
    assert len(source.issues) == 4


def test_an_empty_class_is_an_error_even_when_bad_rows_are_skipped(parquet):
    write_parquet(parquet / "train.parquet", pictures(1)[:8], labels()[:8])
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError, match=r"class 2 \('cow'\) has no training rows"):
            load_data(str(parquet), on_bad=on_bad)


def test_an_image_folder_without_images_of_one_class(tmp_path):
    write_folder(tmp_path / "folder", pictures(1))
    (tmp_path / "folder" / "dog").mkdir()
    with pytest.raises(DataError, match=r"class 3 \('dog'\) has no training rows"):
        load_data(str(tmp_path / "folder"))


def test_a_duplicate_across_splits_leaves_training(parquet):
    test = pictures(2)
    test[2] = pictures(1)[7]
    write_parquet(parquet / "test.parquet", test)
    with pytest.raises(DataError, match="row 7 of train: the same image as row 2 of test"):
        load_data(str(parquet))
    source = load_data(str(parquet), on_bad="skip")
    assert [(i.kind, i.row, i.split) for i in source.issues] == [
        ("duplicate_across_splits", 7, "train")
    ]
    assert source.given_splits.count("test") == 12
    assert source.given_splits.count("train") == 11


def test_a_long_list_of_bad_rows_is_cut(parquet):
    write_parquet(parquet / "train.parquet", pictures(5, 40), [7] * 28 + labels())
    with pytest.raises(DataError) as caught:
        load_data(str(parquet))
    assert len(caught.value.problems) == 1 + 20 + 1
    assert caught.value.problems[-1] == "and 8 more"


# The cache


def test_the_cache_is_used_and_a_damaged_one_is_not(parquet, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load_data(str(parquet), cache=cache)
    [entry] = cache.iterdir()
    pixels, facts = entry / "images_NCHW.npy", entry / "facts.json"
    unreadable = pytest.MonkeyPatch()
    with unreadable.context() as patch:
        # With the decoder out of order only the cache can answer.
        patch.setattr(Image, "open", None)
        again = load_data(str(parquet), cache=cache)
    assert again.fingerprint == first.fingerprint
    assert again.metadata == first.metadata
    assert torch.equal(everything(again), everything(first))
    for path in (pixels, facts):
        good = path.read_bytes()
        for damaged in (
            good[:-20] + bytes([good[-20] ^ 1]) + good[-19:],
            good[: len(good) // 2],
            b"",
        ):
            path.write_bytes(damaged)
            assert torch.equal(everything(load_data(str(parquet), cache=cache)), everything(first))
            assert path.read_bytes() == good
    assert list(cache.rglob("*.part")) == []


def test_the_cache_knows_changed_files_and_options(parquet, tmp_path):
    cache = tmp_path / "cache"
    first = load_data(str(parquet), cache=cache)
    assert load_data(str(parquet), cache=cache, image_size=(3, 3)).image_shape == (3, 3, 3)
    streamed = load_data(str(parquet), cache=cache, memory_limit_bytes=STREAMED)
    assert isinstance(streamed, StreamedImages)
    assert torch.equal(everything(streamed), everything(first))
    again = load_data(str(parquet), cache=cache, memory_limit_bytes=STREAMED)
    assert torch.equal(everything(again), everything(first))
    write_parquet(parquet / "train.parquet", pictures(6))
    changed = load_data(str(parquet), cache=cache)
    assert torch.equal(everything(changed)[:12], torch.from_numpy(pictures(6)).permute(0, 3, 1, 2))


def test_rows_that_name_files_are_not_cached(tmp_path):
    write_folder(tmp_path / "folder", pictures(1))
    paths = sorted(map(str, (tmp_path / "folder").rglob("*.png")))
    pq.write_table(pa.table({"file": paths, "label": labels()}), tmp_path / "paths.parquet")
    source = load_data(
        str(tmp_path / "paths.parquet"), image_column="file", cache=tmp_path / "cache"
    )
    assert torch.equal(everything(source), expected_images()[:12])
    assert list((tmp_path / "cache").glob("*/facts.json")) == []


def test_a_full_disk_costs_the_cache_only(parquet, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load_data(str(parquet), cache=tmp_path / "cache").num_samples == 24


# What cannot be read at all


def test_sources_that_do_not_exist(tmp_path):
    for source in (str(tmp_path / "no.parquet"), "./none", "a/b/c", "no.parquet"):
        with pytest.raises(DataError, match="does not exist"):
            load_data(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data"):
        load_data(str(tmp_path / "empty"))
    (tmp_path / "data.zip").write_bytes(b"")
    with pytest.raises(DataError, match="is no data set"):
        load_data(str(tmp_path / "data.zip"))


def test_a_hub_name_without_a_connection(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"owner/name is no local file.*and the hub did not give"):
        load_data("owner/name")


@pytest.mark.parametrize("limit", [4 << 30, STREAMED], ids=["in memory", "streamed"])
def test_a_damaged_table(parquet, limit):
    (parquet / "test.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(DataError, match=r"the test part of .* cannot be read"):
        load_data(str(parquet), memory_limit_bytes=limit)


def test_a_saved_hub_repository_and_shards(parquet, tmp_path):
    shards = tmp_path / "repository" / "data"
    shards.mkdir(parents=True)
    rows = as_dataset(pictures(1))
    for number in range(2):
        shard = rows.select(range(6 * number, 6 * number + 6))
        shard.to_parquet(shards / f"train-0000{number}-of-00002.parquet")
    shutil.copy(parquet / "test.parquet", shards / "test-00000-of-00001.parquet")
    source = load_data(str(tmp_path / "repository"))
    assert source.fingerprint == load_data(str(parquet)).fingerprint


def test_wrong_tensors_are_listed_together():
    with pytest.raises(DataError) as caught:
        images_from_tensors(
            torch.zeros(3, 2, 4, 4),
            torch.tensor([0, 9]),
            class_names=("a",),
            given_splits=["x"] * 3,
        )
    assert len(caught.value.problems) == 4


@pytest.mark.shared_data
@pytest.mark.skipif("UNDERSTUDY_SHARED" not in os.environ, reason="UNDERSTUDY_SHARED is not set")
def test_cifar10():
    folder = Path(os.environ["UNDERSTUDY_SHARED"], "data", "cifar10")
    source = load_data(str(folder / "test.parquet"))
    assert source.image_shape == (3, 32, 32)
    assert source.labels_N.bincount().tolist() == [1000] * 10

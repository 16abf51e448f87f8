"""Folders of pictures as users have them: with links, empty classes and names of other systems."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from understudy.data.locate import locate, locate_pictures
from understudy.data.sources import load_data
from understudy.errors import DataError

CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def root(tmp_path):
    """train/CLASS/*.png and test/CLASS/*.png."""
    generator = np.random.default_rng(5)
    for part in ("train", "test"):
        for name in CLASSES:
            folder = tmp_path / "root" / part / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels_HWC = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels_HWC).save(folder / f"{number}.png")
    return tmp_path / "root"


def test_links_to_class_folders_are_followed_and_never_without_end(root, tmp_path):
    plain = load_data(str(root))
    inner = root / "train" / "ant" / "more" / ".hidden"
    inner.mkdir(parents=True)
    shutil.copy(root / "train" / "ant" / "0.png", inner)
    before = locate(str(root), None).files
    assert before["train"] == tuple(
        path for path in sorted((root / "train").rglob("*.png")) if ".hidden" not in path.parts
    )
    for part in ("train", "test"):
        (root / part / "bee").rename(tmp_path / f"bee-{part}")
        (root / part / "bee").symlink_to(tmp_path / f"bee-{part}")
    (root / "train" / "cow" / "loop").symlink_to(root / "train")
    (tmp_path / "bee-train" / "itself").symlink_to(tmp_path / "bee-train")
    linked = load_data(str(root), on_bad="skip")
    assert locate(str(root), None).files["test"] == before["test"]
    assert set(before["train"]) <= set(locate(str(root), None).files["train"])
    assert linked.labels_N.bincount().tolist()[1] >= plain.labels_N.bincount().tolist()[1]
    assert root / "train" / "bee" / "1.png" in locate_pictures(str(root)).files["train"]


def test_links_to_class_folders_give_the_data_of_plain_folders(root, tmp_path):
    plain = load_data(str(root))
    (root / "test" / "bee").rename(tmp_path / "elsewhere")
    (root / "test" / "bee").symlink_to(tmp_path / "elsewhere")
    assert load_data(str(root)).fingerprint == plain.fingerprint


@pytest.mark.parametrize("limit", [4 << 30, 1])
def test_an_empty_class_folder_that_is_removed_is_no_class_any_more(root, tmp_path, limit):
    options = {"cache": tmp_path / "cache", "memory_limit_bytes": limit}
    plain = load_data(str(root))
    (root / "train" / "bat").mkdir()
    with pytest.raises(DataError, match=r"class 1 \('bat'\) has no training rows"):
        load_data(str(root), **options)
    (root / "train" / "bat").rmdir()
    for _ in range(2):
        loaded = load_data(str(root), **options)
        assert (loaded.class_names, loaded.fingerprint) == (CLASSES, plain.fingerprint)


def test_names_that_are_not_utf8_are_listed_together(root):
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / os.fsdecode(b"\xe9.png"))
    (root / "test" / "cow").rename(root / "test" / os.fsdecode(b"v\xe2che"))
    for read in (lambda: load_data(str(root), on_bad="skip"), lambda: locate_pictures(str(root))):
        with pytest.raises(
            DataError, match=r"names are not UTF-8: .*\\xe9\.png'.*Rename"
        ) as caught:
            read()
        assert len(caught.value.problems) == 1
        str(caught.value).encode()
    with pytest.raises(DataError, match=r"v\\xe2che"):
        load_data(str(root))

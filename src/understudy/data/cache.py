"""Decoded pictures kept on disk, so that a second run need not decode them again.

One folder a key; ``facts.json`` is written last and holds the hash of the pixels, so that an entry
is either whole or not there. What does not match its hash is decoded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from understudy.artifacts import atomic_path, canonical_json, content_hash, write_text
from understudy.data.decode import Layout, Pixels
from understudy.data.locate import Location
from understudy.data.scan import Scan
from understudy.progress import log
from understudy.runtime import num_usable_cores

CACHE_VERSION = 2
FACTS_NAME = "facts.json"
PIXELS_NAME = "images_NCHW.npy"
CHUNK_BYTES = 8 << 20


def cache_key(location: Location, options: Mapping[str, Any]) -> str:
    """Return the hash (hex) of the source's files and of all options that change what is decoded.

    The names of picture files count (they give classes and order), those of tables do not.
    """
    files = [(split, path) for split, paths in location.files.items() for path in paths]
    with ThreadPoolExecutor(num_usable_cores()) as pool:
        digests = pool.map(_file_digest, [path for _, path in files])
        content = [
            [
                split,
                str(path.relative_to(location.root)) if location.kind == "images" else "",
                digest,
            ]
            for (split, path), digest in zip(files, digests, strict=True)
        ]
    # Another Pillow may decode a JPEG a little differently.
    return content_hash(
        [CACHE_VERSION, PIL.__version__, location.kind, dict(location.parts), content, options]
    )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def save_scan(folder: Path, scan: Scan, rows: Mapping[str, Any]) -> None:
    """Keep a scan and the facts of its rows. A full disk is a warning: the data is at hand."""
    facts: dict[str, Any] = {
        "layout": asdict(scan.layout),
        "sample_ids": scan.sample_ids,
        "broken": list(scan.broken.items()),
        "pixels_hash": None if scan.images_NCHW is None else pixels_hash(scan.images_NCHW),
        "rows": rows,
    }
    try:
        if scan.images_NCHW is not None:
            with atomic_path(folder / PIXELS_NAME) as temporary, temporary.open("wb") as file:
                np.save(file, scan.images_NCHW, allow_pickle=False)
        text = canonical_json(facts)
        write_text(folder / FACTS_NAME, json.dumps({"hash": _text_hash(text)}) + "\n" + text)
    except OSError as error:
        log.warning("the decoded images could not be kept in %s: %s", folder, error)


def load_scan(folder: Path) -> tuple[Scan, dict[str, Any]] | None:
    """Return the kept scan and row facts, or None if there is none or it is damaged."""
    if not (folder / FACTS_NAME).is_file():
        return None
    try:
        head, _, text = (folder / FACTS_NAME).read_text().partition("\n")
        if json.loads(head)["hash"] != _text_hash(text):
            raise ValueError(f"{FACTS_NAME} was changed")
        facts = json.loads(text)
        images_NCHW: Pixels | None = None
        if facts["pixels_hash"] is not None:
            images_NCHW = np.load(folder / PIXELS_NAME, allow_pickle=False)
            if pixels_hash(images_NCHW) != facts["pixels_hash"]:
                raise ValueError(f"{PIXELS_NAME} was changed")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        log.warning("the decoded images in %s are damaged (%s): decoded again", folder, error)
        return None
    scan = Scan(
        layout=Layout(**facts["layout"]),
        sample_ids=facts["sample_ids"],
        broken={int(row): message for row, message in facts["broken"]},
        images_NCHW=images_NCHW,
    )
    return scan, facts["rows"]


def pixels_hash(images_NCHW: Pixels) -> str:
    """Return a hash (hex) of shape and pixels; chunks of it are computed side by side."""
    flat = np.ascontiguousarray(images_NCHW).reshape(-1)
    chunks = [flat[start : start + CHUNK_BYTES] for start in range(0, len(flat), CHUNK_BYTES)]
    with ThreadPoolExecutor(num_usable_cores()) as pool:
        digests = pool.map(lambda chunk: hashlib.blake2b(chunk).hexdigest(), chunks)
        return content_hash([list(images_NCHW.shape), str(images_NCHW.dtype), *digests])


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

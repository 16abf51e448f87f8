"""A teacher with features at three layers, and what is needed to label with it."""

from pathlib import Path

import torch
from test_label import NUM_CLASSES, new_source, teacher

from understudy.data.views import Views
from understudy.teachers.label import view_keys
from understudy.teachers.outputs import TeacherOutputs
from understudy.teachers.store import Entry, OutputStore

NUM_ROWS = 2500  # two chunks of 1,024 and a bit
NUM_VIEWS = 2
ROW_SHAPES = {"layer:map": (3, 4, 4), "layer:attention": (4, 4), "embedding:pooled": (7,)}
SPEC = [{"pad_crop": {"padding": 1}}, {"flip": {"probability": 0.5}}]


def new_indices() -> torch.Tensor:
    return torch.arange(NUM_ROWS) + 100


def new_views() -> Views:
    return Views(SPEC, seed=3, partner_pool=new_indices())


def infer(images_NCHW: torch.Tensor) -> TeacherOutputs:
    """Stand for a network: every output is a function of the pixels."""
    pixels_NCHW = images_NCHW.float() / 64
    map_NCHW = torch.cat([pixels_NCHW, pixels_NCHW.flip(3), -pixels_NCHW.sqrt()], dim=1)
    features = {
        "layer:map": map_NCHW,
        "layer:attention": map_NCHW.square().mean(1),
        "embedding:pooled": pixels_NCHW.flatten(1)[:, 3:10],
    }
    return TeacherOutputs(teacher(images_NCHW), features)


def new_entries(root: Path, views: Views | None, **changes) -> list[Entry]:
    """Return the logits of every view, then the features of every view."""
    store, source = OutputStore(root), new_source()
    given = {"teacher": "t", "num_views": NUM_VIEWS, "precision": "float32"}
    indices_N = new_indices()
    entries = [
        store.entry(key, sample_indices_N=indices_N, num_classes=NUM_CLASSES)
        for key in view_keys(source, views, **given)
    ]
    for output, row_shape in ROW_SHAPES.items():
        for key in view_keys(source, views, **given, output=output):
            options = {"sample_indices_N": indices_N, "row_shape": row_shape} | changes
            entries.append(store.feature_entry(key, **options))
    return entries


def entry_of(entries: list[Entry], output: str, view: int = 0) -> Entry:
    [entry] = [e for e in entries if (e.key.output, e.key.view) == (output, view)]
    return entry


def contents(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}

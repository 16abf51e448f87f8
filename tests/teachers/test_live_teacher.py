import pytest
import torch
from feature_samples import SPEC, infer, new_entries, new_indices
from test_inference import random_statistics
from test_label import NUM_CLASSES, new_source, teacher

from understudy.data.batches import iter_view_batches
from understudy.data.views import Views
from understudy.errors import ModelError
from understudy.models.build import NormalizedModel, build_network
from understudy.models.taps import Tap, kind_shape, tap_shapes
from understudy.teachers.inference import fast_inference
from understudy.teachers.label import label_views, view_keys
from understudy.teachers.live import LiveTeacher
from understudy.teachers.outputs import TeacherOutputs
from understudy.teachers.store import OutputStore
from understudy.teachers.stored import StoredTeacher


def test_a_live_teacher_says_what_would_be_stored(tmp_path):
    source, indices_N = new_source(), new_indices()
    views = Views([*SPEC, {"mixup": {"alpha": 0.4}}], seed=3, partner_pool=indices_N)
    entries = new_entries(tmp_path, views)
    label_views(infer, source, views, indices_N, entries=entries)
    stored, live = StoredTeacher(entries, indices_N), LiveTeacher(infer, num_classes=NUM_CLASSES)
    for view in (0, 1):
        for batch in iter_view_batches(source, views, indices_N.split(700), view=view):
            expected, got = stored.outputs(batch, view=view), live.outputs(batch, view=view)
            assert torch.equal(got.logits_NK.half().float(), expected.logits_NK)
            assert list(got.features) == list(expected.features)
            for key, values in got.features.items():
                assert torch.equal(values.half().float(), expected.features[key])


def test_a_live_teacher_of_other_classes_or_rows_is_refused():
    [batch] = iter_view_batches(new_source(), None, [torch.arange(9)], view=0)
    live = LiveTeacher(lambda images: teacher(images)[:, :4], num_classes=NUM_CLASSES)
    with pytest.raises(ModelError, match=r"\(9, 4\); expected \[N, 5\]"):
        live.outputs(batch, view=0)
    doubled = LiveTeacher(
        lambda images: TeacherOutputs(teacher(images), {"layer:map": torch.zeros(18, 2)}),
        num_classes=NUM_CLASSES,
    )
    with pytest.raises(ModelError, match="'layer:map' have 18 rows for 9 pictures"):
        doubled.outputs(batch, view=0)
    plain = LiveTeacher(teacher, num_classes=NUM_CLASSES).outputs(batch, view=0)
    assert (plain.features, plain.top_k) == ({}, None)


def test_a_networks_features_are_stored_from_its_fastest_runtime(tmp_path):
    """All of it together: taps, their shapes, a real network, labelling and answering."""
    source, indices_N = new_source(), torch.arange(200)
    torch.manual_seed(0)
    network = build_network("mlp", num_classes=NUM_CLASSES, image_shape=source.image_shape)
    model = NormalizedModel(random_statistics(network), mean=[0.5], std=[0.25]).eval()
    shapes = tap_shapes(model, source.image_shape)
    names = [name for name in shapes if name != "embedding"][:2]
    taps = [Tap("embedding"), *map(Tap, names)]
    given = {"teacher": "t", "num_views": 1, "precision": "float32"}
    store = OutputStore(tmp_path)
    [logits_key] = view_keys(source, None, **given)
    entries = [store.entry(logits_key, sample_indices_N=indices_N, num_classes=NUM_CLASSES)]
    for tap in taps:
        [key] = view_keys(source, None, **given, output=tap.key)
        row_shape = kind_shape(shapes[tap.name], tap.kind)
        entries.append(store.feature_entry(key, sample_indices_N=indices_N, row_shape=row_shape))
    fast = fast_inference(model, image_shape=source.image_shape, num_images=200, taps=taps)
    label_views(fast.outputs, source, None, indices_N, entries=entries)
    got = StoredTeacher(entries, indices_N).rows(indices_N, view=0)
    expected = fast.outputs(source.images(indices_N))
    assert torch.allclose(got.logits_NK, expected.logits_NK, rtol=2**-10, atol=1e-4)
    assert list(got.features) == [tap.key for tap in taps]
    for key, values in got.features.items():
        assert torch.allclose(values, expected.features[key], rtol=2**-10, atol=1e-4)

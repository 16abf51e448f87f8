"""Batches of views: order, partners, shares of processes, memory against disk."""

import datasets
import pytest
import torch

from understudy.data.batches import epoch_order, index_batches, iter_view_batches, rank_share
from understudy.data.sources import StreamedImages, images_from_tensors, load_data
from understudy.data.views import Views
from understudy.errors import InputError

MIXING = [{"pad_crop": {"padding": 2}}, {"flip": {}}, {"cutmix": {}}]


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (40, 3, 12, 12), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def source(pixels):
    return images_from_tensors(pixels, torch.arange(40) % 4, class_names=tuple("abcd"))


@pytest.fixture
def streamed(pixels, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))}
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    columns = {"image": pictures, "label": [n % 4 for n in range(40)]}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.save_to_disk(tmp_path / "saved")
    source = load_data(str(tmp_path / "saved"), memory_limit_bytes=1)
    assert isinstance(source, StreamedImages)
    return source


def by_sample(batches):
    return {
        int(index): (image, int(label), int(partner), float(weight))
        for batch in batches
        for index, image, label, partner, weight in zip(
            batch.indices_N,
            batch.images_NCHW,
            batch.labels_N,
            batch.partner_labels_N,
            batch.label_weight_N,
            strict=True,
        )
    }


def test_order_depends_on_seed_and_epoch_alone():
    indices_N = torch.arange(100, 200)
    order = epoch_order(indices_N, seed=5, epoch=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(epoch_order(indices_N, seed=5, epoch=2), order)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(order.sort().values, indices_N)
    assert not torch.equal(epoch_order(indices_N, seed=5, epoch=3), order)
    assert not torch.equal(epoch_order(indices_N, seed=6, epoch=2), order)


def test_index_batches():
    order_N = torch.arange(10)
    assert [len(batch) for batch in index_batches(order_N, 4, drop_last=False)] == [4, 4, 2]
    assert [batch.tolist() for batch in index_batches(order_N, 5, drop_last=True)] == [
        list(range(5)),
        list(range(5, 10)),
    ]
    assert index_batches(order_N, 11, drop_last=True) == []
    assert index_batches(order_N[:0], 4, drop_last=False) == []
    with pytest.raises(InputError, match="batch size is 0"):
        index_batches(order_N, 0, drop_last=True)


def test_processes_share_every_batch_evenly():
    batches = index_batches(epoch_order(torch.arange(24), seed=0, epoch=0), 12, drop_last=True)
    shares = [rank_share(batches, rank=rank, num_processes=3) for rank in range(3)]
    for number, batch in enumerate(batches):
        parts = [share[number] for share in shares]
        assert [len(part) for part in parts] == [4, 4, 4]
        assert torch.equal(torch.cat(parts), batch)
    with pytest.raises(InputError, match="a batch of 12 samples is shared by 5 processes"):
        rank_share(batches, rank=0, num_processes=5)


def test_without_views_the_pictures_are_untouched(source, pixels):
    batches = index_batches(torch.arange(39, -1, -1), 16, drop_last=False)
    found = list(iter_view_batches(source, None, batches, view=3))
    for batch, indices_N in zip(found, batches, strict=True):
        assert torch.equal(batch.indices_N, indices_N)
        assert torch.equal(batch.images_NCHW, pixels[indices_N])
        assert torch.equal(batch.labels_N, indices_N % 4)
        assert batch.partner_labels_N is None
        assert batch.label_weight_N is None


def test_views_that_do_not_mix_have_no_partners(source, pixels):
    views = Views(MIXING[:2], seed=1, partner_pool=torch.arange(40))
    [batch] = iter_view_batches(source, views, [torch.arange(8)], view=0)
    expected, _ = views.apply(pixels[:8], torch.arange(8), 0)
    assert torch.equal(batch.images_NCHW, expected)
    assert batch.partner_labels_N is None


def test_mixed_batches_hold_the_partners_labels(source, pixels):
    views = Views(MIXING, seed=1, partner_pool=torch.arange(20))
    indices_N = torch.tensor([30, 2, 17])
    [batch] = iter_view_batches(source, views, [indices_N], view=4)
    partners_N = views.partners(indices_N, 4)
    expected, weight_N = views.apply(pixels[indices_N], indices_N, 4, pixels[partners_N])
    assert torch.equal(batch.images_NCHW, expected)
    assert torch.equal(batch.label_weight_N, weight_N)
    assert torch.equal(batch.partner_labels_N, partners_N % 4)


def test_a_view_does_not_depend_on_batches_or_processes(source):
    views = Views(MIXING, seed=1, partner_pool=torch.arange(40))
    order_N = epoch_order(torch.arange(40), seed=0, epoch=0)
    whole = by_sample(iter_view_batches(source, views, [order_N], view=2))
    batches = index_batches(order_N.flip(0), 8, drop_last=True)
    shares = [rank_share(batches, rank=rank, num_processes=2) for rank in range(2)]
    for parts in (batches, [*shares[0], *shares[1]]):
        found = by_sample(iter_view_batches(source, views, parts, view=2))
        assert found.keys() == whole.keys()
        for index, (image, *rest) in found.items():
            assert torch.equal(image, whole[index][0])
            assert rest == list(whole[index][1:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_batches_are_those_in_memory(source, streamed, num_workers):
    views = Views(MIXING, seed=1, partner_pool=torch.arange(40))
    streamed = StreamedImages(streamed.facts, streamed.batches, streamed.rows_N, num_workers)
    assert streamed.fingerprint == source.fingerprint
    batches = index_batches(epoch_order(torch.arange(40), seed=0, epoch=1), 7, drop_last=False)
    for one, other in zip(
        iter_view_batches(source, views, batches, view=1),
        iter_view_batches(streamed, views, iter(batches), view=1),
        strict=True,
    ):
        for name, value in vars(one).items():
            if value is None:
                assert getattr(other, name) is None, name
            else:
                assert torch.equal(getattr(other, name), value), name


def test_an_epoch_may_be_left_early(streamed):
    batches = index_batches(torch.arange(40), 4, drop_last=False)
    left = iter_view_batches(streamed, None, batches, view=0)
    assert next(left).indices_N.tolist() == [0, 1, 2, 3]
    left.close()

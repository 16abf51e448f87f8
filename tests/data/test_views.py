import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from view_samples import NUM_SAMPLES, one, samples, view_of

from understudy.data.view_spec import (
    MIXING_TRANSFORMS,
    TRANSFORM_PARAMETERS,
    check_spec,
    mixed_throughout,
)
from understudy.data.views import NUM_DRAWS, PIXELS_VERSION, VIEW_MIXINGS, VIEW_TRANSFORMS, Views
from understudy.errors import DataError, RecipeError

POOL = torch.arange(0, NUM_SAMPLES, 3)
EVERYTHING = [
    {"pad_crop": {"padding": 2, "mode": "reflect"}},
    {"flip": {}},
    {"random_resized_crop": {"probability": 0.5}},
    {"affine": {"probability": 0.5}},
    {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}},
    {"grayscale": {"probability": 0.3}},
    {"low_light": {}},
    {"mixup": {"alpha": 1.0, "probability": 0.5}},
    {"cutmix": {"probability": 0.7}},
    {"motion_blur": {}},
    {"gaussian_noise": {}},
    {"jpeg_blocking": {}},
    {"reduced_depth": {"probability": 0.5}},
    {"cutout": {"size": 0.3}},
]


@pytest.fixture(scope="module", params=["digits", "patches"])
def images(request):
    return samples(request.param)


def test_the_tables_name_the_same_transforms():
    assert set(VIEW_TRANSFORMS) | set(VIEW_MIXINGS) == set(TRANSFORM_PARAMETERS) == set(NUM_DRAWS)
    assert set(VIEW_MIXINGS) == set(MIXING_TRANSFORMS)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, NUM_SAMPLES - 1), max_size=9),
    view=st.integers(0, 3),
    name=st.sampled_from(["digits", "patches"]),
)
def test_any_subset_in_any_order_gives_the_same_pixels(rows, view, name):
    images, everyone = samples(name), torch.arange(NUM_SAMPLES)
    views = Views(EVERYTHING, seed=7, partner_pool=POOL)
    all_images, all_weights = view_of(views, images, everyone, view)
    indices = torch.tensor(rows, dtype=torch.int64)
    some, weights = view_of(views, images, indices, view)
    assert torch.equal(some, all_images[indices])
    assert torch.equal(weights, all_weights[indices])
    assert torch.equal(views.partners(indices, view), views.partners(everyone, view)[indices])


@pytest.mark.parametrize("name", [*VIEW_TRANSFORMS, *VIEW_MIXINGS])
def test_a_sample_alone_is_the_sample_in_a_batch_of_7_and_of_64(name, images):
    views = one(name)
    together, weights = view_of(views, images, torch.arange(64), 2)
    assert together.dtype == torch.uint8
    assert together.shape == images[:64].shape
    for size in (1, 7):
        for start in range(0, 64, size):
            indices = torch.arange(start, min(64, start + size))
            some, some_weights = view_of(views, images, indices, 2)
            assert torch.equal(some, together[indices])
            assert weights is None or torch.equal(some_weights, weights[indices])


@pytest.mark.parametrize("name", [*VIEW_TRANSFORMS, *VIEW_MIXINGS])
def test_seeds_views_and_samples_draw_alone(name):
    images = samples("patches")[:1].expand(NUM_SAMPLES, -1, -1, -1).clone()
    partners = samples("patches")
    spec, everyone = [{name: {"probability": 0.5}}], torch.arange(NUM_SAMPLES)
    results = [
        Views(spec, seed=seed, partner_pool=POOL).apply(images, everyone, view, partners)[0]
        for seed, view in ((0, 0), (0, 1), (1, 0))
    ]
    for result in results:
        assert len(result.flatten(1).unique(dim=0)) > 1
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(results[first], results[second])


def test_order_of_the_spec_matters_and_inputs_are_left_alone(images):
    everyone = torch.arange(NUM_SAMPLES)
    spec = [{"cutout": {}}, {"affine": {}}]
    before = images.clone()
    first, _ = view_of(Views(spec, seed=0, partner_pool=POOL), images, everyone)
    second, _ = view_of(Views(spec[::-1], seed=0, partner_pool=POOL), images, everyone)
    assert not torch.equal(first, second)
    assert torch.equal(images, before)


def test_an_empty_spec_and_an_empty_batch(images):
    unchanged, weights = view_of(Views([], seed=0, partner_pool=POOL), images, torch.arange(9))
    assert torch.equal(unchanged, images[:9])
    assert weights is None
    nothing = torch.arange(0)
    empty, weights = view_of(Views(EVERYTHING, seed=0, partner_pool=POOL), images, nothing)
    assert empty.shape == images[:0].shape
    assert weights.shape == (0,)


def test_probability_zero_changes_nothing_and_half_changes_half():
    everyone = torch.arange(4000)
    images = torch.arange(8, dtype=torch.uint8).view(1, 1, 1, 8).expand(4000, 1, 8, 8).clone()
    for name in VIEW_TRANSFORMS:
        views = Views([{name: {"probability": 0}}], seed=0, partner_pool=POOL)
        assert torch.equal(views.apply(images, everyone, 0)[0], images)
    flipped, _ = Views([{"flip": {}}], seed=0, partner_pool=POOL).apply(images, everyone, 0)
    is_flipped = flipped[:, 0, 0, 0] == 7
    assert torch.equal(flipped[is_flipped], images[is_flipped].flip(3))
    assert torch.equal(flipped[~is_flipped], images[~is_flipped])
    # Four standard deviations of a fair coin.
    assert abs(is_flipped.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5


def test_partners_come_from_the_pool_evenly_and_change_with_the_view():
    pool = torch.tensor([4, 99, 7, 100_000])
    views = Views([{"mixup": {}}], seed=0, partner_pool=pool)
    everyone = torch.arange(4000)
    partners = views.partners(everyone, 0)
    assert partners.dtype == torch.int64
    counts = torch.tensor([(partners == index).sum() for index in pool])
    assert counts.sum() == 4000
    # Chi-squared with 3 degrees of freedom: 16.3 is exceeded once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3
    assert not torch.equal(partners, views.partners(everyone, 1))
    assert Views([{"flip": {}}], seed=0, partner_pool=pool).partners(everyone, 0) is None


def test_a_partner_gets_the_transforms_before_the_mixing_and_the_mixture_those_after():
    images, everyone = samples("patches"), torch.arange(NUM_SAMPLES)
    before, after = {"affine": {}}, {"jpeg_blocking": {"probability": 1}}
    views = Views([before, {"mixup": {}}, after], seed=3, partner_pool=POOL)
    result, weights = view_of(views, images, everyone, 4)
    moved, _ = view_of(Views([before], seed=3, partner_pool=POOL), images, everyone, 4)
    partner = moved[views.partners(everyone, 4)].int()
    scaled = (weights.double() * 65536).round().int().view(-1, 1, 1, 1)
    mixture = ((partner * 65536 + (moved.int() - partner) * scaled + 32768) >> 16).byte()
    # The same transform at the same place of a spec draws the same: nothing else may come before.
    nothing = [{"affine": {"probability": 0}}, {"mixup": {"probability": 0}}, after]
    expected, ones = Views(nothing, seed=3, partner_pool=POOL).apply(mixture, everyone, 4, mixture)
    assert torch.equal(result, expected)
    assert (ones == 1).all()


def test_a_sample_is_mixed_at_most_once():
    num = 3000
    spec = [{"mixup": {"alpha": 1.0, "probability": 0.4}}, {"cutmix": {"probability": 0.5}}]
    own = torch.zeros(num, 1, 8, 8, dtype=torch.uint8)
    views = Views(spec, seed=0, partner_pool=POOL)
    mixed, weights = views.apply(own, torch.arange(num), 0, own + 255)
    flat = mixed.flatten(1).double()
    blended = (flat.std(1) == 0) & (flat[:, 0] > 0) & (flat[:, 0] < 255)
    pasted = (flat.std(1) > 0) | (flat[:, 0] == 255)
    assert set(mixed[~blended].unique().tolist()) == {0, 255}
    assert abs(blended.double().mean() - 0.4) < 0.04
    # Half of what was left; some rectangles are empty and some blends too weak to see.
    assert 0.22 < pasted.double().mean() <= 0.34
    assert (weights[~blended & ~pasted] > 0.998).all()


@pytest.mark.parametrize("name", VIEW_MIXINGS)
def test_later_views_are_left_unmixed(name, images):
    everyone = torch.arange(NUM_SAMPLES)
    flip = {"flip": {"probability": 0.5}}
    mixing = Views(
        [flip, {name: {"alpha": 1.0, "probability": 1, "until_view": 2}}], seed=3, partner_pool=POOL
    )
    plain = Views([flip], seed=3, partner_pool=POOL)
    for view in (0, 1):
        assert not torch.equal(
            view_of(mixing, images, everyone, view)[0], view_of(plain, images, everyone, view)[0]
        )
    for view in (2, 9):
        shown, weights = view_of(mixing, images, everyone, view)
        assert torch.equal(shown, view_of(plain, images, everyone, view)[0])
        assert (weights == 1).all()


def test_a_teacher_sees_mixed_views_throughout(images):
    everyone = torch.arange(NUM_SAMPLES)
    spec = [{"flip": None}, {"cutmix": {"probability": 1, "until_view": 1}}]
    whole = Views(mixed_throughout(spec), seed=0, partner_pool=POOL)
    always = Views([{"flip": {}}, {"cutmix": {"probability": 1}}], seed=0, partner_pool=POOL)
    assert whole.fingerprint(5) == always.fingerprint(5)
    assert not torch.equal(
        view_of(whole, images, everyone, 5)[0],
        view_of(Views(spec, seed=0, partner_pool=POOL), images, everyone, 5)[0],
    )


def test_mixup_may_leave_later_views_to_cutmix():
    first = {"mixup": {"probability": 1, "until_view": 2}}
    assert not check_spec([first, {"cutmix": {}}])
    assert check_spec([{"mixup": {"probability": 1}}, {"cutmix": {}}])


def test_the_fingerprint_changes_with_all_that_pixels_depend_on():
    def fingerprint(spec, seed=0, pool=POOL, view=0):
        return Views(spec, seed=seed, partner_pool=pool).fingerprint(view)

    flip = [{"flip": {}}]
    assert fingerprint(flip) == fingerprint([{"flip": {"probability": 0.5}}])
    assert fingerprint(flip) == fingerprint(flip, pool=POOL[:3])
    mix = [{"mixup": {}}]
    assert fingerprint(mix) == fingerprint([{"mixup": {"until_view": None}}])
    prints = {
        fingerprint(flip),
        fingerprint(flip, seed=1),
        fingerprint([]),
        fingerprint(mix),
        fingerprint(mix, pool=POOL[:3]),
        fingerprint([{"mixup": None}, {"flip": None}]),
    }
    assert len(prints) == 6


def test_the_fingerprint_of_a_view_is_not_changed_by_what_others_do():
    def prints(*spec, pool=POOL):
        views = Views(spec, seed=0, partner_pool=pool)
        return [views.fingerprint(view) for view in range(4)]

    flip, cutmix = {"flip": None}, {"cutmix": None}
    longer, shorter = ({"cutmix": {"until_view": number}} for number in (3, 2))
    mixed, plain = prints(flip, cutmix), prints(flip)
    assert prints(flip, longer) == mixed[:3] + plain[3:]
    assert prints(flip, shorter) == mixed[:2] + plain[2:]
    assert prints(flip, shorter, pool=POOL[:3])[2:] == plain[2:]
    # The draws of what stands behind depend on its place.
    assert prints(shorter, flip)[2] != plain[2]


def test_pixels_of_this_version_are_pinned():
    """Stored teacher outputs rely on the pixels: where this changes, so must PIXELS_VERSION."""
    words = torch.arange(5 * 3 * 16 * 16) * 2654435761 % 2**32
    images = (words >> 24).to(torch.uint8).view(5, 3, 16, 16)
    views = Views(EVERYTHING, seed=11, partner_pool=torch.arange(5))
    result, weights = view_of(views, images, torch.arange(5), 3)
    assert hashlib.sha256(result.numpy().tobytes()).hexdigest()[:16] == "e5fe97c169c1e2d3"
    assert hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16] == "d8ec99724b26fb54"
    assert PIXELS_VERSION == 1


def test_the_number_of_threads_changes_nothing(images):
    everyone = torch.arange(NUM_SAMPLES).repeat(8)
    views = Views(EVERYTHING, seed=2, partner_pool=POOL)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(view_of(views, images, everyone)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_wrong_input_is_refused_with_all_problems():
    with pytest.raises(
        RecipeError, match=r"views\[0\] names the unknown transform 'flop'"
    ) as error:
        Views([{"flop": {}}, {"cutout": {"size": 2}}], seed=0, partner_pool=POOL)
    assert len(error.value.problems) == 2
    with pytest.raises(RecipeError, match=r"until_view is 0.*at least 1.*instance null"):
        Views([{"cutmix": {"until_view": 0}}], seed=0, partner_pool=POOL)
    with pytest.raises(DataError, match="no samples to draw partners from"):
        Views([{"mixup": {}}], seed=0, partner_pool=POOL[:0])
    views = Views([{"mixup": {}}], seed=0, partner_pool=POOL)
    with pytest.raises(DataError) as error:
        views.apply(torch.zeros(2, 4, 8, 8), torch.arange(3), -1)
    assert len(error.value.problems) == 4
    with pytest.raises(DataError, match=r"pad_crop.padding is 4 on pictures of 4 x 4 pixels"):
        one("pad_crop").apply(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.arange(1), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_pixels(images):
    everyone = torch.arange(NUM_SAMPLES)
    for spec in [EVERYTHING] + [[{name: {"probability": 1}}] for name in TRANSFORM_PARAMETERS]:
        views = Views(spec, seed=5, partner_pool=POOL)
        partner = images[views.partners(everyone, 1)] if views.mixes else images
        expected, weights = views.apply(images, everyone, 1, partner)
        result, gpu_weights = views.apply(images.cuda(), everyone.cuda(), 1, partner.cuda())
        assert torch.equal(result.cpu(), expected), spec
        assert weights is None or torch.equal(gpu_weights.cpu(), weights)

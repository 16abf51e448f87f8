import numpy as np
import pytest
import torch
from view_samples import NUM_SAMPLES, one, samples, view_of


@pytest.fixture(scope="module", params=["digits", "patches"])
def images(request):
    return samples(request.param)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_pad_crop_is_a_window_of_the_padded_picture_at_even_offsets(mode):
    num = 3600
    positions = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    crops, _ = one("pad_crop", padding=2, mode=mode).apply(
        positions.expand(num, 1, 8, 8), torch.arange(num), 0
    )
    padded = np.pad(positions[0, 0].numpy(), 2, "constant" if mode == "zero" else "reflect")
    windows = {padded[y : y + 8, x : x + 8].tobytes(): (y, x) for y in range(5) for x in range(5)}
    found = [windows[crop.numpy().tobytes()] for crop in crops[:, 0]]
    counts = np.bincount([y * 5 + x for y, x in found], minlength=25)
    # Chi-squared with 24 degrees of freedom: 51.2 is exceeded once in a thousand.
    assert ((counts - num / 25) ** 2 / (num / 25)).sum() < 51.2


def test_cutout_blanks_a_square_around_any_pixel():
    num, images = 2000, torch.full((2000, 3, 8, 8), 9, dtype=torch.uint8)
    result, _ = one("cutout", size=0.5, fill=3).apply(images, torch.arange(num), 0)
    squares = {}
    for y in range(8):
        for x in range(8):
            expected = np.full((3, 8, 8), 9, np.uint8)
            expected[:, max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 3
            squares[expected.tobytes()] = (y, x)
    centres = [squares[picture.numpy().tobytes()] for picture in result]
    assert len(set(centres)) == 64


def test_affine_without_motion_is_the_identity_and_quarter_turns_are_exact(images):
    still = {"rotation": 0, "translate": 0, "scale": 1, "shear": 0}
    everyone = torch.arange(NUM_SAMPLES)
    for mode in ("zero", "reflect"):
        same, _ = view_of(one("affine", **still, mode=mode), images, everyone)
        assert torch.equal(same, images)
    square = images[:, :, :8, :8].contiguous()
    turned, _ = view_of(one("affine", **{**still, "rotation": [90, 90]}), square, everyone)
    assert torch.equal(turned, torch.rot90(square, 1, (2, 3)))
    moved, _ = view_of(one("affine", **{**still, "translate": [0.25, 0.25]}), square, everyone)
    assert torch.equal(moved[:, :, 2:, 2:], square[:, :, :-2, :-2])
    assert moved[:, :, :2].max() == 0
    small, _ = view_of(one("affine", **{**still, "scale": 0.25}), square, everyone)
    assert small[:, :, 0].max() == 0
    slanted, _ = view_of(one("affine", **{**still, "shear": [45, 45]}), square, everyone)
    # Half a pixel above the centre moves half a pixel: rows 3 and 4 move by -0.5 and 0.5.
    assert torch.equal(slanted[:, :, 4, 1:], halves(square[:, :, 4, :-1], square[:, :, 4, 1:]))


def halves(first, second):
    return ((first.int() + second.int() + 1) // 2).to(torch.uint8)


def test_random_resized_crop_of_the_whole_picture_is_the_identity():
    images = samples("patches")[:, :, :18, :18].contiguous()
    whole, _ = view_of(
        one("random_resized_crop", scale=1, ratio=1), images, torch.arange(NUM_SAMPLES)
    )
    assert torch.equal(whole, images)


def test_random_resized_crop_stays_inside_and_takes_the_asked_share():
    # Values rise by 8 per column: the range of a row tells the width of the crop.
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(300, 1, 32, 32)
    crops, _ = one("random_resized_crop", scale=[0.25, 0.25], ratio=1).apply(
        ramp, torch.arange(300), 0
    )
    assert torch.equal(crops[:, :, :1].expand_as(crops), crops)
    left, right = crops[:, 0, 0, 0].float() / 8, crops[:, 0, 0, -1].float() / 8
    assert (right - left - 15).abs().max() < 1.3
    assert left.min() < 1
    assert right.max() > 30


def test_grayscale_and_color_jitter_follow_the_plain_formulas():
    images, everyone = samples("patches"), torch.arange(NUM_SAMPLES)
    red, green, blue = images.double().unbind(1)
    gray = (red * 0.299 + green * 0.587 + blue * 0.114)[:, None]
    result, _ = view_of(one("grayscale"), images, everyone)
    assert (result - gray).abs().max() <= 0.51
    assert torch.equal(result[:, 0], result[:, 2])
    still = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    assert torch.equal(view_of(one("color_jitter", **still), images, everyone)[0], images)
    bright, _ = view_of(
        one("color_jitter", **{**still, "brightness": [1.5, 1.5]}), images, everyone
    )
    assert (bright - (images * 1.5).clamp(max=255)).abs().max() <= 0.51
    flat, _ = view_of(one("color_jitter", **{**still, "contrast": [0, 0]}), images, everyone)
    mean = gray.round().mean((1, 2, 3), keepdim=True)
    assert (flat - mean).abs().max() <= 1
    pale, _ = view_of(one("color_jitter", **{**still, "saturation": [0, 0]}), images, everyone)
    assert torch.equal(pale, images.amax(1, keepdim=True).expand_as(images))
    turned, _ = view_of(one("color_jitter", **{**still, "hue": [0.5, 0.5]}), images, everyone)
    opposite = images.amax(1, keepdim=True).int() + images.amin(1, keepdim=True) - images
    assert (turned - opposite).abs().max() <= 1


def test_colour_only_transforms_leave_grey_pictures_alone():
    images, everyone = samples("digits"), torch.arange(NUM_SAMPLES)
    assert torch.equal(view_of(one("grayscale"), images, everyone)[0], images)
    jitter = one("color_jitter", brightness=0, contrast=0, saturation=0.9, hue=0.5)
    assert torch.equal(view_of(jitter, images, everyone)[0], images)


def test_reduced_depth_keeps_the_highest_bits_of_each_channel():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    result, _ = one("reduced_depth", bits="rgb565").apply(images, torch.zeros(1).long(), 0)
    for channel, num_bits in enumerate((5, 6, 5)):
        values = result[0, channel].reshape(-1)
        assert len(values.unique()) == 2**num_bits
        assert (values[0], values[-1]) == (0, 255)
        step = 2 ** (8 - num_bits)
        assert torch.equal(values.view(-1, step)[:, :1].expand(-1, step), values.view(-1, step))
        assert (values.int() - torch.arange(256)).abs().max() < step
    grey, _ = one("reduced_depth", bits=[1, 2, 3]).apply(images[:, :1], torch.zeros(1).long(), 0)
    assert grey.unique().tolist() == [0, 85, 170, 255]


def test_low_light_darkens_by_the_tone_curve_and_its_noise_is_that_of_counting():
    images = torch.full((200, 1, 16, 16), 180, dtype=torch.uint8)
    everyone = torch.arange(200)
    curve = 255 * 0.5 * (180 / 255) ** 2
    still, _ = one("low_light", gamma=2, gain=0.5, photons=0).apply(images, everyone, 0)
    assert still.unique().tolist() == [round(curve)]
    noisy, _ = one("low_light", gamma=2, gain=0.5, photons=400).apply(images, everyone, 0)
    assert abs(noisy.double().mean() - curve) < 0.2
    # A count of mean m has the deviation sqrt(m); m is the share of white times 400 photons.
    deviation = 255 / 400 * (400 * curve / 255) ** 0.5
    assert abs(noisy.double().std() / deviation - 1) < 0.02
    black, _ = one("low_light", photons=10).apply(images * 0, everyone, 0)
    assert black.max() == 0


def test_gaussian_noise_has_the_asked_deviation():
    images = torch.full((100, 3, 16, 16), 128, dtype=torch.uint8)
    noisy, _ = one("gaussian_noise", sigma=0.1).apply(images, torch.arange(100), 0)
    assert abs(noisy.double().mean() - 128) < 0.5
    assert abs(noisy.double().std() / 25.5 - 1) < 0.02


def test_mixup_is_the_weighted_mean_and_its_weight_a_beta_variable(images):
    views, everyone = one("mixup", alpha=0.4), torch.arange(NUM_SAMPLES)
    mixed, weights = view_of(views, images, everyone)
    partner = images[views.partners(everyone, 0)]
    own = weights.double().view(-1, 1, 1, 1)
    assert (mixed - (own * images + (1 - own) * partner)).abs().max() <= 0.501
    black = torch.zeros(4000, 1, 1, 1, dtype=torch.uint8)
    many = one("mixup", alpha=0.4).apply(black, torch.arange(4000), 0, black)[1]
    assert many.dtype == torch.float32
    assert ((many >= 0) & (many <= 1)).all()
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert abs(many.mean() - 0.5) < 0.03
    assert abs(many.var() * 4 * 1.8 - 1) < 0.05


def test_cutmix_pastes_a_rectangle_and_weighs_by_the_counted_area():
    num = 500
    own = torch.zeros(num, 3, 8, 11, dtype=torch.uint8)
    mixed, weights = one("cutmix").apply(own, torch.arange(num), 0, own + 255)
    assert set(mixed.unique().tolist()) == {0, 255}
    remaining = (mixed[:, 0] == 0).double().mean((1, 2))
    assert torch.equal(weights, remaining.float())
    assert torch.equal(mixed[:, :1].expand_as(mixed), mixed)
    for picture in mixed[:, 0]:
        rows, columns = picture.any(1), picture.any(0)
        assert torch.equal(picture > 0, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2
    assert weights.min() < 0.2
    assert weights.max() > 0.95

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from understudy.data import pixels
from understudy.data.random import Draws
from understudy.data.transforms_blur import jpeg_blocking, motion_kernels

ONE = 1 << pixels.POSITION_BITS


def pictures(num=4, *, channels=3, height=9, width=13):
    generator = torch.Generator().manual_seed(0)
    shape = (num, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, 8])
def test_padding_is_that_of_numpy(mode, padding):
    images = pictures()
    sides = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    expected = np.pad(images.numpy(), sides, "constant" if mode == "zero" else "reflect")
    assert np.array_equal(pixels.padded(images, padding, mode).numpy(), expected)


@pytest.mark.parametrize("crop", [pixels.copied_windows, pixels.gathered_windows])
def test_windows_are_slices_of_their_image(crop):
    images = pictures(num=5)
    top, left = np.array([0, 1, 4, 2, 4]), np.array([6, 0, 3, 1, 6])
    windows = crop(images, top, left, height=5, width=7)
    for n in range(5):
        y, x = top[n], left[n]
        assert torch.equal(windows[n], images[n, :, y : y + 5, x : x + 7])


def test_windows_of_images_that_are_not_contiguous():
    images = pictures().to(memory_format=torch.channels_last)
    windows = pixels.crop_windows(
        images, np.zeros(4, np.int64), np.ones(4, np.int64), height=9, width=12
    )
    assert torch.equal(windows, images[:, :, :, 1:])


def plain_bilinear(image_CHW, x, y, *, mode):
    """One value per channel at the pixel position (x, y), from the formula."""
    _, height, width = image_CHW.shape

    def pixel(row, column):
        if mode == "edge":
            row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        if mode == "reflect":
            row, column = fold(row, height - 1), fold(column, width - 1)
        if 0 <= row < height and 0 <= column < width:
            return image_CHW[:, row, column].double()
        return torch.zeros(len(image_CHW), dtype=torch.float64)

    def fold(position, last):
        position = abs(position) % (2 * last)
        return min(position, 2 * last - position)

    row, column = math.floor(y), math.floor(x)
    lower, right = y - row, x - column
    upper_row = pixel(row, column) * (1 - right) + pixel(row, column + 1) * right
    lower_row = pixel(row + 1, column) * (1 - right) + pixel(row + 1, column + 1) * right
    return upper_row * (1 - lower) + lower_row * lower


@pytest.mark.parametrize("mode", ["zero", "reflect", "edge"])
def test_bilinear_sampling_is_the_formula(mode):
    images = pictures(num=2, height=5, width=4)
    # Multiples of 1/256 are exact in the weights: the result must be the formula, rounded.
    generator = np.random.default_rng(0)
    x = generator.integers(-7 * 256, 11 * 256, (2, 6, 3)) / 256
    y = generator.integers(-9 * 256, 13 * 256, (2, 6, 3)) / 256
    sampled = pixels.sample_bilinear(
        images, pixels.to_positions(x), pixels.to_positions(y), mode=mode
    )
    assert sampled.shape == (2, 3, 6, 3)
    for n, row, column in np.ndindex(2, 6, 3):
        expected = plain_bilinear(images[n], x[n, row, column], y[n, row, column], mode=mode)
        assert torch.equal(sampled[n, :, row, column].double(), torch.floor(expected + 0.5))


def test_bilinear_sampling_at_the_pixels_changes_nothing():
    images = pictures(channels=1)
    x, y = np.arange(13)[None, None, :] * ONE, np.arange(9)[None, :, None] * ONE
    for mode in ("zero", "reflect", "edge"):
        x_N, y_N = np.repeat(x, 4, axis=0), np.repeat(y, 4, axis=0)
        assert torch.equal(pixels.sample_bilinear(images, x_N, y_N, mode=mode), images)


def test_look_up_reads_each_image_from_its_own_table():
    images = pictures(num=3)
    tables = torch.stack([torch.arange(256) * (n + 1) for n in range(3)])
    found = pixels.look_up(images, tables)
    for n in range(3):
        assert torch.equal(found[n], images[n].long() * (n + 1))


def test_filtering_is_exact_in_whole_numbers():
    images = pictures(num=3)
    kernels = np.random.default_rng(0).random((3, 5, 5))
    kernels /= kernels.sum(axis=(1, 2), keepdims=True)
    filtered = pixels.filtered(images, kernels).numpy()
    weights = np.rint(kernels * 256)
    weights[:, 2, 2] += 256 - weights.sum(axis=(1, 2))
    framed = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), "edge").astype(np.int64)
    sums = sum(
        framed[:, :, dy : dy + 9, dx : dx + 13] * weights[:, dy, dx, None, None, None]
        for dy, dx in np.ndindex(5, 5)
    )
    assert np.array_equal(filtered, np.clip(np.rint(sums / 256), 0, 255))


def test_filtering_keeps_a_flat_picture_flat():
    flat = torch.full((2, 3, 8, 8), 201, dtype=torch.uint8)
    kernels = motion_kernels(np.array([6.3, 2.0]), np.array([33.0, 171.0]), longest=7)
    assert torch.equal(pixels.filtered(flat, kernels), flat)


def test_motion_kernels_are_lines():
    kernels = motion_kernels(np.array([5.0, 5.0, 1.0]), np.array([0.0, 90.0, 30.0]), longest=5)
    assert kernels.shape == (3, 5, 5)
    assert np.allclose(kernels.sum(axis=(1, 2)), 1)
    row, column, point = kernels
    assert np.allclose(row[2].sum(), 1)
    assert (row[2] > 0.1).all()
    assert np.allclose(column, row.T, atol=1e-12)
    assert point[2, 2] == 1
    # At 45 degrees the line rises to the right: counter-clockwise as seen, with rows downwards.
    diagonal = motion_kernels(np.array([5.0]), np.array([45.0]), longest=5)[0]
    assert diagonal[1, 3] > 0.1
    assert diagonal[1, 1] == 0


def test_motion_kernel_does_not_depend_on_the_batch():
    lengths, angles = np.linspace(1, 6.5, 30), np.linspace(0, 180, 30)
    together = motion_kernels(lengths, angles, longest=6.5)
    for n in range(30):
        alone = motion_kernels(lengths[n : n + 1], angles[n : n + 1], longest=6.5)
        assert np.array_equal(alone[0], together[n])


def draws_of(num):
    return Draws(np.full((num, 3), 0.5), (0, 0), np.arange(num), 0)


@pytest.mark.parametrize("quality", [10, 40, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_blocking_is_close_to_a_jpeg_file(quality, channels):
    photo = load_sample_image("china.jpg")[100:164, 200:296]
    picture = Image.fromarray(photo).convert("L" if channels == 1 else "RGB")
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    expected = np.asarray(Image.open(file)).reshape(64, 96, channels)
    given = torch.from_numpy(np.array(picture).reshape(64, 96, channels)).permute(2, 0, 1)[None]
    blocked = jpeg_blocking(given.contiguous(), draws_of(1), quality=[quality, quality])[0]
    # The codec's transform is in whole numbers: near a tie it picks the other step at times.
    loss = np.abs(np.array(picture).reshape(64, 96, channels) - expected.astype(float)).mean()
    difference = np.abs(blocked.permute(1, 2, 0).numpy() - expected.astype(float))
    assert difference.mean() < 0.3 * loss
    assert difference.mean() < 0.7
    assert np.median(difference) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_blocking_at_full_quality_keeps_odd_sizes_nearly_unchanged(channels):
    images = pictures(num=2, channels=channels, height=9, width=13)
    blocked = jpeg_blocking(images, draws_of(2), quality=[100, 100])
    assert blocked.shape == images.shape
    assert (blocked.int() - images.int()).abs().max() <= 4


def test_rectangle_mask_is_cut_at_the_border():
    like = torch.zeros(2, 3, 4, 5)
    mask = pixels.rectangle_mask(
        np.array([-2, 3]), np.array([2, 9]), np.array([1, -1]), np.array([3, 1]), like=like
    )
    assert mask.shape == (2, 1, 4, 5)
    assert mask[0, 0].nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert mask[1, 0].nonzero().tolist() == [[3, 0]]

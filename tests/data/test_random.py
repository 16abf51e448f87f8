import numpy as np
import pytest
import torch

from understudy.data.random import (
    FIRST_PIXEL_BLOCK,
    Draws,
    draw_words,
    philox_4x32,
    pixel_normals,
    stream_key,
    uniforms,
)

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def as_words(text):
    return [int(word, 16) for word in text.split()]


def plain_philox(counter, key):
    """Philox4x32-10 for one counter, in Python's whole numbers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & 0xFFFFFFFF,
            (first >> 32) ^ c3 ^ k1,
            first & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, output):
    words = philox_4x32(
        tuple(np.array([word], np.uint64) for word in as_words(counter)),
        tuple(np.array([word], np.uint64) for word in as_words(key)),
    )
    assert words.dtype == np.uint32
    assert words[:, 0].tolist() == as_words(output)
    assert plain_philox(as_words(counter), as_words(key)) == as_words(output)


def test_philox_is_vectorised_over_counters_and_keys():
    counters = np.array([as_words(counter) for counter, _, _ in KNOWN_ANSWERS], np.uint64).T
    keys = np.array([as_words(key) for _, key, _ in KNOWN_ANSWERS], np.uint64).T
    words = philox_4x32(tuple(counters), tuple(keys))
    assert words.T.tolist() == [as_words(output) for _, _, output in KNOWN_ANSWERS]


def test_words_are_those_of_the_documented_counter():
    keys, samples, blocks = [(1, 2), (3, 4)], [0, 7, 2**33 + 5], [0, 9]
    words = draw_words(
        np.array(keys, np.uint64).T, np.array(samples), 11, np.array(blocks, np.uint64)
    )
    assert words.shape == (3, 2, 4)
    for n, sample in enumerate(samples):
        for b, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            counter = (sample & 0xFFFFFFFF, sample >> 32, 11, block)
            assert words[n, b].tolist() == plain_philox(counter, key)


def test_streams_of_other_names_and_seeds_differ():
    keys = {
        stream_key(seed, "views", position, name)
        for seed in (0, 1)
        for position in (0, 1)
        for name in ("flip", "affine")
    }
    assert len(keys) == 8
    assert all(0 <= word < 2**32 for key in keys for word in key)


def test_uniforms_lie_strictly_inside_and_are_even():
    edges = uniforms(np.array([0, 2**32 - 1], np.uint32))
    assert 0 < edges[0] < edges[1] < 1
    key, block = np.array([[5], [6]], np.uint64), np.zeros(1, np.uint64)
    values = uniforms(draw_words(key, np.arange(20_000), 0, block)).reshape(-1)
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    # Chi-squared with 19 degrees of freedom: 43.8 is exceeded once in a thousand.
    assert ((counts - 4000) ** 2 / 4000).sum() < 43.8


def test_normals_of_a_sample_do_not_depend_on_the_batch():
    indices = np.array([3, 900, 3, 12, 2**40])
    together = pixel_normals((1, 2), indices, 4, 30_001)
    assert together.shape == (5, 30_001)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    for row, index in enumerate(indices):
        assert torch.equal(together[row], pixel_normals((1, 2), np.array([index]), 4, 30_001)[0])


def test_normals_are_quantiles_of_the_documented_words():
    values = pixel_normals((1, 2), np.array([6]), 4, 8)[0]
    words = plain_philox((6, 0, 4, FIRST_PIXEL_BLOCK), (1, 2))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    expected = torch.special.ndtri((torch.tensor(halves, dtype=torch.float64) + 0.5) / 65536)
    assert torch.allclose(values.double(), expected, rtol=0, atol=2**-13)


def test_normals_have_the_moments_of_a_normal():
    values = pixel_normals((1, 2), np.arange(40), 0, 5000).double().reshape(-1)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.1
    assert values.abs().max() < 4.4


def test_whole_draws_cover_every_value_and_no_other():
    draws = Draws(np.array([[2.0**-33], [0.5], [1 - 2.0**-33]]), (0, 0), np.arange(3), 0)
    assert draws.whole(0, 9).tolist() == [0, 4, 8]
    assert draws.between(0, [2.0, 2.0]).tolist() == [2.0, 2.0, 2.0]

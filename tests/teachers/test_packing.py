import numpy as np
import pytest
import torch

from understudy.errors import InputError, StoreError
from understudy.teachers.packing import OutputFormat


def random_logits(num_rows: int, num_classes: int, *, scale: float = 5.0) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (scale * generator.standard_normal((num_rows, num_classes))).astype(np.float32)


def log_probabilities(logits_NK: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(logits_NK).double().log_softmax(1)


def test_dense_rows_are_the_logits_rounded_to_float16():
    logits_NK = random_logits(100, 10)
    layout = OutputFormat(10)
    assert np.array_equal(layout.unpack(layout.pack(logits_NK)), logits_NK.astype(np.float16))


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_top_k_of_all_classes_equals_dense(num_classes):
    logits_NK = random_logits(50, num_classes)
    dense, all_k = OutputFormat(num_classes), OutputFormat(num_classes, num_classes)
    assert np.array_equal(all_k.unpack(all_k.pack(logits_NK)), dense.unpack(dense.pack(logits_NK)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("top_k", [1, 5, 99])
def test_top_k_keeps_the_probabilities_of_the_largest_and_the_total_of_the_rest(top_k, dtype):
    logits_NK = random_logits(64, 100)
    layout = OutputFormat(100, top_k, dtype)
    again_NK = layout.unpack(layout.pack(logits_NK))
    expected, got = log_probabilities(logits_NK), log_probabilities(again_NK)
    classes_Nk = expected.topk(top_k).indices
    tolerance = 0.02 if dtype == "float16" else 1e-5
    assert torch.allclose(got.gather(1, classes_Nk), expected.gather(1, classes_Nk), atol=tolerance)
    rest = torch.ones_like(expected, dtype=torch.bool).scatter(1, classes_Nk, False)
    rest_total = (expected.exp() * rest).sum(1)
    assert torch.allclose((got.exp() * rest).sum(1), rest_total, atol=tolerance)
    # Within the rest every class has an equal share.
    shares = got[rest].reshape(64, 100 - top_k)
    assert torch.allclose(shares, shares[:, :1].expand_as(shares), atol=1e-5)
    assert (again_NK.argmax(1) == logits_NK.argmax(1)).all()


def test_top_k_is_smaller_and_works_beyond_16_bit_classes():
    assert OutputFormat(1000, 10).num_columns == 21
    layout = OutputFormat(70_000, 2)
    logits_NK = random_logits(3, 70_000)
    words = layout.pack(logits_NK)
    assert words.dtype == np.uint32
    assert np.array_equal(layout.unpack(words).argmax(1), logits_NK.argmax(1))


@pytest.mark.parametrize("value", [70_000.0, 1e30, -70_000.0, 600.2])
def test_logits_that_float16_cannot_hold_are_refused_and_float32_takes_them(value):
    logits_NK = random_logits(4, 10)
    logits_NK[2, 3] = value
    with pytest.raises(StoreError, match=r"does not fit float16 .*dtype='float32'"):
        OutputFormat(10).pack(logits_NK)
    layout = OutputFormat(10, dtype="float32")
    assert np.array_equal(layout.unpack(layout.pack(logits_NK)), logits_NK)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_refused_with_their_row(value):
    logits_NK = random_logits(4, 10)
    logits_NK[2, 3] = value
    for layout in (OutputFormat(10), OutputFormat(10, 3), OutputFormat(10, dtype="float32")):
        with pytest.raises(StoreError, match=r"NaN or infinite in 1 rows, the first is row 1026"):
            layout.pack(logits_NK, first_row=1024)


def test_an_impossible_layout_lists_all_problems():
    with pytest.raises(InputError) as caught:
        OutputFormat(10, 11, "float8")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("layout", [OutputFormat(20), OutputFormat(20, 4), OutputFormat(20, 20)])
def test_differences_from_recomputed_logits_show_the_wrong_row(layout):
    logits_NK = random_logits(10, 20)
    words = layout.pack(logits_NK)
    assert layout.max_differences(words, logits_NK).max() < 0.01
    logits_NK[7] = logits_NK[7, ::-1]
    differences = layout.max_differences(words, logits_NK)
    assert differences.argmax() == 7
    assert differences[7] > 1

"""How one row of teacher outputs lies in the store: dense numbers, or the largest k and the rest.

Dense rows are the logits themselves. A top-k row keeps the k largest logits with their classes, and
``rest``: the log-sum-exp of the other ``K - k`` logits, which is their common probability mass in
logit form. Unpacking gives each of them an equal share, ``rest - log(K - k)``. At temperature 1 the
probabilities of the k classes and the total of the rest are therefore exact; only how the rest is
spread among its classes is lost. With ``top_k == num_classes`` nothing is lost but rounding.

A row of features is its numbers, flattened; the manifest keeps their shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy.errors import InputError, StoreError, problem

DTYPES = ("float16", "float32")

# Float16 keeps 11 bits: beyond 512 a logit moves by more than this when it is rounded, and then
# the stored teacher is no longer the teacher.
MAX_ROUNDING = 0.125

# Float16 rounds a feature by up to 2**-11 of itself. Losses on features divide by their norms, so
# what counts is the error as a share of the largest value: more than this is float16 running out
# of range, at the top (65,504) or at the bottom (below some 3e-5).
MAX_FEATURE_ROUNDING = 2**-10

Words = NDArray[Any]


@dataclass(frozen=True)
class OutputFormat:
    """The layout of stored rows of logits.

    Attributes:
        num_classes: K.
        top_k: how many logits a row keeps; None keeps all (dense).
        dtype: "float16" (the default everywhere) or "float32", for logits that float16 cannot hold.

    Raises:
        InputError: top_k is not in 1..num_classes, or the dtype is unknown.
    """

    num_classes: int
    top_k: int | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        problems = []
        if self.top_k is not None and not 1 <= self.top_k <= self.num_classes:
            problems.append(
                problem(
                    f"top_k is {self.top_k}",
                    expected=f"1 to {self.num_classes} (the number of classes)",
                    mend="Lower it, or leave it out to store all logits.",
                )
            )
        problems += _dtype_problems(self.dtype)
        if problems:
            raise InputError(*problems)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one unpacked row."""
        return (self.num_classes,)

    @property
    def fill_value(self) -> float:
        """A stored number that no row can consist of."""
        return math.nan if self.top_k is None else int(np.iinfo(self.word_dtype).max)

    @property
    def num_rest(self) -> int:
        """Classes whose probability is kept as one number."""
        return 0 if self.top_k is None else self.num_classes - self.top_k

    @property
    def word_dtype(self) -> str:
        """NumPy name of the stored numbers; top-k rows hold classes and float bits side by side."""
        if self.top_k is None:
            return self.dtype
        return "uint16" if self.dtype == "float16" and self.num_classes <= 2**16 else "uint32"

    @property
    def num_columns(self) -> int:
        """Stored numbers a row: K; or k classes, k logits and, where classes are left, the rest."""
        if self.top_k is None:
            return self.num_classes
        return 2 * self.top_k + (1 if self.num_rest else 0)

    def pack(self, logits_NK: NDArray[np.float32], *, first_row: int = 0) -> Words:
        """Return the words of these rows, [N, num_columns].

        Raises:
            StoreError: a logit is NaN or infinite, or float16 cannot hold it. Nothing is clipped.
        """
        check_finite(logits_NK, first_row=first_row)
        if self.top_k is None:
            return self._rounded(logits_NK)
        order_NK = np.argsort(-logits_NK, axis=1, kind="stable")
        # In class order, so that equal outputs are equal bytes and compress better.
        classes_Nk = np.sort(order_NK[:, : self.top_k], axis=1)
        values = [np.take_along_axis(logits_NK, classes_Nk, axis=1)]
        if self.num_rest:
            rest_NR = np.take_along_axis(logits_NK, order_NK[:, self.top_k :], axis=1)
            values.append(log_sum_exp(rest_NR)[:, None])
        rounded = self._rounded(np.concatenate(values, axis=1))
        bits = rounded.astype(self._value_dtype).view(self.word_dtype)
        return np.concatenate([classes_Nk.astype(self.word_dtype), bits], axis=1)

    def unpack(self, words: Words) -> NDArray[np.float32]:
        """Return logits_NK, float32, of stored rows. A new array, free to be changed."""
        if self.top_k is None:
            return words.astype(np.float32)
        classes_Nk = words[:, : self.top_k].astype(np.int64)
        values = np.ascontiguousarray(words[:, self.top_k :]).view(self._value_dtype)
        if classes_Nk.size and classes_Nk.max() >= self.num_classes:
            raise StoreError(f"a stored class is {classes_Nk.max()}, of {self.num_classes} classes")
        shape = (len(words), self.num_classes)
        logits_NK = np.zeros(shape, dtype=np.float32)
        if self.num_rest:
            logits_NK += values[:, self.top_k :].astype(np.float32) - math.log(self.num_rest)
        np.put_along_axis(logits_NK, classes_Nk, values[:, : self.top_k].astype(np.float32), 1)
        return logits_NK

    def largest(self, words: Words) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
        """Return (values_Nk, classes_Nk) as stored, by ascending class; None for dense rows."""
        if self.top_k is None:
            return None
        classes_Nk = words[:, : self.top_k].astype(np.int64)
        values = np.ascontiguousarray(words[:, self.top_k :]).view(self._value_dtype)
        return values[:, : self.top_k].astype(np.float32), classes_Nk

    def magnitudes(self, logits_NK: NDArray[np.float32]) -> NDArray[Any]:
        """Return per row what differences are a share of, [N]: at least 1, as for a logit."""
        return np.asarray(np.maximum(1.0, np.abs(logits_NK).max(axis=1)))

    def max_differences(self, words: Words, logits_NK: NDArray[np.float32]) -> NDArray[Any]:
        """Return per row how far stored words are from logits computed again, [N].

        Top-k rows are compared in the classes that were stored and in the rest, because a near tie
        may put another class among the k largest without anything being wrong.
        """
        if self.top_k is None:
            return np.asarray(np.abs(words.astype(np.float32) - logits_NK).max(axis=1))
        classes_Nk = words[:, : self.top_k].astype(np.int64)
        values = np.ascontiguousarray(words[:, self.top_k :]).view(self._value_dtype)
        again = [np.take_along_axis(logits_NK, classes_Nk, axis=1)]
        if self.num_rest:
            masked_NK = logits_NK.copy()
            np.put_along_axis(masked_NK, classes_Nk, -np.inf, 1)
            again.append(log_sum_exp(masked_NK)[:, None])
        difference = values.astype(np.float32) - np.concatenate(again, axis=1)
        return np.asarray(np.abs(difference).max(axis=1))

    @property
    def _value_dtype(self) -> str:
        return "float16" if self.word_dtype == "uint16" else "float32"

    def _rounded(self, values: NDArray[np.float32]) -> Words:
        if self.dtype == "float32":
            return values.astype(np.float32)
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16)
        moved = np.abs(rounded.astype(np.float32) - values)
        if not moved.size or moved.max() <= MAX_ROUNDING:
            return rounded
        raise StoreError(
            problem(
                f"a teacher output of {values.flat[int(moved.argmax())]:.6g} does not fit float16 "
                f"(rounding would move it by {moved.max():.3g})",
                expected="logits between about -512 and 512",
                mend="In a recipe set labelling.live: true, which stores nothing; in Python store "
                "this teacher's outputs as float32 (dtype='float32').",
            )
        )


@dataclass(frozen=True)
class FeatureFormat:
    """The layout of stored rows of features.

    Attributes:
        row_shape: shape of one sample's features, such as (64, 8, 8).
        dtype: "float16" (the default everywhere) or "float32", for values float16 cannot hold.

    Raises:
        InputError: an empty row, or an unknown dtype.
    """

    row_shape: tuple[int, ...]
    dtype: str = "float16"

    def __post_init__(self) -> None:
        problems = _dtype_problems(self.dtype)
        if not self.row_shape or min(self.row_shape) < 1:
            problems.append(
                problem(
                    f"a row of features has the shape {self.row_shape}",
                    expected="at least one number",
                    mend="Give the shape of one sample's features, without the batch.",
                )
            )
        if problems:
            raise InputError(*problems)

    @property
    def word_dtype(self) -> str:
        """NumPy name of the stored numbers."""
        return self.dtype

    @property
    def num_columns(self) -> int:
        """Stored numbers a row."""
        return math.prod(self.row_shape)

    @property
    def fill_value(self) -> float:
        """A stored number that no row can consist of."""
        return math.nan

    def pack(self, features: NDArray[np.float32], *, first_row: int = 0) -> Words:
        """Return the words of rows [N, *row_shape]: [N, num_columns].

        Raises:
            StoreError: a value is NaN or infinite, or float16 cannot hold it. Nothing is clipped.
        """
        values = features.reshape(len(features), self.num_columns)
        check_finite(values, first_row=first_row)
        if self.dtype == "float32" or not values.size:
            return values.astype(self.dtype)
        with np.errstate(over="ignore"):
            words = values.astype(np.float16)
        moved = np.abs(words.astype(np.float32) - values).max()
        largest = np.abs(values).max()
        if moved <= MAX_FEATURE_ROUNDING * largest:
            return words
        raise StoreError(
            problem(
                f"features of up to {largest:.3g} do not fit float16 (rounding would move one by "
                f"{moved:.3g})",
                expected="a largest value between about 3e-5 and 65,504",
                mend="In a recipe set labelling.live: true, which stores nothing; in Python store "
                "this teacher's features as float32 (dtype='float32').",
            )
        )

    def unpack(self, words: Words) -> NDArray[np.float32]:
        """Return features [N, *row_shape], float32, of stored rows. A new array."""
        return words.astype(np.float32).reshape(len(words), *self.row_shape)

    def magnitudes(self, features: NDArray[np.float32]) -> NDArray[Any]:
        """Return per row what differences are a share of, [N]: the largest value."""
        values = np.abs(features.reshape(len(features), -1)).max(axis=1)
        return np.asarray(np.maximum(values, np.finfo(np.float16).tiny))

    def max_differences(self, words: Words, features: NDArray[np.float32]) -> NDArray[Any]:
        """Return per row how far stored words are from features computed again, [N]."""
        values = features.reshape(len(features), self.num_columns)
        return np.asarray(np.abs(words.astype(np.float32) - values).max(axis=1))


RowFormat = OutputFormat | FeatureFormat


def row_format(fields: Mapping[str, Any]) -> RowFormat:
    """Return the layout that a manifest describes."""
    if "row_shape" in fields:
        return FeatureFormat(tuple(fields["row_shape"]), fields["dtype"])
    return OutputFormat(**fields)


def _dtype_problems(dtype: str) -> list[str]:
    if dtype in DTYPES:
        return []
    return [
        problem(
            f"the store's dtype is '{dtype}'",
            expected=" or ".join(DTYPES),
            mend="Use float16 unless the outputs do not fit it.",
        )
    ]


def check_finite(values: NDArray[np.float32], *, first_row: int = 0) -> None:
    """Raise StoreError when a number [N, columns] is NaN or infinite; the text names the rows."""
    bad_rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad_rows):
        raise StoreError(
            problem(
                f"the teacher's outputs are NaN or infinite in {len(bad_rows)} rows, "
                f"the first is row {first_row + int(bad_rows[0])}",
                expected="finite numbers",
                mend="Check the teacher's weights and input normalisation, and use float32.",
            )
        )


def log_sum_exp(logits_NK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log(sum(exp(logits))) per row, [N], without overflow."""
    largest_N1 = logits_NK.max(axis=1, keepdims=True)
    sums_N = np.exp(logits_NK - largest_N1).sum(axis=1)
    return np.asarray(largest_N1[:, 0] + np.log(sums_N))

"""Shape checks and number types that the losses share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from understudy.errors import ModelError, problem


def check_same_shape(
    student: Tensor,
    teacher: Tensor,
    *,
    what: str,
    expected: str = "equal shapes",
    mend: str = "Choose outputs of the same shape, or put an adapter behind the student's.",
) -> None:
    """Raise ModelError, naming both shapes, unless they are equal.

    Args:
        student: any tensor.
        teacher: any tensor.
        what: what both are, in the plural ("logits", "feature maps").
        expected: what the text says was expected.
        mend: what the text advises.
    """
    if student.shape != teacher.shape:
        raise ModelError(_both(student, teacher, what=what, expected=expected, mend=mend))


def check_same_batch(student: Tensor, teacher: Tensor, *, what: str) -> None:
    """Raise ModelError, naming both shapes, unless both are [N, ...] of the same batch size N.

    The other dimensions may differ; ``what`` as in ``check_same_shape``.
    """
    if min(student.ndim, teacher.ndim) < 2 or student.shape[0] != teacher.shape[0]:
        raise ModelError(
            _both(
                student,
                teacher,
                what=what,
                expected="[N, ...] of the same N, the batch",
                mend="Take both from the same batch, batch first.",
            )
        )


def check_labels(logits_NK: Tensor, labels_N: Tensor) -> None:
    """Raise ModelError, naming both shapes, unless there is one label for each row of logits."""
    if labels_N.shape != logits_NK.shape[:1]:
        raise ModelError(
            problem(
                f"labels of shape {tuple(labels_N.shape)} for logits of shape "
                f"{tuple(logits_NK.shape)}",
                expected="one class a row, [N]",
                mend="Take labels and logits from the same batch.",
            )
        )


@contextmanager
def float32_pair(student: Tensor, teacher: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hand out both in float32 (float64 where the student has it), the teacher without gradient.

    Autocast is off inside the block, so that nothing in it falls back to half precision.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        yield student.to(dtype), teacher.detach().to(dtype)


def unit_rows(rows_ND: Tensor) -> Tensor:
    """Divide each row by its Euclidean norm; a row of zeros stays so, with gradient zero.

    Rows are first divided by their largest magnitude, which changes neither result nor gradient:
    no square overflows or vanishes, and no small constant distorts small rows.
    """
    largest_N1 = rows_ND.detach().abs().amax(dim=1, keepdim=True)
    is_zero_N1 = largest_N1 == 0
    scaled_ND = rows_ND / largest_N1.masked_fill(is_zero_N1, 1)
    norm_N1 = scaled_ND.square().sum(dim=1, keepdim=True).masked_fill(is_zero_N1, 1).sqrt()
    return (scaled_ND / norm_N1).masked_fill(is_zero_N1, 0)


def _both(student: Tensor, teacher: Tensor, *, what: str, expected: str, mend: str) -> str:
    return problem(
        f"student {what} of shape {tuple(student.shape)} and teacher {what} of shape "
        f"{tuple(teacher.shape)}",
        expected=expected,
        mend=mend,
    )

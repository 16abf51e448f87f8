"""What a teacher says of a batch: logits, and the features that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from understudy.errors import ModelError, problem


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """A teacher's outputs for N pictures, on the CPU and without gradients.

    Attributes:
        logits_NK: float32, column k for the data's class k. Where only the largest k logits are
            stored, the other classes share what is left of the probability.
        features: float32 values by ``Tap.key`` ("layer3:map"), each of shape [N, ...]; an
            ensemble's by member and key ("1/layer3:map").
        top_k: exactly what was stored where only the largest k logits are: (values_Nk float32,
            classes_Nk int64), in ascending order of the class. None everywhere else.
    """

    logits_NK: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    top_k: tuple[Tensor, Tensor] | None = None


# Runs a teacher on uint8 images NCHW. A plain function may answer with logits_NK alone.
Infer = Callable[[Tensor], Tensor | TeacherOutputs]


def answered(infer: Infer, images_NCHW: Tensor, *, num_classes: int) -> TeacherOutputs:
    """Return a teacher's answer, checked.

    Raises:
        ModelError: another number of rows or classes.
    """
    answer = infer(images_NCHW)
    outputs = answer if isinstance(answer, TeacherOutputs) else TeacherOutputs(answer)
    num_images, shape = len(images_NCHW), tuple(outputs.logits_NK.shape)
    if shape != (num_images, num_classes):
        raise ModelError(
            problem(
                f"the teacher answers with shape {shape}",
                expected=f"[N, {num_classes}], one logit for each class of the data",
                mend="Give num_classes and the teacher's class order, or another teacher.",
            )
        )
    for key, values in outputs.features.items():
        if len(values) != num_images:
            raise ModelError(
                problem(
                    f"the teacher's features '{key}' have {len(values)} rows for {num_images} "
                    "pictures",
                    expected="one row a picture",
                    mend="Tap a layer that is called once on each picture.",
                )
            )
    return outputs

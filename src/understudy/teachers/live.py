"""A teacher that is run on every batch, for outputs that are too large to store."""

from __future__ import annotations

from understudy.data.batches import Batch
from understudy.teachers.outputs import Infer, TeacherOutputs, answered


class LiveTeacher:
    """A teacher that answers by running, once a batch and with nothing kept.

    Its answers are those that labelling would store, unrounded: they are computed from the very
    pictures that the student sees. Every epoch pays for the teacher again.

    Args:
        infer: uint8 images NCHW to logits_NK, or to logits and features (``fast_inference`` and
            its ``outputs``).
        num_classes: K.
    """

    def __init__(self, infer: Infer, *, num_classes: int) -> None:
        self._infer = infer
        self._num_classes = num_classes

    def outputs(self, batch: Batch, *, view: int) -> TeacherOutputs:
        """Return what the teacher says of the batch's pictures, which show the view already.

        Raises:
            ModelError: the teacher answers with another number of classes.
        """
        return answered(self._infer, batch.images_NCHW, num_classes=self._num_classes)

"""The student's own moving average as its teacher (mean teacher)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed
from torch import Tensor, nn

from understudy.data.batches import Batch
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.objective import Objective, StepOutput
from understudy.train.optimization import averaged_copy
from understudy.train.peers import Precision, run_beside


class EmaObjective:
    """A moving average of the student's weights teaches the student.

    Tarvainen and Valpola 2017, "Mean teachers are better role models": after every update
    ``w' = a w' + (1 - a) w``. The decay ``a`` is warmed up as in ``averaged_copy``, which is the
    average that ``training.ema_decay`` keeps. The paper's distance is the mean squared error of the
    probabilities; here it is that of the student's objective, KL at a temperature, whose weight the
    paper lets grow from 0 (a schedule).

    The average answers in eval mode, with averaged running statistics and without dropout: its
    answer to a picture then does not depend on what else is in the batch, nor on how the batch is
    cut into micro-batches and processes, and it is the answer of the network that could be shipped.
    The paper's teacher has noise of its own; here only the student has.

    Args:
        network: the student's network with its first weights; copied.
        student: what the student minimises, given the average's outputs.
        decay: share of the average that stays at an update, once warmed up.
        precision: that of the student.

    Attributes:
        networks: the averaged network as "average".
    """

    def __init__(
        self,
        network: nn.Module,
        student: Objective,
        *,
        decay: float = 0.999,
        precision: Precision = "float32",
    ) -> None:
        self.student, self.precision = student, precision
        self.average = averaged_copy(network, decay)
        self.average.requires_grad_(False)
        self.networks: Mapping[str, nn.Module] = {"average": self.average.module}
        self.parts: nn.Module = nn.ModuleDict({"average": self.average, "student": student.parts})

    def step(
        self, network: nn.Module, batch: Batch, teacher: TeacherOutputs | None, progress: float
    ) -> StepOutput:
        """Return the student's terms, taught by the average."""
        self.average.eval()
        with torch.no_grad():
            answer_NK = run_beside(self.average, batch.images_NCHW, precision=self.precision)
        return self.student.step(network, batch, TeacherOutputs(answer_NK), progress)

    def weights(self, progress: float) -> dict[str, float | Tensor]:
        """Return the student's weights."""
        return self.student.weights(progress)

    def after_step(self, network: nn.Module) -> None:
        """Take the updated weights into the average."""
        self.average.update_parameters(network)
        if torch.distributed.is_initialized():
            # Weights are equal in all processes, running statistics are not: without this the
            # processes' teachers would drift apart, and a resumed run from an unbroken one.
            for buffer in self.average.module.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.student.after_step(network)

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Let the student's objective know."""
        self.student.after_validation(numbers, progress)

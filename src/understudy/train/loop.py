"""The training loop, one for teachers, students and controls."""

from __future__ import annotations

from lightning_fabric import Fabric
from torch import nn

from understudy.progress import Progress
from understudy.runtime import stop_requests
from understudy.train.plan import TrainPlan, TrainResult
from understudy.train.training import INTERRUPTED_NAME, Training


def train(
    network: nn.Module, plan: TrainPlan, *, fabric: Fabric, progress: Progress
) -> TrainResult:
    """Train ``network`` from where its checkpoints left off, or from the start.

    A step whose loss or gradient is not finite is not made: the training goes back to the last
    good checkpoint with a lower learning rate.

    Args:
        network: takes uint8 images_NCHW, returns logits_NK; changed in place.
        plan: data, objective, settings, validation and folder.
        fabric: launched; decides device, precision and processes.
        progress: told the updates done and the validation accuracy.

    Returns:
        The trained weights and one row of metrics an epoch.

    Raises:
        TrainingError: if the loss stays non-finite; the batch is then saved in the folder.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the state is saved.
    """
    training = Training(network, plan, fabric)
    training.resume()
    with stop_requests() as stop_requested:
        while training.at.epoch < plan.settings.num_epochs:
            for batch, teacher_logits_NK in training.rest_of_epoch():
                values = training.backward(batch, teacher_logits_NK)
                if not training.all_finite(values):
                    training.roll_back(batch, teacher_logits_NK, values)
                    break
                training.optimizer.step()
                training.after_step(values)
                progress(training.at.step, training.num_steps, training.note())
                if training.any_process(stop_requested()):
                    training.save(INTERRUPTED_NAME)
                    raise KeyboardInterrupt
            else:
                training.end_epoch()
    return training.finish()

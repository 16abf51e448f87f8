"""One training in progress: networks, optimiser, position, and how they are saved."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel

from understudy.artifacts import atomic_path
from understudy.data.batches import Batch
from understudy.errors import TrainingError, problem
from understudy.models.dropout import set_dropout_step
from understudy.progress import log
from understudy.runtime import derive_seed, keep_freed_memory
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.checkpoint import (
    clone_state,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from understudy.train.feed import split_update
from understudy.train.monitor import MetricsLog
from understudy.train.objective import count_right, sample_losses
from understudy.train.optimization import averaged_copy, build_optimizer
from understudy.train.plan import Position, TrainPlan, TrainResult
from understudy.train.schedules import learning_rate_factor

CHECKPOINT_NAME = "checkpoint.pt"
INTERRUPTED_NAME = "interrupted.pt"
FAILED_BATCH_NAME = "failed_batch.safetensors"
SEED_MASK = (1 << 63) - 1


class Training:
    """One training in progress: network, optimiser, averaged copy, and the position in it."""

    def __init__(self, network: nn.Module, plan: TrainPlan, fabric: Fabric) -> None:
        keep_freed_memory()
        settings = plan.settings
        self.plan, self.fabric, self.at = plan, fabric, Position()
        self.num_steps = settings.num_epochs * plan.feed.num_batches
        self.dropout_seed = derive_seed(plan.feed.seed, "dropout", fabric.global_rank)
        if settings.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network.to(fabric.device)
        self.parts = plan.objective.parts.to(fabric.device)
        self.averaged: AveragedModel | None = None
        if settings.ema_decay is not None:
            self.averaged = averaged_copy(self.network, settings.ema_decay)
        optimizer = build_optimizer((self.network, self.parts), settings.optimizer)
        forward = self.network
        if settings.compile:
            forward = torch.compile(self.network)  # type: ignore[assignment]
        self.model, self.optimizer = fabric.setup(forward, optimizer)
        self.best_weights: dict[str, Tensor] | None = None
        self.epoch_started = 0.0
        self.log: MetricsLog | None = None

    # One update

    def rest_of_epoch(self) -> Iterator[tuple[Batch, TeacherOutputs | None]]:
        """Yield what is left of the current epoch: (batch, teacher outputs or None)."""
        self.network.train()
        self.parts.train()
        self.epoch_started = time.perf_counter() - self.at.epoch_seconds
        return self.plan.feed.epoch(
            self.at.epoch,
            start_batch=self.at.batch,
            rank=self.fabric.global_rank,
            num_processes=self.fabric.world_size,
        )

    def backward(self, batch: Batch, teacher: TeacherOutputs | None) -> dict[str, float]:
        """Leave the batch's clipped gradients in the parameters; return loss, terms and norm."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        set_dropout_step(self.network, seed=self.dropout_seed, step=self.at.step)
        set_dropout_step(self.parts, seed=~self.dropout_seed & SEED_MASK, step=self.at.step)
        self.optimizer.zero_grad(set_to_none=True)
        values = self.accumulate(batch, teacher, self.share_done())
        self.average_gradients(self.parts)
        values["gradient_norm"] = self.clip_gradients(self.network)
        values["parts_gradient_norm"] = self.clip_gradients(self.parts)
        return values

    def clip_gradients(self, module: nn.Module) -> float:
        """Clip a module's gradients together; return their norm before that."""
        clip_norm = self.plan.settings.clip_norm
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if clip_norm is not None:
            clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)
        return norm.item()

    def average_gradients(self, module: nn.Module) -> None:
        """Average a module's gradients over the processes, as Fabric does for the network's."""
        if self.fabric.world_size > 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.fabric.world_size

    def all_finite(self, values: dict[str, float]) -> bool:
        """Return whether loss, terms and gradient norm are finite in every process."""
        return not self.any_process(not all(map(math.isfinite, values.values())))

    def after_step(self, values: dict[str, float]) -> None:
        """Count the update that was just made, and save where one of the schedule is due."""
        at, every_steps = self.at, self.plan.settings.checkpoint_every_steps
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        self.plan.objective.after_step(self.network)
        for name, value in values.items():
            at.sums[name] = at.sums.get(name, 0.0) + value
        at.batch += 1
        at.step += 1
        at.epoch_seconds = time.perf_counter() - self.epoch_started
        if every_steps and at.step % every_steps == 0 and at.batch < self.plan.feed.num_batches:
            self.save(CHECKPOINT_NAME)

    def share_done(self) -> float:
        """Return the share of training done, 0 at the first update and 1 at the last."""
        return self.at.step / max(1, self.num_steps - 1)

    def accumulate(
        self, batch: Batch, teacher: TeacherOutputs | None, done: float
    ) -> dict[str, float]:
        """Back-propagate the batch in its micro-batches; return loss, terms and accuracy."""
        objective, curriculum = self.plan.objective, self.plan.feed.curriculum
        values: dict[str, float] = dict.fromkeys(("loss", "right", "labelled"), 0.0)
        parts = list(self.micro_batches(batch, teacher))
        for number, (part, answer) in enumerate(parts):
            share = len(part.labels_N) / len(batch.labels_N)
            more_follow = number + 1 < len(parts)
            with self.fabric.no_backward_sync(self.model, enabled=more_follow):
                output = objective.step(self.model, part, answer, done)
                weights = objective.weights(done)
                loss = sum(
                    (weights[name] * term for name, term in output.terms.items()),
                    start=torch.zeros((), device=self.fabric.device),
                )
                self.fabric.backward(loss * share)
            values["loss"] += loss.item() * share
            logits_NK = output.logits_NK.detach()
            num_right, num_labelled = count_right(logits_NK, part)
            values["right"] += num_right / len(batch.labels_N)
            values["labelled"] += num_labelled / len(batch.labels_N)
            if curriculum is not None and curriculum.watches_losses:
                curriculum.observe(part.indices_N.cpu(), sample_losses(logits_NK, part).cpu())
            for name, term in output.terms.items():
                key = f"losses/{name}"
                values[key] = values.get(key, 0.0) + term.item() * share
        return values

    def micro_batches(
        self, batch: Batch, teacher: TeacherOutputs | None
    ) -> Iterator[tuple[Batch, TeacherOutputs | None]]:
        """Yield the batch on the device, cut into parts for gradient accumulation."""
        settings = self.plan.settings
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        size = math.ceil(len(batch.labels_N) / settings.num_micro_batches)
        num_labelled = self.over_processes(int(batch.labelled_N.sum()))
        share = num_labelled / (len(batch.labels_N) * self.fabric.world_size)
        parts = split_update(
            batch, teacher, size=size, device=self.fabric.device, labelled_share=share
        )
        for part, answer in parts:
            images_NCHW = part.images_NCHW.contiguous(memory_format=layout)
            yield dataclasses.replace(part, images_NCHW=images_NCHW), answer

    def learning_rate(self) -> float:
        """Return the learning rate of the next update, after any rollback."""
        settings = self.plan.settings
        schedule = settings.learning_rate_schedule
        factor = learning_rate_factor(
            self.at.step,
            num_steps=self.num_steps,
            shape=schedule.shape,
            num_warmup_steps=round(schedule.warmup_epochs * self.plan.feed.num_batches),
            final_factor=schedule.final_factor,
        )
        return settings.optimizer.learning_rate * factor * self.at.rate_factor

    # The end of an epoch

    def end_epoch(self) -> None:
        """Validate, write the epoch's row, remember the best weights and save a checkpoint."""
        at, settings = self.at, self.plan.settings
        num_epochs_done = at.epoch + 1
        is_last = num_epochs_done == settings.num_epochs
        row = self.mean_row(time.perf_counter() - self.epoch_started)
        if is_last or num_epochs_done % settings.validate_every_epochs == 0:
            numbers = self.validate()
            row |= {f"validation_{name}": value for name, value in numbers.items()}
            self.plan.objective.after_validation(numbers, self.share_done())
            if settings.keep == "best" and numbers["accuracy"] > at.best_accuracy:
                at.best_accuracy = numbers["accuracy"]
                self.best_weights = clone_state(self.kept_network().state_dict())
        if self.plan.feed.curriculum is not None:
            self.plan.feed.curriculum.end_epoch(epoch=at.epoch)
        at.rows.append(row)
        at.epoch, at.batch, at.epoch_seconds, at.sums = num_epochs_done, 0, 0.0, {}
        if self.log is not None:
            self.log.add(row)
        if is_last or num_epochs_done % settings.checkpoint_every_epochs == 0:
            self.save(CHECKPOINT_NAME)
        if self.fabric.is_global_zero:
            self.plan.on_epoch(row)

    def mean_row(self, seconds: float) -> dict[str, Any]:
        """Return the epoch's means over updates and processes."""
        at, feed = self.at, self.plan.feed
        means = {name: total / feed.num_batches for name, total in at.sums.items()}
        if self.fabric.world_size > 1:
            names = sorted(means)
            values = torch.tensor([means[name] for name in names], dtype=torch.float64)
            summed = cast(Tensor, self.fabric.all_reduce(values))
            means = dict(zip(names, summed.tolist(), strict=True))
        losses = {n.removeprefix("losses/"): v for n, v in means.items() if n.startswith("losses/")}
        return {
            "epoch": at.epoch,
            "step": at.step,
            "train_loss": means["loss"],
            "losses": losses,
            "learning_rate": self.learning_rate(),
            "gradient_norm": means["gradient_norm"],
            "train_accuracy": means["right"] / means["labelled"] if means["labelled"] else None,
            "num_rollbacks": at.num_rollbacks,
            "samples_per_second": feed.num_batches * feed.batch_size / seconds,
            "seconds": seconds,
        }

    def validate(self) -> dict[str, float]:
        """Validate the network that would be kept; every process gets the same numbers."""
        numbers: dict[str, float] = {}
        if self.fabric.is_global_zero:
            network = self.kept_network().eval()
            with torch.inference_mode():
                numbers = self.plan.validate(network)
            self.network.train()
        shared: dict[str, float] = self.fabric.broadcast(numbers)
        return shared

    def kept_network(self) -> nn.Module:
        """Return the network whose weights are kept: the averaged one where there is one."""
        return self.network if self.averaged is None else self.averaged.module

    # Safety

    def roll_back(
        self, batch: Batch, teacher: TeacherOutputs | None, values: dict[str, float]
    ) -> None:
        """Go back to the last good checkpoint with a lower learning rate, or give up."""
        settings = self.plan.settings
        num_rollbacks = self.at.num_rollbacks + 1
        where = f"epoch {self.at.epoch}, update {self.at.step}"
        if num_rollbacks > settings.max_rollbacks:
            path = self.save_failed_batch(batch, teacher)
            raise TrainingError(
                problem(
                    f"the loss or gradient is not finite at {where} ({values}), after "
                    f"{settings.max_rollbacks} rollbacks",
                    expected="finite values",
                    mend="Lower training.optimizer.learning_rate or set training.clip_norm. "
                    f"The batch is in {path}.",
                )
            )
        self.load(self.plan.folder / CHECKPOINT_NAME)
        self.at.num_rollbacks = num_rollbacks
        self.at.rate_factor = settings.rollback_factor**num_rollbacks
        if self.log is not None:
            self.log.go_back(self.at.rows)
        log.warning(
            "not finite at %s %s: back to update %d with the learning rate times %g",
            *(where, values, self.at.step, self.at.rate_factor),
        )

    def save_failed_batch(self, batch: Batch, teacher: TeacherOutputs | None) -> Path:
        """Write the batch that was not finite, for a look at it."""
        tensors = {name: value for name, value in vars(batch).items() if value is not None}
        if teacher is not None:
            tensors["teacher_logits_NK"] = teacher.logits_NK
        path = self.plan.folder / FAILED_BATCH_NAME
        with atomic_path(path) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        return path

    def any_process(self, flag: bool) -> bool:
        """Return whether the flag is up in any process, so that all of them act alike."""
        return self.over_processes(flag) > 0

    def over_processes(self, value: float) -> float:
        """Return the sum of a number over the processes."""
        if self.fabric.world_size == 1:
            return value
        total = cast(Tensor, self.fabric.all_reduce(torch.tensor(float(value)), reduce_op="sum"))
        return total.item()

    # Saving and resuming

    def save(self, name: str) -> None:
        """Write a checkpoint. A scheduled one makes that of an interruption out of date."""
        own = {"random": random_state(), "sums": self.at.sums}
        states = [own] * self.fabric.world_size
        if self.fabric.world_size > 1:
            torch.distributed.all_gather_object(states, own)
        if self.fabric.is_global_zero:
            values = {
                "position": dataclasses.asdict(self.at),
                "network": self.network.state_dict(),
                "parts": self.parts.state_dict(),
                "curriculum": state_of(self.plan.feed.curriculum),
                "optimizer": self.optimizer.state_dict(),
                "averaged": None if self.averaged is None else self.averaged.state_dict(),
                "best_weights": self.best_weights,
                "processes": states,
            }
            save_checkpoint(self.plan.folder / name, values)
            if name == CHECKPOINT_NAME:
                (self.plan.folder / INTERRUPTED_NAME).unlink(missing_ok=True)
        self.fabric.barrier()

    def resume(self) -> None:
        """Continue from what an earlier process left, or write the checkpoint of the start."""
        folder = self.plan.folder
        names = [n for n in (INTERRUPTED_NAME, CHECKPOINT_NAME) if (folder / n).exists()]
        self.fabric.barrier()
        if names:
            self.load(folder / names[0])
            if self.at.epoch < self.plan.settings.num_epochs:
                log.info("resumed at epoch %d, update %d", self.at.epoch, self.at.step)
        else:
            self.save(CHECKPOINT_NAME)
        if self.fabric.is_global_zero:
            self.log = MetricsLog(folder, self.at.rows)

    def load(self, path: Path) -> None:
        """Put everything back to what a checkpoint holds."""
        values = load_checkpoint(path)
        self.at = Position(**values["position"])
        self.network.load_state_dict(values["network"])
        self.parts.load_state_dict(values["parts"])
        if isinstance(self.plan.feed.curriculum, nn.Module):
            self.plan.feed.curriculum.load_state_dict(values["curriculum"])
        self.optimizer.load_state_dict(values["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(values["averaged"])
        self.best_weights = values["best_weights"]
        own = values["processes"][self.fabric.global_rank]
        self.at.sums = own["sums"]
        restore_random_state(own["random"])

    def finish(self) -> TrainResult:
        """Close the logs and return the weights that ``settings.keep`` names."""
        if self.log is not None:
            self.log.close()
        weights = self.best_weights
        if weights is None:
            weights = clone_state(self.kept_network().state_dict())
        return TrainResult(
            weights=weights,
            parts=clone_state(self.parts.state_dict()),
            rows=self.at.rows,
            seconds=sum(row["seconds"] for row in self.at.rows),
            num_steps=self.at.step,
            num_rollbacks=self.at.num_rollbacks,
        )

    def note(self) -> str:
        """Return the last validation accuracy for the progress display."""
        if not self.at.rows or "validation_accuracy" not in self.at.rows[-1]:
            return ""
        return f"validation {self.at.rows[-1]['validation_accuracy']:.2%}"


def state_of(module: object) -> dict[str, Any] | None:
    """Return the state of what may be a module."""
    return module.state_dict() if isinstance(module, nn.Module) else None

"""The loop against plain PyTorch, and through kills, rollbacks and signals."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from understudy.data.batches import epoch_order
from understudy.errors import TrainingError
from understudy.losses import kl
from understudy.progress import silent
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import DistillObjective
from understudy.train.loop import train
from understudy.train.objective import LabelObjective, StepOutput
from understudy.train.training import (
    CHECKPOINT_NAME,
    FAILED_BATCH_NAME,
    INTERRUPTED_NAME,
)

TIMES = ("seconds", "samples_per_second")


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_equal_results(one, other):
    assert untimed(one.rows) == untimed(other.rows)
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name


class Fixed:
    """A teacher source that answers from a table."""

    def __init__(self, logits_NK):
        self.logits_NK = logits_NK

    def outputs(self, batch, *, view):
        return TeacherOutputs(self.logits_NK[batch.indices_N])


def plain_training(network, plan, digits, step_loss):
    """The same training in a dozen lines of PyTorch."""
    settings = plan.settings
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    num_steps = settings.num_epochs * plan.feed.num_batches
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps - 1)
    network.train()
    losses = []
    for epoch in range(settings.num_epochs):
        order = epoch_order(plan.feed.indices_N, seed=plan.feed.seed, epoch=epoch)
        for indices in order.split(settings.batch_size):
            optimizer.zero_grad()
            logits = network(digits.images(indices))
            loss = step_loss(logits, digits.labels_N[indices], indices)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


def test_label_training_equals_plain_pytorch(make_plan, make_network, fabric, digits):
    plan = make_plan()
    result = train(make_network(), plan, fabric=fabric, progress=silent)
    reference = make_network()
    losses = plain_training(
        reference, plan, digits, lambda z, y, _: torch.nn.functional.cross_entropy(z, y)
    )
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(result.weights[name], value, rtol=1e-4, atol=1e-5)
    for epoch, row in enumerate(result.rows):
        mean = sum(losses[epoch * 8 : epoch * 8 + 8]) / 8
        assert row["train_loss"] == pytest.approx(mean, rel=1e-4)
        assert row["losses"]["ce"] == pytest.approx(mean, rel=1e-4)
    assert result.rows[-1]["validation_accuracy"] > 0.7
    assert result.num_steps == 24


def test_distillation_equals_plain_pytorch(make_plan, make_network, fabric, digits):
    teacher_NK = torch.randn(400, 10, generator=torch.Generator().manual_seed(0)) * 4
    settings = DistillSettings(kl_weight=0.7, ce_weight=0.3, temperature=3)
    plan = make_plan(objective=DistillObjective(settings), teacher=Fixed(teacher_NK))
    result = train(make_network(), plan, fabric=fabric, progress=silent)

    def loss(logits, labels, indices):
        soft = kl(logits, teacher_NK[indices], temperature=3.0)
        return 0.7 * soft + 0.3 * torch.nn.functional.cross_entropy(logits, labels)

    reference = make_network()
    plain_training(reference, plan, digits, loss)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(result.weights[name], value, rtol=1e-3, atol=1e-4)


def test_micro_batches_accumulate_to_the_whole_batch(make_plan, make_network, fabric):
    # Without batch norm a batch in four parts gives the gradient of the whole.
    def networks():
        network = make_network()
        network.norm = torch.nn.Identity()
        return network

    whole = train(networks(), make_plan("a"), fabric=fabric, progress=silent)
    parts = train(networks(), make_plan("b", num_micro_batches=4), fabric=fabric, progress=silent)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=1e-4, atol=1e-5)
    assert parts.rows[-1]["train_loss"] == pytest.approx(whole.rows[-1]["train_loss"], rel=1e-4)


def test_fixed_losses_of_a_fixed_seed(make_plan, make_network, fabric):
    rows = train(make_network(), make_plan(), fabric=fabric, progress=silent).rows
    assert [row["train_loss"] for row in rows] == pytest.approx([1.0862, 0.3191, 0.2334], abs=1e-3)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the loop catches it."""


def kill_after(num_updates):
    def progress(done, total, note=""):
        if done == num_updates:
            raise Killed

    return progress


OPTIONS = {
    "ema_decay": 0.9,
    "keep": "best",
    "clip_norm": 1.0,
    "checkpoint_every_steps": 3,
    "checkpoint_every_epochs": 2,
    "label_smoothing": 0.1,
}


@pytest.mark.parametrize(
    ("num_updates", "optimizer"),
    [*((number, "adamw") for number in (1, 4, 8, 9, 13, 23)), (13, "sgd"), (13, "muon")],
)
def test_a_killed_training_continues_bit_for_bit(
    make_plan, make_network, fabric, num_updates, optimizer
):
    options = {**OPTIONS, "optimizer": {"name": optimizer, "learning_rate": 0.02}}
    unbroken = train(
        make_network(0.3), make_plan("unbroken", **options), fabric=fabric, progress=silent
    )
    torch.manual_seed(99)
    plan = make_plan("broken", **options)
    network = make_network(0.3)
    with pytest.raises(Killed):
        train(network, plan, fabric=fabric, progress=kill_after(num_updates))
    torch.manual_seed(1234)
    resumed = train(make_network(0.3), plan, fabric=fabric, progress=silent)
    assert_equal_results(unbroken, resumed)
    lines = (plan.folder / "metrics.jsonl").read_text().splitlines()
    assert untimed(map(json.loads, lines)) == untimed(unbroken.rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_training_continues_bit_for_bit(
    make_plan, make_network, fabric, number
):
    unbroken = train(make_network(0.3), make_plan("unbroken"), fabric=fabric, progress=silent)

    def interrupt(done, total, note=""):
        if done == 11:
            os.kill(os.getpid(), number)

    plan = make_plan("broken")
    with pytest.raises(KeyboardInterrupt):
        train(make_network(0.3), plan, fabric=fabric, progress=interrupt)
    assert (plan.folder / INTERRUPTED_NAME).exists()
    done = []
    resumed = train(
        make_network(0.3), plan, fabric=fabric, progress=lambda d, total, note="": done.append(d)
    )
    assert done[0] == 12, "nothing is done twice"
    assert_equal_results(unbroken, resumed)
    assert not (plan.folder / INTERRUPTED_NAME).exists()


class Poisoned(LabelObjective):
    """Turns chosen updates' losses into NaN, as long as the learning rate is not lowered enough."""

    def __init__(self, bad_calls):
        super().__init__()
        self.calls, self.bad_calls = iter(range(10**9)), bad_calls

    def step(self, network, batch, teacher, progress):
        output = super().step(network, batch, teacher, progress)
        if next(self.calls) in self.bad_calls:
            return StepOutput({"ce": output.terms["ce"] * float("nan")}, output.logits_NK)
        return output


def test_a_non_finite_loss_is_rolled_back_and_never_reaches_the_weights(
    make_plan, make_network, fabric
):
    plan = make_plan(objective=Poisoned({10}))
    result = train(make_network(), plan, fabric=fabric, progress=silent)
    assert result.num_rollbacks == 1
    assert all(torch.isfinite(value).all() for value in result.weights.values())
    # Calls 0 to 7 were epoch 0, 8 to 10 are lost, and from there the rate is half.
    expected = train(make_network(), make_plan("plain"), fabric=fabric, progress=silent)
    assert untimed(result.rows)[0] == untimed(expected.rows)[0]
    for row, plain in zip(result.rows[1:-1], expected.rows[1:-1], strict=True):
        assert row["learning_rate"] == pytest.approx(plain["learning_rate"] / 2)
        assert row["num_rollbacks"] == 1


def test_epochs_that_are_rolled_back_are_told_once(make_plan, make_network, fabric):
    # Of the checkpoints of a 5-epoch training only the first one is before the bad update.
    plan = make_plan(objective=Poisoned({25}), num_epochs=5, checkpoint_every_epochs=9)
    result = train(make_network(), plan, fabric=fabric, progress=silent)
    assert result.num_rollbacks == 1
    lines = (plan.folder / "metrics.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == result.rows
    assert [row["epoch"] for row in result.rows] == list(range(5))


def test_a_loss_that_stays_non_finite_stops_with_the_batch_saved(make_plan, make_network, fabric):
    plan = make_plan(objective=Poisoned(range(9, 10**6)), max_rollbacks=2)
    with pytest.raises(TrainingError, match=r"after 2 rollbacks; expected finite.*learning_rate"):
        train(make_network(), plan, fabric=fabric, progress=silent)
    saved = load_file(plan.folder / FAILED_BATCH_NAME)
    assert saved["images_NCHW"].shape == (32, 1, 8, 8)
    assert set(saved) >= {"indices_N", "labels_N"}
    # The last good state is there still: half the work is not lost with the bad batch.
    assert torch.load(plan.folder / CHECKPOINT_NAME, weights_only=True)["position"]["step"] == 8


def test_averaged_weights_are_validated_and_kept(make_plan, make_network, fabric):
    network = make_network()
    result = train(network, make_plan(ema_decay=0.5), fabric=fabric, progress=silent)
    raw = network.state_dict()["layer.weight"]
    assert not torch.equal(result.weights["layer.weight"], raw)
    torch.testing.assert_close(result.weights["layer.weight"], raw, rtol=0.2, atol=0.05)


def test_the_best_epoch_is_kept(make_plan, make_network, fabric):
    accuracies = iter([0.5, 0.9, 0.7])
    seen = []
    plan = make_plan(keep="best")

    def validate(network):
        seen.append({k: v.clone() for k, v in network.state_dict().items()})
        return {"accuracy": next(accuracies), "nll": 0.0, "ece": 0.0}

    plan = type(plan)(plan.feed, plan.objective, plan.settings, validate, plan.folder)
    result = train(make_network(), plan, fabric=fabric, progress=silent)
    assert torch.equal(result.weights["layer.weight"], seen[1]["layer.weight"])


def test_gradients_are_clipped(make_plan, make_network, fabric):
    plan = make_plan(
        num_epochs=1, clip_norm=1e-6, optimizer={"learning_rate": 1.0, "momentum": 0.0}
    )
    network = make_network()
    before = network.layer.weight.detach().clone()
    train(network, plan, fabric=fabric, progress=silent)
    assert (network.layer.weight - before).norm() <= 8 * 1e-6 * 1.01 + 8 * 5e-4 * before.norm()

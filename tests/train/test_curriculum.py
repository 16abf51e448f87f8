"""Curricula against plain formulas and loops, and through kills and signals."""

import dataclasses
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from process_pair import in_two_processes
from pydantic import ValidationError
from torch.multiprocessing import ProcessExitedException

from understudy.data.batches import epoch_order
from understudy.progress import silent
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.balance import build_balance
from understudy.train.curriculum import (
    CurriculumOrder,
    answered_labels,
    easiest_of_each,
    pacing_share,
    teacher_difficulty,
)
from understudy.train.distill_settings import Balance, Curriculum, DistillSettings
from understudy.train.distillation import DistillObjective
from understudy.train.loop import train
from understudy.train.training import INTERRUPTED_NAME

# Pacing


@pytest.mark.parametrize("progress", np.linspace(0, 1, 21))
def test_pacing_equals_the_formulas_of_the_papers(progress):
    start, full_at = 0.2, 0.6
    paced = {"start": start, "full_at": full_at}
    t = min(1.0, progress / full_at)
    linear = min(1, start + t * (1 - start))
    assert pacing_share(progress, pacing="linear", **paced) == pytest.approx(linear)
    root = min(1, math.sqrt(t * (1 - start**2) + start**2))
    assert pacing_share(progress, pacing="root", **paced) == pytest.approx(root)
    share = start  # grown by the same factor after each of four equal steps
    for number in range(1, 5):
        if t >= number / 4 - 1e-9:
            share *= start ** (-1 / 4)
    stepped = pacing_share(progress, pacing="step", num_steps=4, **paced)
    assert stepped == pytest.approx(share)


def test_self_pacing_goes_by_the_students_own_loss():
    with pytest.raises(ValidationError, match="student_loss"):
        Curriculum(pacing="self_paced", difficulty="margin")
    with pytest.raises(ValueError, match="unknown pacing 'fast'"):
        pacing_share(0.1, pacing="fast", start=0.1, full_at=0.5)


# Difficulty


@pytest.mark.parametrize("by", ["margin", "entropy", "loss"])
def test_the_teachers_difficulty_equals_the_plain_loops(by):
    random = np.random.default_rng(3)
    logits_NK, labels_N = random.normal(0, 4, (50, 7)), random.integers(-1, 7, 50)
    expected = []
    for z, label in zip(logits_NK, labels_N, strict=True):
        p = np.exp(z) / np.exp(z).sum()
        y = int(np.argmax(z)) if label < 0 else label
        others = [math.log(p[k]) for k in range(7) if k != y]
        expected.append(
            {
                "margin": max(others) - math.log(p[y]),
                "entropy": -sum(q * math.log(q) for q in p),
                "loss": -math.log(p[y]),
            }[by]
        )
    logits, labels = torch.from_numpy(logits_NK), torch.from_numpy(labels_N)
    found = teacher_difficulty(logits, labels, by=by)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (answered_labels(logits, labels) >= 0).all()
    assert teacher_difficulty(logits * 1e4, labels, by=by).isfinite().all()


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5, 1.0])
def test_the_easiest_share_of_every_class_is_chosen(share):
    random = np.random.default_rng(1)
    values = random.integers(0, 20, 200).astype(np.float32)  # with ties
    groups = random.choice([0, 1, 3, 4], 200, p=[0.7, 0.2, 0.08, 0.02])
    expected = np.zeros(200, dtype=bool)
    for group in set(groups):
        members = sorted(np.flatnonzero(groups == group), key=lambda row: (values[row], row))
        expected[members[: math.ceil(round(share * len(members), 6))]] = True
    found = easiest_of_each(torch.from_numpy(values), torch.from_numpy(groups), share=share)
    assert found.tolist() == expected.tolist()
    assert set(groups[found]) == {0, 1, 3, 4}


# Order


def make_order(*, num_epochs=10, **settings):
    """Every third number from 5 on; the difficulty falls with the number."""
    indices_N = torch.arange(5, 305, 3)
    given = Curriculum.model_validate({"difficulty": "entropy", **settings})
    own = given.difficulty == "student_loss"
    return CurriculumOrder(
        given,
        indices_N,
        torch.arange(100) % 4,
        num_epochs=num_epochs,
        difficulty_N=None if own else -torch.arange(100.0),
    )


@pytest.mark.parametrize("pacing", ["linear", "root", "step"])
def test_every_epoch_has_as_many_places_and_the_easiest_fill_them(pacing):
    order = make_order(pacing=pacing, start=0.2, full_at=0.5)
    last_shown = set()
    for epoch in range(10):
        found = order.order(seed=7, epoch=epoch)
        assert found.dtype == torch.int64
        assert len(found) == 100
        share = pacing_share(epoch / 10, pacing=pacing, start=0.2, full_at=0.5, num_steps=4)
        num_each = math.ceil(round(25 * share, 6))
        expected = set(order.indices_N[100 - 4 * num_each :].tolist())
        numbers, counts = found.unique(return_counts=True)
        assert set(numbers.tolist()) == expected, "the hardest come last, each class alike"
        assert counts.max() - counts.min() <= 1, "all come round equally often"
        assert last_shown <= expected
        last_shown = expected
        assert torch.equal(found, make_order(pacing=pacing, start=0.2).order(seed=7, epoch=epoch))
        if epoch >= 5:
            assert torch.equal(found, epoch_order(order.indices_N, seed=7, epoch=epoch))
    one, other = order.order(seed=7, epoch=0), order.order(seed=8, epoch=0)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:20], one[20:40]), "each round is shuffled anew"


def test_a_late_full_share_never_shows_all():
    order = make_order(pacing="linear", start=0.5, full_at=1.0)
    assert not order.shown(epoch=9).all()
    assert make_order(pacing="linear", start=1.0, full_at=1.0).shown(epoch=0).all()


# The student's own loss


def test_observed_losses_count_from_the_next_epoch_on():
    order = make_order(difficulty="student_loss", pacing="linear", memory=0.25)
    assert order.watches_losses
    assert not make_order().watches_losses
    everything = epoch_order(order.indices_N, seed=1, epoch=0)
    assert torch.equal(order.order(seed=1, epoch=0), everything), "nothing is known at first"
    # Of samples 0 to 9 the loss is not known; 10 to 99 are seen, 10 to 19 twice.
    order.observe(order.indices_N[10:], torch.arange(10.0, 100.0))
    order.observe(order.indices_N[10:20], torch.full((10,), 100.0))
    before = order.order(seed=1, epoch=1)
    order.end_epoch(epoch=0)
    expected = np.arange(100.0)
    expected[:10], expected[10:20] = np.nan, (np.arange(10, 20) + 100) / 2
    np.testing.assert_allclose(order.difficulty_N, expected)
    assert not torch.equal(before, order.order(seed=1, epoch=1))
    order.observe(order.indices_N[:30], torch.zeros(30))
    order.end_epoch(epoch=1)
    expected[:10], expected[10:30] = 0, 0.25 * expected[10:30]
    np.testing.assert_allclose(order.difficulty_N, expected)


def test_samples_that_were_never_seen_are_shown():
    order = make_order(difficulty="student_loss", pacing="linear", start=0.1, full_at=1.0)
    order.observe(order.indices_N[:-1], torch.zeros(99))
    order.end_epoch(epoch=0)
    assert order.shown(epoch=1)[-1]


def test_the_self_paced_threshold_grows_to_the_largest_first_loss():
    order = make_order(
        difficulty="student_loss", pacing="self_paced", start=0.2, full_at=0.6, memory=0.0
    )
    losses = torch.linspace(0.1, 6.4, 100)[torch.randperm(100)]
    order.observe(order.indices_N, losses)
    order.end_epoch(epoch=0)
    first = np.sort(losses.numpy())[19]
    growth = (6.4 / first) ** (1 / 5)
    for epoch in range(1, 6):
        threshold = first * growth ** (epoch - 1)
        assert order.threshold(epoch=epoch) == pytest.approx(threshold, rel=1e-6)
        below = losses <= threshold * (1 + 1e-6)
        easiest = easiest_of_each(losses, order.groups_N, share=0.2)
        assert order.shown(epoch=epoch).tolist() == (below | easiest).tolist()
        assert order.shown(epoch=epoch).sum() < 100
    # From full_at on all are shown, even where losses have risen.
    order.observe(order.indices_N[:1], torch.tensor([1e9]))
    order.end_epoch(epoch=5)
    assert order.shown(epoch=6).all()


def test_self_pacing_shows_every_class_whatever_its_losses():
    order = make_order(difficulty="student_loss", pacing="self_paced", start=0.1, memory=0.0)
    losses = torch.where(order.groups_N == 2, 1000.0, 0.0) + torch.rand(100)
    order.observe(order.indices_N, losses)
    order.end_epoch(epoch=0)
    groups = order.groups_N[order.shown(epoch=1)]
    assert groups.bincount().tolist()[2] == 3
    assert set(groups.tolist()) == {0, 1, 2, 3}


def test_losses_of_zero_break_nothing():
    order = make_order(difficulty="student_loss", pacing="self_paced")
    order.observe(order.indices_N, torch.zeros(100))
    order.end_epoch(epoch=0)
    assert order.shown(epoch=1).all()


def watched_by_two(rank):
    order = make_order(difficulty="student_loss", pacing="self_paced")
    order.observe(order.indices_N[rank::2], torch.arange(100.0)[rank::2])
    return order.state_dict()


def test_every_process_takes_note_of_the_losses_of_all(tmp_path):
    first, second = in_two_processes(watched_by_two, tmp_path)
    alone = make_order(difficulty="student_loss", pacing="self_paced")
    alone.observe(alone.indices_N, torch.arange(100.0))
    for name, value in alone.state_dict().items():
        for found in (first, second):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


# In the loop


class Killed(BaseException):
    """Stands for the end of the process: nothing in the loop catches it."""


def kill_after(num_updates):
    def progress(done, total, note=""):
        if done == num_updates:
            raise Killed

    return progress


@pytest.fixture
def make_paced(make_plan, digits):
    """A plan with a curriculum of its own, as a process that starts makes it."""

    def make(folder, *, settings, **training):
        plan = make_plan(folder, num_epochs=5, checkpoint_every_steps=3, **training)
        indices_N = plan.feed.indices_N
        order = CurriculumOrder(
            Curriculum.model_validate({"difficulty": "student_loss", "full_at": 0.8, **settings}),
            indices_N,
            digits.labels_N[indices_N],
            num_epochs=5,
        )
        shown = []
        feed = dataclasses.replace(plan.feed, curriculum=order)
        epoch_of = type(feed).epoch

        class Watched(type(feed)):
            """Notes what is shown."""

            def epoch(self, *arguments, **options):
                for batch, teacher in epoch_of(self, *arguments, **options):
                    shown.append(batch.indices_N.tolist())
                    yield batch, teacher

        watched = Watched(**vars(feed))
        return dataclasses.replace(plan, feed=watched), shown

    return make


PACED = [{"pacing": "root", "start": 0.2}, {"pacing": "self_paced", "start": 0.3}]


def assert_equal_trainings(one, other):
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name
    for column in ("train_loss", "train_accuracy", "step"):
        assert [row[column] for row in one.rows] == [row[column] for row in other.rows]


@pytest.mark.parametrize("settings", PACED, ids=["root", "self_paced"])
def test_a_killed_curriculum_continues_bit_for_bit(make_paced, make_network, fabric, settings):
    plan, shown = make_paced("unbroken", settings=settings)
    unbroken = train(make_network(0.3), plan, fabric=fabric, progress=silent)
    assert unbroken.num_steps == 40, "as many updates as without a curriculum"
    assert len({number for batch in shown[8:16] for number in batch}) < 256
    assert len({number for batch in shown[32:] for number in batch}) == 256
    for num_updates in (13, 29):
        plan, _ = make_paced("broken", settings=settings)
        with pytest.raises(Killed):
            train(make_network(0.3), plan, fabric=fabric, progress=kill_after(num_updates))
    torch.manual_seed(77)
    plan, shown_again = make_paced("broken", settings=settings)
    resumed = train(make_network(0.3), plan, fabric=fabric, progress=silent)
    assert shown_again == shown[27:], "from the last checkpoint on, the same batches"
    assert_equal_trainings(unbroken, resumed)


def test_an_interrupted_curriculum_continues_bit_for_bit(make_paced, make_network, fabric):
    settings = PACED[1]
    plan, shown = make_paced("unbroken", settings=settings, num_micro_batches=2)
    unbroken = train(make_network(), plan, fabric=fabric, progress=silent)

    def interrupt(done, total, note=""):
        if done == 11:
            os.kill(os.getpid(), signal.SIGINT)

    plan, _ = make_paced("broken", settings=settings, num_micro_batches=2)
    with pytest.raises(KeyboardInterrupt):
        train(make_network(), plan, fabric=fabric, progress=interrupt)
    assert (plan.folder / INTERRUPTED_NAME).exists()
    plan, shown_again = make_paced("broken", settings=settings, num_micro_batches=2)
    resumed = train(make_network(), plan, fabric=fabric, progress=silent)
    assert shown_again == shown[11:]
    assert_equal_trainings(unbroken, resumed)


def train_in_two(make_paced, make_network, *, stop_at=None):
    """Train in two forked processes, to the end or until both are killed."""
    settings = {"pacing": "self_paced", "start": 0.3}
    plan, _ = make_paced("two" if stop_at is None else "stopped", settings=settings)
    distilled = DistillSettings(kl_weight=0.5, balance=Balance(method="gradient_norm"))
    plan = dataclasses.replace(
        plan,
        objective=DistillObjective(distilled, balance=build_balance(distilled)),
        feed=dataclasses.replace(plan.feed, teacher=Flat()),
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    stop = silent if stop_at in (None, 40) else kill_after(stop_at)
    fabric.launch(train_and_save, plan, make_network(), stop)
    return SimpleNamespace(**torch.load(plan.folder / "result.pt"))


def train_and_save(fabric, plan, network, stop):
    result = train(network, plan, fabric=fabric, progress=stop)
    states = [None, None]
    torch.distributed.all_gather_object(states, plan.feed.curriculum.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0, equal_nan=True)
    if fabric.is_global_zero:
        torch.save(vars(result), plan.folder / "result.pt")


class Flat:
    """A teacher without an opinion."""

    def outputs(self, batch, *, view):
        return TeacherOutputs(torch.zeros(len(batch.labels_N), 10))


def test_two_processes_agree_and_continue_bit_for_bit(make_paced, make_network):
    unbroken = train_in_two(make_paced, make_network)
    for stop_at in (5, 13):
        with pytest.raises(ProcessExitedException):
            train_in_two(make_paced, make_network, stop_at=stop_at)
    resumed = train_in_two(make_paced, make_network, stop_at=40)
    for one, other in ((unbroken.weights, resumed.weights), (unbroken.parts, resumed.parts)):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


def test_the_loop_tells_the_losses_of_the_labels(make_paced, make_network, fabric, digits):
    plan, _ = make_paced("run", settings={"memory": 0.0}, optimizer={"learning_rate": 1e-12})
    network = make_network()
    network.norm = torch.nn.Identity()
    train(network, plan, fabric=fabric, progress=silent)
    indices_N = plan.feed.indices_N
    labels_N = digits.labels_N[indices_N]
    with torch.no_grad():
        p = network(digits.images(indices_N)).softmax(dim=1)[torch.arange(256), labels_N]
    torch.testing.assert_close(plan.feed.curriculum.difficulty_N, -p.log())

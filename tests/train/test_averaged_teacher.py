"""The moving average that teaches its own network, against a plain loop."""

import copy

import pytest
import torch
from torch import nn

from understudy.data.batches import Batch, epoch_order
from understudy.progress import silent
from understudy.train.averaged_teacher import EmaObjective
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import DistillObjective
from understudy.train.loop import train
from understudy.train.settings import Schedule

DECAY = 0.7


def ema(network, **settings):
    given = DistillSettings(**{"kl_weight": 0.6, "ce_weight": 1, "temperature": 2, **settings})
    return EmaObjective(network, DistillObjective(given), decay=DECAY)


def plain_training(network, plan, digits, *, kl_weight):
    """Mean teacher in plain PyTorch; ``kl_weight(share of training done)``."""
    average = copy.deepcopy(network).eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    num_steps = plan.settings.num_epochs * plan.feed.num_batches
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps - 1)
    step = 0
    for epoch in range(plan.settings.num_epochs):
        order = epoch_order(plan.feed.indices_N, seed=plan.feed.seed, epoch=epoch)
        for indices in order.split(plan.settings.batch_size):
            images, labels = digits.images(indices), digits.labels_N[indices]
            with torch.no_grad():
                target = (average(images) / 2).softmax(1)
            logits = network(images)
            soft = 4 * (target * (target.log() - (logits / 2).log_softmax(1))).sum(1).mean()
            loss = nn.functional.cross_entropy(logits, labels)
            loss = loss + kl_weight(step / (num_steps - 1)) * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            # The first update copies the network, the next ones are warmed up to the decay.
            decay = 0.0 if step == 0 else min(DECAY, (1 + step) / (10 + step))
            new = network.state_dict()
            for name, value in average.state_dict().items():
                if value.is_floating_point():
                    value.copy_(decay * value + (1 - decay) * new[name])
                else:
                    value.copy_(new[name])
            step += 1
    return average


@pytest.mark.parametrize("weight", [0.6, Schedule(start=0, end=2)])
def test_it_is_the_plain_loop(make_plan, make_network, fabric, digits, weight):
    network = make_network()
    plan = make_plan(objective=ema(network, kl_weight=weight))
    result = train(network, plan, fabric=fabric, progress=silent)
    reference = make_network()
    average = plain_training(
        reference,
        plan,
        digits,
        kl_weight=lambda done: 2 * done if isinstance(weight, Schedule) else weight,
    )
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(result.weights[name], value, rtol=1e-3, atol=1e-4)
    for name, value in average.state_dict().items():
        found = result.parts[f"average.module.{name}"]
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)
    assert set(result.rows[-1]["losses"]) == {"kl", "ce"}


def test_the_average_is_the_one_that_ema_decay_keeps(make_plan, make_network, fabric):
    network = make_network()
    plan = make_plan(objective=ema(network), ema_decay=DECAY)
    result = train(network, plan, fabric=fabric, progress=silent)
    for name, value in result.weights.items():
        assert torch.equal(value, result.parts[f"average.module.{name}"]), name


def test_the_average_is_not_trained_and_answers_without_dropout(digits, make_network):
    network = make_network(0.5)
    objective = ema(network)
    objective.parts.train()
    assert not any(p.requires_grad for p in objective.parts.parameters())
    batch = Batch(torch.arange(8), digits.images(torch.arange(8)), digits.labels_N[:8])
    distances = []
    for _ in range(2):
        torch.manual_seed(0)  # of the student's dropout
        network.train()
        output = objective.step(network, batch, None, 0.0)
        distances.append(output.terms["kl"].item())
        torch.rand(3)
    assert distances[0] == distances[1] > 0
    # A picture's answer does not depend on the batch that it is in.
    whole = objective.average(batch.images_NCHW)
    torch.testing.assert_close(objective.average(batch.images_NCHW[:1]), whole[:1])


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("num_updates", [1, 11, 16])
def test_a_killed_training_continues_bit_for_bit(make_plan, make_network, fabric, num_updates):
    options = {"checkpoint_every_steps": 3, "optimizer": {"name": "adamw", "learning_rate": 0.02}}
    network = make_network(0.3)
    plan = make_plan("unbroken", objective=ema(network), **options)
    unbroken = train(network, plan, fabric=fabric, progress=silent)

    def kill(done, total, note=""):
        if done == num_updates:
            raise Killed

    network = make_network(0.3)
    plan = make_plan("broken", objective=ema(network), **options)
    with pytest.raises(Killed):
        train(network, plan, fabric=fabric, progress=kill)
    network = make_network(0.3)
    torch.manual_seed(1234)
    plan = make_plan("broken", objective=ema(network), **options)
    resumed = train(network, plan, fabric=fabric, progress=silent)
    for one, other in ((unbroken.weights, resumed.weights), (unbroken.parts, resumed.parts)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_micro_batches_accumulate_to_the_whole_batch(make_plan, make_network, fabric):
    results = []
    for folder, num_micro_batches in (("whole", 1), ("parts", 4)):
        network = make_network()
        network.norm = nn.Identity()
        plan = make_plan(folder, objective=ema(network), num_micro_batches=num_micro_batches)
        results.append(train(network, plan, fabric=fabric, progress=silent))
    whole, parts = results
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=1e-4, atol=1e-5)

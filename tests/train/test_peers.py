"""Online teacher and mutual peers against plain loops with an optimiser for each network."""

import pytest
import torch
from torch import nn

from understudy.data.batches import Batch, epoch_order
from understudy.progress import silent
from understudy.train.balance import build_balance
from understudy.train.devices import make_fabric
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import DistillObjective
from understudy.train.loop import train
from understudy.train.peers import MutualObjective, OnlineObjective

TIMES = ("seconds", "samples_per_second")


class Deep(nn.Module):
    """Another network than the student's: a hidden layer, and no running statistics."""

    def __init__(self, seed, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(64, 12), nn.Linear(12, 10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images_NCHW):
        pixels = images_NCHW.flatten(1).float() / 255
        return self.last(self.dropout(self.first(pixels)).relu())


def plain_kl(own, other, temperature):
    """KL(other || own) at a temperature, times its square, mean over the batch."""
    p, q = (other / temperature).softmax(1), (own / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def plain_joint_training(networks, plan, digits, losses_of, make_optimizer):
    """Every network with an optimiser of its own; ``losses_of(logits, labels)`` gives its loss."""
    optimizers = [make_optimizer(network) for network in networks]
    num_steps = plan.settings.num_epochs * plan.feed.num_batches
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps - 1)
        for optimizer in optimizers
    ]
    for epoch in range(plan.settings.num_epochs):
        order = epoch_order(plan.feed.indices_N, seed=plan.feed.seed, epoch=epoch)
        for indices in order.split(plan.settings.batch_size):
            images, labels = digits.images(indices), digits.labels_N[indices]
            losses = losses_of([network(images) for network in networks], labels)
            gradients = [
                torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
                for loss, network in zip(losses, networks, strict=True)
            ]
            for network, own in zip(networks, gradients, strict=True):
                for parameter, gradient in zip(network.parameters(), own, strict=True):
                    parameter.grad = gradient
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, nesterov=True)


def adamw(network):
    return torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=0.0)


OPTIMIZERS = {
    sgd: {"learning_rate": 0.5, "weight_decay": 0.0},
    adamw: {"name": "adamw", "learning_rate": 0.02, "weight_decay": 0.0},
}


def assert_close_weights(weights, network, *, prefix=""):
    for name, value in network.state_dict().items():
        torch.testing.assert_close(weights[prefix + name], value, rtol=1e-3, atol=1e-4)


def online(settings, *, seed=2, dropout=0.0, **options):
    return OnlineObjective(Deep(seed, dropout), DistillObjective(settings), **options)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
@pytest.mark.parametrize("teacher_kl_weight", [0.0, 0.5])
def test_an_online_step_is_that_of_two_optimisers(
    make_plan, make_network, fabric, digits, make_optimizer, teacher_kl_weight
):
    settings = DistillSettings(kl_weight=0.7, ce_weight=0.3, temperature=3)
    objective = online(settings, temperature=3.0, teacher_kl_weight=teacher_kl_weight)
    plan = make_plan(objective=objective, optimizer=OPTIMIZERS[make_optimizer])
    trained, student = make_network(), make_network()
    for network in (trained, student):
        # The gradient of a bias before it is rounding alone, which AdamW makes a step of.
        network.norm = nn.Identity()
    result = train(trained, plan, fabric=fabric, progress=silent)

    def losses_of(logits, labels):
        student, teacher = logits
        cross_entropy = nn.functional.cross_entropy
        soft = plain_kl(student, teacher.detach(), 3.0)
        own = cross_entropy(teacher, labels)
        own = own + teacher_kl_weight * plain_kl(teacher, student.detach(), 3.0)
        return 0.7 * soft + 0.3 * cross_entropy(student, labels), own

    teacher = Deep(2)
    plain_joint_training([student, teacher], plan, digits, losses_of, make_optimizer)
    assert_close_weights(result.weights, student)
    assert_close_weights(result.parts, teacher, prefix="teacher.")
    terms = {"kl", "ce", "teacher_ce"} | ({"teacher_kl"} if teacher_kl_weight else set())
    assert set(result.rows[-1]["losses"]) == terms


@pytest.mark.parametrize("num_peers", [1, 2])
def test_mutual_learning_is_the_equations_of_the_paper(
    make_plan, make_network, fabric, digits, num_peers
):
    settings = DistillSettings(kl_weight=1, ce_weight=1, temperature=1)
    objective = MutualObjective([Deep(10 + k) for k in range(num_peers)], settings)
    plan = make_plan(objective=objective)
    result = train(make_network(), plan, fabric=fabric, progress=silent)

    def losses_of(logits, labels):
        for k, own in enumerate(logits):
            others = [other.detach() for m, other in enumerate(logits) if m != k]
            distances = [plain_kl(own, other, 1.0) for other in others]
            mean = sum(distances) / (len(logits) - 1)
            yield nn.functional.cross_entropy(own, labels) + mean

    networks = [make_network(), *(Deep(10 + k) for k in range(num_peers))]
    plain_joint_training(networks, plan, digits, losses_of, sgd)
    assert_close_weights(result.weights, networks[0])
    for number, peer in enumerate(networks[1:], start=1):
        assert_close_weights(result.parts, peer, prefix=f"peer-{number}.")
        assert f"peer{number}_kl" in result.rows[-1]["losses"]


def make_objectives():
    settings = DistillSettings(kl_weight=1, ce_weight=1, temperature=2)
    return {
        "online": lambda dropout: online(settings, dropout=dropout, teacher_kl_weight=0.1),
        "mutual": lambda dropout: MutualObjective([Deep(3, dropout), Deep(4, dropout)], settings),
    }


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_after(num_updates):
    def progress(done, total, note=""):
        if done == num_updates:
            raise Killed

    return progress


@pytest.mark.parametrize("name", make_objectives())
@pytest.mark.parametrize("num_updates", [1, 11, 16])
def test_a_killed_training_continues_bit_for_bit(
    make_plan, make_network, fabric, name, num_updates
):
    make = make_objectives()[name]
    options = {"checkpoint_every_steps": 3, "ema_decay": 0.9, "clip_norm": 1.0}
    plan = make_plan("unbroken", objective=make(0.3), **options)
    unbroken = train(make_network(0.3), plan, fabric=fabric, progress=silent)
    torch.manual_seed(99)
    # The first weights come from seeds; the dropout of these networks from torch's generator.
    objective, network = make(0.3), make_network(0.3)
    with pytest.raises(Killed):
        train(
            network,
            make_plan("broken", objective=objective, **options),
            fabric=fabric,
            progress=kill_after(num_updates),
        )
    again, network = make(0.3), make_network(0.3)
    torch.manual_seed(1234)
    plan = make_plan("broken", objective=again, **options)
    resumed = train(network, plan, fabric=fabric, progress=silent)
    for one, other in ((unbroken.weights, resumed.weights), (unbroken.parts, resumed.parts)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in result.rows]
        for result in (unbroken, resumed)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", make_objectives())
def test_micro_batches_accumulate_to_the_whole_batch(make_plan, make_network, fabric, name):
    results = []
    for folder, num_micro_batches in (("whole", 1), ("parts", 4)):
        network = make_network()
        network.norm = nn.Identity()
        objective = make_objectives()[name](0.0)
        plan = make_plan(folder, objective=objective, num_micro_batches=num_micro_batches)
        results.append(train(network, plan, fabric=fabric, progress=silent))
    whole, parts = results
    for one, other in ((whole.weights, parts.weights), (whole.parts, parts.parts)):
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5)
    assert whole.rows[-1]["losses"] == pytest.approx(parts.rows[-1]["losses"], rel=1e-4)


class Watching(Deep):
    """Notes in which precision its layers answer in training."""

    def forward(self, images_NCHW):
        logits = super().forward(images_NCHW)
        if torch.is_grad_enabled():  # validation is in float32
            self.seen = logits.dtype
        return logits


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_networks_beside_run_in_the_precision_of_the_student(make_plan, precision):
    fabric = make_fabric(precision=precision)
    fabric.launch()
    settings = DistillSettings(kl_weight=1, ce_weight=1)
    student, teacher, peer = Watching(1), Watching(2), Watching(3)
    taught = OnlineObjective(teacher, DistillObjective(settings), precision=precision)
    for folder, objective in (
        ("online", taught),
        ("mutual", MutualObjective([peer], settings, precision=precision)),
    ):
        plan = make_plan(folder, objective=objective, num_epochs=1, precision=precision)
        train(student, plan, fabric=fabric, progress=silent)
    assert {student.seen, teacher.seen, peer.seen} == {getattr(torch, precision)}
    assert peer.first.weight.dtype == torch.float32


def test_schedules_move_the_weights_of_all_networks():
    settings = DistillSettings(
        kl_weight=1, ce_weight=0.2, temperature=1, teacher_share={"start": 1, "end": 0}
    )
    mutual = MutualObjective([Deep(1)], settings)
    assert mutual.weights(0.0) == {"kl": 1, "ce": 0.2, "peer1_kl": 1, "peer1_ce": 0.2}
    assert mutual.weights(1.0) == {"kl": 0, "ce": 1, "peer1_kl": 0, "peer1_ce": 1}
    taught = online(settings, teacher_kl_weight=0.3)
    assert taught.weights(1.0) == {"kl": 0, "ce": 1, "teacher_ce": 1, "teacher_kl": 0.3}


@pytest.mark.parametrize("name", make_objectives())
def test_what_teaches_gets_no_gradient_from_what_it_teaches(digits, make_network, name):
    objective = make_objectives()[name](0.0)
    batch = Batch(torch.arange(8), digits.images(torch.arange(8)), digits.labels_N[:8])
    output = objective.step(make_network(), batch, None, 0.0)
    others = list(objective.parts.parameters())
    for term in ("kl", "ce"):
        gradients = torch.autograd.grad(
            output.terms[term], others, retain_graph=True, allow_unused=True
        )
        assert all(gradient is None for gradient in gradients)


@pytest.mark.parametrize("method", ["uncertainty", "gradient_norm"])
def test_the_weights_of_a_student_with_an_online_teacher_can_be_balanced(
    make_plan, make_network, fabric, method
):
    settings = DistillSettings(kl_weight=1, ce_weight=0.5, balance={"method": method})
    student = DistillObjective(settings, balance=build_balance(settings))
    plan = make_plan(objective=OnlineObjective(Deep(2), student), num_epochs=1)
    result = train(make_network(), plan, fabric=fabric, progress=silent)
    assert {"kl", "ce", "teacher_ce"} <= set(result.rows[0]["losses"])
    assert any(name.startswith("student.balance.") for name in result.parts)

"""Guidance of side heads: its terms, what they may not touch, and trainings with them."""

import pytest
import torch
from process_pair import in_two_processes
from torch import nn
from torch.nn import functional as F

from understudy.data.batches import Batch
from understudy.errors import InputError
from understudy.heads.exits import add_exits
from understudy.models.build import NormalizedModel, build_network
from understudy.models.taps import Tap, Taps
from understudy.progress import silent
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.averaged_teacher import EmaObjective
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import DistillObjective
from understudy.train.exit_settings import ExitGuidance
from understudy.train.exits import ExitHint, ExitObjective
from understudy.train.loop import train
from understudy.train.objective import LabelObjective
from understudy.train.settings import Schedule
from understudy.train.training import INTERRUPTED_NAME

SHAPE = (1, 8, 8)
LAYERS = ("stem", "blocks.0")


@pytest.fixture
def make_exits():
    def make():
        torch.manual_seed(0)
        arguments = {"stages": [[8, 1], [16, 2], [16, 1]]}
        network = build_network("separable", num_classes=10, image_shape=SHAPE, arguments=arguments)
        model = NormalizedModel(network, mean=[0.3], std=[0.4])
        return add_exits(model, SHAPE, LAYERS, num_classes=10)

    return make


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images_NCHW = torch.randint(0, 256, (12, *SHAPE), dtype=torch.uint8, generator=generator)
    return Batch(torch.arange(12), images_NCHW, torch.arange(12) % 10)


@pytest.fixture
def teacher():
    return TeacherOutputs(torch.randn(12, 10, generator=torch.Generator().manual_seed(2)))


def plain_kl(student_NK, teacher_NK, temperature):
    student, target = student_NK / temperature, teacher_NK / temperature
    divergence = F.kl_div(student.log_softmax(1), target.softmax(1), reduction="batchmean")
    return temperature**2 * divergence


def hint_of(network):
    torch.manual_seed(3)
    adapters = [nn.Linear(8, 16), nn.Identity()]
    return ExitHint(network.model, network.layers, adapters)


def test_terms_are_those_by_hand(make_exits, batch, teacher):
    network = make_exits().eval()
    hint = hint_of(network)
    guidance = ExitGuidance(ce_weight=0.2, teacher_weight=0.5, last_weight=0.3, temperature=3)
    last = DistillObjective(DistillSettings(temperature=2), label_smoothing=0.1)
    objective = ExitObjective(last, guidance, label_smoothing=0.1, hint=hint, hint_weight=0.03)
    terms, logits_NK = objective.step(network, batch, teacher, 0.0)
    first_NK, second_NK, last_NK = network(batch.images_NCHW, all_exits=True)
    assert torch.equal(logits_NK, last_NK)
    labels, sides = batch.labels_N, (first_NK, second_NK)
    expected = {
        "ce": F.cross_entropy(last_NK, labels, label_smoothing=0.1),
        "kl": plain_kl(last_NK, teacher.logits_NK, 2),
        "exit_ce": sum(F.cross_entropy(side, labels, label_smoothing=0.1) for side in sides),
        "exit_teacher": sum(plain_kl(side, teacher.logits_NK, 3) for side in sides),
        "exit_last": sum(plain_kl(side, last_NK, 3) for side in sides),
    }
    model = network.model
    taps = [Tap("stem", "pooled"), Tap("blocks.0", "pooled"), Tap("embedding", "pooled")]
    _, features = Taps(model, taps).run(model, batch.images_NCHW)
    stem, block, embedding = features.values()
    distances = [(hint.adapters[0](stem) - embedding), (hint.adapters[1](block) - embedding)]
    expected["exit_hint"] = sum(d.square().sum(1).mean() for d in distances)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    weights = objective.weights(0.0)
    assert {name: weights[name] for name in expected} == {
        "kl": 0.9,
        "ce": 0.1,
        "exit_ce": 0.2,
        "exit_teacher": 0.5,
        "exit_last": 0.3,
        "exit_hint": 0.03,
    }


def test_one_forward_pass_serves_everything(make_exits, batch, teacher):
    network = make_exits()
    calls = []
    network.model.network.stem.register_forward_hook(lambda *_: calls.append(1))
    last = DistillObjective(DistillSettings(), taps=Taps(network.model, [Tap("blocks.0")]))
    objective = ExitObjective(last, ExitGuidance(), hint=hint_of(network), hint_weight=1.0)
    objective.step(network, batch, teacher, 0.0)
    assert len(calls) == 1


def test_the_last_exit_learns_nothing_from_the_side_heads(make_exits, batch, teacher):
    network = make_exits().eval()
    objective = ExitObjective(
        LabelObjective(), ExitGuidance(), hint=hint_of(network), hint_weight=1.0
    )
    terms, _ = objective.step(network, batch, teacher, 0.0)
    side_terms = [value for name, value in terms.items() if name.startswith("exit_")]
    sum(side_terms).backward()
    deep = (network.model.network.linear, network.model.network.blocks[1])
    assert all(p.grad is None or not p.grad.any() for part in deep for p in part.parameters())
    reached = (*network.heads, *objective.hint.adapters, network.model.network.stem)
    assert all(p.grad is not None and p.grad.any() for part in reached for p in part.parameters())


def test_without_a_teacher_and_with_weights_of_zero_terms_are_left_out(make_exits, batch):
    guidance = ExitGuidance(ce_weight=0, last_weight=1)
    terms, _ = ExitObjective(LabelObjective(), guidance).step(make_exits(), batch, None, 0.0)
    assert set(terms) == {"ce", "exit_last"}
    with pytest.raises(ValueError, match="are all 0"):
        ExitGuidance(ce_weight=0, teacher_weight=0, last_weight=0)


def test_the_share_of_the_teacher_counts_for_side_heads_too():
    share = Schedule(start=1, end=0)
    objective = ExitObjective(LabelObjective(), ExitGuidance(), teacher_share=share)
    assert objective.weights(0.0)["exit_teacher"] == pytest.approx(0.5)
    assert objective.weights(0.5)["exit_teacher"] == pytest.approx(0.25)
    assert objective.weights(1.0)["exit_ce"] == pytest.approx(0.2)


def test_a_wrapped_averaged_teacher_follows_the_plain_network(make_exits, batch):
    network = make_exits()
    alone = DistillObjective(DistillSettings(ce_weight=0.5))
    objective = ExitObjective(EmaObjective(network.model, alone, decay=0.9), ExitGuidance())
    terms, _ = objective.step(network, batch, None, 0.0)
    assert {"kl", "ce", "exit_ce", "exit_last"} == set(terms)
    with torch.no_grad():
        network.model.network.linear.weight.fill_(1.0)
    before = objective.networks["average"].network.linear.weight.clone()
    objective.after_step(network)
    assert not torch.equal(before, objective.networks["average"].network.linear.weight)


def exit_plan(make_plan, network, folder, **settings):
    hint = hint_of(network)
    objective = ExitObjective(
        LabelObjective(), ExitGuidance(), hint=hint, hint_weight=Schedule(start=0.1, end=0)
    )
    optimizer = {"name": "adamw", "learning_rate": 0.01}
    return make_plan(folder, objective, optimizer=optimizer, ema_decay=0.9, **settings)


def test_heads_are_trained_averaged_and_resumed_bit_for_bit(make_plan, make_exits, fabric):
    whole = make_exits()
    expected = train(whole, exit_plan(make_plan, whole, "whole"), fabric=fabric, progress=silent)
    assert {name.split(".")[0] for name in expected.weights} == {"model", "heads"}
    assert expected.rows[-1]["losses"].keys() == {"ce", "exit_ce", "exit_last", "exit_hint"}

    def interrupt(done, total, note=""):
        if done == 13:  # in the middle of an epoch
            raise KeyboardInterrupt

    parts = make_exits()
    plan = exit_plan(make_plan, parts, "parts", checkpoint_every_steps=3)
    with pytest.raises(KeyboardInterrupt):
        train(parts, plan, fabric=fabric, progress=interrupt)
    assert not (plan.folder / INTERRUPTED_NAME).exists()  # as after a kill
    again = make_exits()
    plan = exit_plan(make_plan, again, "parts", checkpoint_every_steps=3)
    resumed = train(again, plan, fabric=fabric, progress=silent)
    assert resumed.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert torch.equal(value, resumed.weights[name]), name
    for name, value in expected.parts.items():
        assert torch.equal(value, resumed.parts[name]), name


def test_two_processes_give_the_gradient_of_the_whole_batch(make_exits, batch, tmp_path):
    def gradients(network, part, forward):
        objective = ExitObjective(LabelObjective(), ExitGuidance())
        terms, _ = objective.step(forward, part, None, 0.0)
        weights = objective.weights(0.0)
        sum(weights[name] * term for name, term in terms.items()).backward()
        # No parameter is left out: none would be waited for.
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    def in_process(rank):
        network = make_exits().eval()  # batch norm sees the share of a process only
        rows = slice(6 * rank, 6 * rank + 6)
        part = Batch(batch.indices_N[rows], batch.images_NCHW[rows], batch.labels_N[rows])
        return gradients(network, part, nn.parallel.DistributedDataParallel(network))

    network = make_exits().eval()
    expected = gradients(network, batch, network)
    for found in in_two_processes(in_process, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_settings_refuse_unknown_weights():
    with pytest.raises((ValueError, InputError), match="extra"):
        ExitGuidance.model_validate({"kl_weight": 1})

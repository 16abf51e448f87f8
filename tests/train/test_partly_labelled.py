"""Every label of an update counts alike, however the update is cut into parts and processes."""

import contextlib
import dataclasses

import pytest
import torch
import torch.distributed
from process_pair import in_two_processes
from torch import nn

from understudy.data.batches import Batch
from understudy.data.unlabelled import hide_labels
from understudy.progress import silent
from understudy.train.feed import split_update
from understudy.train.loop import train
from understudy.train.objective import label_loss
from understudy.train.training import Training

LABELS_N = torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3])
PARTNERS_N = torch.tensor([1, -1, 2, 0, 3, -1, -1, 1])
LOGITS_NK = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def partly_labelled(make_plan, digits):
    """A plan whose pictures have a label only at the start of each batch, and few of them."""

    def make(folder, **settings):
        plan = make_plan(folder, **settings)
        hidden_N = torch.arange(digits.num_samples) % 5 != 0
        feed = dataclasses.replace(plan.feed, source=hide_labels(digits, hidden_N))
        return dataclasses.replace(plan, feed=feed)

    return make


@pytest.fixture
def plain_network(make_network):
    def make():
        network = make_network()
        network.norm = nn.Identity()  # batch norm sees the part alone
        return network

    return make


def parts_of(batch, *, size, labelled_share):
    parts = split_update(
        batch, None, size=size, device=torch.device("cpu"), labelled_share=labelled_share
    )
    return [part for part, _ in parts]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_loss_of_the_parts_is_that_of_the_whole(mixed, size):
    mixing = (PARTNERS_N, torch.linspace(0, 1, 8)) if mixed else ()
    batch = Batch(torch.arange(8), LOGITS_NK[:, :, None, None], LABELS_N, *mixing)
    share = batch.labelled_N.sum().item() / 8
    assert share == (2 / 8 if mixed else 4 / 8)
    losses = [
        label_loss(part.images_NCHW[:, :, 0, 0], part, label_smoothing=0.1) * len(part.labels_N) / 8
        for part in parts_of(batch, size=size, labelled_share=share)
    ]
    expected = label_loss(LOGITS_NK, batch, label_smoothing=0.1)
    assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-6)


def test_parts_with_equal_shares_of_labels_are_not_weighed():
    batch = Batch(torch.arange(8), torch.zeros(8, 1, 2, 2), LABELS_N.clamp(min=0))
    assert [p.label_factor for p in parts_of(batch, size=3, labelled_share=1)] == [None] * 3
    none = Batch(torch.arange(8), torch.zeros(8, 1, 2, 2), torch.full((8,), -1))
    assert [p.label_factor for p in parts_of(none, size=3, labelled_share=0)] == [None] * 3


def test_micro_batches_accumulate_to_the_whole_batch(partly_labelled, plain_network, fabric):
    whole = train(plain_network(), partly_labelled("a"), fabric=fabric, progress=silent)
    plan = partly_labelled("b", num_micro_batches=8)
    parts = train(plain_network(), plan, fabric=fabric, progress=silent)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=1e-4, atol=1e-5)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert other["losses"]["ce"] == pytest.approx(one["losses"]["ce"], rel=1e-4)


class TwoProcesses:
    """What an update asks of Fabric, among processes that exist already."""

    device = torch.device("cpu")
    world_size = 2

    def __init__(self, rank):
        self.global_rank = rank

    def setup(self, network, optimizer):
        return nn.parallel.DistributedDataParallel(network), optimizer

    def no_backward_sync(self, model, *, enabled):
        return model.no_sync() if enabled else contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def all_reduce(self, value, reduce_op):
        assert reduce_op == "sum"
        torch.distributed.all_reduce(value)
        return value


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_processes_share_the_gradient_of_the_whole_batch(
    partly_labelled, plain_network, fabric, tmp_path, num_micro_batches
):
    def gradients(fabric, **settings):
        plan = partly_labelled("run", num_micro_batches=num_micro_batches)
        network = plain_network()
        training = Training(network, plan, fabric)
        training.backward(*next(training.rest_of_epoch()))
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    expected = gradients(fabric)
    for found in in_two_processes(lambda rank: gradients(TwoProcesses(rank)), tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)

"""Muon against ``torch.optim.Muon``, the singular value decomposition and SGD."""

import pytest
import torch
from torch import nn

from understudy.heads.exits import add_exits
from understudy.train.muon import Muon, matrices, orthogonal
from understudy.train.optimization import build_optimizer
from understudy.train.settings import Optimizer


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 9, 5), (3, 6, 6), (1, 1, 4)])
def test_the_singular_vectors_stay_and_the_values_come_near_one(shape):
    given_BRC = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    found_BRC = orthogonal(given_BRC)

    left_BRK, _, right_BKC = torch.linalg.svd(given_BRC, full_matrices=False)
    values_BKK = left_BRK.mT @ found_BRC @ right_BKC.mT
    diagonal_BK = values_BKK.diagonal(dim1=-2, dim2=-1)
    assert diagonal_BK.min() > 0.3
    assert diagonal_BK.max() < 1.3
    assert torch.allclose(values_BKK, torch.diag_embed(diagonal_BK), atol=1e-4)


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonal(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


@pytest.mark.parametrize(("rows", "columns"), [(12, 5), (5, 12)])
def test_matrices_move_as_by_torch(rows, columns):
    generator = torch.Generator().manual_seed(1)
    ours = nn.Parameter(torch.randn(rows, columns, 1, 1, generator=generator))
    theirs = nn.Parameter(ours.detach().flatten(1).clone())
    groups = [{"params": [ours], "orthogonal": True, "weight_decay": 0.1, "rate_factor": 0.5}]
    one = Muon(groups, lr=0.04, momentum=0.9)
    other = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1)
    start = theirs.detach().clone()

    for _ in range(5):
        theirs.grad = torch.randn(rows, columns, generator=generator)
        ours.grad = theirs.grad.view_as(ours).clone()
        one.step()
        other.step()

    moved = (theirs - start).norm()
    # torch iterates in bfloat16, of 8 bits.
    assert (ours.flatten(1) - theirs).norm() < 0.02 * moved


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.Flatten(),
        nn.Linear(12 * 16, 6),
        nn.Linear(6, 4),
    )


def test_depthwise_kernels_norms_and_the_classifier_move_by_sgd():
    network = small_network()
    adapter = nn.Linear(3, 3)
    reference = small_network()
    reference.load_state_dict(network.state_dict())
    beside = nn.Linear(3, 3)
    beside.load_state_dict(adapter.state_dict())
    settings = Optimizer(name="muon", learning_rate=0.3, weight_decay=0.01, momentum=0.8)
    muon = build_optimizer((network, adapter), settings)
    sgd = build_optimizer((reference, beside), settings.model_copy(update={"name": "sgd"}))

    for _ in range(3):
        for one, other in zip(
            [*network.parameters(), *adapter.parameters()],
            [*reference.parameters(), *beside.parameters()],
            strict=True,
        ):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        muon.step()
        sgd.step()

    by_muon = {"0.weight", "3.weight", "5.weight"}
    for name, value in network.named_parameters():
        assert torch.allclose(value, reference.get_parameter(name)) == (name not in by_muon), name
    assert torch.allclose(adapter.weight, beside.weight)


def test_the_classifier_of_a_network_with_side_heads_is_its_own():
    network = small_network()
    exits = add_exits(network, (3, 8, 8), ["0"], num_classes=4, channels=5)
    groups = build_optimizer((exits, nn.Identity()), Optimizer(name="muon")).param_groups

    [orthogonal_group] = [group for group in groups if group["orthogonal"]]
    assert set(map(id, orthogonal_group["params"])) == set(map(id, matrices(network)))
    moved = sum(len(group["params"]) for group in groups)
    assert moved == len(list(exits.parameters())), "side heads move by SGD"


def test_shared_and_frozen_weights_are_listed_once_and_never():
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    network[1].weight = network[0].weight
    network[2].weight.requires_grad = False

    assert [id(weight) for weight in matrices(network)] == [id(network[0].weight)]

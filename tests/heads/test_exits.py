"""Side heads: what they read, what they cost, and that nothing behind an exit is run."""

import copy

import pytest
import torch
from torch import nn

from understudy.errors import ModelError
from understudy.heads.exits import (
    ExitHead,
    SingleExit,
    add_exits,
    check_exits,
    exit_macs,
    split_weights,
)
from understudy.models.build import NormalizedModel, build_network

SHAPE = (1, 8, 8)


def model_of(name="separable", **arguments):
    torch.manual_seed(0)
    network = build_network(name, num_classes=10, image_shape=SHAPE, arguments=arguments)
    return NormalizedModel(network, mean=[0.3], std=[0.4])


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8, generator=generator)


@pytest.fixture
def network():
    stages = [[8, 1], [16, 1], [16, 2], [24, 1]]
    layers = ["blocks.1", "stem"]
    return add_exits(model_of(stages=stages), SHAPE, layers, num_classes=10).eval()


def test_every_exit_answers_as_its_layer_and_head_by_hand(network, pictures):
    model, inner = network.model, network.model.network
    with torch.no_grad():
        exits = network(pictures, all_exits=True)
        stem = inner.stem(model.normalize(pictures))
        block = inner.blocks[:2](stem)
        for number, features in enumerate((stem, block)):
            by_hand = network.heads[number].linear(features.mean(dim=(2, 3)))
            torch.testing.assert_close(exits[number], by_hand)
        assert torch.equal(exits[-1], model(pictures))
        assert torch.equal(exits[-1], network(pictures))
        for number in range(network.num_exits):
            assert torch.equal(SingleExit(network, number)(pictures), exits[number])


def test_exits_are_numbered_from_shallow_to_deep_whatever_their_order(network):
    assert network.layers == ("stem", "blocks.1")
    assert network.num_exits == 3


def test_nothing_behind_an_exit_is_run(network, pictures):
    def fail(module, inputs):
        raise AssertionError("this layer is behind the exit")

    network.model.network.blocks[1].register_forward_pre_hook(fail)
    SingleExit(network, 0)(pictures)
    with pytest.raises(AssertionError, match="behind the exit"):
        SingleExit(network, 1)(pictures)
    # The hook that cut the pass short is gone.
    assert not network.model.network.stem._forward_hooks


def test_costs_are_those_of_the_way_and_of_the_heads_on_it():
    # 64 -> 16 -> 12 -> 10 with heads after the first and the second hidden layer.
    model = model_of("mlp", hidden=[16, 12])
    network = add_exits(model, SHAPE, ["layers.2", "layers.4"], num_classes=10)
    way = [64 * 16, 64 * 16 + 16 * 12, 64 * 16 + 16 * 12 + 12 * 10]
    heads = [16 * 10, 12 * 10]
    assert exit_macs(network, SHAPE) == (
        way[0] + heads[0],
        way[1] + heads[0] + heads[1],
        way[2] + heads[0] + heads[1],
    )


@pytest.mark.parametrize(
    ("shape", "kind"), [((12, 4, 4), "map"), ((5, 12), "pooled"), ((12,), "pooled")]
)
def test_heads_read_maps_tokens_and_vectors(shape, kind):
    head = ExitHead(shape, num_classes=3, channels=7)
    assert head.kind == kind
    features = torch.rand(4, *(shape if kind == "map" else (12,)))
    assert head(features).shape == (4, 3)
    assert head.linear.in_features == 7
    assert ExitHead(shape, num_classes=3).linear.in_features == 12


def test_a_head_with_a_convolution_sees_positions(pictures):
    network = add_exits(
        model_of(stages=[[8, 1], [16, 1]]), SHAPE, ["stem"], num_classes=10, channels=6
    ).eval()
    with torch.no_grad():
        stem = network.model.network.stem(network.model.normalize(pictures))
        hidden = network.heads[0].hidden(stem)
        by_hand = network.heads[0].linear(hidden.mean(dim=(2, 3)))
        torch.testing.assert_close(network(pictures, all_exits=True)[0], by_hand)


def test_a_copy_reads_its_own_layers(network, pictures):
    other = copy.deepcopy(network)
    with torch.no_grad():
        before = network(pictures, all_exits=True)
        for parameter in other.parameters():
            parameter.zero_()
        after = network(pictures, all_exits=True)
        zeroed = other(pictures, all_exits=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(not logits_NK.any() for logits_NK in zeroed)


def test_weights_are_split_into_those_of_model_and_heads(network):
    model, heads = split_weights(network.state_dict())
    assert model.keys() == network.model.state_dict().keys()
    assert heads.keys() == network.heads.state_dict().keys()
    plain = network.model.state_dict()
    assert split_weights(plain) == (plain, {})


def test_wrong_layers_are_all_told_at_once():
    model = model_of(stages=[[8, 1], [16, 1]])
    layers = ["stem", "block.0", "embedding", "stem"]
    problems = check_exits(model, SHAPE, layers, where="exits.layers")
    text = "\n".join(problems)
    assert "exits.layers: 'stem' is named twice" in text
    assert "exits.layers: 'embedding' is what the last exit reads" in text
    assert "no layer 'block.0' to tap" in text
    assert "blocks.0 [16, 8, 8]" in text  # all names with their shapes
    with pytest.raises(ModelError, match=r"no layer 'block\.0' to tap"):
        add_exits(model, SHAPE, layers, num_classes=10)


def test_a_layer_that_gives_nothing_is_an_error(pictures):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.extra = nn.Flatten(), nn.Identity()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            x = self.used(x)
            if self.training:
                x = self.extra(x)
            return self.linear(x)

    model = NormalizedModel(Skipping(), mean=[0.0], std=[1.0])
    with pytest.raises(ModelError, match="no layer 'extra' to tap"):
        add_exits(model, SHAPE, ["extra"], num_classes=10)

"""Structured pruning against networks whose removed channels are set to zero by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.compress.prune import (
    NetworkSize,
    PruneGoal,
    PruneReport,
    PruneRule,
    check_reachable,
    network_size,
    prune,
    prune_round,
    round_goals,
)
from understudy.errors import InputError, ModelError
from understudy.models.build import NormalizedModel, build_network
from understudy.models.cost import model_cost
from understudy.models.reshape import apply_channel_shapes, channel_shapes

pytest.importorskip("torch_pruning", reason="structured pruning needs the extra 'compress'")

SHAPE = (3, 8, 8)
EXAMPLE = torch.zeros(1, *SHAPE)


class TwoBranches(nn.Module):
    """A user's own network: branches joined side by side, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(10)
        self.last = nn.Conv2d(10, 5, 3, stride=2)
        self.linear = nn.Linear(5 * 9, 4)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        joined = torch.cat([self.left(images_NCHW), self.right(images_NCHW)], dim=1)
        features = self.last(F.leaky_relu(self.norm(joined)))
        return self.linear(F.relu(features).flatten(1))


class HardToFollow(nn.Module):
    """Operations that a graph of dependencies takes for elementwise ones, or cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = nn.Conv2d(3, 8, 3, padding=1)
        self.mixed = nn.Conv2d(4, 6, 1)
        self.across = nn.GroupNorm(1, 6)
        self.shuffled = nn.Conv2d(6, 6, 1)
        self.tied = nn.Conv2d(6, 6, 1)
        self.tied_too = nn.Conv2d(6, 6, 1)
        self.tied_too.weight = self.tied.weight
        self.free = nn.Conv2d(6, 8, 1)
        self.linear = nn.Linear(8, 4)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        values, gates = self.gated(images_NCHW).chunk(2, dim=1)
        features = self.shuffled(self.across(self.mixed(values * gates.sigmoid())))
        features = features.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        features = self.tied_too(F.relu(self.tied(features)))
        return self.linear(F.relu(self.free(features)).mean(dim=(2, 3)))


# What carries a channel on, for each layer that makes it: all of it is zero without the channel.
STREAMS = {
    "separable": {
        "stem.0": "stem.0 stem.1 blocks.0.depthwise blocks.0.depthwise_norm",
        "blocks.0.pointwise": "blocks.0.pointwise blocks.0.pointwise_norm blocks.1.depthwise "
        "blocks.1.depthwise_norm blocks.1.pointwise blocks.1.pointwise_norm",
    },
    "passes": {
        "stem.0": "stem.0 stem.1 blocks.0.layers.0 blocks.0.layers.1 blocks.0.layers.3 "
        "blocks.0.layers.4 blocks.0.again.0.0 blocks.0.again.0.1",
        "blocks.1.layers.0": "blocks.1.layers.0 blocks.1.layers.1 blocks.1.layers.3 "
        "blocks.1.layers.4",
        "blocks.1.layers.6": "blocks.1.layers.6 blocks.1.layers.7",
    },
    "padded": {f"layer{i}.0.conv1": f"layer{i}.0.conv1 layer{i}.0.bn1" for i in (1, 2, 3)},
    "projected": {
        "conv1": "conv1 bn1 layer1.0.conv2 layer1.0.bn2",
        **{f"layer{i}.0.conv1": f"layer{i}.0.conv1 layer{i}.0.bn1" for i in (1, 2, 3)},
        **{
            f"layer{i}.0.conv2": f"layer{i}.0.conv2 layer{i}.0.bn2 layer{i}.0.shortcut"
            for i in (2, 3)
        },
    },
    "paper_student": {p: p for p in ("features.0", "features.1", "classifier.0")},
    "paper_teacher": {
        "features.0": "features.0",
        "features.1": "features.1 features.3",
        "features.5": "features.5 features.7",
        "classifier.0": "classifier.0",
    },
    "mlp": {p: p for p in ("layers.1", "layers.4")},
}
NETWORKS = {
    "separable": ("separable", {"stages": [[8, 1], [16, 2]], "depth": 2, "residual": True}),
    "passes": ("inverted", {"stem": [8, 1], "blocks": [[8, 1, 1, 3, 2], [12, 2, 2, 3]]}),
    "padded": ("resnet8", {"widths": [4, 8, 8]}),
    "projected": ("resnet8", {"widths": [4, 8, 8], "shortcut": "conv"}),
    "paper_student": ("paper_student", {"channels": 8, "hidden": 6}),
    "paper_teacher": ("paper_teacher", {"channels": 8, "hidden": 6, "num_layers": 2}),
    "mlp": ("mlp", {"hidden": [10, 8], "dropout": 0.2}),
}


def built(family: str) -> NormalizedModel:
    name, arguments = NETWORKS[family]
    network = build_network(name, num_classes=4, image_shape=SHAPE, arguments=arguments)
    order = [1, 3, 0, 2]
    return NormalizedModel(network, mean=[0.5] * 3, std=[0.2] * 3, output_order=order)


def as_trained(model: nn.Module) -> nn.Module:
    """Give biases and batch norms other values than those of a fresh network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


@pytest.fixture
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return as_trained(built(request.param))


def zeroed(model: nn.Module, removed, streams) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for path, channels in removed.items():
            for carrier in streams[path].split():
                layer = model.get_submodule(carrier)
                layer.weight[list(channels)] = 0
                if layer.bias is not None:
                    layer.bias[list(channels)] = 0
    return model


def mlp(hidden: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, hidden), nn.ReLU(), nn.Linear(hidden, 4))


@pytest.mark.parametrize("model", STREAMS, indirect=True, ids=str)
def test_the_pruned_network_is_the_original_with_zeros(model, request, tmp_path):
    family = request.node.callspec.id
    before = copy.deepcopy(model.state_dict())
    size = network_size(model, EXAMPLE)
    goal = PruneGoal(num_params=size.num_params * 3 // 4, num_macs=size.num_macs * 2 // 3)
    pruned, report = prune(model, EXAMPLE, goal=goal)

    removed = {path.removeprefix("network."): c for path, c in report.rounds[0].removed.items()}
    assert removed.keys() == STREAMS[family].keys()
    assert any(removed.values())
    images = torch.randint(256, (8, *SHAPE), dtype=torch.uint8)
    reference = zeroed(model.network, removed, STREAMS[family])
    expected = reference(model.normalize(images))[:, model.output_order]
    assert not torch.allclose(expected, model(images), atol=1e-3)
    torch.testing.assert_close(pruned(images), expected, atol=1e-4, rtol=1e-4)

    cost = model_cost(pruned, SHAPE)
    assert report.after == NetworkSize(cost.num_params, cost.macs, None)
    assert report.before == size
    assert cost.num_params <= goal.num_params
    assert cost.macs <= goal.num_macs
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    # Stored without pickles, and loaded into the network as its name gives it.
    save_file(pruned.state_dict(), tmp_path / "weights.safetensors")
    shapes = json.loads(json.dumps(report.shapes_after))
    loaded = apply_channel_shapes(built(family), shapes).eval()
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    assert torch.equal(loaded(images), pruned(images))
    assert channel_shapes(model) == report.shapes_before


def test_a_users_own_network():
    torch.manual_seed(0)
    model = as_trained(TwoBranches())
    pruned, report = prune(model, EXAMPLE, goal=PruneGoal(num_params=400))
    removed = report.rounds[0].removed
    assert removed.keys() == {"left", "right", "last"}
    assert all(len(channels) > 0 for channels in removed.values())
    streams = {path: path for path in removed}
    reference = zeroed(model, removed, streams)
    with torch.no_grad():
        joined = [*removed["left"], *(6 + channel for channel in removed["right"])]
        reference.norm.weight[joined] = 0
        reference.norm.bias[joined] = 0
    images = torch.rand(4, *SHAPE)
    torch.testing.assert_close(pruned(images), reference(images), atol=1e-5, rtol=1e-4)
    assert report.after.num_params <= 400 < report.before.num_params


def test_what_cannot_be_followed_stays():
    torch.manual_seed(0)
    model = HardToFollow().eval()
    with pytest.raises(InputError, match=r"at least .* Layers that cannot be pruned: "):
        prune(model, EXAMPLE, goal=PruneGoal(num_params=100))
    one_less = PruneGoal(num_params=network_size(model, EXAMPLE).num_params - 1)
    _, report = prune(model, EXAMPLE, goal=one_less)
    assert report.channels == {"free": (8, 7)}
    fixed = report.rounds[0].fixed
    assert fixed.keys() == {"gated", "mixed", "shuffled", "tied", "tied_too", "linear"}
    assert "logits" in fixed["linear"]
    assert "shares its weights" in fixed["tied"]
    assert "the network" in fixed["gated"]


@pytest.mark.parametrize("limit", [2364, 2363, 1200, 201 + 4, 201 * 2 + 4])
def test_a_limit_on_parameters_is_met_and_not_overshot(limit):
    # A hidden unit costs 192 weights, a bias and 4 weights; the logits 4 biases.
    _, report = prune(mlp(), EXAMPLE, goal=PruneGoal(num_params=limit))
    kept = min(12, (limit - 4) // 197)
    assert report.after.num_params == 4 + 197 * kept
    assert report.channels == {"1": (12, kept)}
    assert report.removed_ratio == pytest.approx(1 - kept / 12)


@pytest.mark.parametrize(
    ("round_to", "min_channels", "kept"), [(1, None, 5), (4, None, 4), (8, 1, 8)]
)
def test_a_limit_on_macs_in_steps(round_to, min_channels, kept):
    limit = 196 * (kept if round_to == 8 else 5) + 10
    rule = PruneRule(round_to=round_to, min_channels=min_channels)
    _, report = prune(mlp(), EXAMPLE, goal=PruneGoal(num_macs=limit), rule=rule)
    assert report.after.num_macs == 196 * kept


def test_channel_counts_that_are_no_multiple_may_stay():
    rule = PruneRule(round_to=8)
    _, report = prune(mlp(12), EXAMPLE, goal=PruneGoal(num_params=4 + 197 * 12), rule=rule)
    assert report.channels == {"1": (12, 12)}
    assert "Nothing was removed" in report.warnings[0]


def test_all_limits_hold_at_once():
    model = as_trained(built("separable"))
    size = network_size(model, EXAMPLE)
    by_params = prune(model, EXAMPLE, goal=PruneGoal(num_params=size.num_params // 2))[1].after
    by_macs = prune(model, EXAMPLE, goal=PruneGoal(num_macs=size.num_macs // 2))[1].after
    both = PruneGoal(num_params=size.num_params // 2, num_macs=size.num_macs // 2)
    after = prune(model, EXAMPLE, goal=both)[1].after
    assert after == min(by_params, by_macs, key=lambda found: found.num_params)


def test_a_limit_on_latency_by_a_measuring_function():
    seen = []

    def measure(model: nn.Module) -> float:
        seen.append(model.training)
        return model_cost(model, SHAPE).macs / 1000

    model = built("separable").train()
    macs = network_size(model, EXAMPLE).num_macs
    goal = PruneGoal(latency_ms=macs / 1500)
    # An example as the data has it, in bytes.
    example = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    pruned, report = prune(model, example, goal=goal, measure=measure)
    same = prune(model, EXAMPLE, goal=PruneGoal(num_macs=int(macs / 1.5)))[1]
    assert report.channels == same.channels
    assert report.after.latency_ms == report.after.num_macs / 1000 <= goal.latency_ms
    assert pruned.training
    assert not any(seen)
    # Bisection: far fewer measurements than channels.
    assert len(seen) <= 12
    with pytest.raises(InputError, match=r"at most 0\.1 ms; expected at least"):
        prune(model, EXAMPLE, goal=PruneGoal(latency_ms=0.1), measure=measure)
    with pytest.raises(InputError, match="measuring function returned nan"):
        prune(model, EXAMPLE, goal=goal, measure=lambda _: float("nan"))


def test_l1_removes_the_smallest_weights():
    model = mlp()
    made = model[1].weight.abs().sum(1)
    read = model[3].weight.abs().sum(0)
    smallest = (made + read).argsort()[:5].tolist()
    _, report = prune(model, EXAMPLE, goal=PruneGoal(num_params=4 + 197 * 7))
    assert report.rounds[0].removed == {"1": tuple(sorted(smallest))}


def test_batch_norm_removes_the_smallest_scales():
    model = as_trained(built("projected"))
    with torch.no_grad():
        model.network.layer2[0].bn1.weight[[1, 5, 6]] = 1e-3
        model.network.layer3[0].bn1.weight[2] = -1e-4
    size = network_size(model, EXAMPLE)
    one_less = PruneGoal(num_params=size.num_params - 1)
    rule = PruneRule(importance="batch_norm")
    removed = prune(model, EXAMPLE, goal=one_less, rule=rule)[1].rounds[0].removed
    assert {path: found for path, found in removed.items() if found} == {
        "network.layer3.0.conv1": (2,)
    }
    four = PruneGoal(num_params=size.num_params - (2 * 72 + 2) - 2 * (36 + 72 + 2) - 1)
    removed = prune(model, EXAMPLE, goal=four, rule=rule)[1].rounds[0].removed
    assert removed["network.layer2.0.conv1"] == (1, 5, 6)
    with pytest.raises(InputError, match=r"lose channels \(1: no batch_norm importance.*; 3: "):
        prune(mlp(), EXAMPLE, goal=PruneGoal(num_params=1000), rule=rule)


def test_taylor_removes_what_the_loss_feels_least():
    model = mlp()
    images, labels = torch.rand(16, *SHAPE), torch.arange(16) % 4

    def score(network: nn.Module) -> None:
        assert network is not model
        F.cross_entropy(network(images), labels).backward()

    reference = copy.deepcopy(model)
    score(reference)
    made = (reference[1].weight * reference[1].weight.grad).abs().sum(1)
    read = (reference[3].weight * reference[3].weight.grad).abs().sum(0)
    smallest = (made + read).argsort()[:5].tolist()
    model[1].weight.requires_grad_(False)
    goal, rule = PruneGoal(num_params=4 + 197 * 7), PruneRule(importance="taylor")
    pruned, report = prune(model, EXAMPLE, goal=goal, rule=rule, score=score)
    assert report.rounds[0].removed == {"1": tuple(sorted(smallest))}
    assert all(parameter.grad is None for parameter in [*model.parameters(), *pruned.parameters()])
    assert not pruned[1].weight.requires_grad
    assert pruned[1].bias.requires_grad
    with pytest.raises(InputError, match="no finite gradient in 1, 3; expected"):
        prune(model, EXAMPLE, goal=goal, rule=rule, score=lambda network: None)
    with pytest.raises(InputError, match="taylor without a score function"):
        prune(model, EXAMPLE, goal=goal, rule=rule)


def test_scopes():
    model = as_trained(built("paper_teacher"))
    with torch.no_grad():
        # One layer with a few strong channels: ranked with all others, the weak ones go first.
        model.network.features[1].weight[2:] *= 1e-3
        model.network.features[3].weight[2:] *= 1e-3
        model.network.features[5].weight[:, 2:] *= 1e-3
    goal = PruneGoal(num_macs=network_size(model, EXAMPLE).num_macs // 2)
    by_layer = prune(model, EXAMPLE, goal=goal, rule=PruneRule(scope="layer"))[1].channels
    shares = [after / before for before, after in by_layer.values()]
    assert max(shares) - min(shares) <= 1 / 6
    overall = prune(model, EXAMPLE, goal=goal)[1].channels
    assert overall["network.features.1"][1] < by_layer["network.features.1"][1]
    assert overall["network.features.0"][1] > by_layer["network.features.0"][1]


def test_rounding_minimum_and_ignored_layers():
    model = as_trained(built("separable"))
    size = network_size(model, EXAMPLE)
    rule = PruneRule(round_to=4, min_channels=6)
    pruned, report = prune(
        model, EXAMPLE, goal=PruneGoal(num_macs=int(size.num_macs * 0.8)), rule=rule
    )
    assert all(after % 4 == 0 and after >= 6 for _, after in report.channels.values())
    assert pruned.network.blocks[0].depthwise.groups == pruned.network.stem[0].out_channels
    rule = PruneRule(ignored=("network.stem",))
    report = prune(model, EXAMPLE, goal=PruneGoal(num_params=size.num_params // 2), rule=rule)[1]
    assert report.channels.keys() == {"network.blocks.0.pointwise"}
    assert report.rounds[0].fixed["network.stem.0"] == "'network.stem' is ignored"
    # A norm in the middle of a stream keeps the whole of it.
    rule = PruneRule(ignored=("network.blocks.1.depthwise_norm",))
    report = prune(model, EXAMPLE, goal=PruneGoal(num_params=size.num_params - 10), rule=rule)[1]
    assert report.channels.keys() == {"network.stem.0"}
    with pytest.raises(InputError, match=r"ignored layers stem; expected paths"):
        prune(model, EXAMPLE, goal=PruneGoal(num_params=100), rule=PruneRule(ignored=("stem",)))


def test_rounds_with_real_fine_tuning_can_be_resumed():
    torch.manual_seed(0)
    model = built("separable").train()
    images, labels = torch.rand(32, *SHAPE), torch.arange(32) % 4
    goal = PruneGoal(num_macs=network_size(model, EXAMPLE).num_macs // 3)
    numbers = []

    def finetune(network: nn.Module, number: int) -> nn.Module | None:
        numbers.append(number)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        return network if number else None

    pruned, report = prune(model, EXAMPLE, goal=goal, num_rounds=3, finetune=finetune)
    assert numbers == [0, 1, 2]
    assert report.after.num_macs <= goal.num_macs
    sizes = [round_.after.num_macs for round_ in report.rounds]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3

    goals = round_goals(network_size(model, EXAMPLE), goal, 3)
    again, rounds = model, []
    for number, round_goal in enumerate(goals):
        again, one = prune_round(again, EXAMPLE, goal=round_goal)
        # What a caller stores between rounds: weights, counts and the record.
        stored = TypeAdapter(type(one)).validate_json(json.dumps(asdict(one)))
        assert stored == one
        restored = apply_channel_shapes(built("separable"), one.shapes_after).train()
        restored.load_state_dict(again.state_dict(), strict=True)
        again = finetune(restored, number) or restored
        rounds.append(stored)
    assert PruneReport(goal, PruneRule(), tuple(rounds)) == report
    for name, value in pruned.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_goals_of_rounds_go_equal_factors():
    size = NetworkSize(num_params=8000, num_macs=100, latency_ms=4.0)
    goal = PruneGoal(num_params=1000, num_macs=200, latency_ms=0.5)
    first, second, last = round_goals(size, goal, 3)
    assert (first.num_params, first.num_macs, second.num_params) == (4000, 200, 2000)
    assert (first.latency_ms, second.latency_ms) == pytest.approx((2.0, 1.0))
    assert last == goal


def test_what_is_left_of_a_network_pruned_too_far():
    model = mlp()
    report = prune(model, EXAMPLE, goal=PruneGoal(num_params=250))[1]
    assert report.channels == {"1": (12, 1)}
    assert "One channel is left in 1:" in report.warnings[0]
    assert "1 of 1 layers are down to 1 channel(s)" in report.warnings[1]


@pytest.mark.parametrize("num_rounds", [1, 4])
def test_an_impossible_goal_says_what_can_be_reached(num_rounds):
    def finetune(network: nn.Module, number: int) -> None:
        pytest.fail("trained for a goal that cannot be reached")

    goal = PruneGoal(num_params=200, num_macs=100)
    finetune = finetune if num_rounds > 1 else None
    with pytest.raises(InputError) as caught:
        prune(mlp(), EXAMPLE, goal=goal, num_rounds=num_rounds, finetune=finetune)
    assert len(caught.value.problems) == 2
    assert "at most 200 parameters; expected at least 201" in str(caught.value)
    assert "at most 100 multiply-accumulates; expected at least 196" in str(caught.value)


def test_a_taylor_goal_is_checked_without_gradients():
    rule = PruneRule(importance="taylor", round_to=8)
    check_reachable(mlp(), EXAMPLE, goal=PruneGoal(num_params=4 + 8 * 197), rule=rule)
    with pytest.raises(InputError, match=r"at least 1,580, .* with 8 channel\(s\)"):
        check_reachable(mlp(), EXAMPLE, goal=PruneGoal(num_params=1000), rule=rule)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PruneGoal(), "without a goal"),
        (lambda: PruneGoal(num_params=0.5), "num_params 0.5; .*amount and not a ratio"),
        (lambda: PruneGoal(num_macs=0), "num_macs 0; expected a whole number"),
        (lambda: PruneGoal(num_macs=True), "num_macs True"),
        (lambda: PruneGoal(latency_ms=float("inf")), "latency_ms inf; expected milliseconds"),
        (lambda: PruneRule(importance="l3"), "importance 'l3'; expected l1 or batch_norm"),
        (lambda: PruneRule(scope="all"), "scope 'all'; expected global or layer"),
        (lambda: PruneRule(round_to=0), "round_to 0"),
        (lambda: PruneRule(min_channels=1.5), "min_channels 1.5"),
        (lambda: prune(mlp(), EXAMPLE, goal=PruneGoal(num_params=1), num_rounds=0), "in 0 rounds"),
        (lambda: prune(mlp(), EXAMPLE[0], goal=PruneGoal(num_params=1)), r"shape \[3, 8, 8\]"),
        (lambda: prune(mlp(), EXAMPLE, goal=PruneGoal(latency_ms=1.0)), "without a measure"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_broken_weights_and_networks_that_cannot_be_traced():
    model = mlp()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        prune(model, EXAMPLE, goal=PruneGoal(num_params=1000))

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(192, 4)

        def forward(self, images_NCHW: Tensor) -> Tensor:
            return self.linear(images_NCHW.flatten(1)).detach()

    with pytest.raises(ModelError, match=r"can lose channels \(none found\)"):
        prune(Detached(), EXAMPLE, goal=PruneGoal(num_params=100))

    class Untraceable(nn.Linear):
        def forward(self, images_NCHW: Tensor) -> Tensor:
            assert not torch.is_grad_enabled(), "for inference only"
            return super().forward(images_NCHW.flatten(1))

    with pytest.raises(ModelError, match=r"cannot be traced .*for inference only"):
        prune(Untraceable(192, 4), EXAMPLE, goal=PruneGoal(num_params=100))

    with pytest.raises(InputError, match="after round 0 returned a int"):
        prune(mlp(), EXAMPLE, goal=PruneGoal(num_params=1000), finetune=lambda *_: 3)


def test_outputs_beside_the_logits_keep_their_channels():
    class WithFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3)
            self.second = nn.Conv2d(6, 8, 3)
            self.linear = nn.Linear(8, 4)

        def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
            features = self.second(F.relu(self.first(images_NCHW)))
            return self.linear(features.mean(dim=(2, 3))), features

    _, report = prune(WithFeatures(), EXAMPLE, goal=PruneGoal(num_params=400))
    assert report.channels.keys() == {"first"}
    assert report.rounds[0].fixed["second"] == "its channels are the network's outputs"

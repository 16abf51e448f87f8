"""Channel counts as numbers, and networks brought to them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from understudy.errors import ModelError
from understudy.models.build import build_network
from understudy.models.reshape import apply_channel_shapes, channel_shapes


class EveryKind(nn.Module):
    """One layer of each kind, with a width for all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.instance_norm = nn.InstanceNorm2d(width, affine=True, track_running_stats=True)
        self.grouped = nn.Conv2d(width, 2 * width, 1, groups=2)
        self.group_norm = nn.GroupNorm(2, 2 * width)
        self.transposed = nn.ConvTranspose2d(2 * width, width, 2, 2, groups=2)
        self.prelu = nn.PReLU(width)
        self.scale = nn.Parameter(torch.rand(width, 1, 1))
        self.layer_norm = nn.LayerNorm(width)
        self.rms_norm = nn.RMSNorm(width)
        self.embedding = nn.Embedding(4, width)
        self.linear = nn.Linear(width, 5)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features = self.depthwise(self.batch_norm(self.conv(images_NCHW)))
        features = self.group_norm(self.grouped(self.instance_norm(features)))
        features = self.prelu(self.transposed(features)) * self.scale
        rows = self.rms_norm(self.layer_norm(features.mean(dim=(2, 3))))
        return self.linear(rows + self.embedding(torch.tensor([1])))


def test_a_wide_network_takes_the_counts_and_weights_of_a_narrow_one():
    narrow, wide = EveryKind(6).eval(), EveryKind(16).eval()
    shapes = json.loads(json.dumps(channel_shapes(narrow)))
    assert shapes["depthwise"] == {"in_channels": 6, "out_channels": 6, "groups": 6}
    assert shapes["layer_norm"] == {"normalized_shape": [6]}
    assert shapes[""] == {"scale": [6, 1, 1]}
    assert apply_channel_shapes(wide, shapes) is wide
    assert channel_shapes(wide) == channel_shapes(narrow)
    wide.load_state_dict(narrow.state_dict(), strict=True)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(wide(images), narrow(images))
    assert repr(wide) == repr(narrow)


@pytest.mark.parametrize(
    ("name", "narrow", "wide"),
    [
        ("separable", {"stages": [[8, 1], [16, 2]]}, {"stages": [[16, 1], [24, 2]]}),
        ("resnet8", {"widths": [4, 8, 8]}, {"widths": [4, 8, 16]}),
        ("resnet8", {"widths": [4, 8, 8], "shortcut": "conv"}, {"shortcut": "conv"}),
        ("paper_student", {"channels": 8, "hidden": 6}, {}),
        ("paper_teacher", {"channels": 8, "hidden": 6}, {}),
        ("mlp", {"hidden": [5]}, {"hidden": [9]}),
    ],
)
def test_every_family_goes_round(name, narrow, wide):
    shape = (3, 16, 16)
    small = build_network(name, num_classes=4, image_shape=shape, arguments=narrow).eval()
    large = build_network(name, num_classes=4, image_shape=shape, arguments=wide).eval()
    if name == "resnet8" and "shortcut" not in narrow:
        # The padding of a shortcut is no channel count of a layer: only insides can differ.
        shapes = channel_shapes(large)
        shapes["layer1.0.conv1"]["out_channels"] = shapes["layer1.0.bn1"]["num_features"] = 2
        shapes["layer1.0.conv2"]["in_channels"] = 2
        apply_channel_shapes(large, shapes)
        assert channel_shapes(large) == shapes
        assert large(torch.rand(1, *shape)).shape == (1, 4)
        return
    apply_channel_shapes(large, channel_shapes(small))
    large.load_state_dict(small.state_dict(), strict=True)
    images = torch.rand(2, *shape)
    assert torch.equal(large(images), small(images))


def test_a_reshaped_network_keeps_its_leading_weights_and_flags():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    network[0].weight.requires_grad_(False)
    weight = network[0].weight.detach().clone()
    shapes = channel_shapes(network)
    shapes["0"]["out_channels"] = shapes["1"]["num_features"] = 2
    apply_channel_shapes(network, shapes)
    assert torch.equal(network[0].weight, weight[:2])
    assert not network[0].weight.requires_grad
    assert network[0].bias.requires_grad
    assert network[1].running_mean is None
    assert network(torch.rand(1, 3, 2, 2)).shape == (1, 2, 2, 2)


def test_weight_normalised_layers_only_keep_their_shape():
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)))
    shapes = channel_shapes(network)
    assert shapes["0"] == {"bias": [4]}
    apply_channel_shapes(network, shapes)
    assert network(torch.rand(1, 3, 2, 2)).shape == (1, 4, 2, 2)


@pytest.mark.parametrize(
    ("path", "counts", "words"),
    [
        ("0", {"in_channels": 3, "out_channels": 5, "groups": 1}, "'0': out_channels 5"),
        ("0", {"in_channels": 3, "out_channels": 0, "groups": 1}, "'0': out_channels 0"),
        ("0", {"in_channels": 3, "out_channels": 2.0, "groups": 1}, "'0': out_channels 2.0"),
        ("0", {"in_channels": 3, "out_channels": True, "groups": 1}, "'0': out_channels True"),
        ("0", {"out_channels": 2}, "'0': out_channels; expected in_channels, out_channels"),
        ("0", [3, 2], "'0': \\[3, 2\\]"),
        ("1", {"in_channels": 4, "out_channels": 3, "groups": 2}, "'1': .*in 2 groups"),
        ("1", {"in_channels": 4, "out_channels": 4, "groups": 1}, "'1': .*weight larger"),
        ("2", {"normalized_shape": [2, 2]}, "'2': normalized_shape"),
        ("2", {"normalized_shape": 4}, "'2': normalized_shape 4"),
        ("conv9", {"in_channels": 3}, "'conv9' that the network has not"),
    ],
)
def test_bad_counts_name_the_module_and_change_nothing(path, counts, words):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.LayerNorm(4))
    before = channel_shapes(network)
    shapes = channel_shapes(network) | {path: counts}
    shapes["0"] = shapes["0"] if path == "0" else shapes["0"] | {"out_channels": 2}
    with pytest.raises(ModelError, match=words):
        apply_channel_shapes(network, shapes)
    assert channel_shapes(network) == before


def test_all_problems_are_told_at_once():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.raises(ModelError) as caught:
        apply_channel_shapes(network, {"0": {"in_channels": 9}, "other": {}})
    assert len(caught.value.problems) == 3
    assert "record" in str(caught.value)

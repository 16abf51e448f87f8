"""Trunks, the heads on them, and embeddings in the place of pictures."""

import copy

import pytest
import torch
from torch import nn

from understudy.data.batches import epoch_order, iter_view_batches
from understudy.errors import DataError, ModelError
from understudy.heads.tasks import (
    UNLABELLED,
    UNSEEN,
    OwnHead,
    TaskHead,
    Trunk,
    ViewOrder,
    embedding_source,
    task_labels,
)
from understudy.models.build import NormalizedModel, build_network

SHAPE = (3, 16, 16)
ORDER = [2, 0, 4, 1, 3]
NETWORKS = {
    "separable": {"stages": [[8, 1], [16, 2]]},
    "resnet8": {"widths": [4, 8, 8]},
    "mlp": {"hidden": [12]},
    "paper_student": {},
}


class ConvolutionalHead(nn.Module):
    """Classifies every position, then takes the mean."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Conv2d(6, 5, 1)

    def forward(self, images_NCHW):
        return self.classifier(self.features(images_NCHW).relu()).mean((2, 3))


class CosineClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, embedding_ND):
        unit = nn.functional.normalize
        return 4 * unit(embedding_ND, dim=1) @ unit(self.weight, dim=1).T


def make_model(network, output_order=ORDER):
    return NormalizedModel(
        network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2], output_order=output_order
    )


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (7, *SHAPE), generator=generator, dtype=torch.uint8)


@pytest.fixture(params=[*NETWORKS, "convolution", "cosine"])
def model(request):
    torch.manual_seed(1)
    if request.param == "convolution":
        return make_model(ConvolutionalHead())
    if request.param == "cosine":
        features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return make_model(nn.Sequential(features, CosineClassifier()))
    network = build_network(
        request.param, num_classes=5, image_shape=SHAPE, arguments=NETWORKS[request.param]
    )
    return make_model(network)


# Labels


def test_labels_are_the_sorted_classes_of_the_training_split():
    values = [10, 9, None, 2, 10, 9, 2, 7]
    labels = task_labels(values, torch.tensor([0, 1, 2, 3, 4, 5, 6]), where="column")
    assert labels.class_names == ("2", "9", "10")
    assert labels.labels_N.tolist() == [2, 1, UNLABELLED, 0, 2, 1, 0, UNSEEN]
    words = task_labels(["toad", "frog", "toad", "frog"], torch.arange(4), where="column")
    assert words.class_names == ("frog", "toad")
    assert words.labels_N.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.5, 0.5, 1.5], "holds values of type float; expected either text or whole"),
        (["a", 1, "a", 1], "holds values of type int, str"),
        (["a", "a", "a", None], "names 1 classes for 3 training samples"),
        (["a", "b", "c", "d"], "names 4 classes for 4 training samples"),
        ([None] * 4, "names 0 classes for 0 training samples"),
    ],
)
def test_a_column_that_names_no_classes_is_refused(values, message):
    with pytest.raises(DataError, match=f"heads.x.*{message}"):
        task_labels(values, torch.arange(4), where="heads.x")


# Trunk and own head


def test_trunk_and_own_head_are_the_whole_model(model, images):
    trunk = Trunk(model, SHAPE)
    head = OwnHead(trunk, SHAPE).eval()
    model.eval()
    with torch.no_grad():
        embedding_ND = trunk(images)
        expected_NK = model(images)
        assert embedding_ND.shape == (7, trunk.width)
        torch.testing.assert_close(head(embedding_ND), expected_NK, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_alone_and_the_trunk_stays_frozen(model, images):
    model.train()
    before = copy.deepcopy(model.state_dict())
    trunk = Trunk(model, SHAPE)
    trunk.train()
    with torch.enable_grad():
        first_ND = trunk(images)
        second_ND = trunk(images)
    assert not first_ND.requires_grad
    assert torch.equal(first_ND, second_ND)
    assert not any(module.training for module in trunk.modules())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_identity_is_that_of_weights_and_preprocessing(model):
    identity = Trunk(model, SHAPE).identity()
    assert Trunk(copy.deepcopy(model), SHAPE).identity() == identity
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.parameters()).flatten()[0] += 1e-6
    assert Trunk(changed, SHAPE).identity() != identity
    changed = copy.deepcopy(model)
    changed.shift += 1e-3
    assert Trunk(changed, SHAPE).identity() != identity


def test_logits_that_are_not_the_classifiers_output_are_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.Linear(6, 5), nn.Softplus())
    with pytest.raises(ModelError, match="differs from the whole network by up to"):
        OwnHead(Trunk(network, SHAPE), SHAPE)


# Heads


def test_a_head_standardises_by_what_it_was_shown():
    embeddings_MD = torch.randn(50, 4) * torch.tensor([1e-3, 1.0, 50.0, 1.0]) + 3
    embeddings_MD[:, 3] = 0.25  # never varies: a unit that is always off
    head = TaskHead(4, 3)
    head.standardize(embeddings_MD)
    mean_D, std_D = embeddings_MD.double().mean(0), embeddings_MD.double().std(0)
    expected_MD = ((embeddings_MD.double() - mean_D) / std_D).float()
    expected_MD[:, 3] = 0
    torch.testing.assert_close(head(embeddings_MD), head.layers(expected_MD), rtol=1e-3, atol=1e-3)
    # Something that never varied in training must not explode when it does.
    moved_MD = embeddings_MD.clone()
    moved_MD[:, 3] = 100.0
    assert torch.equal(head(moved_MD), head(embeddings_MD))


def test_the_statistics_are_part_of_the_weights():
    head, other = TaskHead(4, 3, (6, 5)), TaskHead(4, 3, (6, 5))
    embeddings_MD = torch.randn(50, 4) * 7
    head.standardize(embeddings_MD)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head(embeddings_MD), other(embeddings_MD))
    assert [type(layer).__name__ for layer in head.layers] == ["Linear", "ReLU"] * 2 + ["Linear"]


# Embeddings in the place of pictures


def test_epochs_show_the_views_in_turn():
    order = ViewOrder(num_views=3, num_rows=5)
    for epoch in range(7):
        rows_N = order.order(seed=4, epoch=epoch)
        view = epoch % 3
        assert sorted(rows_N.tolist()) == list(range(5 * view, 5 * view + 5))
        expected_N = epoch_order(torch.arange(5), seed=4, epoch=epoch) + 5 * view
        assert torch.equal(rows_N, expected_N)
    assert not order.watches_losses


def test_embeddings_are_fed_as_pictures_are():
    embeddings_MD, labels_M = torch.randn(10, 4), torch.arange(10) % 3
    source = embedding_source(embeddings_MD, labels_M, ("a", "b", "c"))
    (batch,) = iter_view_batches(source, None, [torch.tensor([7, 2])], view=0)
    assert torch.equal(batch.images_NCHW, embeddings_MD[[7, 2]])
    assert torch.equal(batch.labels_N, labels_M[[7, 2]])

import pytest
import torch
from torch import nn

from understudy.data.images import DataFacts, InMemoryImages
from understudy.errors import ModelError
from understudy.models.build import NormalizedModel
from understudy.teachers.check import chance_limit, check_teacher

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CLASSES = 6
# Colours whose order of channels and absolute value both matter.
COLORS_KC = torch.tensor(
    [[200, 40, 90], [240, 120, 30], [150, 20, 20], [180, 90, 60], [220, 200, 90], [30, 50, 190]]
)


class NearestColor(nn.Module):
    """A classifier that is right only on pictures normalised as it was made for."""

    def forward(self, images_NCHW):
        colors_KC = (COLORS_KC / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        return -10 * (images_NCHW.mean((2, 3))[:, None] - colors_KC).square().sum(2)


def new_source(*, num_samples: int = 600) -> InMemoryImages:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(num_samples) % NUM_CLASSES
    noise = torch.randint(-20, 20, (num_samples, 3, 4, 4), generator=generator)
    pixels_NCHW = (COLORS_KC[labels_N][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    facts = DataFacts(
        image_shape=(3, 4, 4),
        class_names=("ant", "bee", "cat", "dog", "eel", "fox"),
        labels_N=labels_N,
        sample_ids=tuple(map(str, range(num_samples))),
        given_splits=("train",) * num_samples,
        fingerprint="f" * 64,
    )
    return InMemoryImages(facts, pixels_NCHW)


def accuracy_of(model: nn.Module, source: InMemoryImages) -> float:
    indices_N = torch.arange(source.num_samples)
    return (model(source.images(indices_N)).argmax(1) == source.labels_N).float().mean().item()


def check(model: nn.Module, *, accuracy: float | None = None) -> None:
    source = new_source()
    accuracy = accuracy_of(model, source) if accuracy is None else accuracy
    check_teacher(model, source, torch.arange(source.num_samples), accuracy=accuracy)


def test_a_good_teacher_passes():
    model = NormalizedModel(NearestColor(), mean=MEAN, std=STD)
    assert accuracy_of(model, new_source()) == 1
    check(model)


def test_a_wrong_normalization_is_named():
    model = NormalizedModel(NearestColor(), mean=(-5.0,) * 3, std=(0.01,) * 3)
    with pytest.raises(ModelError) as caught:
        check(model)
    text = str(caught.value)
    assert "the teacher is right on 16.67 % of 600 validation images, near chance (16.7 %" in text
    assert "Likely cause: the input normalisation; set teacher.model.normalization" in text
    assert "then right on 100 % of 256 images" in text


@pytest.mark.parametrize("given_order", [None, [4, 1, 5, 2, 0, 3]])
def test_a_wrong_class_order_is_named_with_the_names_to_set(given_order):
    names = ["fox", "ant", "cat", "eel", "bee", "dog"]

    class Reordered(NearestColor):
        def forward(self, images_NCHW):
            logits_NK = super().forward(images_NCHW)
            return logits_NK[:, [new_source().class_names.index(name) for name in names]]

    model = NormalizedModel(Reordered(), mean=MEAN, std=STD, output_order=given_order)
    with pytest.raises(ModelError) as caught:
        check(model)
    mend = f"Likely cause: the class order; set teacher.class_names to {names}. It is then right on"
    assert mend in str(caught.value)


class ChannelSensitive(NearestColor):
    """Right on BGR; on RGB it takes every class for another one, never its own."""

    def forward(self, images_NCHW):
        return super().forward(images_NCHW.flip(1))


def test_a_wrong_colour_order_is_named():
    model = NormalizedModel(ChannelSensitive(), mean=MEAN, std=STD, color_order="rgb")
    with pytest.raises(ModelError, match=r"colour order; set teacher.color_order to bgr"):
        check(model)


def test_random_weights_have_no_cause_and_no_order_is_invented():
    class Random(nn.Module):
        def forward(self, images_NCHW):
            generator = torch.Generator().manual_seed(5)
            return torch.randn(len(images_NCHW), NUM_CLASSES, generator=generator)

    model = NormalizedModel(Random(), mean=MEAN, std=STD)
    with pytest.raises(ModelError, match=r"Neither another normalisation.*weights are trained"):
        check(model)


def test_a_constant_answer_on_uneven_classes_is_near_chance():
    source = new_source()
    uneven_N = torch.cat([torch.arange(0, 600, 6), torch.arange(1, 60, 6)])

    class Constant(nn.Module):
        def forward(self, images_NCHW):
            return torch.zeros(len(images_NCHW), NUM_CLASSES)

    with pytest.raises(ModelError, match="near chance"):
        check_teacher(Constant(), source, uneven_N, accuracy=100 / 110)


@pytest.mark.parametrize(
    ("num_classes", "limit"), [(2, 0.55), (10, 0.19), (100, 0.03), (1000, 0.003)]
)
def test_chance_limit(num_classes, limit):
    assert chance_limit(num_classes) == pytest.approx(limit, abs=0.001)

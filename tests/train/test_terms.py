"""Every loss that a recipe can name: built with what it needs, differentiable, and trained."""

import pytest
import torch
from torch import nn

from understudy import losses
from understudy.data.batches import Batch
from understudy.models.build import NormalizedModel, build_network
from understudy.models.taps import Taps, as_kind, tap_shapes
from understudy.progress import silent
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import DistillObjective
from understudy.train.loop import train
from understudy.train.loss_table import LOSSES
from understudy.train.terms import (
    LAYER_LOSSES,
    LOGIT_LOSSES,
    RELATION_LOSSES,
    Seen,
    TermContext,
    build_terms,
    student_taps,
    teacher_taps,
)

IMAGE_SHAPE = (1, 8, 8)
NUM_SAMPLES = 400


def small(name, **arguments):
    network = build_network(name, num_classes=10, image_shape=IMAGE_SHAPE, arguments=arguments)
    return NormalizedModel(network, mean=[0.3], std=[0.4])


@pytest.fixture
def student():
    torch.manual_seed(0)
    return small("separable", stages=[[8, 1], [8, 1], [16, 2]])


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    return small("resnet8", widths=[8, 16, 24]).eval()


# Layers with unequal widths, and in the first pair unequal resolutions too.
LAYERS = [
    {"student": "blocks.0", "teacher": "layer2"},
    {"student": "blocks.1", "teacher": "layer3"},
]


def settings_for(name):
    facts = LOSSES[name]
    loss = {}
    if facts.reads in ("map", "attention"):
        loss["layers"] = LAYERS
    if name == "crd":
        loss["arguments"] = {"num_negatives": 64, "embedding_size": 16}
    return DistillSettings(kl_weight=0.5, ce_weight=0.5, losses={name: loss})


def objective_for(settings, student, teacher, labels_N):
    context = TermContext(
        student_shapes=tap_shapes(student, IMAGE_SHAPE),
        teacher_shapes=tap_shapes(teacher, IMAGE_SHAPE),
        train_indices_N=torch.arange(NUM_SAMPLES),
        train_labels_N=labels_N,
        prior_KK=torch.full((10, 10), 0.1),
    )
    taps = student_taps(settings)
    return DistillObjective(
        settings,
        taps=Taps(student, taps) if taps else None,
        terms=build_terms(settings, context),
    )


class Live:
    """A teacher source that runs the teacher."""

    def __init__(self, settings, teacher):
        self.teacher, self.taps = teacher, Taps(teacher, teacher_taps(settings))

    def outputs(self, batch, *, view):
        with torch.no_grad():
            return TeacherOutputs(*self.taps.run(self.teacher, batch.images_NCHW))


@pytest.fixture
def batch(digits):
    indices_N = torch.arange(100, 132)
    return Batch(indices_N, digits.images(indices_N), digits.labels_N[indices_N])


def test_the_table_and_the_functions_have_the_same_names():
    special = {"class_prior", "vid", "review", "crd"}
    named = {*LOGIT_LOSSES, *LAYER_LOSSES, *RELATION_LOSSES, *special}
    assert named == set(LOSSES)
    assert set(LOSSES) <= set(losses.__all__)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_finite_and_reaches_the_network_and_its_parts(
    name, student, teacher, batch, digits
):
    settings = settings_for(name)
    objective = objective_for(settings, student, teacher, digits.labels_N[:NUM_SAMPLES])
    outputs = Live(settings, teacher).outputs(batch, view=0)
    terms, _ = objective.step(student.train(), batch, outputs, 0.5)
    assert set(terms) == {"kl", "ce", name} == set(objective.weights(0.5))
    assert terms[name].ndim == 0
    assert torch.isfinite(terms[name])
    terms[name].backward()
    norms = [p.grad.abs().sum().item() for p in student.parameters() if p.grad is not None]
    assert sum(norms) > 0
    for part_name, parameter in objective.parts.named_parameters():
        assert parameter.grad is not None, part_name
    assert not any(p.requires_grad and p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("dkd", lambda s, t, b: losses.dkd(s, t, b.labels_N, target_weight=2.0, temperature=3.0)),
        ("standardized_kl", lambda s, t, b: losses.standardized_kl(s, t, temperature=2.0)),
        ("top_k_kl", lambda s, t, b: losses.kl(s, t, temperature=4.0)),
        ("mse_logits", lambda s, t, b: (s - t).square().mean()),
    ],
)
def test_arguments_reach_the_function(name, plain, student, teacher, batch, digits):
    values = {"arguments": {"target_weight": 2.0, "temperature": 3.0}} if name == "dkd" else {}
    settings = DistillSettings(losses={name: values})
    objective = objective_for(settings, student, teacher, digits.labels_N[:NUM_SAMPLES])
    outputs = Live(settings, teacher).outputs(batch, view=0)
    terms, logits_NK = objective.step(student, batch, outputs, 0.0)
    torch.testing.assert_close(terms[name], plain(logits_NK, outputs.logits_NK, batch))


def test_the_embedding_is_what_the_classifier_reads(student, teacher, batch, digits):
    settings = DistillSettings(losses={"rkd": {}})
    objective = objective_for(settings, student, teacher, digits.labels_N[:NUM_SAMPLES])
    outputs = Live(settings, teacher).outputs(batch, view=0)
    student.eval()
    terms, _ = objective.step(student, batch, outputs, 0.0)
    linear = student.network.linear
    seen = []
    handle = linear.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    student(batch.images_NCHW)
    handle.remove()
    embedding = outputs.features["embedding:pooled"]
    torch.testing.assert_close(terms["rkd"], losses.rkd(seen[0], embedding))


@pytest.mark.parametrize("name", ["attention_transfer", "salient_attention"])
@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"),
    [((17, 8), (17, 16)), ((16, 8), (16, 8)), ((8, 4, 4), (17, 16)), ((8, 4, 4), (16, 8, 8))],
)
def test_attention_of_whole_maps_or_tokens_is_the_attention_that_is_stored(
    name, student_shape, teacher_shape, batch
):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.rand(32, *shape, generator=generator) for shape in (student_shape, teacher_shape)
    )

    def loss(keep):
        layers = [{"student": "a", "teacher": "b"}]
        settings = DistillSettings(losses={name: {"layers": layers, "keep": keep}})
        shapes = {"a": student_shape, "b": teacher_shape}
        context = TermContext(shapes, shapes, torch.arange(200), torch.zeros(200))
        kind = keep or "attention"
        features = {f"a:{kind}": as_kind(student, kind)}
        outputs = TeacherOutputs(torch.zeros(32, 10), {f"b:{kind}": as_kind(teacher, kind)})
        (term,) = build_terms(settings, context).values()
        return term(Seen(torch.zeros(32, 10), features, outputs, batch, 4.0))

    assert loss("map") > 0
    torch.testing.assert_close(loss("map"), loss(None))


def test_weights_come_from_the_recipe_or_the_table(student, teacher, digits):
    settings = DistillSettings(
        kl_weight=0.8,
        ce_weight=0.2,
        losses={"rkd": {"weight": {"start": 2.0, "end": 0.0}}, "pkt": {}},
    )
    objective = objective_for(settings, student, teacher, digits.labels_N[:NUM_SAMPLES])
    assert objective.weights(0.5) == pytest.approx(
        {"kl": 0.8, "ce": 0.2, "rkd": 1.0, "pkt": LOSSES["pkt"].weight}
    )


def test_the_teachers_share_goes_over_to_the_labels(student, teacher, digits):
    settings = DistillSettings(
        kl_weight=0.8,
        ce_weight=0.2,
        losses={"rkd": {"weight": 2.0}},
        teacher_share={"start": 1.0, "end": 0.0},
    )
    objective = objective_for(settings, student, teacher, digits.labels_N[:NUM_SAMPLES])
    assert objective.weights(0.0) == pytest.approx({"kl": 0.8, "ce": 0.2, "rkd": 2.0})
    assert objective.weights(0.5) == pytest.approx({"kl": 0.4, "ce": 0.6, "rkd": 1.0})
    assert objective.weights(1.0) == pytest.approx({"kl": 0.0, "ce": 1.0, "rkd": 0.0})


class Dies(BaseException):
    pass


def test_parts_survive_a_kill_bit_for_bit(make_plan, fabric, teacher, digits):
    """Adapters, variances and a memory bank are in the checkpoint, as is the draw of negatives."""

    def new(folder):
        torch.manual_seed(3)
        network = nn.Sequential(small("separable", stages=[[8, 1], [8, 1], [16, 2]]))[0]
        settings = DistillSettings(
            losses={
                "crd": {"arguments": {"num_negatives": 64, "embedding_size": 8}},
                "vid": {"layers": LAYERS},
            }
        )
        objective = objective_for(settings, network, teacher, digits.labels_N[:NUM_SAMPLES])
        plan = make_plan(
            folder,
            objective=objective,
            teacher=Live(settings, teacher),
            num_epochs=2,
            optimizer={"learning_rate": 0.05},
            checkpoint_every_steps=3,
        )
        return network, plan

    def kill(done, total, note=""):
        if done == 5:
            raise Dies

    network, plan = new("whole")
    whole = train(network, plan, fabric=fabric, progress=silent)
    network, plan = new("broken")
    with pytest.raises(Dies):
        train(network, plan, fabric=fabric, progress=kill)
    torch.manual_seed(77)
    network, plan = new("broken")
    resumed = train(network, plan, fabric=fabric, progress=silent)
    assert whole.parts.keys() == resumed.parts.keys()
    assert len(whole.parts) > 5
    for name in whole.parts:
        assert torch.equal(whole.parts[name], resumed.parts[name]), name
    for name in whole.weights:
        assert torch.equal(whole.weights[name], resumed.weights[name]), name

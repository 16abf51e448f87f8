"""What a recipe may not ask of losses, layers and teachers: one error before anything runs."""

import re

import pytest

from understudy.errors import RecipeError
from understudy.recipes.check import check_recipe
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.recipes.train import role_section

SEPARABLE = {"name": "separable", "arguments": {"stages": [[8, 1], [8, 2]]}}
RESNET = {"name": "resnet8", "arguments": {"widths": [4, 8, 16]}}


@pytest.fixture
def problems(tmp_path):
    def found(losses=None, **sections):
        values = {
            "teacher": {"model": RESNET, "training": {"num_epochs": 1}},
            "student": {"model": SEPARABLE},
            "distillation": {"losses": losses or {}},
            **sections,
        }
        try:
            check_recipe(Run(parse_recipe(values), tmp_path / "run", tmp_path / "home"))
        except RecipeError as error:
            return list(error.problems)
        return []

    return found


def test_every_loss_passes_with_its_defaults_on_embeddings_or_named_layers(problems):
    layers = [{"student": "blocks.0", "teacher": "layer3"}]
    vectors = ("embedding_alignment", "similarity_preserving", "rkd", "pkt", "crd", "vid")
    named = ("hint", "attention_transfer", "nst", "review", "salient_attention")
    losses = dict.fromkeys(vectors) | {name: {"layers": layers} for name in named}
    losses["vid"] = {"keep": "pooled"}
    logits = ("dkd", "dist", "standardized_kl", "mse_logits", "top_k_kl", "class_prior")
    assert problems({**losses, **dict.fromkeys(logits)}) == []


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"rdk": {}}, "unknown loss 'rdk', did you mean rkd"),
        ({"rkd": {"arguments": {"distance": 1}}}, "rkd has no argument 'distance'"),
        ({"crd": {"arguments": {"embedding_size": -1}}}, "embedding_size is -1, expected a whole"),
        ({"review": {"arguments": {"mid_channels": 2.5}}}, "mid_channels is 2.5, expected a whole"),
        ({"dist": {"arguments": {"temperature": 0}}}, "temperature is 0, expected above 0"),
        ({"dkd": {"arguments": {"target_weight": -1}}}, "target_weight is -1, expected 0 or more"),
        ({"salient_attention": {"arguments": {"background": 2}}}, "background is 2, expected betw"),
        ({"dkd": {"layers": [{}]}}, "dkd reads logits: drop layers and keep"),
        ({"rkd": {"layers": [{}, {}]}}, "rkd takes one pair of layers, not 2"),
        ({"hint": {"keep": "attention"}}, "hint cannot be computed from keep 'attention'"),
        ({"nst": {"keep": "pooled"}}, "nst cannot be computed from keep 'pooled'"),
        ({"review": {"keep": "pooled"}}, "review cannot be computed from keep 'pooled'"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(problems, loss, words):
    assert words in problems(loss)[0]


@pytest.mark.parametrize("name", ["attention_transfer", "salient_attention", "nst", "review"])
@pytest.mark.parametrize(
    "layers", [[], [{"student": "blocks.0"}], [{"student": "blocks.0", "teacher": "2/embedding"}]]
)
def test_a_loss_on_positions_asks_for_layers_in_the_place_of_an_embedding(problems, name, layers):
    (text,) = problems({name: {"layers": layers}})
    assert f"{name} compares positions, which an embedding has not" in text
    assert f"Name them in distillation.losses.{name}.layers" in text


@pytest.mark.parametrize(
    ("name", "layers", "words"),
    [
        ("attention_transfer", {"teacher": "linear"}, "the teacher: 'linear': .* has no positions"),
        ("salient_attention", {"student": "linear"}, "the student: .* has no positions"),
        ("nst", {"student": "linear", "teacher": "linear"}, "distillation.losses.nst: "),
        ("review", {"student": "linear", "teacher": "linear"}, "distillation.losses.review: "),
        ("hint", {"student": "linear"}, "distillation.losses.hint: "),
        ("embedding_alignment", {}, "distillation.losses.embedding_alignment: .* expected.*N, D"),
    ],
)
def test_layers_that_a_loss_cannot_compare_are_told_before_anything_runs(
    problems, name, layers, words
):
    pair = {"student": "blocks.0", "teacher": "layer3", **layers}
    keep = {"keep": "map"} if name == "embedding_alignment" else {}
    # Every loss says what is wrong with it, and one that is right nothing.
    (text,) = problems({name: {"layers": [pair], **keep}, "rkd": {}})
    assert re.search(words, text)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_unknown_layer_is_answered_with_the_names_and_shapes(problems, side):
    pair = {"student": "blocks.0", "teacher": "layer3", side: "layer9"}
    (text,) = problems({"hint": {"layers": [pair]}})
    assert f"the {side}" in text
    assert "layer9" in text
    known = "blocks.0" if side == "student" else "layer3"
    assert known in text
    assert "[8, 4, 4]" in text if side == "student" else "[16, 2, 2]" in text


def test_unequal_widths_without_an_adapter_are_refused(problems):
    pair = {"student": "blocks.0", "teacher": "layer3"}
    (text,) = problems({"hint": {"layers": [pair], "adapter": "none"}})
    assert "distillation.losses.hint" in text


@pytest.mark.parametrize(
    ("losses", "sections", "words"),
    [
        (
            {"dkd": {}},
            {"views": {"transforms": [{"mixup": {}}]}},
            "together with views that mix two pictures",
        ),
        (
            {"crd": {}},
            {"views": {"transforms": [{"cutmix": {}}]}},
            "crd together with views that mix two pictures",
        ),
        ({"class_prior": {}}, {"labelling": {"live": True}}, "class_prior with labelling.live"),
        ({"rkd": {}}, {"training": {"compile": True}}, "training.compile together with losses"),
        ({"crd": {}}, {"device": {"num_processes": 2}}, "crd with device.num_processes 2"),
        (
            {"rkd": {}},
            {"strategy": {"name": "mutual"}, "teacher": None},
            "strategy mutual has no trained teacher",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(problems, losses, sections, words):
    assert any(words in text for text in problems(losses, **sections))


def test_with_several_teachers_a_layer_says_whose_it_is(problems):
    second = {"model": RESNET, "training": {"num_epochs": 1}}
    ensemble = {"name": "ensemble", "teachers": [second]}
    pair = {"student": "blocks.0", "teacher": "layer3"}
    (text,) = problems({"hint": {"layers": [pair]}}, strategy=ensemble)
    assert "`1/layer3`" in text
    pair["teacher"] = "2/layer3"
    assert problems({"hint": {"layers": [pair]}}, strategy=ensemble) == []
    pair["teacher"] = "2/layer9"
    (text,) = problems({"hint": {"layers": [pair]}}, strategy=ensemble)
    assert "the teacher-2" in text


def test_the_default_embedding_says_whose_it_is_too(problems):
    ensemble = {
        "name": "ensemble",
        "teachers": [{"model": RESNET, "training": {"num_epochs": 1}}],
    }
    (text,) = problems({"rkd": {}, "dist": {}}, strategy=ensemble)
    assert "losses.rkd compares with the teacher's layer 'embedding'" in text
    assert "[{student: embedding, teacher: 1/embedding}]" in text
    named = {"layers": [{"student": "embedding", "teacher": "1/embedding"}]}
    assert problems({"rkd": named}, strategy=ensemble) == []


def test_stored_top_classes_of_several_teachers_have_no_classes_in_common(problems):
    ensemble = {
        "name": "ensemble",
        "teachers": [{"model": RESNET, "training": {"num_epochs": 1}}],
    }
    labelling = {"top_k": 3}
    (text,) = problems({"top_k_kl": {}}, strategy=ensemble, labelling=labelling)
    assert "top_k_kl with labelling.top_k 3 and 2 teachers" in text
    assert problems({"top_k_kl": {}}, labelling=labelling) == []
    assert problems({"top_k_kl": {}}, strategy=ensemble) == []


def test_contrast_needs_no_labels(problems):
    teaching = {"ce_weight": 0, "losses": {"crd": {}}}
    assert problems(strategy={"name": "label_free"}, distillation=teaching) == []


def test_a_strategy_says_what_it_needs(problems):
    (text,) = problems(teacher=None)
    assert "strategy offline needs a teacher section" in text
    (text,) = problems(strategy={"name": "mutual"})
    assert "strategy mutual has no teacher" in text
    (text,) = problems(strategy={"name": "onlin"})
    assert "online" in text


def test_a_training_depends_on_the_precision_of_a_teacher_that_it_runs_itself(tmp_path):
    def section(precision, *, live):
        values = {
            "teacher": {"model": RESNET, "training": {"num_epochs": 1}},
            "student": {"model": SEPARABLE},
            "data": {"source": "digits"},
            "labelling": {"precision": precision, "live": live},
        }
        return role_section(Run(parse_recipe(values), tmp_path / "run", tmp_path), "student")

    assert section("float32", live=True) != section("bfloat16", live=True)
    # Stored outputs are a parent, which has a key of its own.
    assert section("float32", live=False) == section("bfloat16", live=False)

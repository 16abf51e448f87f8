"""Search spaces: what the texts mean, what a recipe becomes, and every mistake at once."""

import pytest
import torch
import yaml

from tiny_run import TINY_RECIPE
from understudy.data.view_spec import TRANSFORM_PARAMETERS, check_spec
from understudy.data.views import Views
from understudy.errors import InputError
from understudy.recipes.files import read_recipe, shipped_recipes
from understudy.recipes.schema import parse_recipe
from understudy.recipes.search_space import (
    check_space,
    default_space,
    scaled_transforms,
    with_settings,
)
from understudy.search.plan import SearchPlan
from understudy.search.space import Choice, Range, parse_space


def tiny_values():
    return parse_recipe(yaml.safe_load(TINY_RECIPE)).model_dump(mode="json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0..1", Range(0, 1)),
        ("log:0.01..0.5", Range(0.01, 0.5, log=True)),
        ("int:1..8", Range(1, 8, whole=True)),
        ("int:log:1..64", Range(1, 64, log=True, whole=True)),
        ("-1e-3..1e-3", Range(-0.001, 0.001)),
        ("1|2|4", Choice((1, 2, 4))),
        ("sgd|adamw", Choice(("sgd", "adamw"))),
        ("[8]|[16, 8]", Choice(([8], [16, 8]))),
        ("null|0.9", Choice((None, 0.9))),
        ([1, 2], Choice((1, 2))),
        (3, Choice((3,))),
    ],
)
def test_texts_mean_ranges_and_choices(text, expected):
    parsed = parse_space({"a.b": text}).parameters["a.b"]
    assert parsed == expected
    if isinstance(text, str) and isinstance(parsed, Range) and "e" not in text:
        assert parsed.text() == text


def test_a_tie_is_one_minus_the_other():
    space = parse_space(["w.kl=0..1", "w.ce=1 - w.kl"])
    assert space.settings({"w.kl": 0.25}) == {"w.kl": 0.25, "w.ce": 0.75}


def test_a_grid_has_every_combination_once_in_order():
    space = parse_space(["a=1|2", "b=x|y|z"])
    expected = [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]
    assert space.grid() == expected


@pytest.mark.parametrize(
    ("items", "texts"),
    [
        (["novalue"], ["--space novalue"]),
        (["a="], ["--space a="]),
        (["a=5..1"], ["low end below its high end"]),
        (["a=log:0..1"], ["above 0"]),
        (["a=int:0.5..3"], ["must be whole"]),
        (["a=1|1"], ["each once"]),
        (["a=1|["], ["`a`: '1|['"]),
        (["a=log:3"], ["no LOW..HIGH"]),
        (["a=1|2", "a=3"], ["`a` twice"]),
        (["a=1 - b"], ["`a` is 1 - `b`"]),
        (["a=5..1", "b=log:0..1"], ["`a`", "`b`"]),
        ([], ["an empty space"]),
    ],
)
def test_mistakes_are_all_told(items, texts):
    with pytest.raises(InputError) as caught:
        parse_space(items)
    for text in texts:
        assert any(text in line for line in caught.value.problems), caught.value.problems


def test_a_grid_over_a_range_is_refused():
    with pytest.raises(InputError, match="values that can be counted"):
        parse_space(["a=0..1"]).grid()


def test_settings_are_put_into_the_recipe_and_leave_the_given_values_alone():
    values = tiny_values()
    changed = with_settings(
        values, {"training.optimizer.learning_rate": 1e-5, "student.model.arguments.hidden": [8]}
    )
    assert changed["training"]["optimizer"]["learning_rate"] == 1e-5
    assert changed["student"]["model"]["arguments"]["hidden"] == [8]
    assert values == tiny_values()


def test_what_makes_no_recipe_is_told_before_anything_runs():
    space = parse_space(
        ["distilation.temperature=1|2", "training.num_epochs=int:0..4", "seed=int:0..3"]
    )
    with pytest.raises(InputError) as caught:
        check_space(tiny_values(), space)
    text = "\n".join(caught.value.problems)
    assert "Did you mean `distillation`" in text
    assert "`training.num_epochs` is 0" in text
    with pytest.raises(InputError, match="hidden='x'"):
        check_space(tiny_values(), parse_space(["student.model.arguments.hidden=x"]))


def test_another_seed_leaves_splits_and_views_as_the_teacher_had_them():
    values = tiny_values()
    changed = with_settings(values, {"seed": 8})
    assert (changed["seed"], changed["data"]["split_seed"], changed["views"]["seed"]) == (8, 3, 3)
    values["data"]["split_seed"], values["views"]["seed"] = 5, 6
    changed = with_settings(values, {"seed": 8, "views.seed": 7})
    assert (changed["seed"], changed["data"]["split_seed"], changed["views"]["seed"]) == (8, 5, 7)
    assert with_settings(values, {"training.num_epochs": 2})["data"] == values["data"]


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        ({"pad_crop": {"padding": None}}, "views.transforms[0].pad_crop.padding"),
        ({"pad_crop": {"padding": "4"}}, "views.transforms[0].pad_crop.padding"),
        ({"color_jitter": {"hue": "x"}}, "views.transforms[0].color_jitter.hue"),
        ({"color_jitter": {"brightness": [0.5]}}, "views.transforms[0].color_jitter.brightness"),
    ],
)
def test_wrong_transforms_are_told_before_they_are_scaled(transform, text):
    values = tiny_values()
    values["views"]["transforms"] = [transform]
    with pytest.raises(InputError) as caught:
        check_space(values, parse_space(["views.strength=0.5..1.5", "seed=1|2"]))
    (told,) = caught.value.problems
    assert text in told


def test_the_default_space_is_of_what_the_recipe_has():
    recipe = parse_recipe(yaml.safe_load(TINY_RECIPE))
    space = default_space(recipe)
    check_space(recipe.model_dump(mode="json"), space)
    assert set(space.parameters) == {
        "training.optimizer.learning_rate",
        "distillation.kl_weight",
        "distillation.temperature",
        "views.strength",
    }
    assert space.parameters["training.optimizer.learning_rate"] == Range(0.002, 0.05, log=True)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_default_space_fits_every_shipped_recipe(name, tmp_path):
    values, _ = read_recipe(name)
    weights = tmp_path / "weights.pt"
    weights.touch()
    for section in (values.get("teacher"), *values.get("strategy", {}).get("teachers", ())):
        if section is not None and section.get("training") is None:
            section["checkpoint"] = str(weights)
    if values.get("strategy", {}).get("name") == "online":
        values["teacher"]["checkpoint"] = None
    values["data"]["source"] = values["data"].get("source") or "digits"
    recipe = parse_recipe(values)
    space = default_space(recipe)
    if recipe.strategy.is_chain:
        return  # refused, whatever the space
    check_space(recipe.model_dump(mode="json"), space)
    weighed = "distillation.kl_weight" in space.parameters
    assert weighed == ("distillation.ce_weight" in space.ties)
    if name in ("digits", "label_free"):
        assert weighed == (name == "digits")


def test_the_strength_scales_the_transforms_that_another_path_gives():
    transforms = [[{"pad_crop": {"padding": 2}}]]
    paths = {"views.strength": [2.0], "views.transforms": transforms}
    for order in (paths, dict(reversed(paths.items()))):
        space = parse_space(order)
        changed = with_settings(tiny_values(), space.grid()[0])
        assert changed["views"]["transforms"] == [{"pad_crop": {"padding": 4}}]


def test_a_student_that_is_not_trained_cannot_be_searched_for(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.touch()
    values = tiny_values() | {"control": False}
    values["student"] = {"model": {"name": "mlp"}, "checkpoint": str(weights)}
    values = parse_recipe(values).model_dump(mode="json")
    with pytest.raises(InputError, match=r"student\.checkpoint, which is not trained"):
        check_space(values, parse_space(["training.batch_size=16|32"]))


def test_the_default_space_of_muon_has_both_learning_rates():
    values = yaml.safe_load(TINY_RECIPE)
    values["training"]["optimizer"] = {"name": "muon", "matrix_learning_rate": 0.05}

    space = default_space(parse_recipe(values))

    rate = space.parameters["training.optimizer.matrix_learning_rate"]
    assert rate == Range(0.01, 0.25, log=True)
    assert "training.optimizer.learning_rate" in space.parameters


def test_strength_scales_how_far_transforms_go():
    given = [
        {"pad_crop": {"padding": 4}},
        {"flip": {}},
        {"affine": {"rotation": 10, "scale": [0.9, 1.1]}},
        {"color_jitter": {"brightness": 0.6}},
        {"grayscale": {"probability": 0.4}},
        {"random_resized_crop": {"scale": [0.6, 1.0]}},
    ]
    doubled = scaled_transforms(given, 2.0)
    assert doubled[0]["pad_crop"]["padding"] == 8
    assert doubled[1] == {"flip": {}}
    assert doubled[2]["affine"]["rotation"] == [-20, 20]
    assert doubled[3]["color_jitter"]["brightness"] == pytest.approx([0, 2.2])
    assert doubled[4]["grayscale"]["probability"] == 0.8
    assert doubled[5]["random_resized_crop"]["scale"] == pytest.approx([0.2, 1.0])
    assert doubled[2]["affine"]["scale"] == pytest.approx([0.8, 1.2])
    assert doubled[5]["random_resized_crop"]["ratio"] == pytest.approx([0.75**2, (4 / 3) ** 2])
    fixed = scaled_transforms([{"affine": {"scale": 1.5}}], 0.5)[0]["affine"]["scale"]
    assert fixed == [1.25, 1.25]
    far = scaled_transforms([{"affine": {}}], 50.0)[0]["affine"]["scale"]
    assert check_spec([{"affine": {"scale": far}}]) == []
    same = scaled_transforms([{"pad_crop": {"padding": 4}}], 1.0)
    assert same == [{"pad_crop": {"padding": 4}}]
    assert scaled_transforms(given, 0.0)[0]["pad_crop"]["padding"] == 0


@pytest.mark.parametrize(
    "path",
    [
        "device.num_threads",
        "measurement.num_threads.0",
        "budget.latency_ms.threads",
        "exits.policy.num_threads",
    ],
)
def test_a_number_of_threads_that_no_machine_has_is_refused(path):
    values = tiny_values()
    values["measurement"]["num_threads"] = [1]
    values["budget"]["latency_ms"] = {"at_most": 50}
    values["exits"] = {"layers": ["layers.1"]}
    check_space(values, parse_space([f"{path}=int:1..4096"]))
    with pytest.raises(InputError) as caught:
        check_space(values, parse_space([f"{path}=int:1..999999999999"]))
    (text,) = caught.value.problems
    assert f"`{path}` is 999999999999: Input should be less than or equal to 4096" in text


@pytest.mark.parametrize("name", sorted(set(TRANSFORM_PARAMETERS) - {"flip"}))
def test_strength_zero_leaves_pictures_alone(name):
    generator = torch.Generator().manual_seed(0)
    images_NCHW = torch.randint(256, (6, 3, 9, 9), generator=generator, dtype=torch.uint8)
    pool = torch.arange(len(images_NCHW))
    views = Views(scaled_transforms([{name: {}}], 0.0), seed=1, partner_pool=pool)
    partners_N = views.partners(pool, 0)
    partners_NCHW = None if partners_N is None else images_NCHW[partners_N]
    found_NCHW, _ = views.apply(images_NCHW, pool, 0, partners_NCHW)
    assert torch.equal(found_NCHW, images_NCHW)


def test_a_plan_says_everything_that_is_wrong_with_it():
    space = parse_space(["a=1|2"])
    with pytest.raises(InputError) as caught:
        SearchPlan(space, objectives=("acuracy",), sampler="best", pruner="x", num_trials=0)
    assert len(caught.value.problems) == 4
    with pytest.raises(InputError, match="values that can be counted"):
        SearchPlan(parse_space(["a=0..1"]), sampler="grid")
    with pytest.raises(InputError, match="without an end"):
        SearchPlan(space, sampler="random")
    assert not SearchPlan(space, objectives=("accuracy", "macs"), num_trials=1).prunes

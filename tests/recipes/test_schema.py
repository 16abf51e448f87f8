"""Recipes are validated whole: every problem at once, each with its mend."""

import pytest

from understudy.errors import RecipeError
from understudy.models.build import build_network
from understudy.recipes.files import apply_change, copy_recipe, load_recipe, shipped_recipes
from understudy.recipes.schema import parse_recipe

ENDS_AT_0 = {"start": 4, "end": 0}


def small_recipe(**changes):
    values = {
        "teacher": {"model": {"name": "mlp"}, "training": {"num_epochs": 2}},
        "student": {"model": {"name": "mlp"}},
    }
    values.update(changes)
    return values


def test_five_mistakes_are_listed_at_once():
    values = small_recipe(
        nmae="x",
        seed=-1,
        training={"num_epoch": 3, "batch_size": "many"},
        distillation={"temperature": 0},
    )
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values)
    assert len(caught.value.problems) == 5
    text = str(caught.value)
    assert "unknown key `nmae`" in text
    assert "Did you mean `name`?" in text
    assert "unknown key `training.num_epoch`" in text
    assert "Did you mean `num_epochs`?" in text
    assert "`seed` is -1" in text
    assert "`training.batch_size` is 'many'" in text
    assert "`distillation.temperature` is 0" in text


def test_a_schedule_is_told_from_a_number():
    recipe = parse_recipe(
        small_recipe(distillation={"temperature": {"start": 8, "end": 2}, "kl_weight": 1})
    )
    assert recipe.distillation.temperature.start == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"distillation": {"temperature": ENDS_AT_0}},
        {"exits": {"layers": ["a"], "guidance": {"temperature": ENDS_AT_0}}},
        {
            "strategy": {"name": "deep_to_shallow", "layers": ["a"], "temperature": ENDS_AT_0},
            "teacher": None,
        },
    ],
)
def test_a_temperature_stays_above_0(changes):
    with pytest.raises(RecipeError, match="a temperature must stay above 0"):
        parse_recipe(small_recipe(**changes))
    with pytest.raises(RecipeError, match=r"unknown key `distillation.kl_weight.shpe`.*`shape`"):
        parse_recipe(small_recipe(distillation={"kl_weight": {"start": 1, "end": 0, "shpe": 1}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"model": {"name": "mlp"}}}, "give its weights"),
        (
            {"teacher": {"model": {"name": "mlp"}, "checkpoint": "a.pt", "training": {}}},
            "either checkpoint or training",
        ),
        ({"distillation": {"kl_weight": 0, "ce_weight": 0}}, "nothing to learn"),
        ({"training": {"batch_size": 10, "num_micro_batches": 3}}, "not a multiple"),
        ({"training": {"learning_rate_schedule": {"warmup_epochs": 99}}}, "warmup_epochs"),
        ({"budget": {"latency_ms": {"batch": 1}}}, "`budget.latency_ms.at_most` is missing"),
        ({"name": "../escape"}, "`name`"),
        (
            {
                "student": {"model": {"name": "mlp"}, "flip_average": True},
                "heads": {"size": {"label_column": "a"}},
            },
            "flip_average.*drop heads and exits",
        ),
        ({"data": {"test_fraction": 1.5}}, "less than 1"),
        ({"training": {"clip_norm": float("nan")}}, "finite"),
        (
            {"training": {"num_epochs": 3, "last_views": {"num_epochs": 4, "num_views": 1}}},
            "last_views.num_epochs is 4, more than num_epochs 3: lower it",
        ),
        (
            {"training": {"last_views": {"num_epochs": 1, "num_views": 10}}},
            "training.last_views keeps 10 of 10 views",
        ),
        (
            {
                "views": {"num_views": 2},
                "finetuning": {"num_epochs": 1, "last_views": {"num_epochs": 1, "num_views": 3}},
            },
            "finetuning.last_views are 3 of 2 views",
        ),
        (
            {
                "teacher": {
                    "model": {"name": "mlp"},
                    "training": {"last_views": {"num_epochs": 1, "num_views": 1}},
                }
            },
            "a teacher's epochs each have a view of their own",
        ),
        (
            {
                "heads": {
                    "size": {
                        "label_column": "a",
                        "training": {"last_views": {"num_epochs": 1, "num_views": 1}},
                    }
                }
            },
            "a head sees its views in turn",
        ),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(small_recipe(**changes))


def test_set_changes_nested_values_and_lists():
    values = {"views": {"transforms": [{"flip": {}}]}, "training": {"num_epochs": 1}}
    apply_change(values, "training.num_epochs=7")
    apply_change(values, "views.transforms.0.flip.probability=0.25")
    apply_change(values, "budget.latency_ms.at_most=50")
    apply_change(values, "student.model.arguments={widths: [8, 16]}")
    assert values["training"]["num_epochs"] == 7
    assert values["views"]["transforms"] == [{"flip": {"probability": 0.25}}]
    assert values["budget"] == {"latency_ms": {"at_most": 50}}
    assert values["student"]["model"]["arguments"] == {"widths": [8, 16]}


@pytest.mark.parametrize("change", ["training", "=3", "a..b=1", "views.transforms.4.flip=1"])
def test_set_says_what_is_wrong(change):
    with pytest.raises(RecipeError, match="--set"):
        apply_change({"views": {"transforms": []}}, change)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe at"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="no shipped recipe named digit; expected one of"):
        load_recipe("digit")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(broken)
    broken.write_text("name: 2024-13-01")  # PyYAML takes it for a date
    for recipe, changes in ((broken, ()), (None, ["name=2024-13-01"])):
        with pytest.raises(RecipeError, match=r"is not YAML \(month must be .* Quote"):
            load_recipe(recipe, changes)
    broken.write_text("- 1")
    with pytest.raises(RecipeError, match="holds list; expected a mapping"):
        load_recipe(broken)


def test_shipped_recipes_can_be_copied_and_never_overwrite(tmp_path):
    assert {"digits", "cifar10"} <= set(shipped_recipes())
    path = copy_recipe("digits", tmp_path)
    assert load_recipe(path) == load_recipe("digits")
    with pytest.raises(RecipeError, match="exists; expected a new file"):
        copy_recipe("digits", tmp_path)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid(name):
    """What the user has to give is given; the rest is as shipped."""
    given = ["data.source=digits"]
    if "checkpoint: null" in shipped_recipes()[name]:
        given.append("teacher.checkpoint=teacher.pt")
    if "name: ensemble\n" in shipped_recipes()[name] and len(given) == 2:
        given.append("strategy.teachers.0.checkpoint=second.pt")
    assert load_recipe(name, given).student.model.name


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "cifar10" in name])
def test_a_student_for_cifar10_is_within_its_own_limit(name):
    changes = ["data.source=folder", "teacher.checkpoint=teacher.pt"]
    if "name: ensemble\n" in shipped_recipes()[name]:
        changes.append("strategy.teachers.0.checkpoint=second.pt")
    recipe = load_recipe(name, changes)
    model, limit = recipe.student.model, recipe.budget.num_params
    network = build_network(
        model.name, num_classes=10, image_shape=(3, 32, 32), arguments=model.arguments
    )
    assert limit is not None
    assert sum(parameter.numel() for parameter in network.parameters()) <= limit


def test_recipes_for_the_edge_name_what_they_ship():
    recipe = load_recipe("edge")
    assert [step.name for step in recipe.compression.steps] == ["prune", "quantize"]
    assert recipe.compression.quantizes
    assert "c" in recipe.release.targets

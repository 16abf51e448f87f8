"""What a search folder remembers: the folder alone goes on, and nothing else is put under it."""

import json
import re

import pytest
import yaml

from tiny_run import TINY_RECIPE
from understudy.errors import InputError
from understudy.recipes.schema import parse_recipe
from understudy.recipes.search_asked import ASKED_NAME, Asked, identity, read_asked, storage_url
from understudy.recipes.search_job import open_search
from understudy.search.space import parse_space

SPACE = parse_space(
    {
        "training.optimizer.learning_rate": "log:0.0012345678..0.5",
        "training.batch_size": "int:1..12345678",
        "student.model.arguments.hidden": [[8], [16, 8]],
        "student.model.name": ["a|b", "1 - x", "0..1"],
        "distillation.kl_weight": "0..1",
        "distillation.ce_weight": "1 - distillation.kl_weight",
    }
)


def tiny():
    return parse_recipe(yaml.safe_load(TINY_RECIPE))


def opened(recipe, out=None, *, changes=(), space=None, **options):
    return open_search(recipe, changes=changes, space=space, options=options, out=out, workers=1)


def test_a_folder_gives_back_what_was_asked_for_exactly(tmp_path):
    asked = Asked(tiny(), SPACE, ("accuracy", "macs"), "nsga2", "none", 7, "sqlite:////x.db")
    assert read_asked(tmp_path) is None
    asked.save(tmp_path)
    assert read_asked(tmp_path) == asked
    assert list(read_asked(tmp_path).space.parameters) == list(SPACE.parameters)


def test_a_password_is_not_written_down_and_asked_for_again(tmp_path):
    url = "postgresql://me:s3cret@host/searches"
    Asked(tiny(), SPACE, storage=url).save(tmp_path)
    assert "s3cret" not in (tmp_path / ASKED_NAME).read_text()
    with pytest.raises(InputError, match="Give --storage again"):
        storage_url(read_asked(tmp_path), tmp_path)
    Asked(tiny(), parse_space(["seed=1|2"]), num_trials=2, storage=url).save(tmp_path)
    assert opened(tmp_path, storage=url).storage == url
    with pytest.raises(InputError, match=re.escape("its storage is postgresql://me:***@host/")):
        opened(tmp_path, storage="postgresql://me:s3cret@other/searches")


def test_a_search_does_not_mind_where_its_data_lies():
    def identity_of(**data):
        values = yaml.safe_load(TINY_RECIPE)
        return identity(parse_recipe(values | {"data": values["data"] | data}))

    moved = {"source": "elsewhere", "memory_limit_bytes": 5}
    assert identity_of(**moved) == identity_of()
    assert identity_of(on_bad="skip") != identity_of()


def test_every_contradiction_is_told_in_one_error(tmp_path):
    Asked(tiny(), parse_space(["seed=1|2"]), num_trials=2).save(tmp_path)
    wrong = {
        "changes": ["training.batch_size=32", "name=other"],
        "space": ["seed=0..1"],
        "sampler": "grid",
        "objectives": ("nll",),
        "storage": "sqlite:////elsewhere.db",
    }
    for recipe, out in ((tmp_path, None), (tiny().model_copy(update={"name": "other"}), tmp_path)):
        with pytest.raises(InputError) as caught:
            opened(recipe, out, **wrong)
        (text,) = caught.value.problems
        for name in ("name", "space", "sampler", "objectives", "storage"):
            assert f"its {name} is" in text
        assert "Leave out what `understudy search" in text
        assert ("its recipe is another" in text) == (recipe == tmp_path)
    # What may be another one.
    found = opened(tmp_path, pruner="none", num_trials=9, changes=["device.num_threads=2"])
    assert (found.plan.pruner, found.plan.num_trials) == ("none", 9)
    assert found.values["device"]["num_threads"] == 2
    with pytest.raises(InputError, match="which stays in its folder"):
        opened(tmp_path, tmp_path / "other")


def test_a_folder_that_cannot_say_what_was_asked_for_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "recipe.yaml").write_text(TINY_RECIPE)
    with pytest.raises(InputError, match="does not say what its search was asked for"):
        opened(tmp_path)
    for text in ("[", "3", "recipe: {}", "{recipe: {}, space: {}, objectives: [], x: 1}"):
        (tmp_path / ASKED_NAME).write_text(text)
        with pytest.raises(InputError, match=ASKED_NAME):
            opened(tmp_path)


def test_the_folder_alone_goes_on_with_the_same_search(warm, tiny_recipe, tmp_path):
    folder, database = tmp_path / "s", tmp_path / "shared.db"

    def run(*arguments):
        return warm.run("search", *arguments, home=tmp_path / "home")

    def trials():
        return json.loads((folder / "search.json").read_text())["trials"]

    begun = run(
        tiny_recipe, "--out", folder, "--sampler", "random",
        "--space", "training.num_epochs=int:1..2",
        "--objective", "nll", "--trials", "1", "--storage", f"sqlite:///{database}",
    )  # fmt: skip
    assert begun.code == 0, begun.err
    first = trials()
    assert len(first) == 1
    more = run(folder, "--trials", "2")
    assert more.code == 0, more.err
    assert trials()[:1] == first
    assert len(trials()) == 2
    assert set(trials()[1]["settings"]) == {"training.num_epochs"}
    result = json.loads((folder / "search.json").read_text())
    assert (result["plan"]["sampler"], result["plan"]["objectives"]) == ("random", ["nll"])
    assert not (folder / "search.db").exists()
    assert yaml.safe_load((folder / "best.yaml").read_text())["control"] is True
    other = run(folder, "--sampler", "grid", "--storage", "sqlite:////other.db")
    assert other.code == 2
    assert "its sampler is random, and grid was asked for; its storage is" in other.err
    assert "Traceback" not in other.err
    assert trials()[:1] == first

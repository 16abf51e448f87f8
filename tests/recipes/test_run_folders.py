"""Which folder a recipe's name means, and what a start may remove from a run folder."""

from understudy.recipes.files import load_recipe, shipped_recipe
from understudy.recipes.job import open_run, start
from understudy.recipes.prepare import split

PART = "k3j_h1g0.part"


def test_data_in_a_folder_of_a_recipes_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    (tmp_path / "digits" / "train").mkdir(parents=True)
    assert load_recipe("digits").name == "digits"
    assert open_run("digits").folder.parts == ("runs", "digits")
    # A run in such a folder is meant as before.
    changed = shipped_recipe("digits").replace("name: digits", "name: mine")
    (tmp_path / "digits" / "recipe.yaml").write_text(changed)
    assert load_recipe("digits").name == "mine"
    assert open_run("digits").folder.parts == ("digits",)


def test_a_start_clears_what_is_its_own_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    own = [
        tmp_path / f".recipe.yaml.{PART}",
        tmp_path / "report" / f".report.html.{PART}",
        tmp_path / "split" / f".key.{PART}",
        tmp_path / "split" / "inner" / f".record.json.{PART}",
    ]
    others = [
        tmp_path / ".download.part",
        tmp_path / "report" / ".notes.part",
        tmp_path / "data" / f".photo.png.{PART}",
        tmp_path / "runs" / "other" / "student" / f".model.safetensors.{PART}",
    ]
    for path in (*own, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    run = open_run("digits", out=".")
    start(run)
    split(run)
    assert [path for path in own if path.exists()] == []
    assert [path for path in others if not path.exists()] == []

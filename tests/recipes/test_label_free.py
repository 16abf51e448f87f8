"""Training pictures without labels: what learns from them, and what leaves them out."""

import json

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from tiny_run import TINY_RECIPE
from understudy.data.batches import Batch
from understudy.data.sources import load_data
from understudy.errors import RecipeError
from understudy.losses import cross_entropy
from understudy.recipes.job import open_run
from understudy.recipes.label import label
from understudy.recipes.outputs import stored_outputs
from understudy.recipes.prepare import split
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.recipes.teach import teach
from understudy.recipes.train import role_section, role_training, train_role
from understudy.train.repeated import RepeatedOrder
from understudy.train.training import count_right

LOGITS_NK = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
LABELS_N = torch.tensor([2, -1, 0, 3, -1, 1])


def recipe_values(**changes):
    values = yaml.safe_load(TINY_RECIPE)
    values["strategy"] = {"name": "label_free"}
    values["distillation"] = {"kl_weight": 1, "ce_weight": 0, "temperature": 2}
    return {**values, **changes}


def run_of(tmp_path, **changes):
    return open_run(recipe_values(**changes), out=tmp_path / "run")


DIGITS = {"source": "digits", "validation_fraction": 0.15, "test_fraction": 0.3}


@pytest.fixture
def more_digits(tmp_path):
    """A folder of new 8x8 pictures, a copy of a test picture among them."""
    folder = tmp_path / "more"
    folder.mkdir()
    digits = load_data("digits")
    images_NHW = digits.images(torch.arange(40))[:, 0].numpy()
    for number, image_HW in enumerate(images_NHW):
        Image.fromarray(image_HW[::-1].copy()).save(folder / f"{number}.png")
    Image.fromarray(images_NHW[0]).save(folder / "known.png")
    return folder


# Losses


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_over_labelled_rows(label_smoothing):
    options = {"label_smoothing": label_smoothing}
    logits_NK = LOGITS_NK.clone().requires_grad_()
    loss = cross_entropy(logits_NK, LABELS_N, **options)
    known_N = LABELS_N >= 0
    expected = nn.functional.cross_entropy(LOGITS_NK[known_N], LABELS_N[known_N], **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert (logits_NK.grad[~known_N] == 0).all()
    assert (logits_NK.grad[known_N] != 0).any(dim=1).all()


def test_mixed_rows_count_where_both_labels_are_known():
    partners_N = torch.tensor([1, 2, -1, 0, -1, 2])
    weights_N = torch.tensor([0.7, 0.2, 0.5, 0.9, 0.4, 0.6])
    loss = cross_entropy(LOGITS_NK, LABELS_N, partner_labels_N=partners_N, label_weight_N=weights_N)
    rows = [0, 3, 5]
    expected = sum(
        weights_N[row] * nn.functional.cross_entropy(LOGITS_NK[row], LABELS_N[row])
        + (1 - weights_N[row]) * nn.functional.cross_entropy(LOGITS_NK[row], partners_N[row])
        for row in rows
    )
    assert loss.item() == pytest.approx(expected.item() / 3, rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_without_labels_gives_zero_and_no_gradient(mixed):
    logits_NK = LOGITS_NK.clone().requires_grad_()
    none_N = torch.full((6,), -1)
    mixing = {"partner_labels_N": LABELS_N, "label_weight_N": torch.full((6,), 0.5)}
    loss = cross_entropy(logits_NK, none_N, **(mixing if mixed else {}))
    assert loss.item() == 0
    loss.backward()
    assert (logits_NK.grad == 0).all()


def test_labelled_rows_alone_count_for_the_accuracy():
    images_NCHW = torch.zeros(6, 1, 2, 2)
    batch = Batch(torch.arange(6), images_NCHW, LABELS_N)
    right_NK = nn.functional.one_hot(LABELS_N.clamp(min=0), 4).float()
    assert count_right(right_NK, batch) == (4.0, 4)
    assert count_right(-right_NK, batch) == (0.0, 4)
    none = Batch(torch.arange(6), images_NCHW, torch.full((6,), -1))
    assert count_right(right_NK, none) == (0.0, 0)


# The control among unlabelled pictures


def test_few_samples_are_repeated_evenly():
    indices_N = torch.tensor([3, 8, 11])
    order = RepeatedOrder(indices_N, 10)
    first_N = order.order(seed=1, epoch=0)
    assert len(first_N) == 10
    counts = [int((first_N == index).sum()) for index in indices_N]
    assert sorted(counts) == [3, 3, 4]
    assert torch.equal(first_N, order.order(seed=1, epoch=0))
    assert not torch.equal(first_N, order.order(seed=1, epoch=1))
    assert not torch.equal(first_N, order.order(seed=2, epoch=0))


@pytest.fixture(scope="module")
def hidden_run(tmp_path_factory):
    """A run in which nine labels of ten are hidden, before anything is trained."""
    folder = tmp_path_factory.mktemp("label-free")
    teacher = yaml.safe_load(TINY_RECIPE)["teacher"]
    teacher["training"]["num_epochs"] = 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERSTUDY_HOME", str(folder / "home"))
        yield run_of(folder, data={**DIGITS, "labelled_fraction": 0.1}, teacher=teacher)


def shown_to(run, role):
    """Return what a role is shown in its first epoch, in order, and its plan."""
    _, plan = role_training(run, role, run.folder / role)
    return torch.cat([batch.indices_N for batch, _ in plan.feed.epoch(0)]), plan


def test_teacher_and_control_see_labelled_pictures_alone(hidden_run):
    run, labelled = hidden_run, set(hidden_run.labelled_train_N.tolist())
    assert len(labelled) == pytest.approx(0.1 * len(run.splits.train), abs=10)
    seen_N, plan = shown_to(run, "teacher")
    assert set(seen_N.tolist()) <= labelled
    assert plan.feed.num_batches == len(labelled) // 64
    seen_N, plan = shown_to(run, "control")
    assert set(seen_N.tolist()) == labelled
    assert plan.feed.num_batches == len(run.splits.train) // 64


def test_validation_and_test_keep_their_labels(hidden_run):
    run = hidden_run
    plain = load_data("digits")
    for name in ("validation", "test"):
        indices_N = getattr(run.splits, name)
        assert torch.equal(run.source.labels_N[indices_N], plain.labels_N[indices_N])
    assert torch.equal(run.splits.train, run.labelled_splits.train)


@pytest.fixture(scope="module")
def finished(hidden_run):
    """The same run, finished."""
    from understudy.stages import distill

    return distill(hidden_run.asked, out=hidden_run.folder)


def test_the_student_learns_from_all_pictures_without_labels(hidden_run, finished):
    run = hidden_run
    seen_N, plan = shown_to(run, "student")
    assert (run.source.labels_N[seen_N] < 0).sum() > 0.8 * len(seen_N)
    rows = run.parent("student", "train").payload["rows"]
    assert {name for row in rows for name in row["losses"]} == {"kl"}
    assert all(0 <= row["train_accuracy"] <= 1 for row in rows)
    steps = [run.parent(role, "train").payload["num_steps"] for role in ("student", "control")]
    assert steps == [plan.feed.num_batches * 4] * 2


def test_the_report_says_how_many_have_no_label(hidden_run, finished):
    data = finished.results.data
    assert data.num_unlabelled == len(hidden_run.splits.train) - len(hidden_run.labelled_train_N)
    assert sum(data.class_counts["train"]) == len(hidden_run.labelled_train_N)
    assert data.num_samples["train"] == len(hidden_run.splits.train)
    assert "Without a label" in finished.page.read_text()


def test_a_source_of_more_pictures_joins_the_training_split(tmp_path, monkeypatch, more_digits):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    plain = run_of(tmp_path)
    data = {**DIGITS, "unlabelled": str(more_digits)}
    run = run_of(tmp_path, data=data)
    assert run.source.num_samples == plain.source.num_samples + 40
    for name in ("validation", "test", "calibration"):
        assert torch.equal(getattr(run.splits, name), getattr(plain.splits, name))
    assert torch.equal(run.splits.train[:-40], plain.splits.train)
    assert run.splits.train[-40:].tolist() == list(range(1797, 1837))
    assert torch.equal(run.labelled_train_N, plain.splits.train)
    assert run.source.fingerprint != plain.source.fingerprint
    for stage in (split, teach, label):
        stage(run)
    logits_NK = stored_outputs(run, run.splits.train[-40:], view=1).logits_NK
    assert logits_NK.shape == (40, 10)
    payload = run.parent("split", "teach").payload
    assert payload["num_unlabelled"] == 40
    assert json.loads(json.dumps(payload)) == payload
    other_batches = run_of(tmp_path, data=data, labelling={"batch_size": 99})
    assert label(other_batches).hash == run.parent("labels", "label").hash
    assert other_batches.reused == {"labels"}


def test_data_that_was_moved_is_the_same_data(tmp_path, monkeypatch, more_digits):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    digits, source = load_data("digits"), tmp_path / "labelled"
    for number, label_of in enumerate(digits.labels_N[40:340].tolist()):
        if label_of < 3:
            (source / str(label_of)).mkdir(parents=True, exist_ok=True)
            image_HW = digits.images(torch.tensor([40 + number]))[0, 0].numpy()
            Image.fromarray(image_HW).save(source / str(label_of) / f"{number}.png")

    def split_of(folder, **changes):
        data = {"source": str(folder / "labelled"), "unlabelled": str(folder / "more")}
        run = run_of(tmp_path, data={**DIGITS, **data, **changes})
        return split(run), run.reused

    first, reused = split_of(tmp_path)
    assert reused == set()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (source, more_digits):
        folder.rename(elsewhere / folder.name)
    again, reused = split_of(elsewhere, memory_limit_bytes=100)
    assert (again.hash, reused) == (first.hash, {"split"})
    # Other pictures without labels are other data, and so are pictures of another size.
    (elsewhere / "more" / "7.png").unlink()
    fewer, reused = split_of(elsewhere)
    assert fewer.key != first.key
    assert split_of(elsewhere, image_size=[8, 8])[0].key != fewer.key
    assert reused == set()


def test_other_strategies_use_the_labels_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    values = recipe_values(
        data={**DIGITS, "labelled_fraction": 0.05},
        strategy={"name": "offline"},
        distillation={"kl_weight": 0.9, "ce_weight": 0.1},
        training={"num_epochs": 2, "batch_size": 16, "optimizer": {"learning_rate": 0.01}},
    )
    values["teacher"]["training"] |= {"batch_size": 32, "num_epochs": 40}
    run = open_run(values, out=tmp_path / "run")
    for stage in (split, teach, label):
        stage(run)
    rows = train_role(run, "student").payload["rows"]
    # Batches of 16 with a label in twenty: some have none.
    assert all(0 < row["losses"]["ce"] < 10 for row in rows)
    assert all(0 <= row["train_accuracy"] <= 1 for row in rows)


def test_keys_tell_that_labels_are_weighed_over_an_update_that_is_cut(tmp_path):
    """Parts once counted alike, however few labels they had: what they taught is made anew."""
    few = {**DIGITS, "labelled_fraction": 0.5}
    mixed = {"transforms": [{"mixup": {}}]}

    def weighed(role, num_parts=2, strategy="offline", data=few, views=None, **device):
        values = recipe_values(data=data, strategy={"name": strategy}, device=device)
        values["training"]["num_micro_batches"] = num_parts
        run = Run(parse_recipe(values | ({"views": views} if views else {})), tmp_path, tmp_path)
        return "labels" in role_section(run, role)

    assert weighed("student")
    assert weighed("student", num_parts=1, num_processes=2)
    assert weighed("control", views=mixed)
    assert weighed("teacher", views=mixed, num_processes=2)
    assert not weighed("student", num_parts=1)
    assert not weighed("student", data=DIGITS)
    assert not weighed("student", strategy="label_free")
    assert not weighed("control")
    assert not weighed("teacher", views=mixed)


# What is refused


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        ({"ce_weight": 0.1}, "set distillation.ce_weight to 0"),
        ({"ce_weight": 0, "teacher_share": 0.5}, "set distillation.ce_weight to 0"),
        ({"ce_weight": 0, "losses": {"dkd": {}}}, "which distillation.losses.dkd needs: drop it"),
        ({"ce_weight": 0, "losses": {"class_prior": {}}}, "distillation.losses.class_prior needs"),
        ({"ce_weight": 0, "curriculum": {"difficulty": "loss"}}, "difficulty loss needs"),
    ],
)
def test_label_free_refuses_what_needs_labels(distillation, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_values(distillation=distillation))


def test_label_free_refuses_exits_that_learn_from_labels():
    values = recipe_values(distillation={"ce_weight": 0}, exits={"layers": ["blocks.0"]})
    with pytest.raises(RecipeError, match=r"set exits\.guidance\.ce_weight to 0"):
        parse_recipe(values)
    values["exits"]["guidance"] = {"ce_weight": 0}
    parse_recipe(values)


def test_hidden_labels_refuse_what_needs_all_of_them():
    values = recipe_values(
        data={**DIGITS, "labelled_fraction": 0.5},
        strategy={"name": "offline"},
        distillation={"losses": {"dkd": {}}, "curriculum": {"difficulty": "student_loss"}},
    )
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values)
    assert "distillation.losses.dkd needs the label of every training picture" in str(caught.value)
    assert "difficulty student_loss needs the label of every training pict" in str(caught.value)
    values["data"]["labelled_fraction"] = 1
    parse_recipe(values)


def test_what_is_wrong_with_the_data_is_found_first(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    with pytest.raises(RecipeError, match=r"data\.unlabelled is \./nowhere, which does not exist"):
        run_of(tmp_path, data={**DIGITS, "unlabelled": "./nowhere"})
    colour = tmp_path / "colour"
    colour.mkdir()
    Image.new("RGB", (8, 8), (10, 200, 90)).save(colour / "one.png")
    with pytest.raises(RecipeError, match=r"unlabelled images are \[3, 8, 8\]"):
        run_of(tmp_path, data={**DIGITS, "unlabelled": str(colour)})
    with pytest.raises(RecipeError, match=r"Give other images in data\.unlabelled"):
        run_of(tmp_path, data={**DIGITS, "unlabelled": "digits"})
    with pytest.raises(RecipeError, match=r"teacher\.training\.batch_size is 64 and the training"):
        run_of(tmp_path, data={**DIGITS, "labelled_fraction": 0.02})


def test_the_shipped_recipe_runs(warm, fresh):
    changes = ["training.num_epochs=4", "teacher.training.num_epochs=20", "views.num_views=2"]
    changes.append("measurement={min_seconds: 0.05, batch_sizes: [1], num_threads: [1]}")
    options = [argument for change in changes for argument in ("--set", change)]
    finished = warm.run("distill", "label_free", *options, "--out", fresh.folder, home=fresh.home)
    assert finished.code in (0, 3), finished.err
    report = json.loads((fresh.folder / "report" / "report.json").read_text())
    assert report["results"]["data"]["num_unlabelled"] > 900

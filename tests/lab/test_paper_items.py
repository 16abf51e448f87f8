"""Every item of the paper's lab on small pictures: it runs, its page has its numbers, it goes on.

The trainings are two and three epochs of a higher learning rate: the paper's would not leave
chance in so few updates.
"""

import shutil
from dataclasses import replace

import pytest
import torch

from understudy.artifacts import Record, file_hash
from understudy.data.sources import load_data
from understudy.lab import paper, paper_recipes, timings
from understudy.lab.paper import ITEMS, Lab, teacher_tag
from understudy.lab.paper_recipes import Setting, alone, distilled
from understudy.lab.paper_records import finished_items, run_item, run_items
from understudy.lab.paper_values import ACCURACIES, OPERATORS, PRETRAINED_ACCURACY
from understudy.lab.paper_views import paper_document
from understudy.recipes.job import open_run
from understudy.report.document import document_html, document_markdown
from understudy.report.formats import fixed, percent, points

TRAINED = ("accuracy", "dropout", "online", "pretrained", "alpha", "temperature")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A lab folder whose trainings are short, and the store that they share."""
    folder = tmp_path_factory.mktemp("lab")
    slow = paper_recipes.training
    optimizer = {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.01}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("UNDERSTUDY_HOME", str(folder / "home"))
        patched.setattr(
            paper_recipes,
            "training",
            lambda num_epochs: slow(num_epochs) | {"batch_size": 16, "optimizer": optimizer},
        )
        for module in (paper, paper_recipes):
            patched.setattr(module, "GRID_LAYERS", 4)
        patched.setattr(paper, "ALPHAS", (0.0, 1.0))
        patched.setattr(paper, "TEMPERATURES", (1.0, 5.0))
        yield folder


@pytest.fixture(scope="module")
def short(quick):
    """The lab after two epochs, its records and its page."""
    setting = Setting("digits", num_epochs=2, dropout=0.0, threads=1)
    lab = Lab(setting, quick / "lab", grid_epochs=1, layers=(4,), rates=(0.0, 0.1))
    run_item(lab, "accuracy")
    # The teacher of Figure 6 lies outside: its weights stay when the network is trained on.
    weights = lab.run_folder("alone") / "teacher" / "model.safetensors"
    shutil.copy(weights, quick / "teacher.safetensors")
    teacher = {
        "model": alone(setting, dropout=0.0)["teacher"]["model"],
        "checkpoint": str(quick / "teacher.safetensors"),
    }
    lab = replace(lab, teacher=teacher)
    records = run_items(lab, [name for name in ITEMS if name != "parameters"])
    return lab, {name: found[0] for name, found in records.items()}, page_of(records)


@pytest.fixture(scope="module")
def longer(short):
    """The same lab after three epochs."""
    lab = replace(short[0], setting=replace(short[0].setting, num_epochs=3), grid_epochs=2)
    records = run_items(lab, TRAINED)
    return lab, {name: found[0] for name, found in records.items()}, page_of(records)


def page_of(records):
    return document_markdown(paper_document(records))


def curves_of(name, payload):
    """Return every curve of an item by name."""
    if name == "dropout":
        return payload["curves"]
    if name == "accuracy":
        return {network: found["curve"] for network, found in payload["networks"].items()}
    if name == "online":
        return {"online": payload["curve"], "offline": payload["offline_curve"]}
    if name == "pretrained":
        return {"student": payload["curve"]}
    return {str(point["settings"]): point["curve"] for point in payload["points"]}


@pytest.mark.parametrize("name", TRAINED)
def test_an_item_has_a_curve_of_every_training_and_goes_on(name, short, longer):
    first = curves_of(name, short[1][name].payload)
    second = curves_of(name, longer[1][name].payload)
    assert list(first) == list(second)
    in_grid = name in ("dropout", "alpha", "temperature")
    for network, curve in first.items():
        # The student of Table 6 is one of the dropout rates, and was trained longer already.
        wanted = 1 if in_grid and (name, network) != ("dropout", "0") else 2
        assert [row[0] for row in curve] == list(range(1, wanted + 1))
        assert [row[0] for row in second[network]] == list(range(1, wanted + 2))
        # A teacher that was trained on is another one, and its student begins anew.
        of_teacher = network.startswith("TS") or network == "offline"
        if not of_teacher and name not in ("alpha", "temperature"):
            assert second[network][:wanted] == curve
    for page, found in ((short[2], first), (longer[2], second)):
        for curve in found.values():
            assert percent(curve[-1][2]) in page


def test_the_tables_have_the_numbers_of_the_records(short):
    _, records, page = short
    for name, network in records["accuracy"].payload["networks"].items():
        start = f"| {name} | {percent(ACCURACIES[name][0])} |"
        row = next(line for line in page.splitlines() if line.startswith(start))
        assert points(network["curve"][-1][2] - ACCURACIES[name][1]) in row
        assert f"{fixed(network['epoch_seconds'], 1)} s" in page
        assert f"{fixed(network['inference_seconds'], 2)} s" in page
        assert network["gpu"] is None
    num = records["accuracy"].payload["num_samples"]
    assert f"{fixed(num['train'], 0)} pictures train and {num['validation']} validate" in page
    online, pretrained = records["online"].payload, records["pretrained"].payload
    assert f"{fixed(online['epoch_seconds'] / 36, 2)} h" in page
    assert f"Labelling between the two, once: {fixed(online['label_seconds'], 0)} s" in page
    whole = pretrained["epoch_seconds"] + pretrained["label_seconds"]
    assert f"| 862 s | {fixed(whole, 1)} s |" in page
    assert points(pretrained["curve"][-1][2] - PRETRAINED_ACCURACY) in page
    assert percent(pretrained["teacher_accuracy"]) in page
    assert "Best on validation: " in page


def test_operators_have_times_and_shares_of_every_network(short):
    _, records, page = short
    for name, theirs in OPERATORS.items():
        table = records["operators"].payload["tables"][name]
        assert table["num_threads"] == 1
        times = {row["kind"]: row["time_ms"] for row in table["rows"]}
        share = times["conv2d"] / sum(times.values())
        their_share = theirs["conv2d"][0] / theirs["model inference"][0]
        assert (
            f"| {name} | {percent(their_share, 1)} | {percent(share, 1)} | "
            f"{points(share - their_share, 1)} |"
        ) in page


def test_short_curves_are_called_short_where_they_stand(short, longer):
    goes_on, anew = "--epochs 100 goes on", "--grid-epochs 100 trains all anew"
    for name, options in (("online", goes_on), ("pretrained", goes_on), ("alpha", anew)):
        text = page_of({name: [short[1][name]]})
        assert "of 100 epochs: too few to tell" in text
        assert options in text
    assert "3 of 100 epochs: over the last two," in page_of({"online": [longer[1]["online"]]})


def test_each_dropout_rate_has_its_own_tables(longer):
    lab, records, _ = longer
    other = replace(lab, setting=replace(lab.setting, dropout=0.1))
    run_item(other, "accuracy")
    found = finished_items(other)
    assert [r.recipe["setting"]["dropout"] for r in found["accuracy"]] == [0, 0.1]
    assert found["accuracy"][0].hash == records["accuracy"].hash
    document = paper_document(found)
    text = document_markdown(document)
    for rate, record in zip(("0", "0.1"), found["accuracy"], strict=True):
        _, _, chapter = text.partition(f"Figures 1 and 2), dropout {rate}\n")
        chapter = chapter.partition("\n## ")[0]
        assert f"--only accuracy --dropout {rate} --layers 4 --layers 6" in chapter  # to run more
        assert f"seed 0, dropout {rate}, " in chapter
        for network in record.payload["networks"].values():
            assert percent(network["curve"][-1][2]) in chapter
    charts = [line for line in document_html(document).splitlines() if 'id="chart-' in line]
    names = [line.partition('id="')[2].partition('"')[0] for line in charts]
    assert len(names) == len(set(names))


def test_a_second_pretrained_teacher_leaves_the_first_ones_student_alone(longer):
    lab, _, _ = longer
    first = lab.run_folder(f"pretrained-{teacher_tag(lab.teacher)}") / "student"
    weights = file_hash(first / "model.safetensors")
    checkpoint = lab.run_folder("ts4") / "teacher" / "model.safetensors"
    model = distilled(lab.setting, 4)["teacher"]["model"]
    second = replace(lab, teacher={"model": model, "checkpoint": str(checkpoint)})
    record = run_item(second, "pretrained")
    assert record.payload["teacher_params"] > longer[1]["pretrained"].payload["teacher_params"]
    assert file_hash(first / "model.safetensors") == weights
    moved = shutil.copy(lab.teacher["checkpoint"], first.parent / "elsewhere.safetensors")
    assert teacher_tag(lab.teacher | {"checkpoint": str(moved)}) == teacher_tag(lab.teacher)


def test_outputs_that_were_there_already_are_not_measured(short, quick):
    lab, records, _ = short
    measured = records["pretrained"].payload
    assert measured["label_seconds"] > 0
    elsewhere = replace(lab, folder=quick / "second")
    record = run_item(elsewhere, "pretrained")
    assert record.payload["curve"] == measured["curve"]
    assert record.payload["label_seconds"] is None
    text = page_of({"pretrained": [record]})
    assert "| epoch that runs the teacher | 862 s | not measured |" in text
    assert "What the store saves was not measured" in text


def test_a_transformer_is_given_its_own_size_and_normalisation(warm, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    vit = transformers.ViTForImageClassification(config)
    digits = load_data("digits")
    pixels_NCHW = digits.images(torch.arange(len(digits.labels_N))).float() / 255
    resized_NCHW = torch.nn.functional.interpolate(pixels_NCHW, (16, 16), mode="bilinear")
    inputs_NCHW = (resized_NCHW - 0.9) / 0.5
    optimizer = torch.optim.Adam(vit.parameters(), lr=0.005)
    for indices_N in torch.randint(len(pixels_NCHW), (150, 64)):
        logits_NK = vit(pixel_values=inputs_NCHW[indices_N]).logits
        torch.nn.functional.cross_entropy(logits_NK, digits.labels_N[indices_N]).backward()
        optimizer.step()
        optimizer.zero_grad()
    vit.eval().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.9], "image_std": [0.5]}'
    )
    finished = warm.run(
        *("lab", "paper", "--data", "digits", "--only", "pretrained", "--epochs", "1"),
        *("--vit", tmp_path / "vit", "--out", tmp_path / "lab", "--threads", "1"),
        home=tmp_path / "home",
    )
    assert finished.code == 0, finished.err
    payload = Record.load(tmp_path / "lab" / "pretrained").payload
    [run] = (tmp_path / "lab" / "runs").glob("pretrained-vit-*")
    indices_N = open_run(run / "recipe.yaml", out=run).splits.validation
    with torch.no_grad():
        found_N = vit(pixel_values=inputs_NCHW[indices_N]).logits.argmax(1)
    expected = (found_N == digits.labels_N[indices_N]).double().mean().item()
    assert expected > 0.4
    assert payload["teacher_accuracy"] == expected
    assert (
        f"| teacher's validation accuracy | {percent(0.9788)} | {percent(expected)} |"
        in finished.out
    )


def test_labelling_that_was_interrupted_is_told_for_all_pictures():
    report = {"num_computed": 100, "num_reused": 900, "images_per_second": 50.0, "seconds": 2.0}
    labels = Record(
        kind="labels", key="k", seed=0, payload={}, timing={"stage_seconds": 2, "teacher": report}
    )
    assert timings.labelling_seconds(labels) == 1000 / 50


def test_inference_is_timed_in_batches_of_100(short, monkeypatch):
    lab, _, _ = short
    sizes = []
    real = timings.predict_logits

    def watched(model, source, indices_N, **options):
        def model_of(images_NCHW):
            sizes.append(len(images_NCHW))
            return model(images_NCHW)

        return real(model_of, source, indices_N, **options)

    monkeypatch.setattr(timings, "predict_logits", watched)
    folder = lab.run_folder("alone")
    record = Record.load(folder / "teacher")
    assert timings.inference_seconds(alone(lab.setting, dropout=0.0), folder, "teacher", record) > 0
    assert max(sizes) == 100

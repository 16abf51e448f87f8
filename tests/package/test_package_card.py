"""The model card shows what is known, and says of the rest that it is not."""

import itertools

import pytest
from package_samples import CLASS_NAMES, CREATED, IMAGE_SHAPE, card

from understudy.package.card import ModelCard, render_card, shown_value, words
from understudy.package.manifest import ArtifactEntry, Preprocessing


def artifact(**changes):
    values = {
        "target": "onnx",
        "precision": "int8",
        "folder": "artifacts/onnx-int8",
        "opens": "student.onnx",
        "files": ["student.onnx"],
        "size_bytes": 12345,
        "batch": "any",
        "runtime": "runtimes/onnx.py",
        "measured": {"accuracy": 0.5, "latency_ms": 0.25, "detail": {"a": 1}},
        "facts": {},
        "notes": ["Slower than float32."],
    }
    return ArtifactEntry(**{**values, **changes})


def rendered(one=None, **changes):
    values = {
        "title": "garden 1.2",
        "created": CREATED,
        "preprocessing": Preprocessing(
            image_shape=IMAGE_SHAPE, color_order="RGB", resize="shorter_side_center_crop"
        ),
        "class_names": CLASS_NAMES,
        "artifacts": [artifact()],
        "notes": ["There is no runner in C."],
    }
    return render_card(one or card(), **{**values, **changes})


def section(text, title):
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0].strip()


def test_sections_in_order():
    titles = [line[3:] for line in rendered().splitlines() if line.startswith("## ")]
    assert titles == [
        "Intended use",
        "Limits",
        "Files",
        "Input and output",
        "Data",
        "Teacher",
        "Student",
        "Metrics",
        "Calibration",
        "Budget",
        "How it was made",
    ]


def test_values_carry_their_units():
    text = rendered()
    assert "| Accuracy | 78.60% |" in section(text, "Metrics")
    assert "| Parameters | 853,018 |" in section(text, "Teacher")
    assert "| Number of train | 1,200 |" in section(text, "Data")
    assert "| Licence | not stated |" in section(text, "Data")
    budget = section(text, "Budget")
    assert r"| Model size | 20.0 kB | 10.0 kB | Passed | 50.0% of the limit |" in budget
    assert "| Latency | 1.5 ms | not measured | Not measured |" in budget
    files = section(text, "Files")
    assert "| Artifact | Size | Accuracy | Latency | Opened by |" in files
    assert "| `onnx-int8` | 12.3 kB | 50.00% | 0.25 ms | `runtimes/onnx.py` |" in files
    assert "- `onnx-int8`: Slower than float32." in files
    assert "- There is no runner in C." in files
    assert r"- onnx-int8: measured on two \| others." in files
    made = section(text, "How it was made")
    assert made.startswith("The student was trained with these versions, on this machine:")
    assert "| Memory | 8,347.1 MB |" in made


def test_scores_of_classes_and_groups():
    metrics = section(rendered(), "Metrics")
    assert "| ant | 75.00% | 40 |" in metrics
    assert r"| dog \| wild | not stated | 0 |" in metrics
    assert "| light: night | 50.00% | 10 |" in metrics


def test_what_is_not_given_is_said():
    text = rendered(ModelCard(summary="Small.", licence="MIT"))
    for title in ("Intended use", "Limits", "Data", "Teacher", "Student", "Calibration"):
        assert section(text, title) == "Not stated."
    assert "Per class: not stated." in text
    assert "Per group: not stated." in text
    text = rendered(ModelCard(summary="Small.", licence="MIT", per_group=()))
    assert "Per group: no groups in this data are named." in text
    assert section(text, "Budget") == "No budget is stated."


def test_every_table_row_has_as_many_cells_as_its_head():
    hostile = "a | b\n\n# head <script>alert(1)</script> [x](y) `c`"
    text = rendered(
        card(summary=hostile, data={hostile: hostile}, limits=[hostile]), class_names=[hostile]
    )
    assert "<script>" not in text.replace(r"\<script\>", "")
    assert "\n# head" not in text
    lines = text.splitlines()
    for before, line in itertools.pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            bars = [one.replace(r"\|", "").count("|") for one in (before, line)]
            assert bars[0] == bars[1], line


def test_no_stray_blank_lines_inside_tables_and_one_newline_at_the_end():
    text = rendered()
    assert "\n\n\n" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    for line, after in itertools.pairwise(text.splitlines()):
        assert line == line.rstrip() or line.startswith("    ")
        if line.startswith("|---"):
            assert after.startswith("|")


def test_an_artifact_without_a_runtime():
    assert "| nothing in Python |" in rendered(artifacts=[artifact(runtime=None)])


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        (None, "x", "not stated"),
        (True, "x", "yes"),
        (0.123456, "ece", "0.1235"),
        (1500000, "peak_memory_bytes", "1.5 MB"),
        (0.04519, "latency_ms", "0.04519 ms"),
        (2.5, "train_hours", "2.5 hours"),
        ({"a": 1}, "x", "a: 1"),
        ([1, 2], "x", "1, 2"),
        ("a|b", "x", r"a\|b"),
    ],
)
def test_shown_values(value, name, expected):
    assert shown_value(value, name) == expected


def test_words():
    assert words("num_classes") == "Number of classes"
    assert words("ece") == "Expected calibration error"
    assert words("latency_ms") == "Latency"

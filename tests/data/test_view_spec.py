import json
import subprocess
import sys

import pytest

from understudy.data.view_spec import TRANSFORM_PARAMETERS, check_spec, normalized_spec


def test_checking_does_not_load_torch():
    code = (
        "import sys; from understudy.data.view_spec import check_spec; "
        "assert check_spec([{'flip': {}}]) == []; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_default_is_valid_and_normalises_to_json():
    spec = [{name: None} for name in TRANSFORM_PARAMETERS if name != "mixup"]
    assert check_spec(spec, image_shape=(3, 32, 32)) == []
    full = normalized_spec(spec)
    assert json.loads(json.dumps(full)) == full
    assert normalized_spec(full) == full
    assert check_spec(full) == []


def test_specs_that_mean_the_same_normalise_to_the_same():
    plain = normalized_spec([{"affine": {"rotation": 15, "scale": [1, 1]}}, {"flip": {}}])
    written = normalized_spec(
        [{"affine": {"rotation": [-15.0, 15], "scale": 1.0}}, {"flip": {"probability": 0.5}}]
    )
    assert plain == written
    assert list(plain[0]["affine"]) == list(TRANSFORM_PARAMETERS["affine"])
    depth = [{"reduced_depth": {"bits": bits}} for bits in ("rgb565", [5, 6, 5], 4)]
    values = [entry["reduced_depth"]["bits"] for entry in normalized_spec(depth)]
    assert values == [[5, 6, 5], [5, 6, 5], [4, 4, 4]]


def test_a_spread_is_cut_where_a_value_cannot_be():
    [entry] = normalized_spec([{"color_jitter": {"brightness": 1.5, "hue": 0.1}}])
    assert entry["color_jitter"]["brightness"] == [0.0, 2.5]
    assert entry["color_jitter"]["hue"] == [-0.1, 0.1]


def test_all_problems_are_listed_at_once_with_place_and_mend():
    problems = check_spec(
        [
            {"pad_corp": {"padding": 4}},
            {"flip": {"probabilty": 0.5}},
            {"pad_crop": {"padding": -1, "mode": "mirror"}},
            {"cutout": {"size": "half", "probability": 1.5}},
            {"reduced_depth": {"bits": 9}},
        ],
        where="data.views",
    )
    assert len(problems) == 7
    assert "data.views[0] names the unknown transform 'pad_corp'" in problems[0]
    assert "Did you mean 'pad_crop'?" in problems[0]
    assert "data.views[1].flip names the unknown parameter 'probabilty'" in problems[1]
    assert "Did you mean 'probability'?" in problems[1]
    assert "padding is -1; expected a whole number at least 0" in problems[2]
    assert "mode is 'mirror'; expected one of zero, reflect" in problems[3]
    assert "size is 'half'; expected a number above 0 and at most 1" in problems[4]
    assert "probability is 1.5; expected a number at least 0 and at most 1" in problems[5]
    assert "bits is 9; expected 1 to 8" in problems[6]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("pad_crop", "padding", 2.5),
        ("pad_crop", "padding", True),
        ("pad_crop", "padding", None),
        ("pad_crop", "padding", [1, 2]),
        ("flip", "probability", "0.5"),
        ("flip", "probability", float("nan")),
        ("random_resized_crop", "scale", [0.8, 0.2]),
        ("random_resized_crop", "scale", [0, 1]),
        ("random_resized_crop", "scale", [0.1, 0.2, 0.3]),
        ("random_resized_crop", "scale", [0.5]),
        ("random_resized_crop", "scale", "big"),
        ("random_resized_crop", "scale", {"low": 0}),
        ("affine", "rotation", -15),
        ("affine", "shear", 80),
        ("color_jitter", "hue", 0.6),
        ("color_jitter", "contrast", [-0.1, 1]),
        ("reduced_depth", "bits", "rgb999"),
        ("reduced_depth", "bits", [5, 6]),
        ("reduced_depth", "bits", [5, 6, True]),
        ("motion_blur", "length", 0.5),
        ("jpeg_blocking", "quality", 0),
        ("cutout", "fill", 256),
        ("mixup", "alpha", 0),
        ("mixup", "alpha", float("inf")),
    ],
)
def test_impossible_values_are_found(name, key, value):
    [found] = check_spec([{name: {key: value}}])
    assert found.startswith(f"views[0].{name}.{key} is {value!r}; expected ")


@pytest.mark.parametrize(
    "spec", ["flip", None, {"flip": {}}, ["flip"], [{}], [{"flip": {}, "cutout": {}}], [3]]
)
def test_other_shapes_are_found(spec):
    assert len(check_spec(spec)) == 1


def test_parameters_must_be_a_mapping():
    assert "[0.5]; expected parameters as a mapping" in check_spec([{"flip": [0.5]}])[0]


def test_what_does_not_fit_the_pictures_is_found():
    spec = [{"flip": {}}, {"pad_crop": {}}]
    assert check_spec(spec, image_shape=(1, 8, 8)) == []
    [found] = check_spec(spec, image_shape=(3, 32, 4))
    assert "views[1].pad_crop.padding is 4 on pictures of 32 x 4 pixels" in found
    assert len(check_spec(spec, image_shape=(4, 32, 32))) == 2


def test_mixing_transforms_are_alternatives_next_to_each_other():
    both = [{"mixup": {"probability": 0.5}}, {"cutmix": {}}]
    assert check_spec(both) == []
    assert "next to each other" in check_spec([both[0], {"flip": {}}, both[1]])[0]
    assert "each at most once" in check_spec([both[0], both[0]])[0]
    assert "mixup.probability is 1 with cutmix after it" in check_spec([{"mixup": {}}, both[1]])[0]

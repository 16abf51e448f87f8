"""What a list of view transforms may say, checked without loading torch.

A spec is a list with one entry per transform, in the order of application::

    - pad_crop: {padding: 4}
    - flip: {probability: 0.5}

``TRANSFORM_PARAMETERS`` is the one table of names, types, bounds and defaults.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from understudy.errors import problem

MIXING_TRANSFORMS = ("mixup", "cutmix")

# Bits of red, green and blue in the compact colour spaces that `reduced_depth` knows by name.
COLOR_FORMATS: dict[str, tuple[int, int, int]] = {
    "rgb888": (8, 8, 8),
    "rgb666": (6, 6, 6),
    "rgb565": (5, 6, 5),
    "rgb555": (5, 5, 5),
    "rgb444": (4, 4, 4),
    "rgb332": (3, 3, 2),
    "rgb222": (2, 2, 2),
    "rgb111": (1, 1, 1),
}

Kind = Literal["number", "whole_number", "range", "choice", "depth"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a transform.

    A "range" is [low, high], drawn uniformly. One number fixes it; but where ``spread_around`` is
    given, one number s means from spread_around - s to spread_around + s, as is usual for jitter.
    ``above`` is an exclusive lower bound, ``at_least`` and ``at_most`` are inclusive. An
    ``optional`` one may be null, which is its default.
    """

    kind: Kind
    default: Any
    meaning: str
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    choices: tuple[str, ...] = ()
    spread_around: float | None = None
    optional: bool = False


def _spread(
    around: float, spread: float, meaning: str, *, at_least: float, at_most: float = math.inf
) -> Parameter:
    return Parameter(
        "range",
        [around - spread, around + spread],
        meaning,
        at_least=at_least,
        at_most=at_most,
        spread_around=around,
    )


def _probability(default: float) -> Parameter:
    return Parameter("number", default, "share of samples changed", at_least=0, at_most=1)


_UNTIL_VIEW = Parameter(
    "whole_number",
    None,
    "first of the stored views that it leaves as they are; null: none",
    at_least=1,
    optional=True,
)


TRANSFORM_PARAMETERS: dict[str, dict[str, Parameter]] = {
    "pad_crop": {
        "padding": Parameter("whole_number", 4, "pixels added on every side", at_least=0),
        "mode": Parameter("choice", "zero", "what fills the border", choices=("zero", "reflect")),
        "probability": _probability(1.0),
    },
    "flip": {"probability": _probability(0.5)},
    "random_resized_crop": {
        "scale": Parameter("range", [0.25, 1.0], "area of the crop", above=0, at_most=1),
        "ratio": Parameter("range", [0.75, 4 / 3], "width over height", above=0),
        "probability": _probability(1.0),
    },
    "affine": {
        "rotation": _spread(0, 15.0, "degrees", at_least=-360, at_most=360),
        "translate": _spread(0, 0.1, "share of the side", at_least=-1, at_most=1),
        "scale": Parameter("range", [0.9, 1.1], "magnification", above=0),
        "shear": _spread(0, 5.0, "degrees", at_least=-75, at_most=75),
        "mode": Parameter("choice", "zero", "what fills the border", choices=("zero", "reflect")),
        "probability": _probability(1.0),
    },
    "color_jitter": {
        "brightness": _spread(1, 0.2, "factor", at_least=0),
        "contrast": _spread(1, 0.2, "factor", at_least=0),
        "saturation": _spread(1, 0.2, "factor", at_least=0),
        "hue": _spread(0, 0.02, "turns", at_least=-0.5, at_most=0.5),
        "probability": _probability(1.0),
    },
    "grayscale": {"probability": _probability(0.1)},
    "reduced_depth": {
        "bits": Parameter("depth", "rgb565", "bits per channel"),
        "probability": _probability(1.0),
    },
    "low_light": {
        "gamma": Parameter("range", [1.0, 2.0], "exponent of the tone curve", above=0),
        "gain": Parameter("range", [0.3, 0.8], "factor after the tone curve", at_least=0),
        "photons": Parameter(
            "range", [100.0, 1000.0], "photons of a white pixel; 0: no shot noise", at_least=0
        ),
        "probability": _probability(0.5),
    },
    "motion_blur": {
        "length": Parameter("range", [2.0, 5.0], "pixels", at_least=1, at_most=63),
        "angle": Parameter("range", [0.0, 180.0], "degrees", at_least=-360, at_most=360),
        "probability": _probability(0.5),
    },
    "gaussian_noise": {
        "sigma": Parameter("range", [0.0, 0.05], "deviation; white is 1", at_least=0, at_most=1),
        "probability": _probability(0.5),
    },
    "jpeg_blocking": {
        "quality": Parameter("range", [20.0, 80.0], "JPEG quality", at_least=1, at_most=100),
        "probability": _probability(0.5),
    },
    "cutout": {
        "size": Parameter("number", 0.5, "side over the shorter side", above=0, at_most=1),
        "fill": Parameter("whole_number", 0, "value of the square", at_least=0, at_most=255),
        "probability": _probability(1.0),
    },
    "mixup": {
        "alpha": Parameter("number", 0.2, "Beta(alpha, alpha) weights", above=0),
        "probability": _probability(1.0),
        "until_view": _UNTIL_VIEW,
    },
    "cutmix": {
        "alpha": Parameter("number", 1.0, "Beta(alpha, alpha) areas", above=0),
        "probability": _probability(0.5),
        "until_view": _UNTIL_VIEW,
    },
}


def check_spec(
    spec: Any, *, image_shape: tuple[int, int, int] | None = None, where: str = "views"
) -> list[str]:
    """Return every problem of a view spec, one sentence each; an empty list means it can be built.

    ``image_shape`` is (channels, height, width) where the data is known; then what does not fit
    the pictures is found as well. ``where`` is the path of the spec that the sentences name.
    """
    if not isinstance(spec, Sequence) or isinstance(spec, str | bytes):
        return [_type_problem(where, spec, "a list of transforms", "- flip: {probability: 0.5}")]
    problems: list[str] = []
    for position, entry in enumerate(spec):
        place = f"{where}[{position}]"
        if not isinstance(entry, Mapping) or len(entry) != 1:
            problems.append(
                _type_problem(place, entry, "one transform name", "flip: {probability: 0.5}")
            )
            continue
        [(name, arguments)] = entry.items()
        if name not in TRANSFORM_PARAMETERS:
            problems.append(_unknown(place, "transform", name, TRANSFORM_PARAMETERS))
            continue
        wrong = _check_arguments(f"{place}.{name}", name, arguments)
        if not wrong and image_shape is not None:
            wrong = _check_fit(f"{place}.{name}", name, arguments or {}, image_shape)
        problems += wrong
    return problems + _check_mixing(spec, where)


def normalized_spec(spec: Sequence[Mapping[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Return the checked spec with every default filled in and every value in its one plain form.

    Two specs that mean the same normalise to the same JSON; an optional parameter that is null is
    left out.
    """
    result = []
    for entry in spec:
        [(name, arguments)] = entry.items()
        values = arguments or {}
        parameters = {
            key: _normalized_value(parameter, values.get(key, parameter.default))
            for key, parameter in TRANSFORM_PARAMETERS[name].items()
        }
        result.append({name: {k: value for k, value in parameters.items() if value is not None}})
    return result


def mixed_throughout(spec: Sequence[Mapping[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Return the spec without ``until_view``: its mixing transforms change every view."""
    return [
        {
            name: {key: value for key, value in (arguments or {}).items() if key != "until_view"}
            for name, arguments in entry.items()
        }
        for entry in spec
    ]


def _normalized_value(parameter: Parameter, value: Any) -> Any:
    if value is None:
        return None
    if parameter.kind == "number":
        return float(value)
    if parameter.kind == "range":
        low, high = _low_high(parameter, value)
        return [float(low), float(high)]
    if parameter.kind == "depth":
        if isinstance(value, str):
            value = COLOR_FORMATS[value]
        return [value] * 3 if isinstance(value, int) else list(value)
    return value


def _low_high(parameter: Parameter, value: Any) -> tuple[float, float]:
    if not _is_number(value):
        low, high = value
        return low, high
    if parameter.spread_around is None:
        return value, value
    return max(parameter.at_least, parameter.spread_around - value), parameter.spread_around + value


def _check_arguments(place: str, name: str, arguments: Any) -> list[str]:
    if arguments is None:
        return []
    if not isinstance(arguments, Mapping):
        return [_type_problem(place, arguments, "parameters as a mapping", f"{name}: {{}}")]
    known = TRANSFORM_PARAMETERS[name]
    problems = []
    for key, value in arguments.items():
        if key not in known:
            problems.append(_unknown(place, "parameter", key, known))
        else:
            problems += _check_value(f"{place}.{key}", known[key], value)
    return problems


def _check_value(place: str, parameter: Parameter, value: Any) -> list[str]:
    if value is None and parameter.optional:
        return []
    expected = _expected(parameter)
    example = "null" if parameter.default is None else repr(parameter.default)
    mend = f"Write for instance {example} ({parameter.meaning})."
    wrong = [problem(f"{place} is {value!r}", expected=expected, mend=mend)]
    if parameter.kind == "choice":
        return [] if value in parameter.choices else wrong
    if parameter.kind == "depth":
        return [] if _is_depth(value) else wrong
    if parameter.kind == "whole_number" and not isinstance(value, int):
        return wrong
    numbers = [value]
    if parameter.kind == "range" and isinstance(value, Sequence) and not isinstance(value, str):
        numbers = list(value)
    if len(numbers) not in (1, 2) or not all(_is_number(number) for number in numbers):
        return wrong
    if parameter.kind == "range" and not isinstance(value, Sequence):
        if parameter.spread_around is not None and value < 0:
            return wrong
        numbers = list(_low_high(parameter, value))
    elif parameter.kind == "range" and len(numbers) != 2:
        return wrong
    low, high = numbers[0], numbers[-1]
    inside = low >= parameter.at_least and low > parameter.above and high <= parameter.at_most
    return [] if inside and low <= high else wrong


def _expected(parameter: Parameter) -> str:
    if parameter.kind == "choice":
        return "one of " + ", ".join(parameter.choices)
    if parameter.kind == "depth":
        return "1 to 8, a list of three such numbers, or one of " + ", ".join(COLOR_FORMATS)
    bounds = []
    if parameter.at_least > -math.inf:
        bounds.append(f"at least {parameter.at_least:g}")
    if parameter.above > -math.inf:
        bounds.append(f"above {parameter.above:g}")
    if parameter.at_most < math.inf:
        bounds.append(f"at most {parameter.at_most:g}")
    noun = {
        "number": "a number",
        "whole_number": "a whole number",
        "range": "[low, high] or a number",
    }[parameter.kind]
    if parameter.spread_around is not None:
        noun = f"[low, high] or a spread around {parameter.spread_around:g}, all"
    return " ".join([noun, " and ".join(bounds)]).strip()


def _check_fit(
    place: str, name: str, arguments: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> list[str]:
    num_channels, height, width = image_shape
    problems = []
    if num_channels not in (1, 3):
        problems.append(
            problem(
                f"{place} is given pictures of {num_channels} channels",
                expected="1 (grey) or 3 (red, green, blue)",
                mend="Convert the pictures, or use no views.",
            )
        )
    if name == "pad_crop":
        padding = arguments.get("padding", TRANSFORM_PARAMETERS[name]["padding"].default)
        if padding >= min(height, width):
            problems.append(
                problem(
                    f"{place}.padding is {padding} on pictures of {height} x {width} pixels",
                    expected="less than the shorter side, so that part of the picture remains",
                    mend=f"Write at most {max(0, min(height, width) // 4)}.",
                )
            )
    return problems


def _check_mixing(spec: Sequence[Any], where: str) -> list[str]:
    """Two mixing transforms are alternatives: next to each other, each at most once."""
    names = [next(iter(entry), None) if isinstance(entry, Mapping) else None for entry in spec]
    positions = [position for position, name in enumerate(names) if name in MIXING_TRANSFORMS]
    if len(positions) < 2:
        return []
    mixing = [str(names[position]) for position in positions]
    if len(set(mixing)) < len(mixing) or positions[-1] - positions[0] != len(positions) - 1:
        return [
            problem(
                f"{where} has the mixing transforms {', '.join(mixing)} at {positions}",
                expected="each at most once, next to each other, for a sample is mixed at most "
                "once and its partner needs the transforms that come before",
                mend="Put mixup and cutmix next to each other.",
            )
        ]
    first = spec[positions[0]][mixing[0]] or {}
    default = TRANSFORM_PARAMETERS[mixing[0]]["probability"].default
    always = isinstance(first, Mapping) and first.get("until_view") is None
    if always and first.get("probability", default) == 1:
        return [
            problem(
                f"{where}[{positions[0]}].{mixing[0]}.probability is 1 with {mixing[1]} after it",
                expected="less than 1, for a sample is mixed at most once",
                mend=f"Write probability: 0.5, or leave {mixing[1]} out.",
            )
        ]
    return []


def _unknown(place: str, noun: str, name: Any, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1)
    mend = f"Did you mean '{nearest[0]}'?" if nearest else "Choose one of these."
    return problem(
        f"{place} names the unknown {noun} {name!r}",
        expected="one of " + ", ".join(known),
        mend=mend,
    )


def _type_problem(place: str, value: Any, expected: str, example: str) -> str:
    return problem(
        f"{place} is {value!r}", expected=expected, mend=f"Write for instance: {example}"
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def _is_depth(value: Any) -> bool:
    if isinstance(value, str):
        return value in COLOR_FORMATS
    numbers = list(value) if isinstance(value, Sequence) and len(value) == 3 else [value]
    return all(type(number) is int and 1 <= number <= 8 for number in numbers)

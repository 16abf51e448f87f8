"""Names and arguments of the built-in networks, without importing torch.

Recipes are validated before anything heavy is loaded; this table is all that validation needs.
``build.py`` pairs each name with its constructor, and a test keeps the two in step.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from understudy.errors import problem

ArgumentKind = Literal[
    "int",
    "depth",
    "rate",
    "scale",
    "bool",
    "odd",
    "ints",
    "widths",
    "stages",
    "shortcut",
    "blocks",
    "stem",
    "activation",
]
SHORTCUTS = ("pad", "conv")
ACTIVATIONS = ("relu", "hardswish")


@dataclass(frozen=True)
class Argument:
    """One argument of a built-in network: its kind, default and meaning."""

    kind: ArgumentKind
    default: Any
    meaning: str
    minimum: int = 1


_KIND_TEXT: dict[str, str] = {
    "int": "a whole number of at least {minimum}",
    "depth": "6n + 2, such as 8, 14, 20, 32, 44, 56 or 110",
    "rate": "a number from 0 up to, but not including, 1",
    "scale": "a number above 0",
    "bool": "true or false",
    "odd": "an odd whole number of at least {minimum}",
    "ints": "a list of whole numbers of at least {minimum}",
    "widths": "three whole numbers of at least {minimum}, none smaller than the one before",
    "stages": "a list of pairs [channels, stride], each a whole number of at least {minimum}",
    "shortcut": "pad or conv",
    "activation": "relu or hardswish",
    "stem": "a pair [channels, stride] of whole numbers of at least {minimum}",
    "blocks": "a list of [channels, stride, expansion, kernel] or [channels, stride, expansion, "
    "kernel, passes], each a whole number of at least {minimum}, the kernel odd",
}

_RESNET_WIDTHS = Argument("widths", (16, 32, 64), "channels of the three stages")
_RESNET = {
    "widths": _RESNET_WIDTHS,
    "shortcut": Argument(
        "shortcut",
        "pad",
        "shortcut where the shape changes: subsampling and zero channels, or a 1x1 convolution",
    ),
}
_PAPER = {
    "channels": Argument("int", 32, "channels of every convolution"),
    "hidden": Argument("int", 30, "width of the classifier's hidden layer"),
    "dropout": Argument("rate", 0.2, "dropout rate of every dropout layer"),
}

# name -> argument name -> Argument
CATALOG: dict[str, dict[str, Argument]] = {
    "resnet": {
        "depth": Argument("depth", 20, "number of weighted layers", minimum=8),
        **_RESNET,
    },
    "resnet8": dict(_RESNET),
    "resnet14": dict(_RESNET),
    "resnet20": dict(_RESNET),
    "resnet32": dict(_RESNET),
    "resnet44": dict(_RESNET),
    "resnet56": dict(_RESNET),
    "resnet110": dict(_RESNET),
    "paper_student": dict(_PAPER),
    "paper_teacher": {
        "num_layers": Argument("int", 4, "convolutions added to the first one", minimum=0),
        **_PAPER,
    },
    "separable": {
        "stages": Argument(
            "stages",
            ((16, 1), (24, 2), (32, 1), (48, 2), (56, 1)),
            "channels and stride of the stem and of each stage after it",
        ),
        "depth": Argument("int", 1, "depthwise-separable blocks in each stage"),
        "width": Argument("scale", 1.0, "factor on all channels, rounded to multiples of 8"),
        "kernel": Argument("odd", 3, "kernel size of the depthwise convolutions"),
        "residual": Argument("bool", False, "add the input of a block that keeps its shape"),
    },
    "inverted": {
        "stem": Argument("stem", (16, 1), "channels and stride of the stem"),
        "blocks": Argument(
            "blocks",
            ((16, 1, 1, 3), (24, 2, 2, 3), (32, 2, 2, 3)),
            "channels, stride, expansion and depthwise kernel of each block, and how often it is "
            "run with the same weights",
        ),
        "squeeze": Argument(
            "int", 0, "reduction of squeeze-and-excitation; 0: without it", minimum=0
        ),
        "head": Argument(
            "int", 0, "channels of a 1x1 convolution before pooling; 0: without it", minimum=0
        ),
        "activation": Argument(
            "activation", "relu", "activation of every convolution but the last of a block"
        ),
    },
    "mlp": {
        "hidden": Argument("ints", (24,), "widths of the hidden layers"),
        "dropout": Argument("rate", 0.0, "dropout rate after each hidden layer"),
    },
}

PREFIXES: dict[str, str] = {
    "timm": "timm:NAME_OR_FOLDER",
    "transformers": "transformers:NAME_OR_FOLDER",
}


def nearest(name: str, known: list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known name, or an empty string."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def _is_int(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_ints(value: Any, minimum: int) -> bool:
    return isinstance(value, list | tuple) and all(_is_int(item, minimum) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(value: Any, argument: Argument) -> bool:
    match argument.kind:
        case "int":
            return _is_int(value, argument.minimum)
        case "depth":
            return _is_int(value, argument.minimum) and value % 6 == 2
        case "odd":
            return _is_int(value, argument.minimum) and value % 2 == 1
        case "rate":
            return _is_number(value) and 0 <= value < 1
        case "scale":
            return _is_number(value) and 0 < value < float("inf")
        case "bool":
            return isinstance(value, bool)
        case "ints":
            return _is_ints(value, argument.minimum)
        case "widths":
            return (
                _is_ints(value, argument.minimum)
                and len(value) == 3
                and list(value) == sorted(value)
            )
        case "shortcut":
            return value in SHORTCUTS
        case "activation":
            return value in ACTIVATIONS
        case "stem":
            return _is_ints(value, 1) and len(value) == 2
        case "blocks":
            is_list = isinstance(value, list | tuple) and len(value) > 0
            return is_list and all(
                _is_ints(item, 1) and len(item) in (4, 5) and item[3] % 2 == 1 for item in value
            )
        case "stages":
            is_list = isinstance(value, list | tuple) and len(value) > 0
            return is_list and all(_is_ints(item, 1) and len(item) == 2 for item in value)


def check_catalog_model(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the problems with a built-in network's arguments; an empty list means none."""
    table = CATALOG[name]
    problems = []
    for key, value in arguments.items():
        if key not in table:
            problems.append(
                problem(
                    f"model '{name}': unknown argument '{key}'{nearest(key, list(table))}",
                    expected=f"one of {', '.join(table)}",
                    mend="Correct or remove it.",
                )
            )
        elif not _fits(value, table[key]):
            expected = _KIND_TEXT[table[key].kind].format(minimum=table[key].minimum)
            problems.append(
                problem(
                    f"model '{name}': {key}={value!r}",
                    expected=expected,
                    mend=f"It is the {table[key].meaning}; the default is {table[key].default!r}.",
                )
            )
    return problems


def check_model(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a model's name and arguments; an empty list means nothing.

    Imports neither torch nor the user's code: for ``module:callable`` only the form is checked, and
    ``timm:`` and ``transformers:`` names are looked up when the network is built.
    """
    if name in CATALOG:
        return check_catalog_model(name, arguments)
    source, colon, target = name.partition(":")
    forms = f"{', '.join(CATALOG)}, module:callable, {', '.join(PREFIXES.values())}"
    if not colon:
        return [
            problem(
                f"unknown model '{name}'{nearest(name, list(CATALOG))}",
                expected=f"one of {forms}",
                mend="Correct the name.",
            )
        ]
    if source in PREFIXES:
        well_formed = bool(target.strip())
    else:
        well_formed = target.isidentifier() and all(
            part.isidentifier() for part in source.split(".")
        )
    if well_formed:
        return []
    return [
        problem(
            f"malformed model '{name}'",
            expected=f"one of {forms}",
            mend="For example my_package.my_models:make_network.",
        )
    ]

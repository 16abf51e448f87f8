"""The recipe reference in ``docs/``, written from the schema itself.

``python -m understudy.recipes.reference`` prints it; a test keeps the file in step.
"""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from understudy.compress.settings import STEPS
from understudy.data.view_spec import TRANSFORM_PARAMETERS
from understudy.models.catalog import CATALOG, PREFIXES
from understudy.recipes.schema import Recipe
from understudy.recipes.strategies import STRATEGIES
from understudy.report.checks import checks_table
from understudy.train.loss_table import LOSSES
from understudy.train.settings import Schedule

HEAD = """# Recipe reference

A recipe is one YAML file. Everything has a default except `student`, and `teacher` where the
strategy has one. On the command line any value is changed with `--set path.to.key=value`. This page
is written from the code by `python -m understudy.recipes.reference`.
"""


def recipe_reference() -> str:
    """Return the whole page as Markdown."""
    sections = section_tables(Recipe, "", {})
    parts = [HEAD, *sections, losses(), transforms(), networks(), checks()]
    return "\n".join(parts)


def section_tables(
    section: type[BaseModel], path: str, seen: dict[type[BaseModel], str]
) -> list[str]:
    """Return a table of this section's keys, then those of the sections inside it.

    A section that stands in two places is written out once and referred to from the other.
    """
    title = f"`{path}`" if path else "Top level"
    if section in (*STRATEGIES.values(), *STEPS.values()):
        (name,) = typing.get_args(section.model_fields["name"].annotation)
        title += f" with `name: {name}`"
    if section is Schedule and section in seen:
        return []
    if section in seen:
        return [f"## {title}\n\nThe same keys as `{seen[section]}`.\n"]
    seen[section] = path
    lines = [f"## {title}\n", sentence(section.__doc__), ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    inner: list[str] = []
    for name, field in section.model_fields.items():
        lines.append(
            f"| `{name}` | {value_text(field)} | {default_text(field)} | {meaning(field)} |"
        )
        for model in models_in(field.annotation):
            inner += section_tables(model, f"{path}.{name}".lstrip("."), seen)
    return ["\n".join(lines) + "\n", *inner]


def meaning(field: FieldInfo) -> str:
    """Return the description, with what the table cannot hold escaped."""
    return (field.description or "").replace("|", "\\|")


def sentence(doc: str | None) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join((doc or "").split("\n\n")[0].split())


def value_text(field: FieldInfo) -> str:
    """Return what a key takes: its type and its limits."""
    limits = [limit_text(item) for item in field.metadata]
    text = type_text(field.annotation)
    return ", ".join([text, *filter(None, limits)]).replace("|", "\\|")


def limit_text(item: Any) -> str:
    """Return a bound in words, an empty string for what is no bound."""
    words = {
        annotated_types.Gt: ("above", "gt"),
        annotated_types.Ge: ("at least", "ge"),
        annotated_types.Lt: ("below", "lt"),
        annotated_types.Le: ("at most", "le"),
    }
    for kind, (word, attribute) in words.items():
        if isinstance(item, kind):
            return f"{word} {getattr(item, attribute)}"
    return ""


def type_text(annotation: Any) -> str:
    """Return a type as a user would name it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = [limit_text(item) for item in arguments[1:]]
        return " ".join([type_text(arguments[0]), *filter(None, bounds)])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(part) for part in arguments))
    if origin is tuple:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "schedule" if annotation is Schedule else "section"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return "null" if annotation is type(None) else names.get(annotation, "path")


def default_text(field: FieldInfo) -> str:
    """Return the default as YAML would have it."""
    if field.is_required():
        return "**required**"
    default = field.default
    if isinstance(default, BaseModel):
        return "see below"
    if default is PydanticUndefined:
        return "`{}`"
    return f"`{json.dumps(default)}`"


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def losses() -> str:
    """Return the table of losses that `distillation.losses` may name."""
    needy = ", ".join(f"`{name}`" for name, facts in LOSSES.items() if facts.needs_positions)
    lines = [
        "## Losses\n",
        "For `distillation.losses`, besides `kl_weight` and `ce_weight`. A loss on features reads "
        f"the layers that `layers` names; without any, the embeddings. {needy} compare positions, "
        "which embeddings have not: they need `layers`.\n",
        "| loss | reads | weight | adapter | arguments |",
        "|---|---|---|---|---|",
    ]
    for name, facts in LOSSES.items():
        arguments = ", ".join(
            f"`{key}`: {'the temperature' if value is None else f'{value:g}'}"
            for key, value in facts.arguments.items()
        )
        adapter = "where widths differ" if facts.equal_widths else "none"
        lines.append(f"| `{name}` | {facts.reads} | {facts.weight:g} | {adapter} | {arguments} |")
    return "\n".join(lines) + "\n"


def transforms() -> str:
    """Return the table of view transforms."""
    lines = [
        "## Transforms\n",
        "| transform | parameter | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, parameters in TRANSFORM_PARAMETERS.items():
        for key, parameter in parameters.items():
            default = json.dumps(parameter.default)
            lines.append(f"| `{name}` | `{key}` | `{default}` | {parameter.meaning} |")
    return "\n".join(lines) + "\n"


def networks() -> str:
    """Return the table of built-in networks."""
    lines = ["## Networks\n", "| network | argument | default | meaning |", "|---|---|---|---|"]
    for name, arguments in CATALOG.items():
        for key, argument in arguments.items():
            default = json.dumps(argument.default)
            lines.append(f"| `{name}` | `{key}` | `{default}` | {argument.meaning} |")
    others = ", ".join(f"`{form}`" for form in ("module:callable", *PREFIXES.values()))
    return "\n".join(lines) + f"\n\nAnd: {others}; for a teacher also an `.onnx` file.\n"


def checks() -> str:
    """Return the table of coded checks."""
    rows = checks_table()
    columns = list(rows[0])
    lines = ["## Coded checks\n", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(recipe_reference(), end="")

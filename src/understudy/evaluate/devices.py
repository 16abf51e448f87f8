"""Profiles of devices: what runs there, what fits there, and what is assumed of their power.

A profile is a YAML file: a shipped one by name (``devices/*.yaml``), or the user's own by path.
Importable without torch, because recipes are validated before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from understudy.errors import InputError, problem
from understudy.evaluate.budget import Budget, BudgetFacts, LatencyLimit
from understudy.export.target_names import TARGETS
from understudy.models.catalog import nearest
from understudy.settings import MAX_THREADS, Section


class Power(Section):
    """Power of the device, above idle, while a network runs. Nobody measured this one."""

    watts: Annotated[float, Field(gt=0)]
    source: Annotated[str, Field(min_length=1, description="Who says so, or `assumed`.")]


class Clock(Section):
    """A microcontroller's clock, and what turns counted instructions into time."""

    mhz: Annotated[float, Field(gt=0)]
    cycles_per_instruction: Annotated[float, Field(gt=0)]
    source: Annotated[str, Field(min_length=1, description="Who says so, or `assumed`.")]


class Device(Section):
    """One kind of device.

    ``is_this_machine`` is true of a profile for the machine that measures: only then are times and
    memory that are measured here those of the device.
    """

    title: Annotated[str, Field(min_length=1)]
    runtime: Annotated[str, Field(description="Export target that suits the device.")]
    precision: Literal["float32", "int8"]
    threads: Annotated[
        int,
        Field(
            gt=0,
            le=MAX_THREADS,
            description="Of the runtime there: measured with, and of a latency limit without any.",
        ),
    ] = 1
    is_this_machine: bool = False
    limits: Annotated[Budget, Field(description="As a recipe's budget.")] = Budget()
    cpu: Annotated[
        Literal["cortex-m4", "cortex-m7"] | None,
        Field(description="Core of a microcontroller that C code is compiled and emulated for."),
    ] = None
    power: Power | None = None
    clock: Clock | None = None

    @field_validator("runtime")
    @classmethod
    def _runtime_is_a_target(cls, runtime: str) -> str:
        if runtime not in TARGETS:
            raise ValueError(f"no target '{runtime}': expected one of {', '.join(TARGETS)}")
        return runtime


@dataclass(frozen=True)
class TimeEstimate:
    """Milliseconds that a count of instructions is expected to take, and why."""

    milliseconds: float
    method: Literal["estimate"]
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return the record as a plain dict."""
        return asdict(self)


def device_names() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _shipped().iterdir()
        if entry.name.endswith(".yaml")
    )


def load_device(name_or_path: str | Path) -> Device:
    """Return a shipped profile by name, or the user's by path (ending in .yaml or .yml).

    Raises:
        InputError: there is no such profile, or it is not a valid one; every problem is listed.
    """
    name = str(name_or_path)
    names = device_names()
    if name in names:
        return parse_device((_shipped() / f"{name}.yaml").read_text(), origin=f"device {name}")
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            problem(
                f"there is no device '{name}'{nearest(name, names)}",
                expected=f"one of {', '.join(names)}, or a .yaml file",
                mend="Correct the name, or write a profile of your own.",
            )
        )
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            problem(
                f"the device profile {path} cannot be read ({error})",
                expected="a YAML file",
                mend=f"Correct the path, or choose one of {', '.join(names)}.",
            )
        ) from None
    return parse_device(text, origin=str(path))


def parse_device(text: str, *, origin: str) -> Device:
    """Return the profile in a YAML text; ``origin`` names it in the errors."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # the second of a date that is none: 2024-13-01
        raise InputError(
            problem(
                f"{origin} is not YAML ({' '.join(str(error).split())})",
                expected="keys and values",
                mend="Correct the line, or quote it.",
            )
        ) from None
    try:
        return Device.model_validate(values)
    except ValidationError as error:
        raise InputError(*[_sentence(item, origin) for item in error.errors()]) from None


def _sentence(item: Any, origin: str) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "the profile"
    section: Any = Device
    inner = {"limits": Budget, "latency_ms": LatencyLimit, "power": Power, "clock": Clock}
    for part in item["loc"][:-1]:
        section = inner.get(str(part), section)
    known = list(section.model_fields)
    if item["type"] == "extra_forbidden":
        given = f"{origin}: unknown key `{key}`{nearest(str(item['loc'][-1]), known)}"
        return problem(given, expected=f"one of {', '.join(known)}", mend="Correct or remove it.")
    if item["type"] == "missing":
        return problem(f"{origin}: `{key}` is missing", expected="a value", mend="Add it.")
    message = item["msg"].removeprefix("Value error, ")
    given = f"{origin}: `{key}` is {item['input']!r}"
    return problem(given, expected=message[0].lower() + message[1:], mend="Correct it.")


def device_limits(device: Device) -> Budget:
    """Return the profile's limits; one on latency that names no threads is for the device's."""
    limit = device.limits.latency_ms
    if limit is None or "threads" in limit.model_fields_set:
        return device.limits
    limit = limit.model_copy(update={"threads": device.threads})
    return device.limits.model_copy(update={"latency_ms": limit})


def device_budget(device: Device) -> dict[str, Any]:
    """Return the profile's limits as values of a recipe's budget."""
    limits = device_limits(device).model_dump(mode="json", exclude_none=True)
    return {name: limit for name, limit in limits.items() if name != "strict" or limit}


def estimate_time(device: Device, num_instructions: int) -> TimeEstimate | None:
    """Return what a count of instructions is expected to take, or None without a clock.

    Instructions are not cycles: memory wait states and branches cost more on a real board.
    """
    clock = device.clock
    if clock is None:
        return None
    cycles = num_instructions * clock.cycles_per_instruction
    return TimeEstimate(
        milliseconds=cycles / clock.mhz / 1e3,
        method="estimate",
        source=f"{num_instructions:,} instructions at {clock.mhz:g} MHz, "
        f"{clock.cycles_per_instruction:g} cycles each ({clock.source})",
    )


def facts_for(device: Device, facts: BudgetFacts, *, is_on_device: bool) -> BudgetFacts:
    """Return what of the facts holds for the device.

    Sizes are those of the file anywhere. Time, memory and energy of this machine are not those of
    another kind of device: unless they were measured there, the device's are not known.
    """
    if is_on_device or device.is_this_machine:
        return facts
    return BudgetFacts(
        num_params=facts.num_params,
        macs=facts.macs,
        model_size_bytes=facts.model_size_bytes,
        train_hours=facts.train_hours,
        flash_bytes=facts.flash_bytes,
        ram_bytes=facts.ram_bytes,
        estimates=facts.estimates,
        counted=facts.counted,
    )


def _shipped() -> Any:
    return resources.files("understudy") / "devices"

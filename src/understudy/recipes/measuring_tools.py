"""Tools besides the package that measure some targets' files, and what they could add by now."""

from __future__ import annotations

import shutil

from understudy.artifacts import Record
from understudy.evaluate import tflm_instructions
from understudy.evaluate.microcontroller import NEWLIB_PACKAGE, TOOLS, has_newlib

# Target: name of a measurement in the record's timing, and the tools that it needs, all of them.
NEEDED = {
    "c": {"microcontrollers": {*TOOLS, NEWLIB_PACKAGE}, "compiled_bytes": {"size"}},
    "tflm": {"instructions": {tflm_instructions.TOOL}},
}


def tools_here(target: str) -> list[str]:
    """Return which of the tools that measure a target's files are installed; mostly none count."""
    names = {name for needed in NEEDED.get(target, {}).values() for name in needed}
    return sorted(
        name
        for name in names
        if (has_newlib() if name == NEWLIB_PACKAGE else shutil.which(name) is not None)
    )


def can_measure_more(record: Record, target: str) -> bool:
    """Return whether a measurement that an artifact's record lacks can be made by now.

    One that failed although its tools were there is not asked for again: it would fail as before.
    """
    here, then = set(tools_here(target)), set(record.timing.get("tools", ()))
    return any(
        not record.timing.get(name) and needed <= here and not needed <= then
        for name, needed in NEEDED.get(target, {}).items()
    )

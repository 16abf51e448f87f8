"""Tables of plain text, the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return columns two spaces apart; those whose cells are all numbers stand to the right."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    to_right = [
        bool(cells) and all(row[index].replace(",", "")[:1].isdigit() for row in cells)
        for index in range(len(titles))
    ]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, to_right, strict=True)
        ).rstrip()
        for line in (titles, *cells)
    ]
    return "\n".join(lines)


def human_bytes(num_bytes: float | None) -> str:
    """Return bytes in the unit that suits them; powers of 1024, as MiB says."""
    if num_bytes is None:
        return "not measured"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes:.0f} B"

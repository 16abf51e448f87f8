"""Numbers as people read them. Missing values are words, never NaN."""

from __future__ import annotations

import math
from datetime import datetime

NOT_MEASURED = "not measured"
MINUS = "\u2212"
# Keeps a number and its unit on one line.
GAP = "\u00a0"


def fixed(value: float, digits: int) -> str:
    """Return a number with thousands separators, a true minus sign and no minus zero."""
    text = f"{value:,.{digits}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def percent(rate: float | None, digits: int = 2) -> str:
    """Return a rate in [0, 1] as a percentage."""
    return NOT_MEASURED if rate is None else f"{fixed(100 * rate, digits)}{GAP}%"


def points(difference: float, digits: int = 2) -> str:
    """Return a difference of two rates in percentage points, with its sign."""
    return f"{signed(100 * difference, digits)}{GAP}points"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign; zero has none."""
    text = fixed(value, digits)
    return text if text.startswith(MINUS) or not text.strip("0.,") else f"+{text}"


def decimal(value: float | None, digits: int = 4) -> str:
    """Return a plain number."""
    return NOT_MEASURED if value is None else fixed(value, digits)


def count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return NOT_MEASURED if value is None else fixed(value, 0)


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number of any size with about ``digits`` significant figures."""
    if value is None:
        return NOT_MEASURED
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3:
        return f"{value:.{digits}g}".replace("-", MINUS)
    return fixed(value, max(0, digits - 1 - exponent))


def large_count(value: float | None) -> str:
    """Return a count such as multiply-adds with k, M or G."""
    if value is None:
        return NOT_MEASURED
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if letter == "k" else size
            return f"{significant(value / scale)}{GAP}{letter}"
    return fixed(value, 0)


def size(num_bytes: float | None) -> str:
    """Return a size in bytes, kB (1000 bytes), MB or GB."""
    if num_bytes is None:
        return NOT_MEASURED
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(num_bytes) >= scale:
            return f"{significant(num_bytes / scale)}{GAP}{unit}"
    return f"{fixed(num_bytes, 0)}{GAP}B"


def duration(seconds: float | None) -> str:
    """Return a time in the unit that suits it, from milliseconds to hours."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 1:
        return f"{significant(1000 * seconds, 2)}{GAP}ms"
    if seconds < 120:
        return f"{fixed(seconds, 1)}{GAP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}{GAP}min {rest}{GAP}s"
    return f"{minutes // 60}{GAP}h {minutes % 60}{GAP}min"


def milliseconds(value: float | None) -> str:
    """Return a latency in milliseconds."""
    return NOT_MEASURED if value is None else f"{significant(value)}{GAP}ms"


def ratio(ours: float, theirs: float, *, words: tuple[str, str] = ("smaller", "larger")) -> str:
    """Return how many times smaller or larger ours is."""
    if ours == theirs:
        return "same"
    if ours <= 0 or theirs <= 0:
        return ""
    larger, word = (ours / theirs, words[1]) if ours > theirs else (theirs / ours, words[0])
    digits = 0 if larger >= 20 else 1 if larger >= 2 else 2
    return f"{fixed(larger, digits)}× {word}"


def plain(text: str) -> str:
    """Return text in the characters that every terminal and log file shows."""
    return (
        text.replace(MINUS, "-")
        .replace(GAP, " ")
        .replace("±", "+-")
        .replace("\u2014", "-")
        .replace("×", "x")
    )


def quantity(value: float | None, unit: str) -> str:
    """Return a number of a budget in its unit."""
    if value is None:
        return NOT_MEASURED
    if unit in ("bytes", "byte", "B"):
        return size(value)
    if unit == "ms":
        return milliseconds(value)
    if unit in ("h", "hours", "hour"):
        return duration(3600 * value)
    text = fixed(value, 0) if value == round(value) else significant(value, 4)
    return f"{text}{GAP}{unit}" if unit else text


def moment(iso: str) -> str:
    """Return an ISO 8601 time as people write it; text of another form as it is."""
    try:
        found = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = "" if found.utcoffset() is None else f" {found.tzname()}"
    return f"{found.day} {found:%B %Y, %H:%M}{zone}"

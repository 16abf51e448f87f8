"""Numbers as people read them."""

from __future__ import annotations

import pytest

from understudy.report import formats


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.percent(0.97314), "97.31 %"),
        (formats.percent(None), "not measured"),
        (formats.points(-0.0123), "-1.23 points"),
        (formats.points(0.0123), "+1.23 points"),
        (formats.points(-0.000001), "0.00 points"),
        (formats.count(1234567), "1,234,567"),
        (formats.decimal(-1e-9), "0.0000"),
        (formats.significant(0.0001), "0.0001"),
        (formats.significant(3.541e-6), "3.54e-06"),
        (formats.significant(0), "0"),
        (formats.significant(1234.5), "1,234"),
        (formats.large_count(40_551_424), "40.6 M"),
        (formats.large_count(69_000), "69.0 k"),
        (formats.large_count(9_999), "9,999"),
        (formats.size(45_776), "45.8 kB"),
        (formats.size(12), "12 B"),
        (formats.size(25_301_000_000), "25.3 GB"),
        (formats.duration(0.0123), "12 ms"),
        (formats.duration(61), "61.0 s"),
        (formats.duration(207), "3 min 27 s"),
        (formats.duration(3.5 * 3600), "3 h 30 min"),
        (formats.milliseconds(0.4567), "0.457 ms"),
        (formats.ratio(650, 4874), "7.5x smaller"),
        (formats.ratio(4874, 650), "7.5x larger"),
        (formats.ratio(5, 5), "same"),
        (formats.ratio(0, 5), ""),
        (formats.quantity(12_000, ""), "12,000"),
        (formats.quantity(50_000_000, "bytes"), "50.0 MB"),
        (formats.quantity(0.5, "ms"), "0.500 ms"),
        (formats.quantity(0.1, "hours"), "6 min 0 s"),
        (formats.quantity(2.5, "mJ"), "2.50 mJ".replace("2.50", "2.500")),
        (formats.quantity(None, "ms"), "not measured"),
        (formats.moment("2026-01-05T10:00:00+00:00"), "5 January 2026, 10:00 UTC"),
        (formats.moment("yesterday"), "yesterday"),
    ],
)
def test_format(text: str, expected: str) -> None:
    assert formats.plain(text) == expected


def test_plain_text_is_ascii() -> None:
    assert formats.plain("−1 ± 2 × 3 — 4\u00a0%").isascii()

"""Progress of long stages: a bar with time left on a terminal, sparse log lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol

log = logging.getLogger("understudy")

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Told how far a stage is."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` units are finished; ``note`` is shown behind the numbers."""
        ...


def silent(done: int, total: int, note: str = "") -> None:
    """Show nothing."""


@contextlib.contextmanager
def shown_progress(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Yield a ``Progress`` that is shown to the user as the output allows, or not at all."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bar(title) as progress:
            yield progress
    else:
        yield _LogLines(title)


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None, note="")

        def show(done: int, total: int, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield show


class _LogLines:
    """Logs a line at most every ten seconds, with the time left from the mean rate so far."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started = self._last = time.monotonic()
        self._first_done: int | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self._first_done is None:
            # What a resumed stage found finished says nothing about the rate.
            self._first_done, self._started = done, now
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        gained = done - self._first_done
        left = f", {(now - self._started) * (total - done) / gained:.0f} s left" if gained else ""
        log.info("%s: %d of %d%s %s", self._title, done, total, left, note)


def setup_logging(*, quiet: bool = False) -> None:
    """Send the package's log to stderr: coloured on a terminal, plain lines elsewhere.

    Quiet leaves warnings and errors: one of several processes speaks for all.
    """
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False

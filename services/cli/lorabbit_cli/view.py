"""View: a job while it runs, on a terminal as a live picture, elsewhere as plain lines.

`feed` only folds the event into a `Progress`; the picture is drawn by rich's own thread a few
times a second, so that thousands of events cost no more than their fold. A lock keeps the two
apart. Start the view after worker processes are forked: a fork copies locks, not threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Lock
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live

from lorabbit import events as ev
from lorabbit.jobspec import JobSpec
from lorabbit_cli.picture import STYLES, draw
from lorabbit_cli.progress import Progress
from lorabbit_cli.rows import Note

REFRESHES_PER_SECOND = 3
"""A frame of 20 clients costs 16 ms of a core that could train."""


def wall_clock_ms() -> int:
    """Milliseconds since 1970, the clock of events."""
    return time.time_ns() // 1_000_000


class View:
    """Show one job: `start`, `feed` every event (from any thread), `stop`."""

    def __init__(
        self, spec: JobSpec | None = None, *, console: Console | None = None, now_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        """Show on `console`, standard output when None; live when that is a terminal."""
        self.progress = Progress(spec)
        self._console = console or Console()
        self._now_ms = now_ms
        self._lock = Lock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it, whatever happened."""
        self.stop()

    def start(self) -> None:
        """Begin to draw; safe to call twice."""
        if self._live is not None or not self._console.is_terminal:
            return
        self._live = Live(
            get_renderable=self._draw, console=self._console, refresh_per_second=REFRESHES_PER_SECOND, transient=False
        )
        self._live.start()

    def stop(self) -> None:
        """Draw the last picture and leave it standing; safe to call twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def feed(self, event: ev.AnyEvent) -> None:
        """Take in one event; cheap, from any thread, in the order of the log."""
        with self._lock:
            notes = self.progress.apply(event)
        if not self._console.is_terminal:
            for note in notes:
                self._print(note)

    def _draw(self) -> RenderableType:
        with self._lock:
            return draw(self.progress, now_ms=self._now_ms(), size=self._console.size, encoding=self._console.encoding)

    def _print(self, note: Note) -> None:
        """Write a plain line: the time of day, the level when it is not info, the text."""
        at = datetime.fromtimestamp(note.at_ms / 1000, tz=UTC).astimezone().strftime("%H:%M:%S")
        level = "" if note.level == "info" else f"{note.level}: "
        self._console.print(
            f"{at} {level}{note.text}", style=STYLES[note.level], markup=False, highlight=False, soft_wrap=True
        )

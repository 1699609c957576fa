"""The live view: one frame is drawn from a `JobProgress` and nothing else.

A population that does not fit the terminal is summarized: how many clients do what, and the ones
at work. The frame never grows beyond the window, so that it redraws in place.

`LiveView`: a job while it runs, on a terminal as a live picture, elsewhere as plain lines.

`feed` only folds the event into a `JobProgress`; the picture is drawn by rich's own thread a few
times a second, so that thousands of events cost no more than their fold. A lock keeps the two
apart. Start the view after worker processes are forked: a fork copies locks, not threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from threading import Lock
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorabbit.events import job_events as ev
from lorabbit.job.schedules import kind_of
from lorabbit.job.spec import JobSpec
from lorabbit_cli.formatting import bytes_text, duration_text, score_text, sparkline
from lorabbit_cli.live_view.state import ClientRow, JobProgress, Level, Note

MOST_ROWS = 20
"""More clients than this are summarized."""
OTHER_LINES = 14
"""Lines of a frame that are not clients."""
NOTES = 4
STYLES: dict[Level, str] = {"info": "none", "warning": "yellow", "error": "bold red"}
STATE_STYLES = {
    "idle": "dim",
    "waiting": "dim",
    "training": "green",
    "evaluating": "cyan",
    "initialising": "magenta",
    "lost": "bold red",
}
STATUS_STYLES = {"running": "green", "done": "bold green", "failed": "bold red", "cancelled": "yellow"}


def render(progress: JobProgress, *, now_ms: int, size: ConsoleDimensions, encoding: str = "utf-8") -> RenderableType:
    """Draw one frame that fits `size`."""
    rows = list(progress.clients.values())
    room = max(4, min(MOST_ROWS, size.height - OTHER_LINES))
    summarized = len(rows) > room
    body: list[RenderableType] = [_head(progress, now_ms)]
    if summarized:
        body.append(_client_counts(progress))
        rows = _notable_clients(rows, room - 2)
    body += [_clients(rows, progress.main_metric), _totals(progress, encoding), *_notes(progress)]
    job = progress.spec.name if progress.spec else "job"
    return Panel(
        Group(*body),
        title=Text.assemble((job, "bold"), "  ", (progress.status, STATUS_STYLES.get(progress.status, "none"))),
        title_align="left",
        border_style="dim",
        box=box.ROUNDED,
    )


def _head(progress: JobProgress, now_ms: int) -> RenderableType:
    """Method and model, then the round with its bar and the time."""
    spec = progress.spec
    line = Text(no_wrap=True, overflow="ellipsis")
    if spec is not None:
        line.append(f"{spec.method.name} of {spec.model.trainable}", "bold")
        line.append(f" on {spec.model.name}", "cyan")
        what = "updates of" if kind_of(spec.schedule) == "buffered" else "of"
        line.append(f", {spec.asked_in_a_round} {what} {spec.clients} clients a round", "dim")
    current = progress.current
    grid = Table.grid(padding=(0, 2), expand=True)
    for ratio in (None, 1, None):
        grid.add_column(ratio=ratio, no_wrap=True)
    number = current.number if current else 0
    total = spec.rounds if spec else max(number, 1)
    done = sum(1 for row in progress.rounds.values() if row.closed and row.number)
    part = progress.round_fraction() if current and not current.closed else 0.0
    left = progress.seconds_left(now_ms)
    time_text = Text(duration_text(progress.elapsed_seconds(now_ms)))
    if left is not None:
        time_text.append(f", about {duration_text(round(left)) if left >= 1 else '1 s'} left", "dim")
    grid.add_row(
        Text("preparation" if current and not number else f"round {number}/{total if spec else '?'}", "bold"),
        ProgressBar(total=total, completed=done + part, complete_style="cyan", finished_style="green"),
        time_text,
    )
    return Group(line, grid)


def _client_counts(progress: JobProgress) -> RenderableType:
    """How many clients are in which state."""
    counts = progress.states()
    line = Text(f"{len(progress.clients):,} clients: ", "bold")
    for i, (state, number) in enumerate(counts.most_common()):
        line.append(", " if i else "")
        line.append(f"{number:,} {state}", STATE_STYLES.get(state, "none"))
    return line


def _notable_clients(rows: list[ClientRow], room: int) -> list[ClientRow]:
    """The lost, then those at work, furthest first; in the population's order among equals."""
    return sorted(rows, key=lambda row: (not row.lost, row.current is None, -row.fraction))[:room]


def _clients(rows: Iterable[ClientRow], main_metric: str | None) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, header_style="dim")
    table.add_column("client", no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True)
    table.add_column("progress", ratio=1, min_width=8)
    for name in ("loss", main_metric or "metric", "examples", "up", "down"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        state = row.state
        table.add_row(
            row.client,
            Text(state, STATE_STYLES.get(state, "none")),
            ProgressBar(total=1.0, completed=row.fraction, complete_style="green") if row.current else "",
            score_text(row.loss),
            score_text(row.score),
            f"{row.examples:,}" if row.examples else "-",
            bytes_text(row.bytes_up),
            bytes_text(row.bytes_down),
        )
    return table


def _totals(progress: JobProgress, encoding: str) -> RenderableType:
    """The main metric over the rounds, and what traveled."""
    line = Text(no_wrap=True, overflow="ellipsis")
    scores = progress.scores
    if scores:
        line.append(f"{progress.main_metric} ", "bold")
        if encoding.lower().startswith("utf"):
            line.append(sparkline(scores), "green")
        line.append(f" {score_text(scores[0])} -> {score_text(scores[-1])}   ")
    line.append("up ", "dim").append(bytes_text(progress.bytes_up))
    line.append("  down ", "dim").append(bytes_text(progress.bytes_down))
    line.append("  overhead ", "dim").append(bytes_text(progress.overhead_bytes))
    if progress.rejected:
        refused = ", ".join(f"{number} {reason}" for reason, number in progress.rejected.most_common(3))
        line.append(f"   refused: {refused}", "yellow")
    return line


def _notes(progress: JobProgress) -> list[RenderableType]:
    """The latest lines told, oldest first."""
    latest = list(progress.notes)[-NOTES:]
    return [
        Text(note.text, STYLES[note.level] if note.level != "info" else "dim", no_wrap=True, overflow="ellipsis")
        for note in latest
    ]


REFRESHES_PER_SECOND = 3
"""A frame of 20 clients costs 16 ms of a core that could train."""


def wall_clock_ms() -> int:
    """Milliseconds since 1970, the clock of events."""
    return time.time_ns() // 1_000_000


class LiveView:
    """Show one job: `start`, `feed` every event (from any thread), `stop`."""

    def __init__(
        self, spec: JobSpec | None = None, *, console: Console | None = None, now_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        """Show on `console`, standard output when None; live when that is a terminal."""
        self.progress = JobProgress(spec)
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
            return render(
                self.progress, now_ms=self._now_ms(), size=self._console.size, encoding=self._console.encoding
            )

    def _print(self, note: Note) -> None:
        """Write a plain line: the time of day, the level when it is not info, the text."""
        at = datetime.fromtimestamp(note.at_ms / 1000, tz=UTC).astimezone().strftime("%H:%M:%S")
        level = "" if note.level == "info" else f"{note.level}: "
        self._console.print(
            f"{at} {level}{note.text}", style=STYLES[note.level], markup=False, highlight=False, soft_wrap=True
        )

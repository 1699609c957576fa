"""Progress of a comparison: a line for each run that begins or ends; on a terminal, bars of those at work."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lorabbit_cli.compare_cache import Outcome
from lorabbit_cli.units import duration_text, score_text


class ProgressView:
    """Shows how runs go; use it as a context."""

    def __init__(self, rounds: Mapping[str, int], metrics: Mapping[str, str | None], console: Console) -> None:
        """Know every run that is still to do: name -> rounds, and the metric to show."""
        self._rounds, self._metrics, self._console = rounds, metrics, console
        self._done = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[score]}"), console=console)
        self._all: TaskID | None = None
        self._of: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        """Begin to draw, where there is a terminal."""
        if self._console.is_terminal and self._rounds:
            self._all = self._bars.add_task("runs", total=len(self._rounds), score="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        if self._all is not None:
            self._bars.stop()

    def started(self, name: str) -> None:
        """A run begins."""
        if self._all is not None:
            self._of[name] = self._bars.add_task(name, total=self._rounds[name], score="")

    def progressed(self, name: str, line: Mapping[str, Any]) -> None:
        """A round of a run ended, or was scored."""
        if name not in self._of:
            return
        if "round" in line:
            self._bars.update(self._of[name], completed=line["round"])
        scores = line.get("scores") or {}
        metric = self._metrics.get(name) or next((key for key in scores if key != "loss"), "loss")
        if metric in scores:
            self._bars.update(self._of[name], score=f"{metric} {score_text(scores[metric])}")

    def ended(self, name: str, outcome: Outcome) -> None:
        """A run is over: say so in a line that stays."""
        self._done += 1
        how = duration_text(outcome.wall_seconds) if outcome.status == "done" else f"failed: {outcome.reason}"
        line = f"{self._done}/{len(self._rounds)} {name}: {how}"
        style = "red" if outcome.status == "failed" else ""
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
        if self._all is not None:
            self._bars.advance(self._all)
        if name in self._of:
            self._bars.remove_task(self._of.pop(name))

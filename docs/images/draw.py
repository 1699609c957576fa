"""Draw run.svg: the terminal of `lorabbit run examples/quickstart.yaml` in the middle of a round.

    python docs/images/draw.py [ROUND]

Runs the quickstart up to that round (14 when absent), takes the picture that the command line would
show, and stops. Some two minutes.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console, ConsoleDimensions

from lorabbit import job_loader
from lorabbit.config.logging import configure
from lorabbit.errors import BadInput
from lorabbit.events import job_events as ev
from lorabbit_cli.live_view.state import JobProgress
from lorabbit_cli.live_view.view import render
from lorabbit_cli.local.embedded_run import Callbacks, ComputeOptions, run_local

ROOT = Path(__file__).parents[2]
JOB = "examples/quickstart.yaml"
SIZE = ConsoleDimensions(112, 20)
HALF = 0.5


class Photographer:
    """Follows a run, and takes one picture when somebody is half through the round."""

    def __init__(self, progress: JobProgress, number: int) -> None:
        """Wait for round `number`."""
        self._progress = progress
        self._number = number
        self.picture: str | None = None

    def __call__(self, event: ev.AnyEvent) -> None:
        """Take in one event; interrupts the run once the picture is taken."""
        self._progress.apply(event)
        in_round = self._progress.current is not None and self._progress.current.number == self._number
        if self.picture is None and in_round and isinstance(event, ev.TaskProgressed) and event.fraction > HALF:
            self.picture = self._svg()
            signal.raise_signal(signal.SIGINT)

    def _svg(self) -> str:
        console = Console(record=True, width=SIZE.width, file=sys.stderr, force_terminal=True)
        console.print(f" lorabbit run {JOB}")
        console.print(render(self._progress, now_ms=time.time_ns() // 1_000_000, size=SIZE))
        return console.export_svg(title="LoRAbbit")


def main(number: int) -> None:
    """Run, draw, and write the picture beside this file."""
    configure("ERROR", "text")
    spec = job_loader.load(ROOT / JOB)
    photographer = Photographer(JobProgress(spec), number)
    with tempfile.TemporaryDirectory() as out:
        run_local(spec, Path(out), compute=ComputeOptions(), callbacks=Callbacks(on_event=photographer))
    if photographer.picture is None:
        raise BadInput(f"no client was met half-way through round {number} of {spec.rounds}")
    (Path(__file__).parent / "run.svg").write_text(photographer.picture, encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 14)

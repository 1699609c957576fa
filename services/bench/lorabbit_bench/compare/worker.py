"""Worker: one run of a comparison, in a process of its own.

``python -m lorabbit_bench.compare.worker JOB OUT WORKERS`` writes one JSON line for every scored or
finished round to standard output and one for the end; everything else goes to standard error. It dies
with the process that started it: a comparison that was killed leaves nothing behind that computes.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lorabbit import job_loader
from lorabbit.config.logging import configure
from lorabbit.config.settings import ClientSettings, read_settings
from lorabbit.errors import LoRAbbitError
from lorabbit.events import job_events as ev
from lorabbit_cli.local.embedded_run import Callbacks, ComputeOptions, run_local

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the job; returns the exit code."""
    job, out, workers, parent = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), int(arguments[3])
    die_with(parent)
    configure("ERROR", "text")
    began = time.monotonic()
    try:
        settings = read_settings(ClientSettings)
        compute = ComputeOptions(settings.device, settings.threads, settings.data_root, workers)
        ended = run_local(job_loader.load(job), out, compute=compute, callbacks=Callbacks(on_event=_on_event))
    except LoRAbbitError as error:
        _say({"end": "failed", "reason": str(error)})
        return error.exit_code
    report = ended.report
    end: dict[str, Any] = {"end": "done" if ended.exit_code == 0 else "failed", "reason": report.reason}
    _say(end | {"folder": str(ended.folder), "wall_seconds": time.monotonic() - began} | _memory())
    return ended.exit_code


def die_with(parent: int) -> None:
    """Ask Linux to end this process when the one that started it ends; do so at once if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(1)


def _on_event(event: ev.AnyEvent) -> None:
    """Tell of a round that ended, or was scored."""
    if isinstance(event, ev.RoundClosed):
        _say({"round": event.round})
    elif isinstance(event, ev.RoundEvaluated):
        _say({"scores": dict(event.metrics)})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _memory() -> dict[str, int | None]:
    """Highest resident memory of this process or a child, and of the GPU where torch ran here."""
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    torch = sys.modules.get("torch")  # only a run on a GPU trains in this process
    gpu = torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_initialized() else None
    return {"peak_memory_bytes": kilobytes * 1024, "peak_gpu_bytes": gpu}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

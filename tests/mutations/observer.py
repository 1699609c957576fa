"""A pytest plugin that appends the course of a test run to a file: each test that starts, and each phase that ends.

The file is named by the environment variable MUTATIONS_LOG. The last test that started tells which one a run that was
killed hung in. MUTATIONS_MEMORY limits the bytes that the run may allocate, because a mutant can compute huge numbers.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest


class Observer:
    """Write one JSON line for each event."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, **event: Any) -> None:
        with self._path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(event) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note that a test starts."""
        self._write(test=nodeid, event="start")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how setup, call or teardown of a test ended."""
        timeout = report.failed and "Timeout (>" in report.longreprtext
        self._write(test=report.nodeid, event=report.outcome, seconds=round(report.duration, 3), timeout=timeout)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a test file that could not be imported."""
        if report.failed:
            self._write(test=report.nodeid, event="failed", seconds=0.0, timeout=False)


def pytest_configure(config: pytest.Config) -> None:
    """Limit memory and register the observer; in a run with workers only their controller writes."""
    if limit := os.environ.get("MUTATIONS_MEMORY"):
        # A run in the background would ignore the interrupt that ends a run that takes too long.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), resource.getrlimit(resource.RLIMIT_DATA)[1]))
    if "MUTATIONS_LOG" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Observer(Path(os.environ["MUTATIONS_LOG"])), "mutations-observer")


def events(path: Path) -> list[dict[str, Any]]:
    """Read what an observer wrote; a line that was cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

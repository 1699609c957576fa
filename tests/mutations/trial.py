"""Run tests on a mutant, in a copy of the repository.

A workspace holds the copy. Its packages come first on PYTHONPATH, before the editable installation, so that the tests
and the processes that they start import the mutant; `verify` checks this. The checkout itself is never changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tree import ROOT

from mutations import observer
from mutations.coverage_map import UNIT

NOT_COPIED = (".git", ".venv", "build", "dist", "runs", "comparisons", "__pycache__", ".*_cache", ".hypothesis")
TIMEOUT = "timeout"
FIRST_BATCH = 25
"""Most mutants are killed by one of the first tests; these are run before the files of all others are imported."""
MAX_SECONDS = 30.0
"""Recorded duration of the tests that are run on one mutant."""
START_SECONDS = 90.0
"""For imports and services, on a busy machine."""
SERVICE_SECONDS = 30.0
"""For a RabbitMQ that a test starts."""
SLACK_SECONDS = 20.0
"""For a test that is slowed down by others."""
MEMORY_BYTES = 8 * 2**30
QUICK_SECONDS = 0.5
"""A longer test may fail because the machine is busy."""
NOT_FOUND = 4
"""Exit code of pytest for arguments that do not exist, and for a conftest.py that cannot be imported."""


@dataclass(frozen=True)
class Verdict:
    """How a mutant fared."""

    outcome: str
    """killed, survived or timeout."""
    test: str = ""
    """The test that failed."""


class Workspace:
    """A copy of the repository that one mutant at a time is applied to."""

    def __init__(self, folder: Path, packages: Sequence[str], root: Path = ROOT) -> None:
        """Copy the files below a root; `packages` are the folders in it that packages are imported from."""
        self._folder = folder
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        self._log = folder / "observer.jsonl"
        paths = [*(str(folder / package) for package in packages), str(ROOT / "tests")]
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            # Byte code has the time of its source in whole seconds, so a mutant could be taken for the next one.
            "PYTHONDONTWRITEBYTECODE": "1",
            "MUTATIONS_LOG": str(self._log),
            "MUTATIONS_MEMORY": str(MEMORY_BYTES),
        }

    def verify(self, modules: Sequence[str]) -> None:
        """Check that modules are imported from the copy."""
        code = f"import importlib\nfor name in {list(modules)!r}: print(importlib.import_module(name).__file__)"
        done = self._python(["-c", code])
        done.check_returncode()
        elsewhere = [path for path in done.stdout.split() if not Path(path).is_relative_to(self._folder)]
        if elsewhere:
            raise RuntimeError(f"not imported from the copy: {', '.join(elsewhere)}")

    def collect(self, arguments: Sequence[str]) -> set[str]:
        """Return the tests that pytest finds."""
        done = self._python(["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments])
        return {line for line in done.stdout.splitlines() if "::" in line}

    def _python(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run the interpreter in the copy."""
        command = [sys.executable, *arguments]
        return subprocess.run(  # noqa: S603 - pytest, on our own tests
            command, cwd=self._folder, env=self._environment, capture_output=True, text=True, check=False
        )

    def failing(self, tests: Sequence[str]) -> set[str]:
        """Return the tests that fail twice without a mutant."""
        left = sorted(tests)
        for _ in range(2):
            if left:
                self._pytest(left, START_SECONDS + 60, limit=1800.0)
                passed = {event["test"] for event in observer.events(self._log) if event["event"] == "passed"}
                failed = {event["test"] for event in observer.events(self._log) if event["event"] == "failed"}
                left = [test for test in left if test in failed or test not in passed]
        return set(left)

    def judge(self, file: str, source: str, tests: Sequence[str], seconds: Mapping[str, float]) -> Verdict:
        """Replace a file's text and run tests in their order until one fails; then put the file back."""
        path = self._folder / file
        original = path.read_text(encoding="utf-8")
        path.write_text(source, encoding="utf-8")
        try:
            left = affordable(tests, seconds)
            for batch in (left[:FIRST_BATCH], left[FIRST_BATCH:]):
                verdict = self._first_failure(batch, seconds)
                if verdict is not None:
                    return verdict
            return Verdict("survived")
        finally:
            path.write_text(original, encoding="utf-8")

    def _first_failure(self, batch: Sequence[str], seconds: Mapping[str, float]) -> Verdict | None:
        """Run tests until one fails; a slow test or one outside the unit tests has to fail twice."""
        left = list(batch)
        while left:
            verdict = self._run(left, seconds)
            test = verdict.test if verdict is not None else ""
            is_sure = verdict is None or verdict.outcome == TIMEOUT or test not in left
            if is_sure or (test.startswith(UNIT) and seconds[test] < QUICK_SECONDS):
                return verdict
            again = self._run([test], seconds)
            if again is not None:
                return again
            left = left[left.index(test) + 1 :]
        return None

    def _run(self, tests: Sequence[str], seconds: Mapping[str, float]) -> Verdict | None:
        """Run tests once; None when all pass."""
        expected = [seconds.get(test, 0.0) for test in tests]
        limit = START_SECONDS + 5 * sum(expected)
        services = 0.0 if all(test.startswith(UNIT) for test in tests) else SERVICE_SECONDS
        each = SLACK_SECONDS + services + 5 * max(expected)
        began = time.monotonic()
        code = self._pytest(tests, each, limit, "-x")
        if code == NOT_FOUND:  # a mutant may change the parameters of tests; then their whole files are run
            files = sorted({test.split("::", maxsplit=1)[0] for test in tests})
            code = self._pytest(files, each, limit, "-x")
        seen = observer.events(self._log)
        failed = next((event for event in seen if event["event"] == "failed"), None)
        if failed is not None:
            return Verdict(TIMEOUT if failed["timeout"] else "killed", failed["test"])
        if code == 0:
            return None
        started = [event["test"] for event in seen if event["event"] == "start"]
        # No test has failed, but the run has: it hung, crashed, or could not import its conftest.py.
        hung = code is None or time.monotonic() - began > each
        return Verdict(TIMEOUT if hung else "killed", started[-1] if started else "")

    def _pytest(self, tests: Sequence[str], each: float, limit: float, *options: str) -> int | None:
        """Run pytest with time limits for each test and for all; its exit code, or None when it did not end in time."""
        self._log.unlink(missing_ok=True)
        arguments = self._folder / "arguments.txt"
        arguments.write_text("\n".join(tests), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", *options, "-q", "--tb=line", "-p", "mutations.observer"]
        command += ["-p", "no:cacheprovider", "--timeout", str(each), f"@{arguments}"]
        with subprocess.Popen(  # noqa: S603 - pytest, on our own tests
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(limit)
            # Fixtures stop the services that they started when pytest is interrupted.
            for number, patience in ((signal.SIGINT, 20), (signal.SIGKILL, None)):
                with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    os.killpg(child.pid, number)
                    child.wait(patience)
                    break
            return None


def affordable(tests: Sequence[str], seconds: Mapping[str, float]) -> list[str]:
    """Return the first tests that take no more than MAX_SECONDS together."""
    total, taken = 0.0, []
    for test in tests:
        total += seconds[test]
        if total > MAX_SECONDS:
            break
        taken.append(test)
    return taken


def temporary_folder() -> Path:
    """Make a folder for workspaces, outside the checkout."""
    return Path(tempfile.mkdtemp(prefix="lorabbit-mutations-")).resolve()

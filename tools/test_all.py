"""Run every test of the project, and store the result with commit, date and machine.

    make test-all

Stages: lint, types and import contracts; all tests of the three tiers but containers and failure matrix, with new
examples for the property tests; containers and failure matrix, one at a time; mutations. A stage that fails does not
stop the following ones. The result is benchmarks/results/test-all.json; the exit code is 1 where a stage failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/test-all.json"
PYTEST = [sys.executable, "-m", "pytest", "--durations=20", "--hypothesis-profile=explore"]
IN_PARALLEL = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
STAGES: dict[str, list[str]] = {
    "lint, types, import contracts": ["make", "lint", "types", "contracts"],
    "tests": [*PYTEST, *IN_PARALLEL, "-m", "not containers and not chaos"],
    "containers and failure matrix": [*PYTEST, "-m", "containers or chaos"],
    "mutations": ["make", "mutations"],
}


def run(name: str, command: Sequence[str]) -> dict[str, object]:
    """Run one stage and return what it took and, for pytest, the number of tests by outcome."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        options = [f"--junitxml={report}"] if "pytest" in command else []
        began = time.monotonic()
        code = subprocess.run([*command, *options], cwd=ROOT, check=False, env={**os.environ, "CI": "true"}).returncode  # noqa: S603
        seconds = round(time.monotonic() - began)
        outcomes = dict(count(report)) if report.exists() else {}
    return {"stage": name, "command": " ".join(command[command[0] == sys.executable :]), "seconds": seconds,
            "exit code": code, **outcomes}  # fmt: skip


def count(report: Path) -> Counter[str]:
    """Return the number of tests by outcome in a JUnit report, which our own pytest wrote."""
    names = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    cases = ET.parse(report).iter("testcase")  # noqa: S314
    return Counter(next((names[part.tag] for part in case if part.tag in names), "passed") for case in cases)


def git(*arguments: str) -> str:
    """Return what git says about this repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


def main() -> None:
    """Run all stages and store the result after each."""
    result: dict[str, object] = {
        "title": "make test-all",
        "commit": git("rev-parse", "--short=10", "HEAD") + ("" if not git("status", "--porcelain") else " and changes"),
        "date": datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "facts": {
            "cores": str(os.cpu_count()),
            "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
            "load before": f"{os.getloadavg()[0]:.1f}",
        },
    }
    rows: list[dict[str, object]] = []
    for name, command in STAGES.items():
        rows.append(run(name, command))
        RESULT.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items() if key != "command"))
    sys.exit(any(row["exit code"] for row in rows))


if __name__ == "__main__":
    main()

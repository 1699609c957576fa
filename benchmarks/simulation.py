"""Embedded runs with null training: seconds per round and peak memory at 10, 100 and 1,000 clients.

    python benchmarks/simulation.py [--rounds 20] [--payload 0.3MB] [--out FILE]

Each size is a `lorabbit run` in a process of its own; a tenth of the clients (at least 10) is asked
in every round, nobody trains, so that what is left is what LoRAbbit itself costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from measure import Table, machine, run_measured, yaml_file


def job(clients: int, cohort: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the job file of one size."""
    return {
        "name": "simulation",
        "model": {"name": f"null:{arguments.payload}"},
        "rounds": arguments.rounds,
        "clients": clients,
        "cohort": cohort,
        "evaluation": {"every": arguments.rounds},
        "output": {"keep_checkpoints": 0},
    }


def measure(clients: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one size and read its report."""
    cohort = min(clients, arguments.cohort)
    with tempfile.TemporaryDirectory() as scratch:
        file = yaml_file(Path(scratch) / "job.yaml", job(clients, cohort, arguments))
        usage = run_measured([sys.executable, "-m", "lorabbit_cli", "run", str(file), "--out", scratch])
        report = json.loads((Path(scratch) / "simulation" / "report.json").read_text())
    seconds = [r["seconds"] for r in report["rounds"]]
    return {
        "clients": clients,
        "cohort": cohort,
        "seconds a round (median)": statistics.median(seconds),
        "seconds a round (largest)": max(seconds),
        "whole run, seconds": usage.seconds,
        "peak memory, MB": usage.peak_mb,
    }


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cohort", type=int, default=10)
    parser.add_argument("--payload", default="0.3MB")
    parser.add_argument("--clients", default="10,100,1000")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [measure(int(clients), arguments) for clients in arguments.clients.split(",")]
    Table("Embedded, null training", rows, machine()).show(arguments.out)


if __name__ == "__main__":
    main()

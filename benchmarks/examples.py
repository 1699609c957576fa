"""What every example job costs, and whether it ends better than it began.

    python benchmarks/examples.py [--only NAME ...] [--out benchmarks/results/examples]

Runs `lorabbit run examples/NAME.yaml` for each, one after the other, with one thread for each process. CPU seconds are
those of all its processes together: on idle cores a job takes at most so long, and less where clients train beside each
other, so that either less than three minutes of them or three minutes by the clock will do. Began is the main metric
where it was first scored, ended where it was last. With `--out`, examples that were measured earlier keep their line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from measure import Table, machine
from transport import LORABBIT

from lorabbit.metrics import is_better

EXAMPLES = Path(__file__).parents[1] / "examples"
LIMIT_SECONDS = 180


def measured(name: str) -> dict[str, object]:
    """Run one example, and say what it took and what came of it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [*LORABBIT, "run", f"examples/{name}.yaml", "--format", "json", "--out", scratch]
        began, before = time.perf_counter(), os.times()
        done = subprocess.run(  # noqa: S603 - a command of ours
            command, check=True, capture_output=True, text=True, cwd=EXAMPLES.parent,
            env={**os.environ, "LORABBIT_THREADS": "1"},
        )  # fmt: skip
        wall, after = time.perf_counter() - began, os.times()
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    report = json.loads(done.stdout)
    metric = report["main_metric"]
    scored = [each["metrics"][metric] for each in report["rounds"] if metric in each["metrics"]]
    better = is_better(metric, scored[-1], scored[0])
    return {
        "example": name,
        "method": report["method"]["name"],
        "CPU seconds": round(cpu),
        "within 3 minutes": "yes" if min(cpu, wall) < LIMIT_SECONDS else "no",
        "wall seconds here": round(wall),
        "metric": metric,
        "began": round(scored[0], 4),
        "ended": round(scored[-1], 4),
        "better": "yes" if better else "no",
    }


def main() -> None:
    """Run what is asked for and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kept = arguments.out.with_suffix(".json") if arguments.out else None
    rows = {row["example"]: row for row in json.loads(kept.read_bytes())["rows"]} if kept and kept.exists() else {}
    for name in arguments.only:
        rows[name] = measured(name)
        print(rows[name], flush=True)
        Table("The example jobs", [rows[each] for each in sorted(rows)], machine()).show(arguments.out)


if __name__ == "__main__":
    main()

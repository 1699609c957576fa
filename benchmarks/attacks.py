"""Attacks against defenses on the tiny federation of the tests: the table of docs/explanation/robustness.md.

python benchmarks/attacks.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hostile import ATTACKS, job, run

DEFENSES = (None, "clip", "median", "trimmed-mean", "krum", "multi-krum")
SEEDS = range(5)


def accuracy(attack: str | None, defense: str | None) -> str:
    """Mean over the seeds, and the worst of them."""
    spec = job(robust={"kind": defense}) if defense else job()
    found = [run(spec, ATTACKS.get(attack or ""), seed=seed)[0] for seed in SEEDS]
    return f"{np.mean(found):.2f} ({min(found):.2f})"


def main() -> None:
    """Print the table as Markdown."""
    print("| attack | " + " | ".join(defense or "none" for defense in DEFENSES) + " |")
    print("|" + "---|" * (len(DEFENSES) + 1))
    for attack in (None, *ATTACKS):
        cells = " | ".join(accuracy(attack, defense) for defense in DEFENSES)
        print(f"| {(attack or 'none').replace('_', ' ')} | {cells} |")


if __name__ == "__main__":
    main()

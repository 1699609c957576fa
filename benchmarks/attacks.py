"""Attacks against defenses on the tiny federation of the tests: the table of docs/explanation/robustness.md.

python benchmarks/attacks.py [--seeds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from measure import Table, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hostile import ATTACKS, job, run

DEFENSES = (None, "clip", "median", "trimmed-mean", "krum", "multi-krum")


def accuracy(attack: str | None, defense: str | None, seeds: int) -> str:
    """Mean over the seeds, and the worst of them."""
    spec = job(robust={"kind": defense}) if defense else job()
    found = [run(spec, ATTACKS.get(attack or ""), seed=seed)[0] for seed in range(seeds)]
    return f"{np.mean(found):.2f} ({min(found):.2f})"


def main() -> None:
    """Run every attack against every defense and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [
        {
            "attack": (attack or "none").replace("_", " "),
            **{defense or "none": accuracy(attack, defense, arguments.seeds) for defense in DEFENSES},
        }
        for attack in (None, *ATTACKS)
    ]
    facts = {**machine(), "seeds": str(arguments.seeds)}
    Table("Attacks against defenses: mean accuracy, and in brackets the worst seed", rows, facts).show(arguments.out)


if __name__ == "__main__":
    main()

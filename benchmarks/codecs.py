"""Bytes against accuracy: a job with each coding of what travels.

    python benchmarks/codecs.py [--job FILE] [--rounds N] [--seeds 0 ...] [--only NAME ...] [--out FILE]

Every row is the same job with the same seeds; only `transport` differs. Accuracy is that of the last round on the
clients' held-out rows, the mean over the seeds; bytes are payload bytes as the report counts them, over all rounds
and clients, the mean over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import Table, machine

from lorabbit import job_loader
from lorabbit_cli.local.embedded_run import ComputeOptions, run_local

CODINGS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "int8 up": ("up.codec=int8",),
    "int4 up, feedback": ("up.codec=int4", "up.feedback=true"),
    "top-k 5 % up, zstd": ("up.codec=top-k", "up.zstd=true"),
    "int8 up and down": ("up.codec=int8", "down.codec=int8"),
    "delta and zstd, lossless": ("up.delta=true", "up.zstd=true", "down.delta=true", "down.zstd=true"),
    "bf16 up and down": ("up.codec=bf16", "down.codec=bf16"),
    "int4 up": ("up.codec=int4",),
    "top-k 1 % up, zstd": ("up.codec=top-k", "up.share=0.01", "up.zstd=true"),
}


def run(job: Path, rounds: int | None, seed: int, coding: Sequence[str]) -> dict[str, float]:
    """Run the job; returns accuracy, loss and bytes."""
    settings = [f"seed={seed}", *(f"transport.{each}" for each in coding)]
    settings += [] if rounds is None else [f"rounds={rounds}"]
    with tempfile.TemporaryDirectory() as scratch:
        report = run_local(job_loader.load(job, settings), Path(scratch), compute=ComputeOptions(workers=1)).report
    return {
        "accuracy": report.final.metrics["accuracy"],
        "loss": report.final.metrics["loss"],
        "up": sum(each.bytes_up for each in report.rounds) / 1e6,
        "down": sum(each.bytes_down for each in report.rounds) / 1e6,
    }


def main() -> None:
    """Run every coding and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(CODINGS), default=list(CODINGS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in arguments.only:
        found = [run(arguments.job, arguments.rounds, seed, CODINGS[name]) for seed in arguments.seeds]
        mean = {key: statistics.fmean(each[key] for each in found) for key in found[0]}
        each_one = " ".join(f"{each['accuracy']:.3f}" for each in found)
        row = {"transport": name, "accuracy": f"{mean['accuracy']:.4f}", "seed by seed": each_one}
        row["loss"] = f"{mean['loss']:.4f}"
        rows.append({**row, "MB up": mean["up"], "MB down": mean["down"], "MB": mean["up"] + mean["down"]})
        print(rows[-1], flush=True)
        rounds = arguments.rounds or job_loader.load(arguments.job).rounds
        title = f"{arguments.job.name}, {rounds} rounds, seeds {', '.join(str(seed) for seed in arguments.seeds)}"
        Table(title, rows, machine()).show(arguments.out)


if __name__ == "__main__":
    main()

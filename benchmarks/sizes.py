"""One upload and one download of each payload size, through a real broker that takes messages of 16 MiB at most.

    python benchmarks/sizes.py [--sizes 25KB 300KB ... 2GB] [--chunks 1048576 262144] [--clients 1] [--out FILE]

Starts a private broker (`max_message_size` is 16 MiB) and store, one server and the clients as processes of their
own, and submits one null job of one round for each size: the first adapter goes up, then down to every client, an
update of the same size comes up from each, is checked and folded.
`--clients 8 --sizes 200MB` is the row that tells whether the server's memory stays flat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Sampler, Table, machine, yaml_file
from transport import Federation

TITLE = "Payload sizes through a broker whose messages have 16 MiB at most"
SIZES = ["25KB", "300KB", "4MB", "16MB", "64MB", "200MB", "1GB", "2GB"]


@contextlib.contextmanager
def federation(clients: int, chunk_bytes: int) -> Iterator[Federation]:
    """Run a federation whose server cuts payloads so."""
    before = os.environ.get("LORABBIT_CHUNK_BYTES")
    os.environ["LORABBIT_CHUNK_BYTES"] = str(chunk_bytes)
    with tempfile.TemporaryDirectory() as scratch:
        running = Federation(Path(scratch), clients, clustered=False)
        try:
            running.wait_ready()
            yield running
        finally:
            running.close()
            os.environ.pop("LORABBIT_CHUNK_BYTES")
            if before is not None:
                os.environ["LORABBIT_CHUNK_BYTES"] = before


def finished(running: Federation, name: str) -> dict[str, Any]:
    """The report of a job that has ended, once its run folder is complete; `watch` ends a little earlier."""
    for _ in range(600):
        entry = next(each for each in json.loads(running.command("jobs", "--format", "json")) if each["job"] == name)
        if entry["status"] not in {"queued", "running"}:
            break
        time.sleep(0.2)
    report: dict[str, Any] = json.loads((running.folder / "runs" / name / "report.json").read_text())
    return report


def measure(running: Federation, size: str, chunk_bytes: int, clients: int) -> dict[str, object]:
    """Run one job; raises SystemExit unless it ended and every client's update counted."""
    name = f"size-{size.lower()}-{chunk_bytes // 1024}k"
    job = {
        "name": name,
        "model": {"name": f"null:{size}"},
        "rounds": 1,
        "clients": clients,
        "evaluation": {"on": "central"},
        "output": {"keep_checkpoints": 0},
    }
    file = yaml_file(running.folder.parent / f"{name}.yaml", job)
    tiers = running.tiers()
    with Sampler(tiers) as sampler:
        began = time.perf_counter()
        running.command("submit", str(file))
        running.command("watch", name)
        seconds = time.perf_counter() - began
    report = finished(running, name)
    first = report["rounds"][0]
    if report["status"] != "done" or first["accepted"] != clients:
        raise SystemExit(f"{name}: {report['status']} {report['reason']}: {first}")
    file_bytes = min(each["bytes_up"] for each in first["per_client"])
    return {
        "payload": size,
        "clients": clients,
        "chunk, KiB": chunk_bytes // 1024,
        "chunks": -(-file_bytes // chunk_bytes),
        "job, s": seconds,
        "round, s": first["seconds"],
        "file, bytes": file_bytes,
        "sent again, %": 100 * (first["bytes_up"] / clients / file_bytes - 1),
        "server, MB": sampler.peaks_mb["server"],
        "a client, MB": sampler.largest_mb["client"],
        "broker, MB": sampler.peaks_mb["broker"],
        "load": f"{os.getloadavg()[0]:.0f}",
    }


def main() -> None:
    """Measure every size with every cut and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--chunks", nargs="+", type=int, default=[2**20, 2**18])
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for chunk_bytes in arguments.chunks:
        with federation(arguments.clients, chunk_bytes) as running:
            for size in arguments.sizes:
                rows.append(measure(running, size, chunk_bytes, arguments.clients))
                print(rows[-1], flush=True)
                Table(TITLE, rows, {**machine(), **running.versions()}).show(arguments.out)


if __name__ == "__main__":
    main()

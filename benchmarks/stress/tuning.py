"""Settings before and after: the same stress test under one changed setting at a time.

    python benchmarks/stress/tuning.py [--clients 100] [--payload 0.3MB] [--rounds 4] [--only NAME] [--out FILE]

Each line is a federation of its own, of processes, as `lorabbit stress` makes it; the first is the shipped
configuration. A setting earns its place there by a line of this table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import Table, machine

from lorabbit_bench.stress import process_deployment
from lorabbit_bench.stress.plan import StressPlan, read_plan
from lorabbit_bench.stress.process_deployment import ProcessDeployment
from lorabbit_bench.stress.runner import StressRunner
from lorabbit_cli.options import quiet_logs

SHIPPED = "shipped"


@dataclass(frozen=True, slots=True)
class Variant:
    """One changed setting."""

    name: str
    broker: dict[str, str] = field(default_factory=dict)
    """Lines of rabbitmq.conf in place of the shipped ones."""
    server: dict[str, str] = field(default_factory=dict)
    """LORABBIT_* variables of the server."""


def buffers(size: int) -> dict[str, str]:
    """Lines that set both TCP buffers."""
    return {"tcp_listen_options.sndbuf": str(size), "tcp_listen_options.recbuf": str(size)}


VARIANTS = (
    Variant(SHIPPED),
    Variant("TCP buffers 32 KiB", broker=buffers(32 * 2**10)),
    Variant("TCP buffers 64 KiB", broker=buffers(64 * 2**10)),
    Variant("TCP buffers 192 KiB", broker=buffers(192 * 2**10)),
    Variant("chunks of 256 KiB", server={"LORABBIT_CHUNK_BYTES": str(256 * 2**10)}),
    Variant("chunks of 4 MiB", server={"LORABBIT_CHUNK_BYTES": str(4 * 2**20)}),
)


@contextmanager
def changed(variant: Variant) -> Iterator[None]:
    """Start private brokers with the variant's settings."""
    before = process_deployment.RABBITMQ_SETTINGS
    lines = dict(line.split(" = ", 1) for line in before.splitlines())
    process_deployment.RABBITMQ_SETTINGS = "".join(
        f"{name} = {value}\n" for name, value in {**lines, **variant.broker}.items()
    )
    try:
        yield
    finally:
        process_deployment.RABBITMQ_SETTINGS = before


class Tuned(ProcessDeployment):
    """A federation whose server gets the variant's settings too."""

    def __init__(self, plan: StressPlan, clients: int, variant: Variant) -> None:
        """Prepare."""
        super().__init__(plan, clients, configured=False)
        self.server_settings = variant.server


def measure(variant: Variant, plan: StressPlan, console: Console) -> dict[str, object]:
    """Run the plan once under a variant."""
    console.print(f"{variant.name}:", highlight=False)
    work = StressRunner(plan, lambda plan, clients: Tuned(plan, clients, variant), console)
    with changed(variant):
        work.run()
    if not work.rows:
        return {"setting": variant.name, "stopped": "; ".join(work.reached)}
    row = work.rows[-1]
    return {
        "setting": variant.name,
        "round p50, s": row.round_p50,
        "round p99, s": row.round_p99,
        "MB/s": row.mb_per_second,
        "broker, MB": row.memory_mb["broker"],
        "server, MB": row.memory_mb["server"],
        "CPU ms of one client's round": sum(row.cpu_ms_per_update.values()),
        "stopped": row.stopped,
    }


def main() -> None:
    """Measure every variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="100")
    parser.add_argument("--payload", default="0.3MB")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_logs()
    plan = read_plan(
        clients=arguments.clients,
        payload=arguments.payload,
        rounds=arguments.rounds,
        train="null",
        churn=0.0,
        slow="none",
        quorum=1.0,
        time_limit=arguments.time_limit,
        per_process=None,
        seed=0,
        out=Path("stress"),
    )
    chosen = [each for each in VARIANTS if not arguments.only or each.name in arguments.only]
    console = Console(stderr=True)
    rows = [measure(variant, plan, console) for variant in chosen]
    title = f"Settings, {arguments.clients} clients, {arguments.payload}, {arguments.rounds} rounds"
    columns = list(max(rows, key=len))
    complete = [{name: row.get(name, "-") for name in columns} for row in rows]
    Table(title, complete, machine()).show(arguments.out)


if __name__ == "__main__":
    main()

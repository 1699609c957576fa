"""Plan of a stress test: what is measured, read from the command line's words."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit_bench.stress.traces import TrainTimeDistribution, read_slowness
from lorabbit_client.execution.null_workspace import PREFIX, size_of

OWN_PROCESSES = 100
"""So many client processes at most, unless the user says otherwise; with more clients each holds several."""
MEGABYTE = 1_000_000
REAL_MODEL: dict[str, Any] = {
    "model": {"name": "tiny:bert", "task": "text-classification", "lora": {"rank": 4, "alpha": 4}},
    "data": {"source": "stdlib-docs", "partition": {"kind": "iid"}, "max_length": 16},
    "local": {"steps": 2, "batch_size": 4},
}
"""The job of `--train real`: a BERT of two small blocks, so that the machine is loaded by many, not by one."""


@dataclass(frozen=True, slots=True)
class StressPlan:
    """Everything that decides what a stress test does."""

    clients: tuple[int, ...]
    """Sizes, ascending."""
    payloads_mb: tuple[float, ...]
    """Sizes of an adapter in MB of 10^6 bytes, ascending; (0.0,) where a real model decides."""
    rounds: int
    train: str
    """null or real."""
    churn: float
    """Probability that a client leaves in the middle of a training and comes back later."""
    slow: TrainTimeDistribution
    quorum: float
    """Share of the clients whose updates close a round; 1.0 waits for all."""
    time_limit_seconds: float
    per_process: int | None
    seed: int
    out: Path

    def clients_per_process(self, clients: int) -> int:
        """How many clients one process holds at a size."""
        return self.per_process or math.ceil(clients / OWN_PROCESSES)

    def job(self, clients: int, payload_mb: float) -> JobSpec:
        """The job of one size; raises BadInput where it cannot be."""
        model = REAL_MODEL if self.train == "real" else {"model": {"name": f"{PREFIX}{payload_mb:g}MB"}}
        schedule: Any = "sync"
        if self.quorum < 1:
            schedule = {"kind": "quorum", "quorum": self.quorum, "over_select": 1.0}
        return JobSpec.model_validate(
            {
                "name": f"stress-{clients}-{payload_mb:g}mb".replace(".", "-"),
                **model,
                "rounds": self.rounds,
                "clients": clients,
                "schedule": schedule,
                "evaluation": {"every": self.rounds, "on": "central"},
                "output": {"keep_checkpoints": 0},
                "seed": self.seed,
            }
        )


def read_clients(text: str) -> tuple[int, ...]:
    """Read --clients; raises BadInput."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise BadInput(f"--clients: {text!r} is no list of whole numbers above 0 such as 10,50,100")
    return tuple(sizes)


def read_payloads(text: str) -> tuple[float, ...]:
    """Read --payload, such as 0.3,4,16MB or 300KB,4MB: a unit holds for the numbers before it; raises BadInput."""
    found: list[float] = []
    unit = "MB"
    for part in reversed([part.strip() for part in text.split(",")]):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", part)
        if match is None:
            raise BadInput(f"--payload: {text!r} is no list of sizes such as 0.3,4,16MB")
        unit = match[2] or unit
        try:
            found.append(size_of(f"{PREFIX}{match[1]}{unit}") / MEGABYTE)
        except BadInput:
            raise BadInput(f"--payload: {match[1]}{unit} is no size of an adapter; write for example 0.3MB") from None
    return tuple(sorted(set(found)))


def read_plan(  # noqa: PLR0913 - the options of the command
    clients: str,
    payload: str | None,
    *,
    rounds: int,
    train: str,
    churn: float,
    slow: str,
    quorum: float,
    time_limit: float,
    per_process: int | None,
    seed: int,
    out: Path,
) -> StressPlan:
    """Check the options and put a plan together; raises BadInput before anything is started."""
    if train not in {"null", "real"}:
        raise BadInput(f"--train: {train!r} is neither null nor real")
    if train == "real" and payload is not None:
        raise BadInput("--payload: with --train real the model decides the size; leave --payload out")
    if not 0 <= churn < 1:
        raise BadInput(f"--churn: {churn:g} is no probability from 0 to below 1")
    if not 0 < quorum <= 1:
        raise BadInput(f"--quorum: {quorum:g} is no share above 0 and up to 1")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out: {out} is a file; name a folder")
    payloads = read_payloads(payload or "0.3MB") if train == "null" else (0.0,)
    return StressPlan(
        read_clients(clients), payloads, rounds, train, churn, read_slowness(slow), quorum, time_limit, per_process,
        seed, out,
    )  # fmt: skip

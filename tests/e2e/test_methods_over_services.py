"""Every method's job in one process and over RabbitMQ and Redis: one adapter, the same scores, the same bytes.

All jobs share one federation of processes. The four methods are also run while their server is killed in every
phase, and their clients while they train and after they wrote what only they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from cases import tiered
from processes import Event, Federation

from lorabbit.job.spec import JobSpec
from lorabbit_cli.local.embedded_run import ComputeOptions, run_local

CLIENTS = 3
LORA = {
    "model": {"name": "tiny:vit", "task": "image-classification", "lora": {"rank": 4, "alpha": 8}},
    "local": {"steps": 4, "batch_size": 8, "learning_rate": 0.01},
}
OWN = {
    "model": {"variants": ["cnn:5", "cnn:4"], "name": "cnn:5", "task": "image-classification", "trainable": "full"},
    "local": {"steps": 4, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05},
}
STAGES = {"t0": 2, "r_min": 1, "t_heat": 1, "t_cool": 1, "ladder": [1, 2, 4]}
CURRICULUM = {"n_fisher": 8, "probes": 4, "draws": 1, "warmup_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "sa-fedlora": {**LORA, "method": {"name": "sa-fedlora", **STAGES}, "rounds": 6},
    "federa": {**LORA, "method": {"name": "federa"}},
    "fibecfed": {**LORA, "method": {"name": "fibecfed", **CURRICULUM}},
    "pfedlora": {**OWN, "method": {"name": "pfedlora", "mu": 0.3}},
    "ffa-lora": {**LORA, "method": {"name": "ffa-lora"}},
    "fedsa-lora": {**LORA, "method": {"name": "fedsa-lora"}},
    "fml": {**OWN, "method": {"name": "fml"}},
}
THE_FOUR = ("sa-fedlora", "federa", "fibecfed", "pfedlora")
COUNTS = ("rejected", "bytes_up")
pytestmark = pytest.mark.services


def job(method: str) -> dict[str, Any]:
    """A job of seconds; every method of LoRA trains a vision transformer on handwritten digits."""
    data = {"source": "digits", "limit": 150}
    return {"name": method, "data": data, "rounds": 3, "clients": CLIENTS, "seed": 7, **METHODS[method]}


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, module_rabbitmq_url: str, module_redis: services.Redis
) -> Iterator[Federation]:
    started = Federation(tmp_path_factory.mktemp("federation"), module_rabbitmq_url, module_redis.url)
    try:
        started.start(CLIENTS)
        yield started
    finally:
        started.close()


def told(report: dict[str, Any], *, counts: bool = True) -> dict[str, Any]:
    """What must be the same wherever a job runs; `counts`: bytes too, which a killed server begins to count anew."""
    rows = [report["preparation"]] if report["preparation"] else []
    return {
        "adapter": report["adapter"],
        "final": report["final"],
        "rounds": [
            {key: row[key] for key in ("round", "accepted", "sha256", "metrics", *(COUNTS if counts else ()))}
            for row in [*rows, *report["rounds"]]
        ],
    }


@pytest.mark.parametrize("method", tiered(METHODS, fast=["federa"], slow=THE_FOUR))
def test_processes_and_one_process_make_the_same_adapter_scores_and_bytes(
    federation: Federation, tmp_path: Path, method: str
) -> None:
    spec, compute = JobSpec.model_validate(job(method)), ComputeOptions(device="cpu", workers=1)
    embedded = run_local(spec, tmp_path, compute=compute).report.model_dump(mode="json")

    report = federation.run(job(method))

    assert told(report) == told(embedded)


class Killer:
    """Kills and starts again a client that was just asked, then the server, then a client whose update counts."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._steps = [
            ("round-started", 1, lambda event: self._kill_client(event["cohort"][0])),
            ("update-accepted", 2, lambda _: self._kill_server()),
            ("update-accepted", 3, lambda event: self._kill_client(event["client"])),
        ]
        self.killed: list[str] = []

    def __call__(self, event: Event) -> None:
        if self._steps:
            kind, round_number, act = self._steps[0]
            if event["kind"] == kind and event["round"] == round_number:
                self._steps.pop(0)
                act(event)

    def _kill_client(self, client: str) -> None:
        process = self._federation.clients[self._federation.address_of(client)]
        process.kill()
        process.start()
        self.killed.append("client")

    def _kill_server(self) -> None:
        self._federation.server.kill()
        self._federation.server.start()
        self.killed.append("server")


@pytest.mark.parametrize("method", tiered(THE_FOUR, slow=["federa"]))
def test_whoever_is_killed_changes_nothing(federation: Federation, method: str) -> None:
    """`tests/integration/test_restarts.py` has every phase; here it is processes, and whatever they are at."""
    spec = job(method)
    spec |= {"name": f"{method}-killed", "local": {**spec["local"], "steps": 150}}
    undisturbed = federation.run(spec | {"name": f"{method}-long"})
    killer = Killer(federation)

    report = federation.run(spec, killer)

    assert killer.killed == ["client", "server", "client"]
    assert told(report, counts=False) == told(undisturbed, counts=False)

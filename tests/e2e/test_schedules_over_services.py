"""Schedules over a real RabbitMQ and Redis: what an asynchronous run made is made again, to the same sha256."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from cases import tiered
from processes import Federation

from lorabbit_cli.local.replay import replay

JOB: dict[str, Any] = {
    "model": {"name": "tiny:vit", "task": "image-classification", "lora": {"rank": 2, "alpha": 4}},
    "data": {"source": "digits", "limit": 90},
    "clients": 3,
    "rounds": 5,
    "seed": 7,
    "local": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
    "evaluation": {"every": 5},
    "output": {"keep_updates": True},
}
CELLS: dict[str, dict[str, Any]] = {
    "buffered": {"schedule": {"kind": "buffered", "buffer": 2}, "method": {"name": "fedavg"}},
    "fedasync": {"schedule": {"kind": "buffered", "buffer": 1}, "method": {"name": "federa"}},
    "stacked": {"schedule": {"kind": "buffered", "buffer": 1}, "aggregation": "svd"},
    "quorum": {
        "schedule": {"kind": "quorum", "quorum": 0.6, "over_select": 1.0, "late": "keep"},
        "method": {"name": "ffa-lora"},
    },
}
pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, module_rabbitmq_url: str, module_redis: services.Redis
) -> Iterator[tuple[Federation, Path]]:
    folder = tmp_path_factory.mktemp("federation")
    started = Federation(folder, module_rabbitmq_url, module_redis.url)
    try:
        started.start(3)
        yield started, folder / "server" / "runs"
    finally:
        started.close()


@pytest.mark.parametrize("cell", tiered(CELLS, slow=["fedasync", "quorum"]))
def test_every_version_of_a_run_that_waited_for_nobody_is_made_again_to_the_same_sha256(
    federation: tuple[Federation, Path], cell: str
) -> None:
    started, runs = federation

    report = started.run({**JOB, "name": cell, **CELLS[cell]})

    versions = list(replay(runs / cell))
    assert [(version.round, version.is_same) for version in versions] == [(n, True) for n in range(1, 6)]
    assert versions[-1].sha256 == report["adapter"]["sha256"]
    assert [version.updates for version in versions] == [entry["accepted"] for entry in report["rounds"]]

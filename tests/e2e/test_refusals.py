"""What the broker will never take ends the job with the broker's words, instead of leaving it waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import rabbitmq_files
import services
from processes import Federation

JOB = {"name": "refused", "model": {"name": "null:20KB"}, "rounds": 1, "clients": 1}
pytestmark = pytest.mark.services


@pytest.fixture
def federation(tmp_path: Path, empty_rabbitmq_url: str, redis_server: services.Redis) -> Iterator[Federation]:
    narrow = empty_rabbitmq_url.replace("guest:guest", f"{rabbitmq_files.NARROW}:{rabbitmq_files.NARROW}")
    started = Federation(tmp_path, empty_rabbitmq_url, redis_server.url, server={"LORABBIT_BROKER_URL": narrow})
    yield started
    started.close()


def test_a_server_that_may_not_publish_an_adapter_ends_the_job_and_says_why(federation: Federation) -> None:
    federation.start(1)

    ended = list(federation.events(federation.submit(JOB)))[-1]

    assert (ended["kind"], ended["status"], ended["exit_code"]) == ("job-ended", "failed", 1)
    assert ended["reason"].startswith("publishing payload ")
    assert "ACCESS_REFUSED" in ended["reason"]


def test_a_server_that_finds_queues_of_the_other_kind_ends_and_names_them(
    tmp_path: Path, empty_rabbitmq_url: str, redis_server: services.Redis
) -> None:
    federation = Federation(tmp_path, empty_rabbitmq_url, redis_server.url)
    try:
        federation.start(1)
        federation.run(JOB)
        federation.server.stop()

        federation.server.start(LORABBIT_REPLICATED_QUEUES="true")

        assert federation.server.wait(60) == 1
        said = federation.server.tail()
        assert "inequivalent arg 'x-queue-type' for queue 'lorabbit." in said
        assert "Traceback" not in said
    finally:
        federation.close()

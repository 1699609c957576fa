"""A client that still works for a job that is over, or that nobody knows, is told to drop it."""

from __future__ import annotations

import pytest
from server_rig import Rig

from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import CancelTask, TaskAccepted, TaskProgress


@pytest.fixture
def client(tmp_path):
    """A client of a server whose one job has ended."""
    rig = Rig(tmp_path)
    rig.run(JobSpec(name="over", clients=2, rounds=1))
    rig.clients[0].received.clear()
    return rig.clients[0]


def say(client, message):
    """Send a message and let everything happen; what the client was answered."""
    client.send(message)
    client.broker.run_until_idle()
    return client.received


@pytest.mark.parametrize("job", ["over", "never-heard-of"])
def test_a_client_that_accepts_a_task_of_a_job_that_is_not_running_is_told_to_drop_it(client, job):
    about = {"job": job, "task": f"{job}.train.1.client-1", "client": client.client}

    answers = say(client, TaskAccepted(**about))

    assert answers == [CancelTask(**about)]


def test_progress_of_a_job_that_is_over_is_not_answered(client):
    about = {"job": "over", "task": "over.train.1.client-1", "client": client.client}

    assert say(client, TaskProgress(**about, fraction=0.5)) == []

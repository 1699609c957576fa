"""Shares of work and clients that join later, through a whole server: what is folded, told, and made again."""

from __future__ import annotations

import numpy as np
import pytest
from scripted_client import ScriptedClient
from server_rig import Rig

from lorabbit.job.schedules import Buffered, Quorum
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Offer
from lorabbit.tensors import serialization
from lorabbit.types import ADAPTER, TRAIN
from lorabbit_cli.local.replay import replay

KEEP = {"keep_updates": True}


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, clients=2)
    yield rig
    if rig.service is not None:
        rig.service.close()


def timed(rig, index, *, seconds_a_step, change):
    """Let a client train ten steps, or its share of them, and take its time; every step changes all values alike."""
    client = rig.clients[index]
    otherwise = client.finish

    def answer(task):
        steps = round(10 * task.share)
        received = serialization.read_tensors(client.store.path(task.payloads[ADAPTER].sha256))
        moved = {name: value + np.float32(steps * change) for name, value in received.items()}
        metrics = Metrics(num_examples=10, loss=0.5, steps=steps, seconds=steps * seconds_a_step)
        ref = client.store.add_tensors(moved, chunk_bytes=1024)
        offer = Offer(**client.about(task), payload=ref, metrics=metrics, base_sha256=client.base_sha256)
        client.offers[task.task] = offer
        client.send(offer)

    def finish(task):
        if task.phase != TRAIN:
            otherwise(task)
            return
        rig.broker.after(10 * task.share * seconds_a_step, lambda: answer(task))

    client.finish = finish


@pytest.mark.parametrize(("weighting", "second"), [("normalised", 0.0), ("examples", 3.0)])
def test_a_slow_client_does_fewer_steps_in_time_and_its_change_counts_as_the_job_says(rig, weighting, second):
    timed(rig, 0, seconds_a_step=0.5, change=1)
    timed(rig, 1, seconds_a_step=2.0, change=-1)
    spec = JobSpec(
        name="job",
        clients=2,
        rounds=2,
        schedule=Quorum(quorum=1.0, over_select=1.0, deadline_seconds=60),
        work={"within_seconds": 9, "weighting": weighting},
        output=KEEP,
        evaluation={"every": 2, "on": "central"},
    )

    report = rig.run(spec)

    accepted = [e for e in rig.events if e.kind == "update-accepted" and e.phase == TRAIN]
    assert [(e.round, e.client, e.share) for e in sorted(accepted, key=lambda e: (e.round, e.client))] == [
        (1, "client-1", 1.0),
        (1, "client-2", 1.0),
        (2, "client-1", 1.0),
        (2, "client-2", 0.4),
    ]
    assert [r.seconds for r in report.rounds] == pytest.approx([20, 8], abs=1.0)
    # Round 1: ten steps each way. Round 2: ten steps up and four down; per step done they are equal.
    adapter = serialization.read_tensors(rig.runs("job") / "adapter" / "adapter_model.safetensors")
    assert np.allclose(adapter["a"], second, atol=1e-5)
    assert [version.is_same for version in replay(rig.runs("job"))] == [True, True]


@pytest.mark.parametrize("schedule", ["sync", Buffered(buffer=2)])
def test_a_client_that_joins_a_running_job_counts_scores_and_is_made_again(rig, schedule):
    late = ScriptedClient(rig.broker, "host-9", rig.folder / "clients")
    rig.clients.append(late)

    def start(_client, task):
        if task.phase == TRAIN and task.round == 2 and late.client is None:
            late.start()
        return False

    rig.clients[0].work = start
    rig.serve()
    for client in rig.clients[:2]:
        client.start()
    spec = JobSpec(name="job", clients=2, rounds=4, schedule=schedule, output=KEEP, data={"partition": {"kind": "own"}})

    rig.run_to_end(rig.service.submit(spec))

    report = rig.report("job")
    assert (report.status, report.clients) == ("done", ["client-1", "client-2", "client-3"])
    assert any(c.client == "client-3" and c.num_examples for r in report.rounds for c in r.per_client)
    assert [version.is_same for version in replay(rig.runs("job"))] == [True] * 4

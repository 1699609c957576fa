"""The server is killed before and after every single effect it has on the world, and the job ends the same.

An effect is a commit, a mark in the queue, a message sent, acknowledged or rejected, a queue declared or
deleted, an identity given. Whatever was in memory is lost; what was not acknowledged comes again.
"""

from __future__ import annotations

import json

import pytest
from server_rig import Fuse, Rig

from lorabbit.job.spec import JobSpec

SPEC = JobSpec(name="job", clients=2, rounds=2, seed=7)


def play(rig, fuse):
    """Run the job; when the server dies, start another on what it left. Returns the number of effects."""
    rig.serve(fuse)
    rig.start_clients()
    job = rig.service.submit(SPEC)
    rig.run_to_end_over_death(job)
    return fuse.count


def outcome(rig):
    """What must be the same in every run: the result, and what counted."""
    report = rig.report("job")
    rounds = [
        (
            r.round,
            r.cohort,
            r.accepted,
            r.rejected,
            r.sha256,
            r.metrics,
            r.train_loss,
            [c.num_examples for c in r.per_client],
        )
        for r in report.rounds
    ]
    lines = (rig.runs("job") / "rounds.jsonl").read_text().splitlines()
    folder = {
        str(path.relative_to(rig.runs("job"))): path.read_bytes() for path in rig.runs("job").rglob("*.safetensors")
    }
    accepted = [e for e in rig.store.events("job", progress=False) if '"update-accepted"' in e.event]
    return {
        "status": (report.status, report.final, report.best, report.adapter, report.base),
        "rounds": rounds,
        "lines": [json.loads(line)["sha256"] for line in lines],
        "folder": folder,
        "counted": len(accepted),
        "left": (
            sorted(rig.service.payloads.folder.iterdir()),
            rig.store.outbox("job"),
            rig.store.jobs()["job"].status,
        ),
        "streams": sorted(name for name in rig.broker._queues if "adapter" in name),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    rig = Rig(tmp_path_factory.mktemp("undisturbed"))
    count = play(rig, Fuse())
    result = outcome(rig)
    rig.service.close()
    return count, result


def test_the_undisturbed_job_is_what_paper_says(undisturbed):
    _, result = undisturbed

    assert result["status"][0] == "done"
    assert result["counted"] == 1 + 2 * 2 + 2 * 2
    assert result["left"] == ([], [], "done")
    assert result["streams"] == []


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("part", range(4))
def test_a_server_killed_at_any_effect_changes_nothing(undisturbed, tmp_path, after, part):
    count, expected = undisturbed

    for at in range(1 + part, count + 1, 4):
        rig = Rig(tmp_path / str(at))
        play(rig, Fuse(at, after=after))
        result = outcome(rig)
        rig.service.close()

        assert result == expected, f"killed {'after' if after else 'before'} effect {at} of {count}"

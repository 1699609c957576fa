"""Jobs whose tensors travel coded: the same adapter embedded and over services, whoever is killed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import tiered
from mortal_rig import Fate, Moment, MortalRig
from server_rig import Rig

from lorabbit.job.spec import JobSpec
from lorabbit_cli.local.dry_run import dry_run
from lorabbit_cli.local.embedded_run import ComputeOptions, run_local
from lorabbit_cli.local.replay import replay
from lorabbit_client.executor import Executor

TRANSPORTS = {
    "int8": {"up": {"codec": "int8"}, "down": {"codec": "int8"}},
    "int4 with feedback": {"up": {"codec": "int4", "feedback": True}, "down": {"codec": "bf16"}},
    "top-k": {"up": {"codec": "top-k", "share": 0.1}, "down": {"delta": True, "zstd": True}},
    "lossless": {"up": {"delta": True, "zstd": True}, "down": {"zstd": True}},
}


def spec(transport, **more):
    given = {
        "name": "job", "clients": 2, "rounds": 3, "seed": 7, "model": {"name": "null:4KB"}, "transport": transport,
    }  # fmt: skip
    return JobSpec.model_validate({**given, **more}, strict=False)


def played(folder, job, *, fate=None, moment=None):
    rig = MortalRig(folder, job, Executor(threads=1), fate)
    report = rig.play(moment)
    left = list(rig.service.payloads.folder.iterdir())
    rig.service.close()
    return rig, report, left


def what_counts(report):
    return [
        (r.round, r.accepted, r.rejected, r.sha256, r.metrics, [c.coding for c in r.per_client]) for r in report.rounds
    ]


def traffic(report):
    return [(r.bytes_up, r.bytes_down) for r in report.rounds]


@pytest.mark.parametrize("name", tiered(TRANSPORTS, fast=["top-k"], slow=["int8"]))
def test_a_coded_job_gives_the_same_adapter_and_bytes_embedded_and_over_services(tmp_path: Path, name: str):
    job = spec(TRANSPORTS[name], output={"keep_updates": True})

    embedded = run_local(job, tmp_path / "out", compute=ComputeOptions())
    _, report, left = played(tmp_path / "services", job)

    assert report.status == "done"
    assert what_counts(report) == what_counts(embedded.report)
    assert traffic(report) == traffic(embedded.report)
    assert {c.coding for r in report.rounds for c in r.per_client} == {job.transport.uploads.word}
    assert left == []
    assert [each.is_same for each in replay(embedded.folder)] == [True] * 3


@pytest.mark.parametrize("name", tiered(TRANSPORTS, slow=["int4 with feedback", "top-k"]))
@pytest.mark.parametrize("after_writing", [False, True], ids=["while it trains", "once its state is written"])
def test_a_client_killed_with_its_unsent_changes_sends_the_same_bytes_again(tmp_path, name, after_writing):
    job = spec(TRANSPORTS[name])
    _, undisturbed, _ = played(tmp_path / "whole", job)

    rig, report, left = played(tmp_path / "cut", job, fate=Fate("host-2", 2, "train", after_writing))

    assert rig.deaths == 1
    assert what_counts(report) == what_counts(undisturbed)
    assert [r.bytes_up for r in report.rounds] == [r.bytes_up for r in undisturbed.rounds]
    assert left == []


@pytest.mark.parametrize("name", tiered(TRANSPORTS, slow=["int4 with feedback"]))
@pytest.mark.parametrize(
    "moment",
    [
        Moment("round-started", round=2, effects=3),
        Moment("update-accepted", round=2, phase="train", effects=1),
        Moment("round-closed", round=2, effects=2),
    ],
    ids=lambda moment: moment.kind,
)
def test_a_server_killed_between_coded_updates_makes_the_same_versions(tmp_path, name, moment):
    job = spec(TRANSPORTS[name])
    _, undisturbed, _ = played(tmp_path / "whole", job)

    rig, report, left = played(tmp_path / "cut", job, moment=moment)

    assert rig.deaths == 1
    assert what_counts(report) == what_counts(undisturbed)
    assert left == []


def test_a_client_that_knows_no_coding_is_served_without_and_the_report_says_so(tmp_path):
    rig = Rig(tmp_path)
    job = JobSpec.model_validate(
        {"name": "job", "clients": 2, "rounds": 2, "transport": TRANSPORTS["int8"]}, strict=False
    )

    report = rig.run(job)

    rig.service.close()
    assert report.status == "done"
    assert {c.coding for r in report.rounds for c in r.per_client} == {"fp32"}
    assert all(task.ways == {} for client in rig.clients for task in client.tasks)


def test_a_client_that_lost_what_a_difference_is_to_reads_the_whole(tmp_path):
    class Forgetful(Executor):
        """Deletes every payload before its second training, as a new disk would."""

        def execute(self, work, on_progress):
            outcome = super().execute(work, on_progress)
            if work.task.phase == "train" and work.task.round == 1 and work.task.index == 1:
                for path in work.inputs.values():
                    path.unlink()
            return outcome

    job = spec({"down": {"delta": True, "zstd": True}}, evaluation={"every": 3})
    _, undisturbed, _ = played(tmp_path / "whole", job)
    rig = MortalRig(tmp_path / "lost", job, Forgetful(threads=1))

    report = rig.play()

    rig.service.close()
    assert what_counts(report) == what_counts(undisturbed)
    lost, kept = ({c.client: c.bytes_down for c in each.rounds[1].per_client} for each in (report, undisturbed))
    assert lost["client-1"] == kept["client-1"]
    assert lost["client-2"] == report.adapter.bytes > kept["client-2"]


def test_a_client_keeps_no_file_that_no_task_will_name_again(tmp_path):
    rig, _, _ = played(tmp_path, spec(TRANSPORTS["top-k"]))

    for number in (1, 2):
        folder = rig.folder / "clients" / f"host-{number}" / "payloads"
        assert (
            len(list(folder.iterdir())) <= 4
        )  # the adapter of the last training, the scored one, what it was made of and one they are to


@pytest.mark.parametrize("name", ["int8", "int4 with feedback"])
def test_the_forecast_of_a_coded_job_is_to_the_byte_what_it_then_moves(tmp_path: Path, name: str):
    job = spec(TRANSPORTS[name])

    told = dry_run(job, ComputeOptions())
    ended = run_local(job, tmp_path, compute=ComputeOptions())

    assert [r.bytes_up for r in ended.report.rounds] == [told.round_bytes_up] * 3
    assert ended.report.rounds[1].bytes_down == told.round_bytes_down


def test_a_compressed_job_never_moves_more_than_its_forecast(tmp_path: Path):
    job = spec(TRANSPORTS["lossless"])

    told = dry_run(job, ComputeOptions())
    ended = run_local(job, tmp_path, compute=ComputeOptions())

    assert all(0 < r.bytes_up <= told.round_bytes_up for r in ended.report.rounds)
    assert 0 < ended.report.rounds[1].bytes_down <= told.round_bytes_down

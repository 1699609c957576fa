"""Files and streams of payloads go once no task needs them, while the job goes on."""

from __future__ import annotations

from server_rig import Rig

from lorabbit.job.spec import JobSpec
from lorabbit.types import TRAIN


def test_files_that_the_job_no_longer_needs_are_deleted_while_it_runs(tmp_path):
    rig = Rig(tmp_path)
    for client in rig.clients:
        client.work = lambda _client, task: (task.phase, task.round) == (TRAIN, 3)
    rig.serve()
    rig.start_clients()
    rig.service.submit(JobSpec(name="job", clients=2, rounds=3))
    rig.pass_seconds(5.0)

    needed = rig.service._run.state.payloads
    files = rig.service._context.payloads.folder.iterdir()

    assert rig.service._run.state.round == 3
    assert {path.name.partition(".")[0] for path in files} == needed

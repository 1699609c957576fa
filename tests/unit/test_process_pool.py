import faulthandler
import hashlib
import os
import queue
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from family import Family

from lorabbit.errors import BadInput, RunFailed
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Task
from lorabbit_client.execution.interface import OnProgress, TaskInput, TaskResult
from lorabbit_client.execution.process_pool import ForkRunner

PATIENCE = 20.0


class Scripted:
    """An executor that does what the task's phase says."""

    def __init__(self) -> None:
        self.loaded = ""

    def preload(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        if spec.name == "unknown-model":
            raise BadInput("model.name: there is no model 'x'")
        if spec.name == "defect":
            raise ZeroDivisionError("1 / 0")
        self.loaded = f"{spec.name} for {list(indices)} of {population}"

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        phase = work.task.phase
        if phase == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if phase == "crash":
            faulthandler.disable()  # pytest's traceback of the crash would only be noise
            os.kill(os.getpid(), signal.SIGSEGV)
        if phase == "exit":
            os._exit(3)
        if phase == "forever":
            (work.private / "started").touch()
            while True:
                time.sleep(0.02)
                on_progress(0.5, 0.25)
        if phase == "late":
            while not (work.private / "go").exists():
                time.sleep(0.02)
        if phase in {"write", "late"}:
            work.output.write_bytes(b"tensors")
        details = {"loaded": self.loaded, "pid": str(os.getpid())}
        return TaskResult(
            Metrics(num_examples=work.task.index), has_tensors=phase in {"write", "late"}, details=details
        )


class Answers:
    """Collects what a runner calls back."""

    def __init__(self) -> None:
        self.outcomes: queue.Queue[TaskResult] = queue.Queue()
        self.progress: queue.Queue[tuple[float, float | None]] = queue.Queue()

    def submit(self, runner: ForkRunner, work: TaskInput) -> None:
        runner.submit(work, lambda fraction, loss: self.progress.put((fraction, loss)), self.outcomes.put)

    def next(self) -> TaskResult:
        return self.outcomes.get(timeout=PATIENCE)


def work_of(tmp_path: Path, *, task: str = "t-1", client: str = "client-1", phase: str = "report") -> TaskInput:
    spec = JobSpec()
    wire = Task(
        job="job", task=task, client=client, index=int(client.removeprefix("client-")), population=4, round=1,
        attempt=1, epoch=1, phase=phase, seed=0, payloads={}, settings={}, spec=spec,
    )  # fmt: skip
    return TaskInput(wire, {}, tmp_path / f"{task}.safetensors", tmp_path, tmp_path / "privacy.json")


@pytest.fixture
def runner() -> Iterator[ForkRunner]:
    runner = ForkRunner(Scripted(), workers=2)
    runner.preload(JobSpec(name="shared"), 4, range(4))
    yield runner
    runner.close()


def test_workers_share_what_was_loaded_before_the_fork(runner: ForkRunner, tmp_path: Path) -> None:
    answers = Answers()

    answers.submit(runner, work_of(tmp_path))

    outcome = answers.next()
    assert outcome.details["loaded"] == "shared for [0, 1, 2, 3] of 4"
    assert int(outcome.details["pid"]) != os.getpid()


def test_a_result_carries_the_sha256_of_its_file(runner: ForkRunner, tmp_path: Path) -> None:
    answers = Answers()

    answers.submit(runner, work_of(tmp_path, phase="write"))

    assert answers.next().sha256 == hashlib.sha256(b"tensors").hexdigest()


@pytest.mark.parametrize(("phase", "said"), [("die", "memory ran out"), ("crash", "SIGSEGV"), ("exit", "exit code 3")])
def test_a_worker_that_dies_fails_its_task_and_is_replaced(
    runner: ForkRunner, tmp_path: Path, phase: str, said: str
) -> None:
    answers = Answers()

    answers.submit(runner, work_of(tmp_path, phase=phase))
    error = answers.next().error
    for number in range(2, 6):
        answers.submit(runner, work_of(tmp_path, task=f"t-{number}", client=f"client-{number}"))
    after = [answers.next() for _ in range(4)]

    assert error is not None
    assert said in error
    assert [outcome.error for outcome in after] == [None] * 4


def test_work_of_one_client_is_done_in_the_order_submitted(runner: ForkRunner, tmp_path: Path) -> None:
    answers = Answers()
    finished: list[str] = []

    for number in range(20):
        work = work_of(tmp_path, task=f"t-{number}")

        def done(outcome: TaskResult, name: str = work.task.task) -> None:
            finished.append(name)
            answers.outcomes.put(outcome)

        runner.submit(work, lambda *_: None, done)
    for _ in range(20):
        answers.next()

    assert finished == [f"t-{number}" for number in range(20)]


def test_a_cancelled_task_stops_and_its_worker_works_on(runner: ForkRunner, tmp_path: Path) -> None:
    answers, after = Answers(), Answers()
    for number in (1, 2):
        answers.submit(runner, work_of(tmp_path, task=f"t-{number}", client=f"client-{number}", phase="forever"))
        assert answers.progress.get(timeout=PATIENCE) == (0.5, 0.25)

    after.submit(runner, work_of(tmp_path, task="t-3", client="client-3"))
    runner.cancel("t-1")

    assert after.next().error is None
    assert answers.outcomes.empty()


def test_a_task_that_is_cancelled_while_it_writes_leaves_no_result(runner: ForkRunner, tmp_path: Path) -> None:
    answers, after = Answers(), Answers()
    after.submit(runner, work_of(tmp_path, task="t-0"))
    assert after.next().error is None, "a worker is there, and has nothing to do"
    answers.submit(runner, work_of(tmp_path, task="t-1", phase="late"))

    runner.cancel("t-1")
    (tmp_path / "go").touch()
    after.submit(runner, work_of(tmp_path, task="t-2", phase="write"))

    assert after.next().error is None
    assert answers.outcomes.empty()
    assert {path.name for path in tmp_path.iterdir()} == {"go", "t-2.safetensors"}


def test_queued_work_can_be_cancelled(runner: ForkRunner, tmp_path: Path) -> None:
    answers, after = Answers(), Answers()
    answers.submit(runner, work_of(tmp_path, task="t-1", phase="forever"))
    answers.submit(runner, work_of(tmp_path, task="t-2"))

    runner.cancel("t-2")
    runner.cancel("t-1")
    after.submit(runner, work_of(tmp_path, task="t-3"))

    assert after.next().error is None
    assert answers.outcomes.empty()


def test_closing_in_the_middle_of_work_leaves_no_process_behind(tmp_path: Path, family: Family) -> None:
    runner = ForkRunner(Scripted(), workers=2)
    runner.preload(JobSpec(), 4, range(4))
    answers = Answers()
    answers.submit(runner, work_of(tmp_path, phase="forever"))
    answers.progress.get(timeout=PATIENCE)
    workers = family.members()

    runner.close()

    assert len(workers) == 3
    assert family.members() == []
    assert not any(process.is_running() for process in workers)


def test_work_submitted_after_the_nursery_is_killed_fails_at_once(
    family: Family, runner: ForkRunner, tmp_path: Path
) -> None:
    answers = Answers()
    answers.submit(runner, work_of(tmp_path, phase="forever"))
    answers.progress.get(timeout=PATIENCE)
    fork_server = family.children()[0]

    fork_server.kill()
    running = answers.next()
    answers.submit(runner, work_of(tmp_path, task="t-2"))

    assert running.error is not None
    assert answers.next().error is not None


def test_what_the_user_got_wrong_is_raised_as_bad_input(family: Family) -> None:
    runner = ForkRunner(Scripted(), workers=1)

    with pytest.raises(BadInput, match="there is no model 'x'"):
        runner.preload(JobSpec(name="unknown-model"), 1, [0])

    assert family.members() == []


def test_a_defect_while_loading_is_a_failed_run() -> None:
    runner = ForkRunner(Scripted(), workers=1)

    with pytest.raises(RunFailed, match="ZeroDivisionError"):
        runner.preload(JobSpec(name="defect"), 1, [0])


def test_workers_do_not_hear_ctrl_c(family: Family, runner: ForkRunner, tmp_path: Path) -> None:
    answers = Answers()
    answers.submit(runner, work_of(tmp_path))
    answers.next()

    for process in family.members():
        process.send_signal(signal.SIGINT)
    answers.submit(runner, replace(work_of(tmp_path, task="t-2")))

    assert answers.next().error is None

import hashlib
import queue
import threading
from pathlib import Path

from lorabbit.jobspec import JobSpec
from lorabbit.messages import Metrics, Task
from lorabbit_client.execution import OnProgress, Outcome, Work
from lorabbit_client.runners import InlineRunner, ThreadRunner

PATIENCE = 20.0


class Gated:
    """An executor whose tasks wait at a gate, then report progress, then write."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started: queue.Queue[str] = queue.Queue()
        self.threads: set[str] = set()

    def execute(self, work: Work, on_progress: OnProgress) -> Outcome:
        self.threads.add(threading.current_thread().name)
        self.started.put(work.task.task)
        assert self.gate.wait(PATIENCE)
        on_progress(0.5, 1.0)
        work.output.write_bytes(b"tensors")
        return Outcome(Metrics(num_examples=1), has_tensors=True)


class Endless:
    """An executor whose tasks report progress for ever."""

    def __init__(self) -> None:
        self.started = threading.Event()

    def execute(self, work: Work, on_progress: OnProgress) -> Outcome:  # noqa: ARG002 - no work is ever done
        while True:
            self.started.set()
            on_progress(0.5, 1.0)


def work_of(folder: Path, task: str) -> Work:
    wire = Task(
        job="job",
        task=task,
        client="client-1",
        index=0,
        population=1,
        round=1,
        attempt=1,
        epoch=1,
        phase="train",
        seed=0,
        payloads={},
        settings={},
        spec=JobSpec(),
    )
    return Work(wire, {}, folder / task, folder)


def test_a_thread_runner_executes_in_order_in_one_thread_of_its_own(tmp_path: Path) -> None:
    executor = Gated()
    executor.gate.set()
    runner = ThreadRunner(executor)
    finished: queue.Queue[str] = queue.Queue()

    for task in ("a", "b", "c"):
        runner.submit(work_of(tmp_path, task), lambda *_: None, lambda _, task=task: finished.put(task))
    order = [finished.get(timeout=PATIENCE) for _ in range(3)]
    runner.close()

    assert order == ["a", "b", "c"]
    assert executor.threads == {"training"}


def test_a_result_is_sealed_with_the_sha256_of_its_file(tmp_path: Path) -> None:
    executor = Gated()
    executor.gate.set()
    outcomes: list[Outcome] = []

    InlineRunner(executor).submit(work_of(tmp_path, "a"), lambda *_: None, outcomes.append)

    assert outcomes[0].sha256 == hashlib.sha256(b"tensors").hexdigest()


def test_a_cancelled_task_ends_at_its_next_progress_and_says_nothing(tmp_path: Path) -> None:
    executor = Gated()
    runner = ThreadRunner(executor)
    finished: queue.Queue[str] = queue.Queue()
    for task in ("running", "queued", "last"):
        runner.submit(work_of(tmp_path, task), lambda *_: None, lambda _, task=task: finished.put(task))
    executor.started.get(timeout=PATIENCE)

    runner.cancel("running")
    runner.cancel("queued")
    executor.gate.set()
    first = finished.get(timeout=PATIENCE)
    runner.close()

    assert first == "last"
    assert finished.empty()
    assert not (tmp_path / "running").exists()


def test_closing_stops_what_runs_and_ends_the_thread(tmp_path: Path) -> None:
    executor = Endless()
    runner = ThreadRunner(executor)
    finished: queue.Queue[str] = queue.Queue()
    runner.submit(work_of(tmp_path, "a"), lambda *_: None, lambda _: finished.put("a"))
    assert executor.started.wait(PATIENCE)

    runner.close()

    assert finished.empty()
    assert "training" not in {thread.name for thread in threading.enumerate()}

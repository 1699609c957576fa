import hashlib
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Task
from lorabbit_client.execution.failures import OUT_OF_MEMORY
from lorabbit_client.execution.interface import OnProgress, TaskInput, TaskResult
from lorabbit_client.execution.runners import InlineRunner, ThreadRunner

PATIENCE = 20.0


class Gated:
    """An executor whose tasks wait at a gate, then report progress, then write."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started: queue.Queue[str] = queue.Queue()
        self.threads: set[str] = set()

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        self.threads.add(threading.current_thread().name)
        self.started.put(work.task.task)
        assert self.gate.wait(PATIENCE)
        on_progress(0.5, 1.0)
        work.output.write_bytes(b"tensors")
        return TaskResult(Metrics(num_examples=1), has_tensors=True)


class Late:
    """An executor whose tasks report progress, then wait at a gate, then write."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.reported = threading.Event()

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        on_progress(1.0, 1.0)
        self.reported.set()
        assert self.gate.wait(PATIENCE)
        work.output.write_bytes(b"tensors")
        return TaskResult(Metrics(num_examples=1), has_tensors=True)


class Endless:
    """An executor whose tasks report progress for ever."""

    def __init__(self) -> None:
        self.started = threading.Event()

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:  # noqa: ARG002 - no work is ever done
        while True:
            self.started.set()
            on_progress(0.5, 1.0)


class Failing:
    """An executor that raises in one task, writes in another, and in a third says so without having written."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:  # noqa: ARG002 - it makes no progress
        if work.task.task == "raises":
            raise self.error
        if work.task.task == "writes":
            work.output.write_bytes(b"tensors")
        return TaskResult(Metrics(num_examples=1), has_tensors=True)


WITHOUT_MEMORY = """
import resource, sys, threading
from pathlib import Path
from unit.test_runners import Gated, work_of
from lorabbit_client.execution.runners import ThreadRunner

threading.stack_size(256 * 2**20)
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
executor, outcomes, folder = Gated(), [], Path(sys.argv[1])
executor.gate.set()
runner = ThreadRunner(executor)
resource.setrlimit(resource.RLIMIT_AS, (mapped + 64 * 2**20, resource.RLIM_INFINITY))
runner.submit(work_of(folder, "short"), lambda *_: None, outcomes.append)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
done = threading.Event()
runner.submit(work_of(folder, "again"), lambda *_: None, lambda outcome: (outcomes.append(outcome), done.set()))
assert done.wait(20)
for outcome in outcomes:
    print(outcome.error)
"""


def work_of(folder: Path, task: str) -> TaskInput:
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
    return TaskInput(wire, {}, folder / task, folder, folder / "privacy.json")


def submit(runner: ThreadRunner, folder: Path, *tasks: str) -> "queue.Queue[str]":
    """Submit tasks; the queue gets the name of each one that is said to be done."""
    finished: queue.Queue[str] = queue.Queue()
    for task in tasks:
        runner.submit(work_of(folder, task), lambda *_: None, lambda _, task=task: finished.put(task))
    return finished


def test_a_thread_runner_executes_in_order_in_one_thread_of_its_own(tmp_path: Path) -> None:
    executor = Gated()
    executor.gate.set()
    runner = ThreadRunner(executor)

    finished = submit(runner, tmp_path, "a", "b", "c")
    order = [finished.get(timeout=PATIENCE) for _ in range(3)]
    runner.close()

    assert order == ["a", "b", "c"]
    assert executor.threads == {"training"}


def test_a_result_is_sealed_with_the_sha256_of_its_file(tmp_path: Path) -> None:
    executor = Gated()
    executor.gate.set()
    outcomes: list[TaskResult] = []

    InlineRunner(executor).submit(work_of(tmp_path, "a"), lambda *_: None, outcomes.append)

    assert outcomes[0].sha256 == hashlib.sha256(b"tensors").hexdigest()


def test_a_cancelled_task_ends_at_its_next_progress_and_says_nothing(tmp_path: Path) -> None:
    executor = Gated()
    runner = ThreadRunner(executor)
    finished = submit(runner, tmp_path, "running", "queued", "last")
    executor.started.get(timeout=PATIENCE)

    runner.cancel("running")
    runner.cancel("queued")
    executor.gate.set()
    first = finished.get(timeout=PATIENCE)
    runner.close()

    assert first == "last"
    assert finished.empty()
    assert not (tmp_path / "running").exists()


def test_a_task_that_is_cancelled_while_it_writes_leaves_no_result(tmp_path: Path) -> None:
    executor = Late()
    runner = ThreadRunner(executor)
    cancelled = submit(runner, tmp_path, "writing")
    assert executor.reported.wait(PATIENCE)

    runner.cancel("writing")
    executor.gate.set()
    submit(runner, tmp_path, "next").get(timeout=PATIENCE)
    runner.close()

    assert cancelled.empty()
    assert [path.name for path in tmp_path.iterdir()] == ["next"]


def test_closing_stops_what_runs_and_ends_the_thread(tmp_path: Path) -> None:
    executor = Endless()
    runner = ThreadRunner(executor)
    finished = submit(runner, tmp_path, "a")
    assert executor.started.wait(PATIENCE)

    runner.close()

    assert finished.empty()
    assert "training" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_fails_the_task_in_one_sentence_and_the_next_one_runs(
    tmp_path: Path, error: Exception
) -> None:
    runner = ThreadRunner(Failing(error))
    finished: queue.Queue[TaskResult] = queue.Queue()

    for task in ("raises", "writes"):
        runner.submit(work_of(tmp_path, task), lambda *_: None, finished.put)
    first, second = (finished.get(timeout=PATIENCE) for _ in range(2))
    runner.close()

    assert first.error == f"{OUT_OF_MEMORY} ({type(error).__name__} in phase 'train')"
    assert second.error is None


def test_a_result_that_cannot_be_sealed_fails_its_task_and_the_next_one_runs(tmp_path: Path) -> None:
    runner = ThreadRunner(Failing(MemoryError()))
    finished: queue.Queue[TaskResult] = queue.Queue()

    for task in ("writes-nothing", "writes"):
        runner.submit(work_of(tmp_path, task), lambda *_: None, finished.put)
    first, second = (finished.get(timeout=PATIENCE) for _ in range(2))
    runner.close()

    assert "FileNotFoundError in phase 'train'" in str(first.error)
    assert second.error is None


def test_a_task_whose_thread_cannot_be_started_fails_and_the_next_one_starts_it(tmp_path: Path) -> None:
    done = subprocess.run(  # noqa: S603 - the interpreter of the test run, by path
        [sys.executable, "-c", WITHOUT_MEMORY, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )

    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{OUT_OF_MEMORY} (RuntimeError in phase 'train')", "None"]

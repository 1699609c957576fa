"""Embedded run: a whole federation in one process, over the drivers in memory.

The server and every client are the ones that a deployment runs; only broker and store are in
memory, no client sends heartbeats, and nothing is forced to the disk: a run that dies is started
again. Training runs in processes that share one base model, forked before this process has a
thread, and everything else on one loop thread, which is the caller's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lorabbit.broker.memory import MemoryBroker
from lorabbit.config.settings import ClientSettings, ServerSettings
from lorabbit.errors import BadInput, RunFailed
from lorabbit.events.job_events import AnyEvent, JobEnded
from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit.state.redis import RedisStateStore
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit_client.agent.agent import Agent
from lorabbit_client.agent.payload_cache import PayloadCache
from lorabbit_client.execution.interface import Runner
from lorabbit_client.execution.null_workspace import is_null
from lorabbit_client.execution.process_pool import ForkRunner
from lorabbit_client.execution.runners import InlineRunner, ThreadRunner
from lorabbit_client.executor import Executor
from lorabbit_server.server import Server

OWNER = "local"
FOREVER_SECONDS = 1e8
PAYLOADS_KEPT = 8
NVIDIA_DEVICE = Path("/dev/nvidiactl")
"""Where Linux shows that there is an NVIDIA driver: asking torch would load it into this process."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a local run ended."""

    folder: Path
    report: Report
    exit_code: int


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """With what a local run trains; a result depends on none of it (on one kind of device)."""

    device: str = "auto"
    threads: int = 1
    data_root: Path = Path()
    workers: int | None = None
    """Training processes; one for each processor when None."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Who is told how a local run goes."""

    on_loading: Callable[[], None] = lambda: None
    """Before model and data are loaded."""
    on_ready: Callable[[], None] = lambda: None
    """Once they are, and threads may be started."""
    on_event: Callable[[AnyEvent], None] = lambda _: None


def run_local(spec: JobSpec, out: Path, *, compute: ComputeOptions, callbacks: Callbacks | None = None) -> RunResult:
    """Run a job; its folder is made in `out`. Raises LoRAbbitError when it cannot begin."""
    callbacks = callbacks or Callbacks()
    with contextlib.ExitStack() as stack:
        try:
            if not out.exists():
                out.mkdir(parents=True)
                stack.callback(_remove_if_empty, out)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out, prefix=".run-")))
        except OSError as error:
            raise BadInput(f"{out} cannot be written: {error.strerror}; name another folder with --out") from error
        callbacks.on_loading()
        runner = open_runner(spec, compute)
        stack.callback(runner.close)
        callbacks.on_ready()
        federation = _EmbeddedFederation(spec, out, scratch, runner, callbacks.on_event)
        stack.callback(federation.close)
        with _interrupts(federation.cancel):
            return federation.run()


def _remove_if_empty(folder: Path) -> None:
    """Take back a folder in which nothing came to be."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def open_runner(spec: JobSpec, compute: ComputeOptions) -> Runner:
    """Choose where clients train, and load the job there: at once, in forked processes, or in a thread."""
    executor = Executor(threads=compute.threads, data_root=compute.data_root, device=compute.device)
    if is_null(spec.model.name):
        return InlineRunner(executor)
    if not can_fork(compute.device):
        executor.preload(spec, spec.clients, range(spec.clients))
        return ThreadRunner(executor, durable=False)
    workers = compute.workers or len(os.sched_getaffinity(0))
    runner = ForkRunner(executor, min(workers, spec.clients))
    try:
        runner.preload(spec, spec.clients, range(spec.clients))
    except BaseException:
        runner.close()
        raise
    return runner


def can_fork(device: str) -> bool:
    """Tell whether training can be spread over forked processes: on Linux, and not on a GPU."""
    if device == "auto":
        device = "cuda" if NVIDIA_DEVICE.exists() else "cpu"
    return sys.platform == "linux" and device == "cpu"


class _EmbeddedFederation:
    """One server and its clients on one loop."""

    def __init__(
        self, spec: JobSpec, out: Path, scratch: Path, runner: Runner, on_event: Callable[[AnyEvent], None]
    ) -> None:
        """Make everybody; nothing happens before `run`."""
        self._spec, self._out = spec, out
        self._on_event = on_event
        self._ended: JobEnded | None = None
        self._job = ""
        (scratch / "server").mkdir()
        (scratch / "server" / "runs").symlink_to(out.resolve(), target_is_directory=True)
        self._broker = MemoryBroker()
        self._store = RedisStateStore.embedded()
        settings = ServerSettings(
            folder=scratch / "server",
            durable=False,
            lease_seconds=FOREVER_SECONDS,
            client_lease_seconds=FOREVER_SECONDS,
        )
        self._service = Server(self._broker, self._store, settings, owner=OWNER)
        self._service.listen(self._receive)
        self._service.on_job_ended(lambda _: self._broker.stop())
        cache = PayloadCache(self._broker, PayloadStore(scratch / "payloads", durable=False), keep=PAYLOADS_KEPT)
        self._agents = [
            Agent(self._broker, runner, _client_settings(scratch, number), cache=cache, embedded=True)
            for number in range(1, spec.clients + 1)
        ]

    def run(self) -> RunResult:
        """Run the job to its end, on this thread."""
        self._service.start()
        self._job = self._service.submit(self._spec)
        for agent in self._agents:
            self._broker.post(agent.start)
        self._broker.run()
        folder = self._out / self._job
        if self._ended is None:
            raise RunFailed(f"the loop ended before the job did; what there is of it lies in {folder}")
        report = Report.model_validate_json((folder / "report.json").read_bytes())
        return RunResult(folder, report, self._ended.exit_code)

    def cancel(self) -> None:
        """End the job soon; callable from a signal handler."""
        self._broker.post(self._cancel_now)

    def _cancel_now(self) -> None:
        self._service.cancel(self._job)

    def close(self) -> None:
        """Let everything go."""
        self._service.close()
        self._broker.close()
        self._store.close()

    def _receive(self, job: str, event: AnyEvent) -> None:
        if isinstance(event, JobEnded) and job == self._job:
            self._ended = event
        self._on_event(event)


def _client_settings(scratch: Path, number: int) -> ClientSettings:
    """Settings of one client, which the environment has no say in."""
    name = f"client-{number}"
    return ClientSettings.model_construct(
        folder=scratch / "clients" / name, address=name, client=name, device="cpu", tags=()
    )


@contextlib.contextmanager
def _interrupts(cancel: Callable[[], None]) -> Iterator[None]:
    """Turn the first Ctrl-C into a cancellation; a second one ends the process as usual."""

    def first(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cancel()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

"""A server and scripted clients on one loop with a clock of the test's own, and ways to kill the server.

`Fuse` stands between the service and the world (store, broker): after so many effects the process
"dies" in the middle of a callback, before or after the effect. What it had in memory is gone; what
it had not acknowledged comes again, as a broker does.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from scripted_client import ScriptedClient

from lorabbit.broker.memory import MemoryBroker
from lorabbit.config.settings import ServerSettings
from lorabbit.events.job_events import AnyEvent
from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit.state.redis import RedisStateStore
from lorabbit_server.context import ServerOverrides
from lorabbit_server.server import Server


class Died(BaseException):
    """The server was killed here."""


class AtOnce(Executor):
    """Does work where it is asked for."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Paused(AtOnce):
    """Does work where it is asked for, or once it is told to go on: a process that was put to sleep."""

    def __init__(self) -> None:
        self.sleeps = False
        self._asleep: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self.sleeps:
            return super().submit(fn, *args, **kwargs)
        self._asleep.append(lambda: fn(*args, **kwargs))
        return Future()

    def wake(self) -> None:
        self.sleeps = False
        for each in self._asleep:
            each()


EFFECTS = frozenset({"commit", "mark_job", "send", "ack", "reject", "declare_queue", "delete_queue", "lease_identity"})


class Fuse:
    """Counts effects and dies at the given one."""

    def __init__(self, at: int | None = None, *, after: bool = False) -> None:
        self.at, self.after, self.count = at, after, 0

    def wrap(self, target: Any) -> Any:
        fuse = self

        class Fragile:
            def __getattr__(self, name: str) -> Any:
                value = getattr(target, name)
                return fuse.effect(value) if name in EFFECTS else value

        return Fragile()

    def effect(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def effect(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at and not self.after:
                raise Died
            result = function(*args, **kwargs)
            if self.count == self.at:
                raise Died
            return result

        return effect


class Rig:
    """See the module's docstring."""

    def __init__(self, folder: Path, clients: int = 2, *, broker: type[MemoryBroker] = MemoryBroker) -> None:
        self.now = 1_000.0
        self.folder = folder
        self.broker = broker(clock=lambda: self.now)
        self.store = RedisStateStore.embedded()
        self.events: list[AnyEvent] = []
        self.ended: list[str] = []
        self.clients = [ScriptedClient(self.broker, f"host-{n}", folder / "clients") for n in range(1, clients + 1)]
        self.settings = ServerSettings(folder=folder / "server", durable=False, chunk_bytes=1024)
        self.service: Server | None = None

    def serve(self, fuse: Fuse | None = None, *, owner: str = "server", worker: Executor | None = None) -> Server:
        """Start a server on whatever an earlier one left; `worker` does its heavy work, at once when None."""
        fuse = fuse or Fuse()
        overrides = ServerOverrides(now_ms=lambda: round(self.now * 1000), worker=worker or AtOnce())
        service = Server(fuse.wrap(self.broker), fuse.wrap(self.store), self.settings, owner=owner, overrides=overrides)
        service.listen(lambda _, event: self.events.append(event))
        service.on_job_ended(self.ended.append)
        service.start()
        self.service = service
        return service

    def kill(self) -> None:
        """Take the server's memory away; nothing is said to anybody."""
        assert self.service is not None
        self.service._loop._closed = True
        for subscription in self.service._subscriptions:
            subscription.cancel()
        self.service = None

    def start_clients(self) -> None:
        for client in self.clients:
            client.start()

    def idle(self) -> None:
        self.broker.run_until_idle()

    def pass_seconds(self, seconds: float) -> None:
        """Let time go by in steps that no timer is shorter than."""
        for _ in range(round(seconds / 0.5)):
            self.beat()
            self.idle()

    def beat(self) -> None:
        """Half a second later; clients renew their leases every five."""
        self.now += 0.5
        if self.now % 5.0 == 0.0:
            for client in self.clients:
                client.alive() if client.client else client.hello()

    def run_to_end(self, job: str, *, patience_seconds: float = 120.0) -> None:
        """Go on until a job has ended, in simulated time."""
        for _ in range(round(patience_seconds / 0.5)):
            self.idle()
            if job in self.ended or self.store.jobs()[job].status in {"done", "failed", "cancelled"}:
                return
            self.beat()
        raise AssertionError(f"job {job} does not end: {self.store.jobs()[job]}")

    def run_to_end_over_death(self, job: str) -> None:
        """Go on until a job has ended; a server that dies on the way is replaced by another one."""
        try:
            self.run_to_end(job)
        except Died:
            self.kill()
            self.serve()
            self.run_to_end(job)

    def run(self, spec: JobSpec) -> Report:
        """Submit a job, run it to its end, and return its report."""
        if self.service is None:
            self.serve()
            self.start_clients()
        assert self.service is not None
        job = self.service.submit(spec)
        self.run_to_end(job)
        return self.report(job)

    def runs(self, job: str) -> Path:
        return self.settings.folder / "runs" / job

    def report(self, job: str) -> Report:
        return Report.model_validate_json((self.runs(job) / "report.json").read_text())

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

"""The server process: connect, serve, drain.

It keeps trying until broker and store are there, says what it waits for, and gives its lease up
when it is told to stop, so that the next server need not wait for it to expire.
"""

from __future__ import annotations

import hashlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

import structlog

from lorabbit import __version__
from lorabbit.broker.base import Broker
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.logging import configure
from lorabbit.config.settings import ServerSettings, read_settings, unknown_variables
from lorabbit.errors import BadInput, LoRAbbitError, StoreUnavailable
from lorabbit.events.job_events import AnyEvent, TaskProgressed
from lorabbit.runtime import failpoints
from lorabbit.state.redis import RedisStateStore
from lorabbit_server.api.app import make_app
from lorabbit_server.api.metrics import ServerMetrics
from lorabbit_server.api.status import StatusService
from lorabbit_server.health.dependencies import DependencyHealth
from lorabbit_server.http_server import HttpServer
from lorabbit_server.server import Server

log = structlog.get_logger()
INTERRUPTED = 130
PROBE_TIMEOUT_SECONDS = 2.0
"""An operator who asks why nothing happens shall not wait as long as the server itself bears."""


def main(settings: ServerSettings | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    try:
        settings = settings or read_settings(ServerSettings)
        configure(settings.log_level, settings.log_format)
        failpoints.arm(settings.crash_at)
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    try:
        _make(settings.folder)
        return _serve(settings)
    except KeyboardInterrupt:
        return INTERRUPTED
    except LoRAbbitError as error:
        log.error("server-failed", why=str(error))  # noqa: TRY400 - a sentence, not a trace
        return error.exit_code


def _make(folder: Path) -> None:
    """Make the server's folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"environment variable LORABBIT_FOLDER: the folder {folder} cannot be used: {error.strerror}"
        raise BadInput(why) from error


def _serve(settings: ServerSettings) -> int:
    """Put the parts together and run the loop."""
    store = RedisStateStore.connect(settings.redis_url, trust=settings.trust)
    broker: Broker = RabbitBroker(
        settings.broker_url,
        name=f"lorabbit-server@{settings.name}",
        trust=settings.trust,
        replicated=settings.replicates,
    )
    service = Server(broker, store, settings, owner=f"{settings.name}:{settings.folder.resolve()}")
    measures = ServerMetrics()
    service.listen(measures.on_event)
    service.listen(_log_event)
    if settings.submit is not None:
        service.on_leading(partial(_submit, service, settings.submit))
    probe = RedisStateStore.connect(
        settings.redis_url, trust=settings.trust, patience=1, timeout_seconds=PROBE_TIMEOUT_SECONDS
    )
    dependencies = DependencyHealth(broker, probe, service.now_ms)
    try:
        app = make_app(service, measures, StatusService(service, dependencies, probe))
        where = (settings.http_host, settings.http_port)
        http = HttpServer(app, *where, cert=settings.http_cert, key=settings.http_key)
        http.start()
        dependencies.start()
        for said in unknown_variables():
            log.warning("unknown-variable", why=said)
        log.info("server-started", version=__version__, http=http.url, folder=str(settings.folder))
        try:
            with _signals(service, broker):
                service.start()
                broker.run()
        finally:
            http.close()
            dependencies.close()
    finally:
        with suppress(StoreUnavailable):
            service.close()
        broker.close()
        probe.close()
        store.close()
        service.access.close()
    log.info("server-stopped")
    return 0


def _submit(service: Server, path: Path) -> None:
    """Submit a job file, unless this store has had this very file before."""
    from lorabbit import job_loader  # noqa: PLC0415 - needed once, by few

    spec = job_loader.load(path)
    digest = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    job = service.submit(spec, operation=f"on-start:{digest}")
    log.info("job-submitted", job=job, file=str(path))


def _log_event(job: str, event: AnyEvent) -> None:
    """Tell the log what the event log is told; progress is for watchers."""
    if not isinstance(event, TaskProgressed):
        fields = event.model_dump(exclude={"kind", "at_ms", "facts", "metrics"}, exclude_none=True)
        log.info(event.kind, job=job, **fields)


@contextmanager
def _signals(service: Server, broker: Broker) -> Iterator[None]:
    """Drain on the first SIGTERM or SIGINT, stop at once on the second."""
    asked = 0

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            log.info("draining", signal=signal.Signals(number).name)
            service.drain(broker.stop)
        else:
            broker.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


if __name__ == "__main__":
    sys.exit(main())

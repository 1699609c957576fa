"""The client process: connect, do what the server asks, leave cleanly.

It imports no torch: a client that waits costs less than 80 MB, and the executor loads what a task needs when
the first one comes. On SIGTERM it stops training at the next step, says goodbye and exits; the
journal has what is unfinished, and a restart goes on with it. Exit code 0 says that it has no more to do: a
client that ends by itself (LORABBIT_IDLE_SECONDS) and is told to leave before that exits as one that the signal
ended, so that a Job of Kubernetes starts another in its place.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import structlog
from filelock import FileLock, Timeout

from lorabbit import __version__
from lorabbit.broker.base import Broker
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.logging import configure
from lorabbit.config.settings import ClientSettings, read_settings, unknown_variables
from lorabbit.errors import BadInput, LoRAbbitError, NotAllowed
from lorabbit.runtime import failpoints
from lorabbit_client.agent.agent import Agent
from lorabbit_client.agent.credentials import FILE, with_credentials
from lorabbit_client.agent.registration import capabilities_of, device
from lorabbit_client.capabilities import TrainingLimits
from lorabbit_client.execution.data_sandbox import SandboxedExecutor
from lorabbit_client.execution.failures import FAILED, OUT_OF_MEMORY, exit_on_thread_memory_error, is_out_of_memory
from lorabbit_client.execution.runners import ThreadRunner
from lorabbit_client.executor import Executor

log = structlog.get_logger()
INTERRUPTED = 130
SIGNALLED = 128
"""Exit code of whatever a signal ends, less the signal's number."""
REFUSED_SECONDS = 20.0
"""How long an enrolled client retries while the broker refuses its user; a server that starts restores the user."""
REVOKED = "where the server's operator revoked it, it needs another join token in LORABBIT_JOIN_TOKEN"


def main(settings: ClientSettings | None = None) -> int:
    """Work until told to stop; returns the exit code."""
    try:
        settings = settings or read_settings(ClientSettings)
        configure(settings.log_level, settings.log_format)
        failpoints.arm(settings.crash_at)
        _limits(settings).check(device(settings.device))
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    try:
        exit_on_thread_memory_error()
        with _locked(settings.folder):
            return _work(with_credentials(settings))
    except KeyboardInterrupt:
        return INTERRUPTED
    except NotAllowed as error:
        log.error("client-not-allowed", why=f"{error}; {REVOKED}")  # noqa: TRY400 - a sentence, not a trace
        return error.exit_code
    except LoRAbbitError as error:
        log.error("client-failed", why=str(error))  # noqa: TRY400 - a sentence, not a trace
        return error.exit_code
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        log.error("client-failed", why=OUT_OF_MEMORY)  # noqa: TRY400 - a sentence, not a trace
        return FAILED


def _work(settings: ClientSettings) -> int:
    """Create the agent and run the event loop."""
    name = f"lorabbit-client {settings.address}"
    refused_seconds = REFUSED_SECONDS if (settings.folder / FILE).exists() else None
    broker: Broker = RabbitBroker(settings.broker_url, name=name, trust=settings.trust, refused_seconds=refused_seconds)
    executor = Executor(
        threads=settings.threads,
        data_root=settings.data_root,
        device=settings.device,
        limits=_limits(settings),
    )
    runner = ThreadRunner(SandboxedExecutor(executor, settings.data_root), durable=settings.durable)
    agent = Agent(broker, runner, settings)
    finished: list[bool] = []
    conflicts: list[str] = []

    def exit_idle() -> None:
        finished.append(True)
        broker.stop()

    def exit_conflict(why: str) -> None:
        conflicts.append(why)
        broker.stop()

    agent.on_idle(exit_idle)
    agent.on_conflict(exit_conflict)
    for problem in unknown_variables():
        log.warning("unknown-variable", why=problem)
    log.info("client-started", version=__version__, address=settings.address, folder=str(settings.folder))
    try:
        with _signals(broker, agent, settings.drain_seconds) as received:
            broker.post(agent.start)
            broker.run()
        agent.close()
    finally:
        runner.close()
        broker.close()
    if conflicts:
        raise BadInput(conflicts[0])
    log.info("client-stopped")
    has_work_left = received and settings.idle_seconds is not None and not finished
    return SIGNALLED + received[0] if has_work_left else 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a client's folder: two processes would execute the same journal. Raises BadInput."""
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BadInput(
            f"another client works in {folder}; give each client a folder of its own with LORABBIT_FOLDER"
        ) from None
    except OSError as error:
        raise BadInput(f"the client's folder {folder} cannot be used: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def _limits(settings: ClientSettings) -> TrainingLimits:
    return TrainingLimits(
        epsilon=settings.privacy_epsilon,
        delta=settings.privacy_delta,
        **capabilities_of(settings).model_dump(),
    )


@contextmanager
def _signals(broker: Broker, agent: Agent, drain_seconds: float) -> Iterator[list[int]]:
    """Handle signals: SIGTERM drains for at most `drain_seconds`; a second one, or SIGINT, stops the loop at once.

    Yields the list of received signals.
    """
    received: list[int] = []

    def drain() -> None:
        agent.drain(broker.stop)
        broker.after(drain_seconds, broker.stop)

    def stop(number: int, _: FrameType | None) -> None:
        log.info("client-stopping", signal=signal.Signals(number).name)
        if number == signal.SIGINT or received or drain_seconds == 0:
            broker.stop()
        else:
            broker.post(drain)
        received.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


if __name__ == "__main__":
    sys.exit(main())

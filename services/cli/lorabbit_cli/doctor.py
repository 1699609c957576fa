"""Doctor: one line for everything that LoRAbbit needs, with what to do where it is missing.

Every check ends within seconds, raises nothing and changes nothing: a doctor that hangs or leaves
something behind is no help.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import JsonValue

from lorabbit import __version__
from lorabbit.config.network import TlsSettings, urls_of_hosts, without_password
from lorabbit.config.settings import ClientSettings, OperatorSettings, ServerSettings, unknown_variables, variable
from lorabbit.errors import LoRAbbitError, NotAllowed, Retryable
from lorabbit_cli.formatting import bytes_text
from lorabbit_cli.options import read_settings

PASS, WARN, FAIL = "pass", "warn", "fail"
SERVICES = ("broker", "store")
GIB = 2**30
LITTLE_DISK_BYTES = 2 * GIB
LITTLE_MEMORY_BYTES = 2 * GIB
CONNECT_SECONDS = 3.0
TOOL_SECONDS = 10.0
TRAINING = ("torch", "transformers", "peft", "datasets")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    what: str
    verdict: str
    text: str

    def as_json(self) -> dict[str, JsonValue]:
        """Return it as plain data."""
        return dict(asdict(self))


def examine() -> list[Finding]:
    """Make every check."""
    return [finding for check in CHECKS for finding in _guarded(check)]


def exit_code(findings: list[Finding]) -> int:
    """Return 3 when broker or store cannot be reached, 1 when something else is broken, else 0."""
    failed = {finding.what for finding in findings if finding.verdict == FAIL}
    if failed & set(SERVICES):
        return Retryable.exit_code
    return 1 if failed else 0


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Turn whatever a check raises into a finding."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - a check that breaks is itself a finding
        what = check.__name__.strip("_")
        sentence = str(error) if isinstance(error, LoRAbbitError) else f"{type(error).__name__}: {error}"
        yield Finding(what, FAIL, sentence)


def _versions() -> Iterator[Finding]:
    """LoRAbbit and Python."""
    yield Finding(
        "version", PASS, f"LoRAbbit {__version__}, Python {platform.python_version()} on {platform.platform()}"
    )


def _environment() -> Iterator[Finding]:
    """Variables that nobody reads."""
    for said in unknown_variables():
        yield Finding("environment", WARN, f"{said}; docs/reference/settings.md has the names")


def _machine() -> Iterator[Finding]:
    """Processors and memory."""
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{processors} processors, {bytes_text(memory)} of memory"
    if memory < LITTLE_MEMORY_BYTES:
        yield Finding("machine", WARN, f"{text}: little for training; use a small model or fewer --workers")
    else:
        yield Finding("machine", PASS, text)


def _disk() -> Iterator[Finding]:
    """Room, and the right to write, here and in the server's folder."""
    folders = dict.fromkeys(_existing(folder) for folder in (Path(), read_settings(ServerSettings).folder))
    for folder in folders:
        text = f"{bytes_text(shutil.disk_usage(folder).free)} free in {folder}"
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            yield Finding("disk", FAIL, f"{folder} cannot be written: {error.strerror}; work in another folder")
            continue
        if shutil.disk_usage(folder).free < LITTLE_DISK_BYTES:
            yield Finding("disk", WARN, f"{text}: little for models and checkpoints; free some space")
        else:
            yield Finding("disk", PASS, text)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def _torch() -> Iterator[Finding]:
    """What training needs, and the device; torch itself is asked in a process of its own."""
    missing = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    if missing:
        todo = "pip install 'lorabbit[client]' where clients train"
        yield Finding("torch", WARN, f"{', '.join(missing)} not installed, so nothing can be trained here: {todo}")
        return
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    versions = ", ".join(f"{name} {version(name)}" for name in TRAINING)
    if asked.returncode != 0:
        why = (asked.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        yield Finding("torch", FAIL, f"torch is installed but does not start ({why}); install it again")
        return
    gpus = int(asked.stdout)
    device = f"{gpus} GPUs" if gpus else "CPU only"
    yield Finding("torch", PASS, f"{versions}; {device}; device setting {read_settings(ClientSettings).device!r}")


def _packages() -> Iterator[Finding]:
    """What the other roles need."""
    for extra, names in (("server", ("fastapi", "redis", "uvicorn")), ("cli", ("fakeredis", "httpx", "matplotlib"))):
        missing = []
        for name in names:
            try:
                version(name)
            except PackageNotFoundError:
                missing.append(name)
        if missing:
            yield Finding("packages", WARN, f"{', '.join(missing)} not installed: pip install 'lorabbit[{extra}]'")
        else:
            yield Finding("packages", PASS, f"everything for {extra} is installed")


def _broker() -> Iterator[Finding]:
    """A connection to each host of RabbitMQ; one that is away is worth a warning where another one answers."""
    from lorabbit_client.agent import credentials  # noqa: PLC0415 - imports what joins

    settings = read_settings(ClientSettings)
    joined = credentials.read(settings.folder / credentials.FILE)  # a client asks as the user that it joined as
    broker_url = settings.broker_url if joined is None else credentials.url_of(settings.broker_url, joined)
    troubles = {url: _connection_error(url, settings.trust) for url in urls_of_hosts(broker_url)}
    answers = any(trouble is None for trouble in troubles.values())
    for url, trouble in troubles.items():
        shown = without_password(url)
        if trouble is None:
            yield Finding("broker", PASS, f"RabbitMQ at {shown}")
        elif answers:
            yield Finding("broker", WARN, f"{shown}: {trouble}; start this node, the others do without it")
        else:
            todo = "start RabbitMQ or set LORABBIT_BROKER_URL (`lorabbit run` needs none)"
            yield Finding("broker", FAIL, f"{shown}: {trouble}; {todo}")


def _connection_error(url: str, trust: TlsSettings) -> str | None:
    """What keeps RabbitMQ at one host from answering within seconds; None if nothing."""
    from lorabbit.broker.rabbitmq.broker import RabbitBroker  # noqa: PLC0415 - imports pika

    broker = RabbitBroker(url, name="lorabbit-doctor", trust=trust)
    deadline = time.monotonic() + CONNECT_SECONDS
    while (trouble := broker.health()) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    broker.close()
    return trouble


def _store() -> Iterator[Finding]:
    """A connection to Redis."""
    from lorabbit.state.redis import RedisStateStore  # noqa: PLC0415 - imports redis

    settings = read_settings(ServerSettings)
    url = settings.redis_url
    todo = "start Redis or set LORABBIT_REDIS_URL (`lorabbit run` needs none)"
    try:
        store = RedisStateStore.connect(url, trust=settings.trust, patience=0)
        store.ping()
        store.close()
    except (Retryable, ValueError) as error:
        if _is_named("LORABBIT_BROKER_URL") and not _is_named("LORABBIT_REDIS_URL"):  # as where a client runs
            yield Finding("store", WARN, "no LORABBIT_REDIS_URL: a server needs a store, a client none")
        else:
            yield Finding("store", FAIL, f"{without_password(url)}: {error}; {todo}")
    else:
        yield Finding("store", PASS, f"Redis at {without_password(url)}")


def _is_named(name: str) -> bool:
    """Tell whether a setting was given, in a variable or in the file that one names."""
    return (variable(name) or variable(f"{name}_FILE")) is not None


def _server() -> Iterator[Finding]:
    """A LoRAbbit server."""
    from lorabbit_cli.api_client import ApiClient  # noqa: PLC0415 - imports httpx

    settings = read_settings(OperatorSettings)
    url = settings.server_url
    try:
        with ApiClient(url, token=settings.http_token, trust=settings.trust) as server:
            trouble = server.ready()
            clients = sum(bool(client["present"]) for client in server.clients())
    except (Retryable, NotAllowed) as error:
        yield Finding("server", WARN, str(error))
        return
    if trouble:
        yield Finding("server", WARN, f"{url} does not lead: {trouble}")
    else:
        yield Finding("server", PASS, f"{url} leads; {clients} clients are there")


def _docker() -> Iterator[Finding]:
    """A Docker engine, for compose."""
    if shutil.which("docker") is None:
        yield Finding("docker", WARN, "no docker command: only `docker compose up` needs one")
        return
    yield _tool("docker", ["docker", "version", "--format", "{{.Server.Version}}"], "start the Docker engine")


def _kubernetes() -> Iterator[Finding]:
    """A cluster, for Helm."""
    if shutil.which("kubectl") is None:
        yield Finding("kubernetes", WARN, "no kubectl command: only a deployment with Helm needs one")
        return
    yield _tool(
        "kubernetes", ["kubectl", "version", "--request-timeout=3s", "-o", "yaml"], "name a cluster in kubeconfig"
    )


def _tool(what: str, command: list[str], todo: str) -> Finding:
    """Ask a command-line tool whether its other end answers."""
    try:
        asked = subprocess.run(  # noqa: S603 - a fixed command
            command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(what, WARN, f"{command[0]} did not answer within {TOOL_SECONDS:.0f} s; {todo}")
    if asked.returncode != 0:
        why = (asked.stderr.strip().splitlines() or ["it failed without a word"])[-1]
        return Finding(what, WARN, f"{why}; {todo} if you need it")
    first = asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else ""
    return Finding(what, PASS, f"{command[0]} answers{f', version {first}' if what == 'docker' else ''}")


CHECKS = (_versions, _environment, _machine, _disk, _torch, _packages, _broker, _store, _server, _docker, _kubernetes)

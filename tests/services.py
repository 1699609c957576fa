"""Private RabbitMQ and Redis for the test run: found, started on free ports, killed at will.

A server is a running process with `url`, `kill()` (SIGKILL, as a power cut would) and `start()`
(again, on the same data and port), so that a crash test reads as what it does. Binaries on this
machine are used first, then a Docker engine that already holds the image; `ServiceMissing` says
why there is neither. Nothing here listens on a well-known port, so a broker that already runs on
the machine is never touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import pika
import pytest
import redis
from hosts import ChildProcess, Container, Host, has_image
from rabbitmq_files import configuration, definitions, formation, tls_listener

START_SECONDS = 240.0
RABBITMQ_IMAGE = "rabbitmq:4-management"
REDIS_IMAGE = "redis:8"
DATA = "appendonlydir"
"""Redis's folder of what it appends."""
DEBIAN_RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


class ServiceMissing(Exception):
    """Neither a binary nor an image is at hand; the text says what was looked for."""


class Service:
    """A private server; see the module's docstring."""

    url: str

    def __init__(self, kind: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"lorabbit-{kind}-"))
        self.folder.chmod(0o755)
        self.port = free_port()
        self.host: Host

    def start(self) -> None:
        """Start it, on the data it had, and wait until it answers."""
        self.launch()
        self.await_answer()

    def launch(self) -> None:
        """Start it, and do not wait."""
        self.host.start()

    def await_answer(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if not self.host.alive() or time.monotonic() > deadline:
                output = self.host.output()
                self.host.kill()
                raise RuntimeError(f"{type(self).__name__} did not start on port {self.port}:\n{output}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL it; `start` brings it back on the same port and data."""
        self.host.kill()

    def freeze(self) -> None:
        """Make it silent: its connections stay open and nothing answers."""
        self.host.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self.host.signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it and forget its data."""
        self.host.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def pids(self) -> list[int]:
        """Process ids of the server."""
        return [self.host.pid()]

    def version(self) -> str:
        """Version that the server reports."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Tell whether a client gets through."""
        raise NotImplementedError


class NameServer:
    """Erlang's epmd on a port of its own, to be started before any node; the one that a node starts outlives it."""

    def __init__(self) -> None:
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="lorabbit-epmd-"))
        command = [shutil.which("epmd") or "epmd", "-port", str(self.port)]
        self._host = ChildProcess(self._folder, command, {"ERL_EPMD_ADDRESS": "127.0.0.1"})

    def start(self) -> None:
        """Start it unless it runs."""
        if not self._host.alive():
            self._host.start()

    def close(self) -> None:
        """Kill it."""
        self._host.close()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class Membership:
    """A node's place in a cluster: its name, those of all, and what they share."""

    name: str
    names: tuple[str, ...]
    cookie: str
    name_server: NameServer


class RabbitMQ(Service):
    """A private RabbitMQ, `max_message_size` 16 MiB as 4.x has it.

    `settings` adds lines to rabbitmq.conf. `vhosts` virtual hosts are made at boot (10 ms each): every test that
    wants an empty broker takes the next one. `management` turns its management interface on, at `management_url`;
    `certificates`, a folder that `lorabbit certificates` made, a TLS listener beside the other, at `tls_url`. With a
    `membership` it is one node of a cluster, which has to be a process.
    """

    def __init__(  # noqa: PLR0913 - what tests want of a broker
        self,
        settings: str = "",
        vhosts: int = 1,
        *,
        admin: bool = False,
        certificates: Path | None = None,
        password: str = "guest",  # noqa: S107 - of a server that lives as long as a test
        membership: Membership | None = None,
    ) -> None:
        super().__init__("rabbitmq")
        who = f"guest:{password}@127.0.0.1"
        self.url = f"amqp://{who}:{self.port}/"
        self._plugins = "[rabbitmq_management].\n" if admin else "[].\n"
        self._management_port, self._tls_port = free_port(), free_port()
        self.management_url = f"http://{who}:{self._management_port}/" if admin else ""
        self.tls_url = f"amqps://{who}:{self._tls_port}/"
        self._certificates = certificates
        if admin:
            settings += f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self._management_port}\n"
        self._vhosts = [f"test-{number}" for number in range(vhosts)]
        self._unused = iter(self._vhosts)
        self._membership, self._name_server = membership, None if membership is None else membership.name_server
        self._rabbitmqctl = "rabbitmqctl"
        image = os.environ.get("LORABBIT_TEST_RABBITMQ_IMAGE")
        binary = shutil.which("rabbitmq-server") or shutil.which(DEBIAN_RABBITMQ)
        (self.folder / "definitions.json").write_text(definitions(["/", *self._vhosts], password))
        if binary and not image:
            self.host = self._process(binary, settings)
        elif membership is not None:
            shutil.rmtree(self.folder)
            raise ServiceMissing("no rabbitmq-server on PATH, and a cluster is not made of containers")
        elif has_image(image or RABBITMQ_IMAGE):
            self.host = self._container(image or RABBITMQ_IMAGE, settings)
        else:
            shutil.rmtree(self.folder)
            raise ServiceMissing(f"no rabbitmq-server on PATH, and no Docker engine holds {image or RABBITMQ_IMAGE}")

    def empty_url(self) -> str:
        """URL of a virtual host that nobody has used yet."""
        vhost = next(self._unused, None)
        assert vhost, f"more tests want an empty broker than the {len(self._vhosts)} virtual hosts made at boot"
        return self.url + vhost

    def empty(self, url: str) -> None:
        """Lose everything that a virtual host holds, and its connections, as with a volume; users stay."""
        vhost = url.rpartition("/")[2] or "/"
        self.control("delete_vhost", vhost)
        self.control("add_vhost", vhost)
        self.control("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")

    def launch(self) -> None:
        if self._name_server is not None:
            self._name_server.start()
        super().launch()

    def close(self) -> None:
        super().close()
        if self._name_server is not None and self._membership is None:
            self._name_server.close()

    def version(self) -> str:
        return self.control("version").split()[-1]

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on it."""
        return self.host.execute(self._rabbitmqctl, *arguments)

    def answers(self) -> bool:
        try:
            pika.BlockingConnection(pika.URLParameters(self.url + self._vhosts[-1])).close()
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True

    def _process(self, binary: str, settings: str) -> Host:
        # Debian's rabbitmq-server on PATH insists on root or the rabbitmq user; the script behind it does not.
        binary = str(DEBIAN_RABBITMQ) if DEBIAN_RABBITMQ.exists() else binary
        self._rabbitmqctl = str(Path(binary).with_name("rabbitmqctl"))
        folder = str(self.folder)
        if self._membership is None:
            # The node would start a name server that outlives it; ours ends with the test run.
            self._name_server = NameServer()
            name, epmd_port = f"lorabbit{self.port}@localhost", self._name_server.port
        else:
            name, epmd_port = self._membership.name, self._membership.name_server.port
            settings += formation(self._membership.names)
            cookie = self.folder / ".erlang.cookie"
            cookie.write_text(self._membership.cookie)
            cookie.chmod(0o400)
        if self._certificates is not None:
            settings += tls_listener(self._certificates, self._tls_port)
        (self.folder / "rabbitmq.conf").write_text(configuration(self.folder, self.port, settings))
        (self.folder / "enabled_plugins").write_text(self._plugins)
        environment = {
            "HOME": folder,
            "RABBITMQ_NODENAME": name,
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            # The start script then becomes the server instead of watching over it: SIGKILL reaches it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        return ChildProcess(self.folder, [binary], environment)

    def _container(self, image: str, settings: str) -> Host:
        inside = Path("/etc/lorabbit")
        options = [f"--publish=127.0.0.1:{self.port}:5672", f"--volume={self.folder}:{inside}:ro", "--hostname=broker"]
        if self.management_url:
            settings = settings.replace("management.tcp.ip = 127.0.0.1\n", "")
            options += [f"--publish=127.0.0.1:{self._management_port}:{self._management_port}"]
        if self._certificates is not None:
            settings += tls_listener(Path("/certificates"), 5671)
            options += [f"--publish=127.0.0.1:{self._tls_port}:5671", f"--volume={self._certificates}:/certificates:ro"]
        (self.folder / "rabbitmq.conf").write_text(configuration(inside, 5672, settings))
        (self.folder / "enabled_plugins").write_text(self._plugins)
        config = [
            f"--env=RABBITMQ_CONFIG_FILE={inside}/rabbitmq.conf",
            f"--env=RABBITMQ_ENABLED_PLUGINS_FILE={inside}/enabled_plugins",
        ]
        return Container(image, [*options, *config])


class Redis(Service):
    """A private Redis that fsyncs every write before it answers.

    With `certificates`, a folder that `lorabbit certificates` made, a TLS listener beside the other, at `tls_url`.
    """

    def __init__(self, *, certificates: Path | None = None, password: str = "") -> None:
        super().__init__("redis")
        who = f":{password}@127.0.0.1" if password else "127.0.0.1"
        self.url = f"redis://{who}:{self.port}/0"
        tls_port = free_port()
        self.tls_url = f"rediss://{who}:{tls_port}/0"
        settings = ["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", "--save", ""]
        settings += ["--requirepass", password] if password else []
        image = os.environ.get("LORABBIT_TEST_REDIS_IMAGE")
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary and not image:
            here = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
            if certificates is not None:
                here += redis_tls(certificates, tls_port)
            self.host = ChildProcess(self.folder, [binary, *here, *settings])
        elif has_image(image or REDIS_IMAGE):
            options = [f"--publish=127.0.0.1:{self.port}:6379"]
            if certificates is not None:
                options += [f"--publish=127.0.0.1:{tls_port}:6380", f"--volume={certificates}:/certificates:ro"]
                settings += redis_tls(Path("/certificates"), 6380)
            self.host = Container(image or REDIS_IMAGE, options, ["redis-server", *settings])
        else:
            shutil.rmtree(self.folder)
            raise ServiceMissing(f"no redis-server on PATH, and no Docker engine holds {image or REDIS_IMAGE}")

    def version(self) -> str:
        with redis.Redis.from_url(self.url) as client:
            return str(client.info("server")["redis_version"])

    def keep(self) -> Path | None:
        """Copy its data as they are now, as a backup does; None where they lie in a container."""
        if not isinstance(self.host, ChildProcess):
            return None
        kept = self.folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.folder / DATA, kept)
        return kept

    def restore(self, kept: Path) -> None:
        """Kill it and start it on the data of a backup: what came after is forgotten."""
        self.kill()
        shutil.rmtree(self.folder / DATA)
        shutil.copytree(kept, self.folder / DATA)
        self.start()

    def answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, retry=None) as client:
                return bool(client.ping())
        except (redis.RedisError, OSError):
            return False


class Startable(Protocol):
    """What `serve` serves."""

    def start(self) -> None:
        """Start it and wait until it answers."""

    def close(self) -> None:
        """Kill it and forget its data."""


S = TypeVar("S", bound=Startable)


def serve(make: Callable[[], S]) -> Iterator[S]:
    """A server for as long as a fixture lasts; without one the test is skipped on a laptop and fails where CI=true."""
    try:
        service = make()
    except ServiceMissing as missing:
        if os.environ.get("CI") == "true":
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    try:
        service.start()
        yield service
    finally:
        service.close()


def free_port() -> int:
    """A TCP port that nobody listens on, below those that the system gives to outgoing connections.

    A port of that range may be taken by a connection between the moment it was found free and the server's start.
    """
    while True:
        port = random.randrange(10_240, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def redis_tls(certificates: Path, port: int) -> list[str]:
    """Arguments of redis-server for a TLS listener."""
    files = {"--tls-ca-cert-file": "ca.pem", "--tls-cert-file": "redis.pem", "--tls-key-file": "redis.key"}
    named = [part for option, name in files.items() for part in (option, str(certificates / name))]
    return ["--tls-port", str(port), "--tls-auth-clients", "no", *named]

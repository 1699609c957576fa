"""Where a server of the test run lives: a child process or a container, started and killed alike."""

# ruff: noqa: S603, S607 - the test run starts programs of this machine by name
from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from uuid import uuid4


class Host(Protocol):
    """Where a server runs: a child process or a container."""

    def start(self) -> None:
        """Start it on the data it had; returns before it answers."""

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, for example SIGSTOP to make it silent without closing its sockets."""

    def alive(self) -> bool:
        """Tell whether it still runs."""

    def output(self) -> str:
        """The end of what it printed, for a failure's message."""

    def pid(self) -> int:
        """Process id of the server; its children may do the work."""

    def execute(self, *command: str) -> str:
        """Run a program beside it, in its surroundings; its output."""

    def close(self) -> None:
        """Kill it and give back what it held."""


class ChildProcess:
    """A server as a child process in a session of its own."""

    def __init__(self, folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._folder = folder
        self._log = folder / "output.log"
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        if self._child is not None:
            self.signal(signal.SIGKILL)
            self._child.wait()
            self._child = None

    def signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def output(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def execute(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        self.kill()


class Container:
    """A server in a Docker container, its port published on the loopback."""

    def __init__(self, image: str, arguments: Sequence[str], command: Sequence[str] = ()) -> None:
        self._name = f"lorabbit-test-{uuid4().hex[:12]}"
        self._run = ["run", "--detach", "--name", self._name, *arguments, image, *command]
        self._made = False

    def start(self) -> None:
        docker("start", self._name) if self._made else docker(*self._run)
        self._made = True

    def kill(self) -> None:
        docker("kill", self._name)

    def signal(self, number: signal.Signals) -> None:
        docker("kill", f"--signal={number.name}", self._name)

    def alive(self) -> bool:
        return docker("inspect", "--format={{.State.Running}}", self._name) == "true"

    def output(self) -> str:
        return docker("logs", "--tail=50", self._name)

    def pid(self) -> int:
        return int(docker("inspect", "--format={{.State.Pid}}", self._name))

    def execute(self, *command: str) -> str:
        return docker("exec", self._name, *command)

    def close(self) -> None:
        if self._made:
            docker("rm", "--force", "--volumes", self._name)


def docker(*arguments: str) -> str:
    """Run the Docker command line; its output, stripped."""
    done = subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def has_image(image: str) -> bool:
    """Tell whether a Docker engine answers and holds the image."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode == 0

"""Pools of processes on this machine: client n of a pool keeps its folder, and with it its identity and journal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from lorabbit.config.settings import child_environment, default_address
from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import PoolStatus, Scaler

PID = "process.pid"
LOG = "client.log"
KILL_SECONDS = 40.0
"""Time to finish or hand back a task before a process that was told to leave is killed."""
OWN = ("LORABBIT_FOLDER", "LORABBIT_ADDRESS", "LORABBIT_CLIENT", "LORABBIT_CLIENT_FILE", "LORABBIT_POOL")


class ProcessScaler(Scaler):
    """`lorabbit client` processes, with the caller's LORABBIT_* settings, below one folder."""

    def __init__(self, folder: Path) -> None:
        """Keep client n of a pool in ``folder/pool/n``."""
        self._folder = folder
        self._leaving: dict[Path, float] = {}

    def count(self, pool: str) -> int:
        """Count the processes that run and were not told to leave."""
        return len([place for place in self._running(pool) if place not in self._leaving])

    def resize(self, pool: str, number: int) -> None:
        """Start the lowest numbers that are missing, or tell the highest to leave."""
        running = [place for place in self._running(pool) if place not in self._leaving]
        for place in running[number:]:
            _signal(place, signal.SIGTERM)
            self._leaving[place] = time.monotonic()
        places = (self._folder / pool / str(n) for n in range(number + len(self._leaving) + len(running)))
        free = (place for place in places if place not in running and place not in self._leaving)
        for _ in range(number - len(running)):
            self._start(next(free), pool)

    def status(self, pool: str) -> PoolStatus:
        """Look at the processes; one that was told to leave and does not is killed in the end."""
        running = self._running(pool)
        for place, since in list(self._leaving.items()):
            if place not in running:
                del self._leaving[place]
                (place / PID).unlink(missing_ok=True)
            elif time.monotonic() - since > KILL_SECONDS:
                _signal(place, signal.SIGKILL)
        staying = [place for place in running if place not in self._leaving]
        ready = [place for place in staying if _is_connected(place)]
        dead = [place for place in self._known(pool) if (place / PID).is_file() and place not in running]
        trouble = "".join(f"{place} has ended; its last words: {_log_tail(place)}" for place in dead[:1])
        return PoolStatus(len(running), len(ready), trouble)

    def _known(self, pool: str) -> list[Path]:
        """Every folder of a pool, by number."""
        home = self._folder / pool
        numbers = [int(path.name) for path in home.iterdir() if path.name.isdigit()] if home.is_dir() else []
        return [home / str(number) for number in sorted(numbers)]

    def _running(self, pool: str) -> list[Path]:
        return [place for place in self._known(pool) if _process(place) is not None]

    def _start(self, place: Path, pool: str) -> None:
        """Start a client that outlives this command."""
        inherited = child_environment({}, keeps_settings=True)
        settings = {name: value for name, value in inherited.items() if name not in OWN} | {
            "LORABBIT_FOLDER": str(place.resolve()),
            "LORABBIT_ADDRESS": f"{default_address()[:40]}-{pool}-{place.name}",
            "LORABBIT_POOL": pool,
        }
        try:
            place.mkdir(parents=True, exist_ok=True)
            with (place / LOG).open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "lorabbit_client"],
                    env=settings,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            (place / PID).write_text(f"{child.pid} {psutil.Process(child.pid).create_time()}", encoding="ascii")
        except (OSError, psutil.Error) as error:
            raise BadInput(f"a client cannot be started in {place}: {error}") from error


def _process(place: Path) -> psutil.Process | None:
    """Return the process of a folder, if it is the one that was started there and lives."""
    try:
        pid, started = (place / PID).read_text(encoding="ascii").split()
        found = psutil.Process(int(pid))
        lives = found.is_running() and found.status() != psutil.STATUS_ZOMBIE
        is_it = abs(found.create_time() - float(started)) < 1.0
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    return found if lives and is_it else None


def _signal(place: Path, number: signal.Signals) -> None:
    """Signal the process of a folder, if there is one."""
    with suppress(psutil.NoSuchProcess):
        if (found := _process(place)) is not None:
            found.send_signal(number)


def _is_connected(place: Path) -> bool:
    """Tell whether a client holds a connection, which can only be the broker's."""
    found = _process(place)
    try:
        return found is not None and any(
            each.status == psutil.CONN_ESTABLISHED for each in found.net_connections(kind="tcp")
        )
    except psutil.Error:
        return False


def _log_tail(place: Path) -> str:
    """Return the last line of a client's log."""
    with suppress(OSError):
        lines = (place / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "none"
    return "none"

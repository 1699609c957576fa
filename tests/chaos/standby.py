"""What happens to a server while another one stands by; see `faults`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from chaos.faults import midway
from chaos.handover import Handover
from chaos.scene import Scene

SHORT_LEASE_SECONDS = 4.0
LONG_LEASE_SECONDS = 60.0
"""Far longer than a standby may take where the lease was given up."""


@contextlib.contextmanager
def two_servers(scene: Scene, lease_seconds: float) -> Iterator[Handover]:
    """Come half-way through an upload with a standby at hand, and follow the job over it from the body's end on."""
    lease = {"LORABBIT_LEASE_SECONDS": str(lease_seconds)}
    standby = scene.add_standby(**lease)
    with midway(scene, **lease), contextlib.closing(Handover(scene.ground.store.url, lease_seconds)) as handover:
        yield handover
        scene.await_log(standby, '"leader-elected"')
        scene.ask_standby()


def leader_dies(scene: Scene) -> None:
    """Kill the server while another one stands by, which leads no later than one lease after that."""
    with two_servers(scene, SHORT_LEASE_SECONDS) as handover:
        scene.server.kill()
        handover.begin()
        handover.await_end_of_lease()


def leader_freezes(scene: Scene) -> None:
    """Put the server to sleep until another one leads, then wake it: it must change nothing more."""
    with two_servers(scene, SHORT_LEASE_SECONDS) as handover:
        scene.server.freeze()
        handover.begin()
        handover.await_end_of_lease()
        scene.server.signal(signal.SIGCONT)
        scene.await_log(scene.server, "leadership-lost")
        scene.await_log(scene.server, "standby")


def leader_drains(scene: Scene) -> None:
    """Ask the server to end while another one stands by, which leads at once, however long the lease is."""
    with two_servers(scene, LONG_LEASE_SECONDS) as handover:
        handover.begin()
        scene.server.signal(signal.SIGTERM)
        handover.await_release()
        code = scene.server.wait(30)
        assert code == 0, scene.server.tail()

"""What happens to a scene on a cluster of RabbitMQ: it loses nodes in the middle of an upload, and they come back.

Every process reaches the nodes through doors of its own, one for each node, of which one at a time is open: so it is
known who is connected where.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from proxy import Proxy
from services import RabbitMQ

from chaos.faults import SLOW_BYTES_PER_SECOND, come_midway
from chaos.scene import Scene
from lorabbit.broker import topology

CONNECTIONS = 2
"""Of a process to the broker."""
MOVE_SECONDS = 60.0


def node_dies(scene: Scene) -> None:
    """Kill the node to which everybody is connected; the others serve without it, and it comes back later."""
    with midway(scene) as doors:
        open_only(doors, 1, 2)
        nodes_of(scene)[0].kill()
    serve_without(scene, 0)


def leader_dies(scene: Scene) -> None:
    """Kill the node that leads every queue, while everybody is connected to another one."""
    with midway(scene, moves_to=1):
        vhost = urlsplit(scene.broker_url).path[1:]
        leaders, lost = scene.ground.cluster.leaders(vhost), scene.ground.cluster.names[0]
        led = {topology.SERVER_QUEUE.name, topology.DATA_QUEUE.name, topology.inbox("site-1").name}
        assert led <= {queue for queue, leader in leaders.items() if leader == lost}, leaders
        nodes_of(scene)[0].kill()
    serve_without(scene, 0)


def majority_dies(scene: Scene) -> None:
    """Kill two nodes: the third one pauses, everybody waits and says so, and goes on when one of the two is back."""
    with midway(scene) as doors:
        open_only(doors, 0, 1, 2)
        nodes_of(scene)[0].kill()
        nodes_of(scene)[1].kill()
        scene.await_wait("broker", "cannot be reached")
        nodes_of(scene)[0].start()
    serve_without(scene, 1)


@contextlib.contextmanager
def midway(scene: Scene, *, moves_to: int = 0) -> Iterator[list[list[Proxy]]]:
    """Come half-way through the victim's upload, let the body disturb it, and give the victim its full speed.

    Everybody is connected to the first node when the queues are made, and to `moves_to` from then on.
    """
    (url, doors), (slow_url, slow) = scene.doors(), scene.doors()
    for door in slow:
        door.bytes_per_second = SLOW_BYTES_PER_SECOND
    here, victim = {"LORABBIT_BROKER_URL": url}, {"LORABBIT_BROKER_URL": slow_url}
    scene.start(server=here, others=here, victim=victim)
    scene.await_clients()
    if moves_to:
        move([doors, slow], moves_to, scene)
    come_midway(scene)
    elsewhere = [door for each in (doors, slow) for place, door in enumerate(each) if place not in {0, moves_to}]
    assert not any(door.connections for door in elsewhere)
    scene.disturb()
    yield [doors, slow]
    for door in slow:
        door.bytes_per_second = None


def move(doors: list[list[Proxy]], place: int, scene: Scene) -> None:
    """Let everybody go to another node."""
    open_only(doors, place)
    for each in doors:
        for door in each:
            door.cut()
    processes = 1 + len(scene.federation.clients)

    def has_moved() -> bool:
        return sum(each[place].connections for each in doors) >= CONNECTIONS * processes

    assert scene.witness.settle(has_moved, MOVE_SECONDS), f"not everybody moved\n{scene.federation.tails()}"


def open_only(doors: list[list[Proxy]], *places: int) -> None:
    """Let new connections through to these nodes alone."""
    for each in doors:
        for place, door in enumerate(each):
            door.accepts = place in places


def serve_without(scene: Scene, lost: int) -> None:
    """See two rounds end without a node that was lost, and let it come back."""
    scene.await_event("round-closed", 2)
    nodes_of(scene)[lost].start()


def nodes_of(scene: Scene) -> list[RabbitMQ]:
    """The cluster's nodes."""
    return scene.ground.cluster.nodes

"""What happens to a scene, one function per fault; each starts everything, hands the job in and disturbs it.

Most of them strike half-way through the upload of one client, the victim, whose link is slow until then.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import httpx
import pika

from chaos.scene import Act, Scene
from lorabbit.broker import topology

HALF_BYTES = 30_000
SLOW_BYTES_PER_SECOND = 40_000.0
BARE_BYTES_PER_SECOND = 100_000.0


class NotHere(Exception):
    """This machine cannot do what the row needs; the text says what."""


# ---- crash points ----
def server_dies_at(point: str) -> Act:
    """Let the server come to a crash point, and start it again."""

    def act(scene: Scene) -> None:
        scene.start(server={"LORABBIT_CRASH_AT": point})
        scene.submit()
        scene.await_death(scene.server)
        scene.server.start()

    return act


def client_dies_at(point: str) -> Act:
    """Let a client come to a crash point, and start it again."""

    def act(scene: Scene) -> None:
        scene.start(victim={"LORABBIT_CRASH_AT": point})
        scene.submit()
        scene.await_death(scene.victim)
        scene.victim.start()

    return act


# ---- half-way through an upload ----
@contextlib.contextmanager
def midway(scene: Scene, **server: str) -> Iterator[None]:
    """Come half-way through the victim's upload, let the body disturb it, and give the victim its full speed.

    `server` is more of the server's environment.
    """
    link = scene.proxy()
    link.bytes_per_second = SLOW_BYTES_PER_SECOND
    scene.start(server=server, victim={"LORABBIT_BROKER_URL": link.url})
    come_midway(scene)
    scene.disturb()
    yield
    link.bytes_per_second = None


def come_midway(scene: Scene) -> None:
    """Hand the job in, and wait for the middle of an upload."""
    scene.submit()
    arrived = scene.witness.settle(lambda: scene.witness.bytes_from("client-2") > HALF_BYTES, 60.0)
    assert arrived, f"no upload began\n{scene.federation.tails()}"


def broker_dies(scene: Scene) -> None:
    """Kill RabbitMQ and start it again."""
    with midway(scene):
        scene.ground.broker.kill()
        scene.ground.broker.start()


def store_dies(scene: Scene) -> None:
    """Kill Redis and start it again."""
    with midway(scene):
        scene.ground.store.kill()
        scene.ground.store.start()


def store_is_restored(scene: Scene) -> None:
    """Let Redis forget a result that counted already: it starts on a backup of a moment before."""
    with midway(scene):
        kept = scene.ground.store.keep()
        if kept is None:
            raise NotHere("the store's data lie in a container")
        scene.proxies[0].bytes_per_second = None
        scene.await_event("update-accepted", 1, client="client-2")
        scene.ground.store.restore(kept)
        scene.forget_events()
        scene.disturb("client-2")


def both_die(scene: Scene) -> None:
    """Kill RabbitMQ and Redis, and start them again."""
    with midway(scene):
        scene.ground.broker.kill()
        scene.ground.store.kill()
        scene.ground.store.start()
        scene.ground.broker.start()


def spool_is_lost(scene: Scene) -> None:
    """Kill the server and lose what it has of uploads under way."""
    with midway(scene):
        scene.server.kill()
        spool = scene.folder / "server" / "payloads"
        lost = [path for pattern in ("*.part", "*.have") for path in spool.glob(pattern)]
        assert lost, "there was no upload under way"
        for path in lost:
            path.unlink()
        scene.server.start()


def link_is_cut(scene: Scene) -> None:
    """Reset the victim's connections."""
    with midway(scene):
        scene.proxies[0].cut()


def link_is_half_open(scene: Scene) -> None:
    """Let the victim's connections fall silent for good; only heartbeats can tell."""
    with midway(scene):
        scene.proxies[0].half_open()


def link_stalls(scene: Scene) -> None:
    """Let nothing pass for a while."""
    with midway(scene):
        scene.proxies[0].stall()
        scene.witness.settle(lambda: False, 3.0)
        scene.proxies[0].flow()


def link_flips_a_bit(scene: Scene) -> None:
    """Let one bit of the victim's update arrive flipped."""
    with midway(scene):
        scene.proxies[0].flip_a_bit(upwards=True)
        scene.await_log(scene.server, "chunk-rejected")


def server_drains(scene: Scene) -> None:
    """Ask the server to end, and start it again."""
    with midway(scene):
        code = scene.server.stop()
        assert code == 0, scene.server.tail()
        scene.server.start()


def client_drains(scene: Scene) -> None:
    """Ask the victim to end, and start it again."""
    with midway(scene):
        scene.proxies[0].bytes_per_second = None
        code = scene.victim.stop()
        assert code == 0, scene.victim.tail()
        scene.victim.start()


# ---- half-way through a download ----
@contextlib.contextmanager
def midway_down(scene: Scene) -> Iterator[None]:
    """Come half-way through what the victim reads, let the body disturb it, and give the victim its full speed."""
    link = scene.proxy()
    link.bytes_per_second = SLOW_BYTES_PER_SECOND
    scene.start(victim={"LORABBIT_BROKER_URL": link.url})
    scene.submit()
    arrived = scene.witness.settle(lambda: link.returned > HALF_BYTES, 60.0)
    assert arrived, f"no download began\n{scene.federation.tails()}"
    scene.disturb()
    yield
    link.bytes_per_second = None


def link_is_cut_down(scene: Scene) -> None:
    """Reset the victim's connections while it reads."""
    with midway_down(scene):
        scene.proxies[0].cut()


def link_flips_a_bit_down(scene: Scene) -> None:
    """Let one bit of the adapter arrive flipped at the victim."""
    with midway_down(scene):
        scene.proxies[0].flip_a_bit(upwards=False)
        scene.await_log(scene.victim, "chunk-rejected")


def server_link_flips_a_bit(scene: Scene) -> None:
    """Let one bit of the first adapter arrive flipped at the broker: nobody can read it, until it is sent again."""
    server = scene.proxy()
    server.flip_a_bit(upwards=True)
    scene.start(server={"LORABBIT_BROKER_URL": server.url})
    scene.submit()
    scene.disturb()
    scene.await_log(scene.server, "stream-damaged")


# ---- the network, all the time ----
def link_is_slow(scene: Scene) -> None:
    """Give one client a slow and distant link."""
    link = scene.proxy()
    link.latency_seconds, link.bytes_per_second = 0.04, BARE_BYTES_PER_SECOND
    scene.start(victim={"LORABBIT_BROKER_URL": link.url})
    scene.submit()


def server_link_is_half_open(scene: Scene) -> None:
    """Let the server's connections fall silent for good."""
    link, server = scene.proxy(), scene.proxy()
    link.bytes_per_second = SLOW_BYTES_PER_SECOND
    scene.start(server={"LORABBIT_BROKER_URL": server.url}, victim={"LORABBIT_BROKER_URL": link.url})
    come_midway(scene)
    scene.disturb()
    server.half_open()
    link.bytes_per_second = None


def poison_is_sent(scene: Scene) -> None:
    """Send both sides what nobody can read: it is put aside and counted, and comes back to neither of them."""
    with midway(scene), pika.BlockingConnection(pika.URLParameters(scene.broker_url)) as connection:
        channel = connection.channel()
        for exchange, key, kind in (
            (topology.UP, topology.up_key("site-1"), "lorabbit.offer.v1"),
            (topology.CONTROL, topology.control_key("site-1"), "lorabbit.task.v1"),
        ):
            channel.basic_publish(exchange, key, b"\x00", pika.BasicProperties(type=kind, user_id="guest"))
        for process in (scene.server, scene.victim):
            scene.await_log(process, "message-refused")
        dead = topology.DEAD_QUEUE.name
        assert scene.witness.settle(lambda: channel.queue_declare(dead, passive=True).method.message_count == 2)
        counted = httpx.get(f"{scene.federation.url}/metrics", timeout=10).text
        assert 'reason="malformed"} 1' in counted, counted


# ---- what gets lost ----
def inbox_is_lost(scene: Scene) -> None:
    """Lose a task that waits in the inbox of a dead client."""
    scene.start()
    scene.await_clients()
    scene.victim.kill()
    scene.submit()
    scene.await_event("update-accepted", 1, client="client-1")
    with pika.BlockingConnection(pika.URLParameters(scene.broker_url)) as connection:
        lost = connection.channel().queue_purge(topology.inbox("site-1").name)
    assert lost.method.message_count > 0, "no task waited"
    scene.disturb("client-2")
    scene.victim.start()


# ---- a client moves ----
def client_moves(scene: Scene) -> None:
    """Kill a client and let it go on from its folder, in another place and under another address."""
    scene.start()
    scene.submit()
    scene.await_event("update-accepted", 1, client="client-2")
    scene.victim.kill()
    scene.disturb("client-2")
    elsewhere = scene.federation.add_client("elsewhere")
    shutil.rmtree(elsewhere.folder)
    (scene.folder / "site-1").rename(elsewhere.folder)
    elsewhere.start()

"""What runs out while a scene plays: the server's disk, the memory of broker, store and client."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from pathlib import Path

import redis

from chaos.faults import SLOW_BYTES_PER_SECOND, NotHere, come_midway, midway
from chaos.scene import Scene
from lorabbit_client.execution.failures import FAILED, OUT_OF_MEMORY

DISK = "16m"
LESS_THAN_NOTHING = "1mb"
"""Memory that an empty Redis has in use already."""
END_SECONDS = 30.0
SPARING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Lets glibc keep nothing in reserve: a tensor is given back after use, and the next one has to be asked for."""


def memory_alarm(scene: Scene) -> None:
    """Let the broker believe that it is out of memory for a while: it takes nothing from anybody who publishes."""
    with midway(scene):
        scene.ground.broker.control("set_vm_memory_high_watermark", "0.00001")
        scene.proxies[0].bytes_per_second = None
        scene.await_log(scene.victim, "broker-blocked")
        scene.ground.broker.control("set_vm_memory_high_watermark", "0.6")


def store_is_full(scene: Scene) -> None:
    """Let Redis refuse every write for lack of memory until the operator is told, and make room again."""
    with midway(scene), redis.Redis.from_url(scene.ground.store.url) as store:
        store.config_set("maxmemory", LESS_THAN_NOTHING)
        scene.proxies[0].bytes_per_second = None
        scene.await_wait("store", "takes no writes")
        store.config_set("maxmemory", "0")


def disk_is_full(scene: Scene) -> None:
    """Fill the server's disk while updates arrive, and make room again."""
    volume = scene.folder / "server"
    mount = f'mount -t tmpfs -o size={DISK} tmpfs "{volume}" && exec "$@"'
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:  # noqa: S603
        raise NotHere("nobody may mount a small disk here")
    scene.replace_server(alone)
    link = scene.proxy()
    link.bytes_per_second = SLOW_BYTES_PER_SECOND
    scene.start(victim={"LORABBIT_BROKER_URL": link.url})
    come_midway(scene)
    filler = Path(f"/proc/{scene.server.child.pid}/root{volume}/filler")
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    link.bytes_per_second = None
    scene.await_log(scene.server, "No space left on device")
    scene.disturb()
    filler.unlink()


def client_without_memory(scene: Scene) -> None:
    """Let the victim map nothing any more until it says that it ran out of memory."""
    scene.start(victim=SPARING)
    scene.submit()
    scene.await_event("update-accepted", 1, client="client-2")
    pid = scene.victim.child.pid
    resource.prlimit(pid, resource.RLIMIT_AS, (0, resource.RLIM_INFINITY))
    scene.await_log(scene.victim, OUT_OF_MEMORY)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    scene.disturb("client-2")
    if "client-failed" in scene.victim.log.read_text():
        assert scene.victim.wait(END_SECONDS) == FAILED
        scene.victim.start()

"""A cluster of RabbitMQ: three nodes on this machine, each to be killed and started like a broker by itself."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from services import Membership, NameServer, RabbitMQ

NODES = 3


class Cluster:
    """Nodes that share queues, users and virtual hosts; a minority of them pauses.

    `nodes[n].kill()` is the loss of one, `nodes[n].start()` its return. `vhosts` virtual hosts are made at boot.
    """

    def __init__(self, vhosts: int = 1) -> None:
        """Prepare; raises ServiceMissing where there is no binary."""
        self._name_server = NameServer()
        self.names = tuple(f"node-{number}@localhost" for number in range(NODES))
        cookie = secrets.token_hex(16)
        self.nodes: list[RabbitMQ] = []
        try:
            for name in self.names:
                membership = Membership(name, self.names, cookie, self._name_server)
                self.nodes.append(RabbitMQ(vhosts=vhosts, membership=membership))
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """AMQP URL that names every node."""
        return url_of_hosts([node.url for node in self.nodes])

    def empty_url(self) -> str:
        """URL of a virtual host that nobody has used yet, at every node."""
        vhost = self.nodes[0].empty_url().removeprefix(self.nodes[0].url)
        return self.url + vhost

    def start(self) -> None:
        """Start every node that does not run and wait until each answers.

        The first one is alone at its first start: a node that joins while virtual hosts are made may lack one of them.
        """
        if not any(node.host.alive() for node in self.nodes):
            self.nodes[0].start()
        stopped = [node for node in self.nodes if not node.host.alive()]
        for node in stopped:
            node.launch()
        for node in stopped:
            node.await_answer()

    def pids(self) -> list[int]:
        """Process ids of the nodes."""
        return [node.host.pid() for node in self.nodes]

    def version(self) -> str:
        """Version that the nodes report."""
        return self.nodes[0].version()

    def close(self) -> None:
        """Kill every node and forget their data."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._name_server.close)
            for node in self.nodes:
                stack.callback(node.close)

    def leaders(self, vhost: str) -> dict[str, str]:
        """Which node leads each queue and stream of a virtual host, by name."""
        return {queue["name"]: queue["leader"] for queue in self._list(vhost, "leader")}

    def members(self, vhost: str) -> dict[str, set[str]]:
        """Which nodes keep each queue and stream of a virtual host, by name."""
        return {queue["name"]: set(queue["members"]) for queue in self._list(vhost, "members")}

    def _list(self, vhost: str, what: str) -> list[dict[str, Any]]:
        running = next(node for node in self.nodes if node.host.alive())
        queues: list[dict[str, Any]] = json.loads(
            running.control("list_queues", "--silent", "-p", vhost, "--formatter=json", "name", what)
        )
        return queues


def url_of_hosts(urls: Sequence[str]) -> str:
    """One URL in the place of several that differ in their hosts alone."""
    parts = [urlsplit(url) for url in urls]
    who = parts[0].netloc.rpartition("@")[0]
    places = ",".join(part.netloc.rpartition("@")[2] for part in parts)
    return parts[0]._replace(netloc=f"{who}@{places}").geturl()

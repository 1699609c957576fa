"""RabbitMQ's management interface: users, what each may do, and their connections.

A client's user may publish under its own address, read its own inbox and the adapters, and nothing else: it
declares nothing, because the server does. Needs the plugin rabbitmq_management and an administrator.
On a cluster every node has the interface; the one that answered last is asked first.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx

from lorabbit.broker import topology
from lorabbit.config.network import TlsSettings, tls_error, urls_of_hosts
from lorabbit.errors import BrokerUnavailable, NotAllowed

HASHING = "rabbit_password_hashing_sha256"
"""Which of RabbitMQ's ways to keep a password `lorabbit.config.enrollment.password_hash` is."""
ALREADY_THERE = "already_exists"
"""What RabbitMQ says to one of two who make the same thing at once; the second try finds it there."""
TIMEOUT_SECONDS = 10.0
MOST_CONNECTIONS = 8
"""Of one client: it needs two, and may not know yet that old ones are gone."""


def permissions_of(client: str) -> dict[str, str]:
    """What the user of a client may do with queues and exchanges, as RabbitMQ's three expressions."""
    inbox = re.escape(topology.inbox(client).name)
    return {
        "configure": "^$",
        "write": f"^{re.escape(topology.UP)}$",
        "read": rf"^({inbox}|{re.escape(topology.ADAPTERS)}\..*)$",
    }


def topic_permissions_of(client: str) -> dict[str, str]:
    """Under which routing keys the user of a client may publish; the name stands escaped, for it may have dots."""
    keys = "|".join(re.escape(key) for key in (topology.up_key(client), topology.data_key(client)))
    return {"exchange": topology.UP, "write": f"^({keys})$", "read": "^$"}


class RabbitMqAdmin:
    """See the module's docstring. Safe to call from any thread."""

    def __init__(self, url: str, broker_url: str, trust: TlsSettings) -> None:
        """Ask at `url`, whose user is an administrator, about the virtual host of `broker_url`."""
        parts = urlsplit(url)
        self._user = unquote(parts.username or "guest")
        self._vhost = quote(unquote(urlsplit(broker_url).path[1:]) or "/", safe="")
        places = [
            urlsplit(each)._replace(netloc=urlsplit(each).netloc.rpartition("@")[2]) for each in urls_of_hosts(url)
        ]
        self._where = ", ".join(place.geturl().rstrip("/") for place in places)
        self._nodes = [
            httpx.Client(
                base_url=f"{place.geturl().rstrip('/')}/api",
                auth=(self._user, unquote(parts.password or "guest")),
                timeout=TIMEOUT_SECONDS,
                verify=trust.context() if parts.scheme == "https" else True,
                trust_env=False,
            )
            for place in places
        ]

    def put_user(self, client: str, password_hash: str) -> None:
        """Make a client's user, or give it another password; raises BrokerUnavailable or NotAllowed."""
        user = quote(client, safe="")
        self._put(f"/users/{user}", {"password_hash": password_hash, "hashing_algorithm": HASHING, "tags": ""})
        self._put(f"/topic-permissions/{self._vhost}/{user}", topic_permissions_of(client))
        self._put(f"/permissions/{self._vhost}/{user}", permissions_of(client))
        self._put(f"/user-limits/{user}/max-connections", {"value": MOST_CONNECTIONS})

    def users(self) -> dict[str, str]:
        """The password hash of every user, by name."""
        return {str(each["name"]): str(each.get("password_hash", "")) for each in self._ask("GET", "/users").json()}

    def delete_user(self, client: str) -> None:
        """Delete a client's user; a missing one is fine. RabbitMQ then closes its connections."""
        self._ask("DELETE", f"/users/{quote(client, safe='')}", missing_is_fine=True)

    def close_connections(self, client: str, reason: str) -> None:
        """Close the connections of a user that the broker lists, should it not have done so by itself."""
        for connection in self._ask("GET", "/connections").json():
            if connection.get("user") == client:
                name = quote(str(connection["name"]), safe="")
                self._ask("DELETE", f"/connections/{name}", missing_is_fine=True, headers={"X-Reason": reason})

    def close(self) -> None:
        """Close the connections to it."""
        for node in self._nodes:
            node.close()

    def _put(self, path: str, body: dict[str, Any]) -> None:
        self._ask("PUT", path, json=body)

    def _ask(self, verb: str, path: str, *, missing_is_fine: bool = False, **request: Any) -> httpx.Response:  # noqa: ANN401
        what = f"RabbitMQ's management interface at {self._where}"
        try:
            answer = self._first_answer(verb, path, request)
            if answer.status_code == httpx.codes.BAD_REQUEST and ALREADY_THERE in answer.text:
                answer = self._first_answer(verb, path, request)
        except httpx.TransportError as error:
            raise BrokerUnavailable(f"{what} cannot be reached: {tls_error(error) or error}") from error
        if answer.status_code in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
            raise NotAllowed(f"{what} refuses {self._user}: LORABBIT_MANAGEMENT_URL needs an administrator")
        if answer.is_success or (missing_is_fine and answer.status_code == httpx.codes.NOT_FOUND):
            return answer
        raise BrokerUnavailable(f"{what} answered {verb} {path} with {answer.status_code}: {answer.text[:200]}")

    def _first_answer(self, verb: str, path: str, request: dict[str, Any]) -> httpx.Response:
        """Ask one node after the other; every request may be made twice. Raises the last one's TransportError."""
        nodes = list(self._nodes)
        first = nodes[0]
        while True:
            try:
                answer = nodes[0].request(verb, path, **request)
            except httpx.TransportError:
                nodes.append(nodes.pop(0))
                if nodes[0] is first:
                    raise
            else:
                self._nodes = nodes
                return answer

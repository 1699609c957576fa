"""The registry of clients: identities, addresses and leases.

Identities are kept in the store; who is *present* is this server's own observation, so a server
that starts sees nobody until they speak. Clients that were alive when the last server stopped get
one lease of grace, in which nobody else is given their identity.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from lorabbit.protocol.messages import Hello
from lorabbit.state.base import ClientEntry, StateStore
from lorabbit.types import ClientCapabilities, ClientId


@dataclass(slots=True)
class RegisteredClient:
    """One client as last heard of."""

    client: ClientId
    address: str
    capabilities: ClientCapabilities
    expires_ms: int = 0
    heard_ms: int = 0
    """When it was heard of last."""
    present: bool = False


class ClientRegistry:
    """See the module's docstring; for the loop thread."""

    def __init__(self, store: StateStore, epoch: int = 0, *, lease_ms: int) -> None:
        """Keep leases of this length, as the server that leads in this epoch."""
        self._store, self._epoch = store, epoch
        self._lease_ms = lease_ms
        self._clients: dict[ClientId, RegisteredClient] = {}
        self._by_address: dict[str, ClientId] = {}
        self._introduced: dict[str, Hello] = {}
        """What whoever is at an address said of itself last, also where its identity is another's now."""
        self._heard: set[ClientId] = set()
        self._asked_ms = 0
        """When it was asked last whose lease has ended."""
        self._since_ms = 0
        """When this server began to listen."""

    def load(self, now_ms: int) -> None:
        """Read every known identity: nobody is lost before one more lease, which those alive a moment ago get anew.

        The last server's clock may have been another.
        """
        self._asked_ms = self._since_ms = now_ms
        for name, entry in self._store.clients().items():
            client = ClientId(name)
            recent = entry.expires_ms > now_ms - self._lease_ms
            expires = now_ms + self._lease_ms if entry.expires_ms else 0
            declared = ClientCapabilities.model_validate_json(entry.record)
            heard = min(now_ms, max(0, entry.expires_ms - self._lease_ms))
            self._clients[client] = RegisteredClient(
                client, entry.address, declared, expires_ms=expires, heard_ms=heard
            )
            if recent:
                self._heard.add(client)
        self._by_address = {c.address: c.client for c in self._clients.values()}
        self.renew_leases()

    def hello(self, message: Hello, now_ms: int) -> ClientId:
        """Give a client its identity; it is present from now on."""
        expires = now_ms + self._lease_ms
        declared = message.capabilities
        client = ClientId(self._lease(message.address, message.client, declared, now_ms=now_ms, expires_ms=expires))
        self._introduced[message.address] = message
        before = self._by_address.get(message.address)
        if before is not None and before != client:
            self._clients[before].present = False
        displaced = self._clients.get(client)
        if displaced is not None and displaced.address != message.address:
            self._by_address.pop(displaced.address, None)
        self._by_address[message.address] = client
        self._clients[client] = RegisteredClient(
            client, message.address, declared, expires_ms=expires, heard_ms=now_ms, present=True
        )
        return client

    def _lease(
        self, address: str, client: str | None, declared: ClientCapabilities, *, now_ms: int, expires_ms: int
    ) -> str:
        """Lease an identity to the client at an address, in the store."""
        record = json.dumps(declared.model_dump(mode="json"))
        wanted = ClientEntry(client or "", address, record, expires_ms)
        return self._store.lease_identity(wanted, now_ms=now_ms, epoch=self._epoch)

    def introduction(self, address: str, wanted: ClientId | None) -> Hello:
        """Return the hello of a client that lost its identity, or that this server knows nothing of."""
        said = self._introduced.get(address, Hello(address=address))
        return said.model_copy(update={"client": wanted, "outbox": ()})

    def heard(self, address: str, now_ms: int) -> tuple[ClientId | None, bool]:
        """Renew the lease of the client at an address, or lease it anew; its identity, and whether it was absent."""
        client = self._by_address.get(address)
        if client is None:
            return None, False
        entry, expires = self._clients[client], now_ms + self._lease_ms
        if not entry.expires_ms:
            self._lease(address, client, entry.capabilities, now_ms=now_ms, expires_ms=expires)
        back = not entry.present
        entry.present, entry.heard_ms, entry.expires_ms = True, now_ms, expires
        self._heard.add(client)
        return client, back

    def leave(self, address: str) -> ClientId | None:
        """End the lease of the client at an address; its identity is free."""
        client = self._by_address.get(address)
        self._introduced.pop(address, None)
        if client is None:
            return None
        entry = self._clients[client]
        entry.present, entry.expires_ms = False, 0
        self._heard.discard(client)
        self._store.free_identity(client, address, epoch=self._epoch)
        return client

    def expire(self, now_ms: int, every_ms: int) -> list[ClientId]:
        """Return the clients whose lease has just ended; to be asked every `every_ms`.

        Where that is late this server was busy or stopped and heard nobody, whoever spoke: leases last as much longer.
        """
        deaf_ms = max(0, now_ms - self._asked_ms - every_ms)
        self._asked_ms = now_ms
        for entry in self._clients.values():
            entry.expires_ms += deaf_ms if entry.expires_ms else 0
        gone = [c for c in self._clients.values() if c.expires_ms and c.expires_ms <= now_ms]
        for entry in gone:
            entry.present, entry.expires_ms = False, 0
            self._heard.discard(entry.client)
        return [entry.client for entry in gone]

    def renew_leases(self) -> None:
        """Bring the leases renewed since the last call to the store, in one command."""
        heard, self._heard = self._heard, set()
        self._store.touch_clients({client: self._clients[client].expires_ms for client in heard})

    @property
    def present(self) -> tuple[ClientId, ...]:
        """Clients that are here; for any thread."""
        return tuple(entry.client for entry in list(self._clients.values()) if entry.present)

    @property
    def heard_ms(self) -> dict[str, int]:
        """When each client was heard of last, where it ever was; for any thread."""
        return {entry.client: entry.heard_ms for entry in list(self._clients.values()) if entry.heard_ms}

    @property
    def silent_ms(self) -> dict[str, int]:
        """Since when each client may have been silent: no server before this one counts; for any thread."""
        return {entry.client: max(self._since_ms, entry.heard_ms) for entry in list(self._clients.values())}

    @property
    def capabilities(self) -> dict[ClientId, ClientCapabilities]:
        """Capabilities of the clients that are present."""
        return {entry.client: entry.capabilities for entry in self._clients.values() if entry.present}

    def get(self, client: ClientId) -> RegisteredClient | None:
        """A client by its identity."""
        return self._clients.get(client)

    def at(self, address: str) -> ClientId | None:
        """The identity of the client at an address."""
        return self._by_address.get(address)

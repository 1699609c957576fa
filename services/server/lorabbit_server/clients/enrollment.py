"""Enrollment: which clients may speak to this server, and under which identity.

Without a management interface clients share a user of the broker, and a message has to carry the name that
the broker checked, whatever it is. With one, every client joins with a token, gets a user of its own, and a message
counts only if its user, its address and its identity are one and the same.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from lorabbit.broker.base import Delivery
from lorabbit.config.enrollment import JoinRequest, JoinResponse, JoinTokenRequest, digest, new_secret
from lorabbit.config.settings import ServerSettings
from lorabbit.errors import BadInput, JoinRefused, LoRAbbitError, Refused
from lorabbit.state.enrollment import EnrollmentStore, JoinToken, tokens_named
from lorabbit_server.clients.rabbitmq_admin import RabbitMqAdmin

log = structlog.get_logger()
WHY_NOT = {
    "unknown": "the server knows no such join token; ask its operator for one",
    "expired": "the join token has expired; ask the server's operator for another",
    "used": "the join token has been used up; ask the server's operator for another",
    "other-client": "the join token is another client's",
    "taken": "another client of this name has joined; choose another name, "
    "or ask the server's operator for a token of this client's own",
    "revoked": "this client was revoked; it needs a token that the operator makes for it by name",
}


class ClientAccess:
    """See the module's docstring. Safe to call from any thread; `check` and `take_note` are the loop's."""

    def __init__(self, enrollment: EnrollmentStore, settings: ServerSettings) -> None:
        """Give out users where the settings name a management interface."""
        self._enrollment = enrollment
        url = settings.management_url
        self._admin = None if url is None else RabbitMqAdmin(url, settings.broker_url, settings.trust)
        self._revoked: frozenset[str] = frozenset()
        self.on_revoked: Callable[[], None] = lambda: None
        """Called, from any thread, when somebody was revoked here."""

    @property
    def is_enrolled(self) -> bool:
        """Whether every client has a user of its own."""
        return self._admin is not None

    # ---- messages ----
    def check(self, delivery: Delivery, address: str) -> None:
        """Refuse a message whose sender the broker did not check, or that is not the one it claims to be."""
        if delivery.sender is None:
            raise Refused("unsigned", f"a message from {address} carries no user_id")
        if not self.is_enrolled:
            return
        if delivery.sender != address:
            raise Refused("forged", f"the user {delivery.sender} sent it as {address}")
        if address in self._revoked:
            raise Refused("revoked", f"{address} was revoked")

    def take_note(self) -> frozenset[str]:
        """Read who was revoked; returns those who were not when this was called last."""
        if not self.is_enrolled:
            return frozenset()
        before, self._revoked = self._revoked, self._enrollment.revoked()
        return self._revoked - before

    # ---- tokens ----
    def make_token(self, wish: JoinTokenRequest, *, now_ms: int) -> tuple[str, JoinToken]:
        """Make a join token; the secret is in the answer and nowhere else."""
        self._needed()
        secret = new_secret()
        token = JoinToken(digest(secret), wish.client or "", wish.uses, expires_ms=now_ms + round(wish.seconds * 1000))
        self._enrollment.add_token(token)
        log.info("token-created", token=token.id, client=wish.client, uses=wish.uses, seconds=wish.seconds)
        return secret, token

    def tokens(self, *, now_ms: int) -> list[JoinToken]:
        """Tokens that can still be used; the others are forgotten."""
        usable = []
        for token in self._enrollment.tokens():
            if token.expires_ms <= now_ms or token.used >= token.uses:
                self._enrollment.drop_token(token)
            else:
                usable.append(token)
        return usable

    def drop_token(self, id_: str) -> None:
        """Make a token worthless; raises BadInput when none or more than one is meant."""
        found = tokens_named(self._enrollment.tokens(), id_)
        if len(found) != 1:
            raise BadInput(f"{len(found)} tokens begin with {id_!r}; list them with: lorabbit tokens")
        self._enrollment.drop_token(found[0])
        log.info("token-deleted", token=found[0].id)

    # ---- clients ----
    def join(self, wish: JoinRequest, *, now_ms: int) -> JoinResponse:
        """Give a client a user of its own; the same wish again is fine. Raises JoinRefused."""
        admin = self._needed()
        verdict = self._enrollment.join(digest(wish.token), wish.client, wish.password_hash, now_ms=now_ms)
        if verdict != "ok":
            log.warning("enrollment-refused", client=wish.client, reason=verdict)
            raise JoinRefused(verdict, f"{wish.client} may not join: {WHY_NOT[verdict]}")
        admin.put_user(wish.client, wish.password_hash)
        log.info("client-enrolled", client=wish.client)
        return JoinResponse(user=wish.client)

    def revoke(self, client: str, *, now_ms: int) -> None:
        """Take a client's user away and close its connections; raises BadInput when it never joined."""
        admin = self._needed()
        if not self._enrollment.revoke(client, now_ms=now_ms):
            known = ", ".join(member.client for member in self._enrollment.members()) or "nobody"
            raise BadInput(f"no client {client!r} has joined; those who have: {known}")
        admin.delete_user(client)
        admin.close_connections(client, f"{client} was revoked")
        log.info("client-revoked", client=client)
        self.on_revoked()

    def restore(self) -> None:
        """Bring the broker's users to what the store says: one that lost them, or a server that died half-way."""
        if self._admin is None:
            return
        users = self._admin.users()
        for member in self._enrollment.members():
            if users.get(member.client) != member.password_hash:
                self._admin.put_user(member.client, member.password_hash)
                log.info("user-restored", client=member.client)
        for client in self._enrollment.revoked() & users.keys():
            self._admin.delete_user(client)

    def close(self) -> None:
        """Close connections."""
        if self._admin is not None:
            self._admin.close()

    def _needed(self) -> RabbitMqAdmin:
        if self._admin is None:
            why = "clients share one user of the broker here"
            raise LoRAbbitError(f"{why}; set LORABBIT_MANAGEMENT_URL at the server to give each its own")
        return self._admin

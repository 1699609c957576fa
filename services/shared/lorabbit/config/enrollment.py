"""Enrollment: how a client asks for a RabbitMQ user of its own, and what is never sent or kept.

The client makes its password itself and sends only the salted hash that RabbitMQ stores, so neither the
wire nor the server ever holds it, and the same request may be made again after a crash. Of a join token the
server keeps the sha256 alone.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lorabbit.config.settings import Address

SALT_BYTES = 4
"""Of RabbitMQ's password hashes: base64(salt + sha256(salt + password))."""
HASH_PATTERN = r"^[A-Za-z0-9+/]{48}$"


class JoinRequest(BaseModel):
    """Client -> server, over HTTP: let me in under this name."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    token: str = Field(min_length=16, max_length=200, repr=False)
    client: Address
    """The name it wants: its RabbitMQ user, its inbox and its identity."""
    password_hash: str = Field(pattern=HASH_PATTERN, repr=False)


class JoinResponse(BaseModel):
    """Server -> client: this user exists now, with the password that the hash is of."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    user: Address


class JoinTokenRequest(BaseModel):
    """Operator -> server: make a join token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: Address | None = None
    """The only client that may use it, which may also replace what it had; None: whoever has it, under a new name."""
    uses: Annotated[int, Field(ge=1, le=100_000)] = 1
    seconds: Annotated[float, Field(gt=0, le=366 * 86400)] = 3600.0
    """How long it can be used."""


def new_secret() -> str:
    """Return a password or token of 192 random bits."""
    return secrets.token_urlsafe(24)


def digest(token: str) -> str:
    """Return what is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def password_hash(password: str) -> str:
    """Return a password as RabbitMQ keeps it, with a new salt."""
    salt = secrets.token_bytes(SALT_BYTES)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()

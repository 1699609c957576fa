"""Credentials: a client's own RabbitMQ user, got once with a join token and kept on its volume.

The password is made and written down before the server hears of it, so a client that dies anywhere on the way
asks again for the same. The files are replaced in one step and their owner's alone (0600). Once joined, the token is
no longer needed. Another token makes a client join again that was revoked; where it is not for this client, as when
a token for newcomers was put in the place of its own, the client stays who it was.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import structlog

from lorabbit.config.enrollment import JoinRequest, JoinResponse, digest, new_secret, password_hash
from lorabbit.config.network import tls_error
from lorabbit.config.settings import ClientSettings
from lorabbit.errors import BadInput, NotAllowed
from lorabbit.runtime.atomic_files import replacing
from lorabbit.runtime.backoff import Backoff

log = structlog.get_logger()
FILE, BEGUN = "credentials.json", "credentials-begun.json"
"""What a client has joined with, and what it has begun to join with."""
MODE = 0o600
TIMEOUT_SECONDS = 30.0
REFUSALS = range(400, 500)
"""HTTP answers that asking again does not change."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client is known by; never logged."""

    user: str
    password: str
    token: str
    """Digest of the last join token that was tried."""
    password_hash: str

    def __repr__(self) -> str:
        """Show no secret."""
        return f"Credentials({self.user!r})"


def settled(settings: ClientSettings) -> ClientSettings:
    """Return the settings with the client's own user in them, joining first where there is a token for it.

    Waits for the server as long as it takes. Raises NotAllowed when the server refuses, and BadInput when the
    file of credentials is damaged.
    """
    path, begun = settings.folder / FILE, settings.folder / BEGUN
    known, token = read(path), settings.join_token
    if token is not None and (known is None or known.token != digest(token)):
        known = _joined(settings, token, begun, known)
        write(path, known)
        begun.unlink(missing_ok=True)
    if known is None:
        if begun.exists():
            raise BadInput(f"{begun} belongs to a client that had begun to join; set LORABBIT_JOIN_TOKEN again")
        return settings
    url = url_of(settings.broker_url, known)
    return settings.model_copy(update={"broker_url": url, "address": known.user, "client": known.user})


def _joined(settings: ClientSettings, token: str, path: Path, before: Credentials | None) -> Credentials:
    """Join with a token, keeping on `path` what it asks for; `before` is kept where the server refuses the token."""
    asked = read(path)
    if asked is None or asked.token != digest(token):
        password, user = new_secret(), settings.client or settings.address
        asked = Credentials(user, password, digest(token), password_hash(password))
        write(path, asked)
    try:
        _join(settings, token, asked)
    except NotAllowed as error:
        if before is None:
            raise
        log.warning("join-token-ignored", client=before.user, why=str(error))
        return replace(before, token=digest(token))
    log.info("client-enrolled", client=asked.user)
    return asked


def read(path: Path) -> Credentials | None:
    """Return what is kept; None when there is nothing."""
    try:
        return Credentials(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        todo = "remove it and set LORABBIT_JOIN_TOKEN to a new token"
        raise BadInput(f"{path} is damaged and holds no credentials; {todo}") from error


def write(path: Path, credentials: Credentials) -> None:
    """Replace the file in one step that survives a power cut; nobody else may read it at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE), "w", encoding="utf-8") as file:
            json.dump(asdict(credentials), file)


def url_of(broker_url: str, credentials: Credentials) -> str:
    """Put a user and its password into the broker's URL, in the place of any other."""
    parts = urlsplit(broker_url)
    place = parts.netloc.rpartition("@")[2]
    who = f"{quote(credentials.user, safe='')}:{quote(credentials.password, safe='')}"
    return parts._replace(netloc=f"{who}@{place}").geturl()


def _join(settings: ClientSettings, token: str, credentials: Credentials) -> None:
    """Ask the server for the user until it answers."""
    import httpx  # noqa: PLC0415 - needed once in a client's life

    wish = JoinRequest(token=token, client=credentials.user, password_hash=credentials.password_hash)
    backoff, told = Backoff(0.2, 10.0), ""
    with httpx.Client(base_url=settings.server_url, timeout=TIMEOUT_SECONDS, verify=settings.trust.context()) as http:
        while True:
            try:
                answer = http.post("/join", json=wish.model_dump())
            except httpx.TransportError as error:
                why = str(tls_error(error) or error)
            else:
                if answer.is_success:
                    JoinResponse.model_validate_json(answer.content)
                    return
                why = _sentence(answer.content) or f"it answered {answer.status_code}"
                if answer.status_code in REFUSALS:
                    raise NotAllowed(f"the server at {settings.server_url} does not let this client join: {why}")
            if why != told:
                log.warning("enrollment-delayed", server=settings.server_url, why=why)
            told = why
            time.sleep(backoff.next_seconds())


def _sentence(content: bytes) -> str:
    """The server's own sentence; empty where it sent none."""
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return ""

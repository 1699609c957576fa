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
FILE, PENDING_FILE = "credentials.json", "credentials-begun.json"
"""Credentials of an enrolled client, and those of an enrollment that has not finished."""
MODE = 0o600
TIMEOUT_SECONDS = 30.0
REFUSALS = range(400, 500)
"""HTTP answers that asking again does not change."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A client's RabbitMQ user; never logged."""

    user: str
    password: str
    token: str
    """Digest of the last join token that was tried."""
    password_hash: str

    def __repr__(self) -> str:
        """Show no secret."""
        return f"Credentials({self.user!r})"


def with_credentials(settings: ClientSettings) -> ClientSettings:
    """Return the settings with the client's own user, enrolling first if there is a new token.

    Waits for the server as long as it takes. Raises NotAllowed when the server refuses, and BadInput when the
    file of credentials is damaged.
    """
    path, pending_path = settings.folder / FILE, settings.folder / PENDING_FILE
    stored, token = read(path), settings.join_token
    if token is not None and (stored is None or stored.token != digest(token)):
        stored = _enroll(settings, token, pending_path, stored)
        write(path, stored)
        pending_path.unlink(missing_ok=True)
    if stored is None:
        if pending_path.exists():
            raise BadInput(f"{pending_path} belongs to a client that had begun to join; set LORABBIT_JOIN_TOKEN again")
        return settings
    url = url_of(settings.broker_url, stored)
    return settings.model_copy(update={"broker_url": url, "address": stored.user, "client": stored.user})


def _enroll(settings: ClientSettings, token: str, path: Path, previous: Credentials | None) -> Credentials:
    """Enroll with a token; `path` keeps the request. If the server refuses it, `previous` stays valid."""
    pending = read(path)
    if pending is None or pending.token != digest(token):
        password, user = new_secret(), settings.client or settings.address
        pending = Credentials(user, password, digest(token), password_hash(password))
        write(path, pending)
    try:
        _request_user(settings, token, pending)
    except NotAllowed as error:
        if previous is None:
            raise
        log.warning("join-token-ignored", client=previous.user, why=str(error))
        return replace(previous, token=digest(token))
    log.info("client-enrolled", client=pending.user)
    return pending


def read(path: Path) -> Credentials | None:
    """Return the stored credentials; None without a file."""
    try:
        return Credentials(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        todo = "remove it and set LORABBIT_JOIN_TOKEN to a new token"
        raise BadInput(f"{path} is damaged and holds no credentials; {todo}") from error


def write(path: Path, credentials: Credentials) -> None:
    """Replace the file atomically and durably; only its owner can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE), "w", encoding="utf-8") as file:
            json.dump(asdict(credentials), file)


def url_of(broker_url: str, credentials: Credentials) -> str:
    """Put a user and its password into the broker's URL, in the place of any other."""
    parts = urlsplit(broker_url)
    host = parts.netloc.rpartition("@")[2]
    userinfo = f"{quote(credentials.user, safe='')}:{quote(credentials.password, safe='')}"
    return parts._replace(netloc=f"{userinfo}@{host}").geturl()


def _request_user(settings: ClientSettings, token: str, credentials: Credentials) -> None:
    """Ask the server for the user until it answers."""
    import httpx  # noqa: PLC0415 - needed once in a client's life

    request = JoinRequest(token=token, client=credentials.user, password_hash=credentials.password_hash)
    backoff, logged = Backoff(0.2, 10.0), ""
    with httpx.Client(base_url=settings.server_url, timeout=TIMEOUT_SECONDS, verify=settings.trust.context()) as http:
        while True:
            try:
                answer = http.post("/join", json=request.model_dump())
            except httpx.TransportError as error:
                why = str(tls_error(error) or error)
            else:
                if answer.is_success:
                    JoinResponse.model_validate_json(answer.content)
                    return
                why = _error_text(answer.content) or f"it answered {answer.status_code}"
                if answer.status_code in REFUSALS:
                    raise NotAllowed(f"the server at {settings.server_url} does not let this client join: {why}")
            if why != logged:
                log.warning("enrollment-delayed", server=settings.server_url, why=why)
            logged = why
            time.sleep(backoff.next_seconds())


def _error_text(content: bytes) -> str:
    """The error message in an answer; empty without one."""
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return ""

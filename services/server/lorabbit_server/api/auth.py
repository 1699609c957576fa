"""Authentication of HTTP requests: the operator's token, and how clients join and are revoked.

A client shows its join token, once; everything else needs the operator's, where the server has one. Health and
numbers (`/healthz`, `/readyz`, `/metrics`) are open: probes and Prometheus hold no secret.

`RequestBodyLimit` bounds the bytes and the seconds of a request's body before anything reads it.

A join needs no secret to be asked for, so whoever reaches the server can send one. A body is read to its end here, in
bounded memory and time; the application sees it whole.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from types import MappingProxyType
from typing import Any

import structlog
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorabbit.config.enrollment import JoinRequest, JoinTokenRequest
from lorabbit.errors import JoinRefused, Refused
from lorabbit.protocol.codec import MAX_MESSAGE_BYTES
from lorabbit.state.enrollment import JoinToken
from lorabbit_server.server import Server

log = structlog.get_logger()
JOIN = "/join"
MAX_JOIN_BYTES = 4096
"""A token, a name and a hash, with room to spare."""
READ_SECONDS = 10.0
"""From the head of a request to the end of its body."""
STATUS = MappingProxyType({"too-large": 413, "too-slow": 408})


class RequestBodyLimit:
    """ASGI middleware: refuses bodies that are too large or too slow, and counts them by reason."""

    def __init__(self, app: ASGIApp, refused: Callable[[str], None], seconds: float = READ_SECONDS) -> None:
        """Stand before `app`; `refused` is told the reason of every refusal, `seconds` are there for a body."""
        self._app, self._refused, self._seconds = app, refused, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then let the application go on, or answer in its place."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = MAX_JOIN_BYTES if scope["path"] == JOIN else MAX_MESSAGE_BYTES
        try:
            body = await _read(receive, most, self._seconds)
        except Refused as why:
            self._refused(why.reason)
            log.warning("request-refused", path=scope["path"][:200], reason=why.reason)
            answer = JSONResponse({"error": why.detail}, STATUS[why.reason], {"Connection": "close"})
            await answer(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)


async def _read(receive: Receive, most: int, seconds: float) -> bytes | None:
    """Read a whole body, None where the other side went away; raises Refused."""
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > most:
                    raise Refused("too-large", f"a body of more than {most} bytes; send less")
    except TimeoutError as error:
        raise Refused("too-slow", f"the body took more than {seconds:.0f} s; send it at once") from error
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read, and after it what really comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


OPEN = frozenset({"/healthz", "/readyz", "/metrics", JOIN})
Json = dict[str, Any]


def guard(app: FastAPI, token: str | None, refused: Callable[[str], None]) -> None:
    """Let nobody but the operator in, where there is a token to show, and nothing that is too large or too slow.

    `refused` is told the reason of every refusal.
    """
    app.add_middleware(RequestBodyLimit, refused=refused)
    if token is None:
        return
    wanted = f"Bearer {token}".encode()

    @app.middleware("http")
    async def check(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        shown = request.headers.get("authorization", "").encode()
        if request.url.path in OPEN or hmac.compare_digest(shown, wanted):
            return await go_on(request)
        refused("unauthorized")
        sentence = "this server answers its operator alone; set LORABBIT_HTTP_TOKEN to the server's own"
        return JSONResponse({"error": sentence}, 401, {"WWW-Authenticate": "Bearer"})


def add_access(app: FastAPI, service: Server, refused: Callable[[str], None]) -> None:
    """Make tokens, let clients join, and send them away; `refused` is told why a client may not join."""
    access = service.access

    @app.post("/tokens", status_code=201)
    def make(wish: JoinTokenRequest) -> Json:
        secret, token = access.make_token(wish, now_ms=service.now_ms())
        return {"token": secret, **_shown(token)}

    @app.get("/tokens")
    def tokens() -> list[Json]:
        return [_shown(token) for token in access.tokens(now_ms=service.now_ms())]

    @app.delete("/tokens/{token}")
    def drop(token: str) -> Json:
        access.drop_token(token)
        return {"dropped": token}

    @app.post(JOIN, status_code=201)
    async def join(request: Request) -> Json:
        try:
            wish = JoinRequest.model_validate_json(await request.body())
            return (await run_in_threadpool(access.join, wish, now_ms=service.now_ms())).model_dump()
        except ValidationError as error:
            refused("malformed")
            raise HTTPException(400, _malformed(error)) from error
        except JoinRefused as error:
            refused(error.reason)
            raise

    @app.post("/clients/{client}/revoke")
    def revoke(client: str) -> Json:
        access.revoke(client, now_ms=service.now_ms())
        return {"revoked": client, "tokens": [token.id for token in access.tokens(now_ms=service.now_ms())]}


def _malformed(error: ValidationError) -> str:
    """Say what is wrong with a wish without repeating any of it: part of it is secret."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:100]
    return (
        f"{where}: {first['msg']}"
        if where in JoinRequest.model_fields
        else f"this is no request to join: {first['type']}"
    )


def _shown(token: JoinToken) -> Json:
    """A token as an operator sees it."""
    left = token.uses - token.used
    return {"id": token.id, "client": token.client or None, "uses_left": left, "expires_ms": token.expires_ms}

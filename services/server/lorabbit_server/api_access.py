"""The HTTP interface's door: the operator's token, and how clients join and are sent away.

A client shows its join token, once; everything else needs the operator's, where the server has one. Health and
numbers (`/healthz`, `/readyz`, `/metrics`) are open: probes and Prometheus hold no secret.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from lorabbit.enrolment import Join, TokenWish
from lorabbit.state.roster import Token
from lorabbit_server.service import Service

OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/join"})
Json = dict[str, Any]


def guard(app: FastAPI, token: str | None) -> None:
    """Let nobody but the operator in, where there is a token to show."""
    if token is None:
        return
    wanted = f"Bearer {token}".encode()

    @app.middleware("http")
    async def check(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        shown = request.headers.get("authorization", "").encode()
        if request.url.path in OPEN or hmac.compare_digest(shown, wanted):
            return await go_on(request)
        sentence = "this server answers its operator alone; set LORABBIT_HTTP_TOKEN to the server's own"
        return JSONResponse({"error": sentence}, 401, {"WWW-Authenticate": "Bearer"})


def add_access(app: FastAPI, service: Service) -> None:
    """Make tokens, let clients join, and send them away."""
    access = service.access

    @app.post("/tokens", status_code=201)
    def make(wish: TokenWish) -> Json:
        secret, token = access.make_token(wish, now_ms=service.now_ms())
        return {"token": secret, **_shown(token)}

    @app.get("/tokens")
    def tokens() -> list[Json]:
        return [_shown(token) for token in access.tokens(now_ms=service.now_ms())]

    @app.delete("/tokens/{token}")
    def drop(token: str) -> Json:
        access.drop_token(token)
        return {"dropped": token}

    @app.post("/join", status_code=201)
    def join(wish: Join) -> Json:
        return access.join(wish, now_ms=service.now_ms()).model_dump()

    @app.post("/clients/{client}/revoke")
    def revoke(client: str) -> Json:
        access.revoke(client, now_ms=service.now_ms())
        return {"revoked": client, "tokens": [token.id for token in access.tokens(now_ms=service.now_ms())]}


def _shown(token: Token) -> Json:
    """A token as an operator sees it."""
    left = token.uses - token.used
    return {"id": token.id, "client": token.client or None, "uses_left": left, "expires_ms": token.expires_ms}

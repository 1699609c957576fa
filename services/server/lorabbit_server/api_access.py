"""The HTTP interface's door: the operator's token, and how clients join and are sent away.

A client shows its join token, once; everything else needs the operator's, where the server has one. Health and
numbers (`/healthz`, `/readyz`, `/metrics`) are open: probes and Prometheus hold no secret.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from lorabbit.enrolment import Join, TokenWish
from lorabbit.errors import JoinRefused
from lorabbit.state.roster import Token
from lorabbit_server.api_bodies import JOIN, Bodies
from lorabbit_server.service import Service

OPEN = frozenset({"/healthz", "/readyz", "/metrics", JOIN})
Json = dict[str, Any]


def guard(app: FastAPI, token: str | None, refused: Callable[[str], None]) -> None:
    """Let nobody but the operator in, where there is a token to show, and nothing that is too large or too slow.

    `refused` is told the reason of every refusal.
    """
    app.add_middleware(Bodies, refused=refused)
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


def add_access(app: FastAPI, service: Service, refused: Callable[[str], None]) -> None:
    """Make tokens, let clients join, and send them away; `refused` is told why a client may not join."""
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

    @app.post(JOIN, status_code=201)
    async def join(request: Request) -> Json:
        try:
            wish = Join.model_validate_json(await request.body())
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
    return f"{where}: {first['msg']}" if where in Join.model_fields else f"this is no request to join: {first['type']}"


def _shown(token: Token) -> Json:
    """A token as an operator sees it."""
    left = token.uses - token.used
    return {"id": token.id, "client": token.client or None, "uses_left": left, "expires_ms": token.expires_ms}

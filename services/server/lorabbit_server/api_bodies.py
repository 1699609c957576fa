"""Bodies: what an HTTP request may bring, in bytes and in seconds, before anything reads it.

A join needs no secret to be asked for, so whoever reaches the server can send one. A body is read to its end here, in
bounded memory and time; the application sees it whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import MappingProxyType

import structlog
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorabbit.codec import MAX_MESSAGE_BYTES
from lorabbit.errors import Refused

log = structlog.get_logger()
JOIN = "/join"
MAX_JOIN_BYTES = 4096
"""A token, a name and a hash, with room to spare."""
READ_SECONDS = 10.0
"""From the head of a request to the end of its body."""
STATUS = MappingProxyType({"too-large": 413, "too-slow": 408})


class Bodies:
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

"""Requests that nobody honest sends to the HTTP interface: one sentence in answer, a name that is counted, no more.

Whoever reaches the server may ask to join, so that door is thrown everything.
"""

from __future__ import annotations

import base64
import json
import socket
import string
from contextlib import suppress

import pytest
from hostile_requests import BODIES, CODINGS, KINDS, NOWHERE, OPERATOR, TOKEN, WISH, refusals
from hypothesis import example, given, settings
from hypothesis import strategies as st
from served import Served

from lorabbit.config.enrollment import JoinRequest, JoinTokenRequest
from lorabbit.errors import JoinRefused
from lorabbit.protocol.codec import MAX_MESSAGE_BYTES
from lorabbit_server.api.auth import MAX_JOIN_BYTES, RequestBodyLimit
from lorabbit_server.http_server import HttpServer


@pytest.fixture(scope="module")
def enrolling(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"), management_url=NOWHERE, http_token=OPERATOR)
    made.lead()
    yield made
    made.close()


def refused(served, reason, ask):
    """The answer to a request that is refused by this name, once."""
    before = refusals(served)
    answer = ask()
    assert refusals(served) == before | {reason: before.get(reason, 0) + 1}
    assert list(answer.json()) == ["error"]
    assert WISH["password_hash"] not in answer.text
    assert TOKEN not in answer.text
    return answer


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(body=BODIES, kind=KINDS, coding=CODINGS)
@example(body=b"[" * 4000, kind="application/json", coding="")
@example(body=b'{"client": ' * 300, kind="application/json", coding="")
@example(body=json.dumps(WISH | {"client": "x" * 4000}).encode()[:MAX_JOIN_BYTES], kind="", coding="")
@example(body=json.dumps(WISH | {"token": 0}).replace("0}", "9" * 3500 + "}").encode(), kind="", coding="")
@example(body=json.dumps(WISH).encode("utf-16"), kind="application/json", coding="")
@example(body=b"\x1f\x8b" + bytes(100), kind="application/json", coding="gzip")
def test_no_request_to_join_breaks_the_door_and_each_is_refused_by_name(enrolling, body, kind, coding):
    headers = {"Content-Type": kind, "Content-Encoding": coding}
    before = sum(refusals(enrolling).values())

    answer = enrolling.web.post("/join", content=body, headers=headers)

    assert answer.status_code in {400, 403}
    assert list(answer.json()) == ["error"]
    assert len(answer.content) < 1000
    assert sum(refusals(enrolling).values()) == before + 1


@pytest.mark.parametrize(
    "change",
    [
        {"client": "../../etc"},
        {"client": "a/b"},
        {"client": "."},
        {"client": "A"},
        {"client": "a\n"},
        {"client": "a" * 64},
        {"client": ""},
        {"client": "a*"},
        {"client": None},
        {"token": "short"},
        {"token": "t" * 201},
        {"password_hash": "x"},
        {"password_hash": base64.b64encode(bytes(1000)).decode()},
        {"uses": 5},
    ],
    ids=str,
)
def test_a_wish_that_could_mean_something_else_is_malformed(enrolling, change):
    answer = refused(enrolling, "malformed", lambda: enrolling.web.post("/join", json=WISH | change))

    assert answer.status_code == 400


@pytest.mark.parametrize("path", ["/join", "/jobs", "/tokens"])
def test_a_body_that_is_too_large_is_refused(enrolling, path):
    most = MAX_JOIN_BYTES if path == "/join" else MAX_MESSAGE_BYTES
    headers = {"Authorization": f"Bearer {OPERATOR}"}

    answer = refused(
        enrolling, "too-large", lambda: enrolling.web.post(path, content=b" " * (most + 1), headers=headers)
    )

    assert answer.status_code == 413


def test_a_body_without_an_end_is_read_no_further_than_it_may_be_large(enrolling):
    head = b"POST /join HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", enrolling.http.port), timeout=30) as link, suppress(ConnectionError):
        link.sendall(head)
        while sent < 2**28:
            link.sendall(piece)
            sent += len(piece)

    assert sent < 2**26  # what the sockets of both sides hold, and not a quarter of a gigabyte


def test_a_body_that_comes_too_slowly_is_refused():
    counted = []

    async def app(_scope, _receive, _send):
        raise AssertionError("it came to the application")

    door = HttpServer(RequestBodyLimit(app, counted.append, seconds=0.2), "127.0.0.1", 0)
    door.start()
    try:
        with socket.create_connection(("127.0.0.1", door.port), timeout=30) as link:
            link.sendall(b"POST /join HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            answer = b""
            while piece := link.recv(2**16):
                answer += piece
    finally:
        door.close()

    assert answer.startswith(b"HTTP/1.1 408")
    assert counted == ["too-slow"]


def test_a_client_that_may_not_join_is_told_why_and_counted_by_that_reason(enrolling):
    access, now = enrolling.service.access, enrolling.service.now_ms()

    def token(*, used=False, late=False, **wish):
        secret, made = access.make_token(JoinTokenRequest(**wish), now_ms=now - (10**9 if late else 0))
        if used:
            access._enrollment.join(made.digest, f"first-{made.id}", WISH["password_hash"], now_ms=now)
        return secret

    for client in ("taken", "gone"):
        digest = access.make_token(JoinTokenRequest(), now_ms=now)[1].digest
        access._enrollment.join(digest, client, WISH["password_hash"], now_ms=now)
    access._enrollment.revoke("gone", now_ms=now)
    tried = {
        "unknown": {"token": TOKEN},
        "expired": {"token": token(late=True)},
        "used": {"token": token(used=True)},
        "other-client": {"token": token(client="site-b")},
        "taken": {"token": token(), "client": "taken"},
        "revoked": {"token": token(), "client": "gone"},
    }

    for reason, change in tried.items():
        answer = refused(enrolling, reason, lambda change=change: enrolling.web.post("/join", json=WISH | change))
        assert answer.status_code == 403
        assert change["token"] not in answer.text


def test_a_refusal_to_join_has_a_name_and_a_sentence(enrolling):
    with pytest.raises(JoinRefused, match="knows no such join token") as caught:
        enrolling.service.access.join(JoinRequest(**WISH), now_ms=enrolling.service.now_ms())

    assert caught.value.reason == "unknown"


@pytest.mark.parametrize("shown", ["", "Bearer", "Bearer x", f"Basic {OPERATOR}", f"Bearer {OPERATOR}x"])
@pytest.mark.parametrize(("verb", "path"), [("GET", "/jobs"), ("POST", "/tokens"), ("POST", "/clients/site-a/revoke")])
def test_whoever_does_not_show_the_operators_token_is_refused_and_counted(enrolling, verb, path, shown):
    headers = {"Authorization": shown}

    answer = refused(enrolling, "unauthorized", lambda: enrolling.web.request(verb, path, headers=headers))

    assert answer.status_code == 401


@settings(max_examples=100, deadline=None)
@given(path=st.text(string.printable, max_size=40), verb=st.sampled_from(["GET", "POST", "DELETE", "PUT", "X"]))
def test_no_path_is_open_that_should_not_be(enrolling, path, verb):
    line = f"{verb} /{path.encode('unicode_escape').decode().replace(' ', '%20')} HTTP/1.1\r\n"
    with socket.create_connection(("127.0.0.1", enrolling.http.port), timeout=30) as link:
        link.sendall(f"{line}Host: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
        answer = b""
        while piece := link.recv(2**16):
            answer += piece

    status = int(answer.split()[1])
    assert status in {400, 401, 404, 405} or (status == 200 and path in {"healthz", "readyz", "metrics"}), answer

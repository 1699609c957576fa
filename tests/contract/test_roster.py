"""What every roster promises, over fakeredis (embedded runs) and over a real Redis."""

from __future__ import annotations

import pytest

from lorabbit.state.enrollment import JoinToken
from lorabbit.state.redis import RedisStateStore

D, HASH = "d" * 64, "hash"


@pytest.fixture(params=["embedded", pytest.param("redis", marks=pytest.mark.services)])
def roster(request):
    if request.param == "embedded":
        store = RedisStateStore.embedded()
    else:
        store = RedisStateStore.connect(request.getfixturevalue("redis_url"))
        store._redis.flushdb()
    yield store.roster
    store.close()


def test_a_token_lets_as_many_clients_in_as_it_says(roster):
    roster.add_token(JoinToken(D, uses=2, expires_ms=100))

    said = [roster.join(D, client, HASH, now_ms=1) for client in ("a", "b", "c")]

    assert said == ["ok", "ok", "used"]
    assert [member.client for member in roster.members()] == ["a", "b"]


def test_the_same_wish_again_uses_nothing_up_even_after_the_token_expired(roster):
    roster.add_token(JoinToken(D, uses=1, expires_ms=100))
    roster.join(D, "a", HASH, now_ms=1)

    assert roster.join(D, "a", HASH, now_ms=1000) == "ok"
    assert roster.join(D, "a", "another", now_ms=1) == "used"


def test_an_unknown_or_expired_token_lets_nobody_in(roster):
    roster.add_token(JoinToken(D, expires_ms=100))

    assert roster.join("e" * 64, "a", HASH, now_ms=1) == "unknown"
    assert roster.join(D, "a", HASH, now_ms=100) == "expired"
    assert roster.members() == []


def test_a_token_for_anybody_gives_nobody_anothers_name(roster):
    roster.add_token(JoinToken(D, uses=9, expires_ms=100))
    roster.join(D, "a", HASH, now_ms=1)

    assert roster.join(D, "a", "another", now_ms=1) == "taken"


def test_a_token_made_for_a_client_lets_it_alone_in_and_in_again(roster):
    roster.add_token(JoinToken(D, client="a", uses=2, expires_ms=100))

    assert roster.join(D, "b", HASH, now_ms=1) == "other-client"
    assert roster.join(D, "a", HASH, now_ms=1) == "ok"
    assert roster.join(D, "a", "another", now_ms=1) == "ok"
    assert [member.password_hash for member in roster.members()] == ["another"]


def test_a_revoked_client_comes_back_only_with_a_token_of_its_own(roster):
    roster.add_token(JoinToken(D, uses=9, expires_ms=100))
    roster.join(D, "a", HASH, now_ms=1)

    assert roster.revoke("a", now_ms=2)
    assert roster.revoke("a", now_ms=3)
    assert (roster.members(), roster.revoked()) == ([], frozenset({"a"}))
    assert roster.join(D, "a", HASH, now_ms=4) == "revoked"
    roster.add_token(JoinToken("e" * 64, client="a", expires_ms=100))
    assert roster.join("e" * 64, "a", HASH, now_ms=4) == "ok"
    assert roster.revoked() == frozenset()


def test_nobody_is_revoked_who_never_joined(roster):
    assert not roster.revoke("a", now_ms=1)
    assert roster.revoked() == frozenset()


def test_a_dropped_token_is_gone(roster):
    token = JoinToken(D, expires_ms=100)
    roster.add_token(token)

    assert roster.tokens() == [token]
    roster.drop_token(token)
    assert roster.tokens() == []
    assert roster.join(D, "a", HASH, now_ms=1) == "unknown"

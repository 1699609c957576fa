"""What every roster promises, over fakeredis (embedded runs) and over a real Redis."""

from __future__ import annotations

import pytest

from lorabbit.state.enrollment import JoinToken
from lorabbit.state.redis import RedisStateStore

D, HASH = "d" * 64, "hash"


@pytest.fixture(params=["embedded", pytest.param("redis", marks=pytest.mark.services)])
def enrollment(request):
    if request.param == "embedded":
        store = RedisStateStore.embedded()
    else:
        store = RedisStateStore.connect(request.getfixturevalue("redis_url"))
        store._redis.flushdb()
    yield store.enrollment
    store.close()


def test_a_token_lets_as_many_clients_in_as_it_says(enrollment):
    enrollment.add_token(JoinToken(D, uses=2, expires_ms=100))

    said = [enrollment.join(D, client, HASH, now_ms=1) for client in ("a", "b", "c")]

    assert said == ["ok", "ok", "used"]
    assert [member.client for member in enrollment.members()] == ["a", "b"]


def test_the_same_wish_again_uses_nothing_up_even_after_the_token_expired(enrollment):
    enrollment.add_token(JoinToken(D, uses=1, expires_ms=100))
    enrollment.join(D, "a", HASH, now_ms=1)

    assert enrollment.join(D, "a", HASH, now_ms=1000) == "ok"
    assert enrollment.join(D, "a", "another", now_ms=1) == "used"


def test_an_unknown_or_expired_token_lets_nobody_in(enrollment):
    enrollment.add_token(JoinToken(D, expires_ms=100))

    assert enrollment.join("e" * 64, "a", HASH, now_ms=1) == "unknown"
    assert enrollment.join(D, "a", HASH, now_ms=100) == "expired"
    assert enrollment.members() == []


def test_a_token_for_anybody_gives_nobody_anothers_name(enrollment):
    enrollment.add_token(JoinToken(D, uses=9, expires_ms=100))
    enrollment.join(D, "a", HASH, now_ms=1)

    assert enrollment.join(D, "a", "another", now_ms=1) == "taken"


def test_a_token_made_for_a_client_lets_it_alone_in_and_in_again(enrollment):
    enrollment.add_token(JoinToken(D, client="a", uses=2, expires_ms=100))

    assert enrollment.join(D, "b", HASH, now_ms=1) == "other-client"
    assert enrollment.join(D, "a", HASH, now_ms=1) == "ok"
    assert enrollment.join(D, "a", "another", now_ms=1) == "ok"
    assert [member.password_hash for member in enrollment.members()] == ["another"]


def test_a_revoked_client_comes_back_only_with_a_token_of_its_own(enrollment):
    enrollment.add_token(JoinToken(D, uses=9, expires_ms=100))
    enrollment.join(D, "a", HASH, now_ms=1)

    assert enrollment.revoke("a", now_ms=2)
    assert enrollment.revoke("a", now_ms=3)
    assert (enrollment.members(), enrollment.revoked()) == ([], frozenset({"a"}))
    assert enrollment.join(D, "a", HASH, now_ms=4) == "revoked"
    enrollment.add_token(JoinToken("e" * 64, client="a", expires_ms=100))
    assert enrollment.join("e" * 64, "a", HASH, now_ms=4) == "ok"
    assert enrollment.revoked() == frozenset()


def test_nobody_is_revoked_who_never_joined(enrollment):
    assert not enrollment.revoke("a", now_ms=1)
    assert enrollment.revoked() == frozenset()


def test_a_dropped_token_is_gone(enrollment):
    token = JoinToken(D, expires_ms=100)
    enrollment.add_token(token)

    assert enrollment.tokens() == [token]
    enrollment.drop_token(token)
    assert enrollment.tokens() == []
    assert enrollment.join(D, "a", HASH, now_ms=1) == "unknown"

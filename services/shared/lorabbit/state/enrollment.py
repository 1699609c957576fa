"""Enrollment in the store: join tokens, enrolled clients and revoked ones.

Tokens are kept as their sha256. A token is used up and a member written in one step, so a client that
asks twice, or a server that dies between store and broker, changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lorabbit.state.lua_scripts import text_of

Verdict = Literal["ok", "unknown", "expired", "used", "other-client", "taken", "revoked"]
"""Why a client may join, or may not."""

# KEYS: tokens, members, revoked; ARGV: digest, client, password hash, now
JOIN = """
local member = redis.call('HGET', KEYS[2], ARGV[2])
if member then
  local known = cjson.decode(member)
  if known.token == ARGV[1] and known.password_hash == ARGV[3] then return {'ok'} end
end
local text = redis.call('HGET', KEYS[1], ARGV[1])
if not text then return {'unknown'} end
local token = cjson.decode(text)
if tonumber(token.expires_ms) <= tonumber(ARGV[4]) then return {'expired'} end
if token.used >= token.uses then return {'used'} end
if token.client ~= '' and token.client ~= ARGV[2] then return {'other-client'} end
if token.client == '' then
  if member then return {'taken'} end
  if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 1 then return {'revoked'} end
end
token.used = token.used + 1
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(token))
redis.call('HSET', KEYS[2], ARGV[2], cjson.encode({token = ARGV[1], password_hash = ARGV[3], joined_ms = ARGV[4]}))
redis.call('HDEL', KEYS[3], ARGV[2])
return {'ok'}
"""

# KEYS: members, revoked; ARGV: client, now
REVOKE = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then
  return {'unknown'}
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])
return {'ok'}
"""


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A join token as it is kept: nobody can use it who reads this."""

    digest: str
    client: str = ""
    """The only client that may use it; empty: anybody."""
    uses: int = 1
    used: int = 0
    expires_ms: int = 0

    @property
    def id(self) -> str:
        """What an operator calls it by."""
        return self.digest[:8]


@dataclass(frozen=True, slots=True)
class EnrolledClient:
    """A client with a user of its own."""

    client: str
    token: str
    """The digest of the token with which it joined."""
    password_hash: str
    joined_ms: int


class EnrollmentStore:
    """See the module's docstring. Safe to call from any thread; each call may raise StoreUnavailable."""

    def __init__(self, run: Callable[..., Any], call: Callable[[Callable[[Any], Any]], Any], prefix: str) -> None:
        """Keep everything under keys that begin with `prefix`; `run` runs a script, `call` one command."""
        self._run, self._call = run, call
        self._tokens, self._members, self._revoked = (prefix + name for name in ("tokens", "members", "revoked"))

    def add_token(self, token: JoinToken) -> None:
        """Let a token be used."""
        kept = {name: value for name, value in asdict(token).items() if name != "digest"}
        self._call(lambda redis: redis.hset(self._tokens, token.digest, json.dumps(kept)))

    def tokens(self) -> list[JoinToken]:
        """Every token that was not dropped, the one that expires first first."""
        found = self._all(self._tokens)
        return sorted((JoinToken(key, **json.loads(text)) for key, text in found.items()), key=lambda t: t.expires_ms)

    def drop_token(self, token: JoinToken) -> None:
        """Let a token be used no more."""
        self._call(lambda redis: redis.hdel(self._tokens, token.digest))

    def join(self, digest: str, client: str, password_hash: str, *, now_ms: int) -> Verdict:
        """Use a token and write a member down; the same request again is fine."""
        keys = [self._tokens, self._members, self._revoked]
        verdict: Verdict = text_of(self._run(JOIN, keys, digest, client, password_hash, now_ms)[0])  # type: ignore[assignment]
        return verdict

    def revoke(self, client: str, *, now_ms: int) -> bool:
        """Strike a member off, for good; False when there never was one of this name."""
        return text_of(self._run(REVOKE, [self._members, self._revoked], client, now_ms)[0]) == "ok"

    def members(self) -> list[EnrolledClient]:
        """Everybody who has joined and was not sent away."""
        found = {client: json.loads(text) for client, text in self._all(self._members).items()}
        members = [EnrolledClient(client, **kept) for client, kept in sorted(found.items())]
        return [replace(member, joined_ms=int(member.joined_ms)) for member in members]

    def revoked(self) -> frozenset[str]:
        """Everybody who was sent away and has not joined again since."""
        return frozenset(self._all(self._revoked))

    def _all(self, key: str) -> dict[str, str]:
        entries: dict[Any, Any] = self._call(lambda redis: redis.hgetall(key))
        return {text_of(name): text_of(value) for name, value in entries.items()}


def tokens_named(tokens: Sequence[JoinToken], id_: str) -> list[JoinToken]:
    """The tokens that an operator may mean."""
    return [token for token in tokens if id_ and token.digest.startswith(id_)]

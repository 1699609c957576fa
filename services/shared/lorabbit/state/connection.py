"""A client of a Redis at a URL: patient, and careful whom it speaks to."""

from __future__ import annotations

from typing import Any

import redis
from redis.backoff import FullJitterBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError  # noqa: A004
from redis.retry import Retry

from lorabbit.tls import Trust

CONNECT_SECONDS = 5.0


def client_of(url: str, trust: Trust, *, patience: int, timeout_seconds: float) -> redis.Redis:
    """Open a client; each call is tried again `patience` times with full jitter up to 2 s apart."""
    retry = Retry(
        FullJitterBackoff(cap=2.0, base=0.05),
        patience,
        supported_errors=(ConnectionError, TimeoutError, BusyLoadingError, OSError),
    )
    return redis.Redis.from_url(
        url,
        retry=retry,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=min(CONNECT_SECONDS, timeout_seconds),
        health_check_interval=30,
        decode_responses=True,
        **(_tls(trust) if url.startswith("rediss:") else {}),
    )


def _tls(trust: Trust) -> dict[str, Any]:
    """Whom to believe, in redis-py's words."""
    trust.context()  # says which file cannot be used
    files = {"ssl_ca_certs": trust.ca, "ssl_certfile": trust.cert, "ssl_keyfile": trust.key or trust.cert}
    named = {name: str(path) for name, path in files.items() if path is not None}
    return {**named, "ssl_cert_reqs": "required" if trust.verify else "none", "ssl_check_hostname": trust.verify}

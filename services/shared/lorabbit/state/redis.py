"""StateStore over Redis; the only module that knows redis-py.

Keys share a hash tag per job, ``lorabbit:{<job>}:...``, and one for the server itself,
``lorabbit:{server}:...``, so that every script stays within one slot of a cluster. redis-py sends
a command again after a broken connection, which is safe because every script that must happen
once carries an operation id. The same code runs over fakeredis in an embedded run.

A client of a Redis at a URL: patient, and careful whom it speaks to.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self, TypeVar

import redis
from redis import exceptions as said
from redis.backoff import FullJitterBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, RedisError, ResponseError, TimeoutError  # noqa: A004
from redis.retry import Retry

from lorabbit.config.network import TlsSettings, tls_error
from lorabbit.errors import Fenced, StoreRefuses, StoreUnavailable
from lorabbit.state import lua_scripts, redis_streams
from lorabbit.state.base import (
    START,
    ClientEntry,
    CommitResult,
    Conflict,
    JobEntry,
    JobRecord,
    JobStatus,
    LoggedEvent,
    StateChange,
    StateStore,
)
from lorabbit.state.enrollment import EnrollmentStore
from lorabbit.state.lua_scripts import text_of

CONNECT_SECONDS = 5.0


def client_of(url: str, trust: TlsSettings, *, patience: int, timeout_seconds: float) -> redis.Redis:
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


def _tls(trust: TlsSettings) -> dict[str, Any]:
    """Whom to believe, in redis-py's words."""
    trust.context()  # says which file cannot be used
    files = {"ssl_ca_certs": trust.ca, "ssl_certfile": trust.cert, "ssl_keyfile": trust.key or trust.cert}
    named = {name: str(path) for name, path in files.items() if path is not None}
    return {**named, "ssl_cert_reqs": "required" if trust.verify else "none", "ssl_check_hostname": trust.verify}


Answer = TypeVar("Answer")
SLICE_SECONDS = 2.0
"""A blocking read is cut into slices well under the socket's timeout."""
PROGRESS_KEPT = 2000
REFUSALS = (said.OutOfMemoryError, said.ReadOnlyError, said.ClusterDownError, said.TryAgainError)
"""Answers of a Redis that takes no writes for a while; redis-py strips the word by which they begin."""
NAMELESS_REFUSALS = ("MISCONF", "NOREPLICAS", "BUSY")
"""The same, where redis-py has no class for them and leaves the word."""
_SERVER = "lorabbit:{server}:"


class RedisStateStore(StateStore):
    """See `StateStore`. Give it a client, or use `connect` or `embedded`."""

    def __init__(self, client: redis.Redis) -> None:
        """Speak through this client, whatever its `decode_responses`."""
        self._redis: Any = client  # redis-py's own types mix its sync and async answers
        self._scripts: dict[str, Callable[..., Any]] = {}
        self._closed = False

    @classmethod
    def connect(
        cls, url: str, *, trust: TlsSettings | None = None, patience: int = 14, timeout_seconds: float = 10.0
    ) -> Self:
        """Use the Redis at a URL; each call is tried again `patience` times with full jitter up to 2 s apart.

        One try takes at most `timeout_seconds`.
        """
        return cls(client_of(url, trust or TlsSettings(), patience=patience, timeout_seconds=timeout_seconds))

    @classmethod
    def embedded(cls) -> Self:
        """Use a Redis of one's own inside this process."""
        import fakeredis  # noqa: PLC0415 - an extra that only the embedded run needs

        return cls(fakeredis.FakeRedis(decode_responses=True))

    @property
    def enrollment(self) -> EnrollmentStore:
        """See `StateStore.enrollment`."""
        return EnrollmentStore(self._run, lambda ask: self._call(lambda: ask(self._redis)), _SERVER)

    # ---- the server's lease ----
    def acquire_lease(self, owner: str, seconds: float) -> int | None:
        """See `StateStore.acquire_lease`."""
        answer = self._run(lua_scripts.ACQUIRE, _server("lease", "epoch"), owner, _ms(seconds))
        return int(answer[1]) if text_of(answer[0]) == "ok" else None

    def renew_lease(self, owner: str, epoch: int, seconds: float) -> None:
        """See `StateStore.renew_lease`."""
        self._fenced(self._run(lua_scripts.RENEW, _server("lease", "epoch"), owner, epoch, _ms(seconds)))

    def release_lease(self, owner: str, epoch: int) -> None:
        """See `StateStore.release_lease`."""
        self._run(lua_scripts.RELEASE, _server("lease", "epoch"), owner, epoch)

    def newest_epoch(self) -> int:
        """See `StateStore.newest_epoch`."""
        epoch = self._call(lambda: self._redis.get(_SERVER + "epoch"))
        return 0 if epoch is None else int(epoch)

    def lease_holder(self) -> str | None:
        """See `StateStore.lease_holder`."""
        holder = self._call(lambda: self._redis.get(_SERVER + "lease"))
        return None if holder is None else text_of(holder)

    # ---- clients ----
    def lease_identity(self, wanted: ClientEntry, *, now_ms: int, epoch: int) -> str:
        """See `StateStore.lease_identity`."""
        values = (wanted.address, wanted.client, wanted.record, now_ms, wanted.expires_ms, epoch)
        answer = self._run(lua_scripts.IDENTITY, _server("clients", "addresses", "alive", "epoch"), *values)
        self._fenced(answer)
        return text_of(answer[1])

    def touch_clients(self, expires_ms: Mapping[str, int]) -> None:
        """See `StateStore.touch_clients`."""
        if expires_ms:
            self._call(lambda: self._redis.zadd(_SERVER + "alive", dict(expires_ms), xx=True))

    def free_identity(self, client: str, address: str, *, epoch: int) -> None:
        """See `StateStore.free_identity`."""
        self._fenced(self._run(lua_scripts.FREE, _server("addresses", "alive", "epoch"), client, address, epoch))

    def clients(self) -> dict[str, ClientEntry]:
        """See `StateStore.clients`."""
        entries = self._call(lambda: self._redis.hgetall(_SERVER + "clients"))
        scores = self._call(lambda: self._redis.zrange(_SERVER + "alive", 0, -1, withscores=True))
        expires = {text_of(client): int(score) for client, score in scores}
        found = {}
        for name, value in entries.items():
            client = text_of(name)
            address, _, record = text_of(value).partition(" ")
            found[client] = ClientEntry(client, address, record, expires.get(client, 0))
        return found

    # ---- the queue of jobs ----
    def enqueue(self, name: str, spec: str, *, taken: Sequence[str] = (), now_ms: int = 0, operation: str = "") -> str:
        """See `StateStore.enqueue`."""
        entry = asdict(JobEntry("", spec, submitted_ms=now_ms))
        del entry["job"]
        operation = operation or uuid.uuid4().hex
        keys = _server("jobs", "order", "submissions")
        return text_of(self._run(lua_scripts.ENQUEUE, keys, name, json.dumps(entry), operation, *taken)[1])

    def jobs(self) -> dict[str, JobEntry]:
        """See `StateStore.jobs`."""
        order = [text_of(job) for job in self._call(lambda: self._redis.lrange(_SERVER + "order", 0, -1))]
        entries = self._call(lambda: self._redis.hgetall(_SERVER + "jobs"))
        known = {text_of(job): json.loads(text_of(entry)) for job, entry in entries.items()}
        return {job: JobEntry(job, **known[job]) for job in order if job in known}

    def mark_job(self, job: str, status: JobStatus, *, epoch: int, reason: str = "", exit_code: int = 0) -> None:
        """See `StateStore.mark_job`."""
        values = {"status": status, "reason": reason, "exit_code": exit_code}
        pairs = [part for key, value in values.items() for part in (key, json.dumps(value))]
        self._fenced(self._run(lua_scripts.MARK, _server("jobs", "epoch"), job, epoch, *pairs))

    def request_cancel(self, job: str) -> bool:
        """See `StateStore.request_cancel`."""
        answer = self._run(lua_scripts.MARK, _server("jobs", "epoch"), job, "", "cancel_requested", "true")
        return text_of(answer[0]) == "ok"

    # ---- one job ----
    def claim_job(self, job: str, epoch: int) -> JobRecord:
        """See `StateStore.claim_job`."""
        self._fenced(self._run(lua_scripts.CLAIM, _keys(job, "meta"), epoch))
        return self.load_job(job)

    def load_job(self, job: str) -> JobRecord:
        """See `StateStore.load_job`."""
        meta, tasks = _keys(job, "meta", "tasks")
        version, header = self._call(lambda: self._redis.hmget(meta, ["version", "header"]))
        kept = self._call(lambda: self._redis.hgetall(tasks))
        return JobRecord(
            int(version or 0),
            None if header is None else text_of(header),
            {text_of(task): text_of(value) for task, value in kept.items()},
        )

    def commit(self, job: str, change: StateChange) -> CommitResult:
        """See `StateStore.commit`."""
        kept = [part for task, value in change.tasks.items() if value is not None for part in (task, value)]
        gone = [task for task, value in change.tasks.items() if value is None]
        effects = [part for item in change.effects.items() for part in item]
        counted: list[str | int] = []
        for each in (kept, gone, effects, change.events, change.outbox, change.relayed):
            counted.append(len(each))
            counted.extend(each)
        keys = _keys(job, "meta", "tasks", "effects", "events", "outbox")
        head = (change.operation, change.epoch, change.version, change.header or "")
        answer = [text_of(part) for part in self._run(lua_scripts.COMMIT, keys, *head, *counted)]
        match answer[0]:
            case "fenced":
                raise Fenced(f"epoch {answer[1]} owns job {job}, not {change.epoch}")
            case "version":
                raise Conflict(f"job {job} is at version {answer[1]}, not {change.version}")
            case "effect":
                raise Conflict(f"the result of task {answer[1]} counts already")
        behind = 3 + int(answer[2])
        return CommitResult(int(answer[1]), tuple(answer[3:behind]), tuple(answer[behind:]))

    def effect(self, job: str, task: str) -> str | None:
        """See `StateStore.effect`."""
        value = self._call(lambda: self._redis.hget(_keys(job, "effects")[0], task))
        return None if value is None else text_of(value)

    def outbox(self, job: str) -> list[tuple[str, str]]:
        """See `StateStore.outbox`."""
        return redis_streams.entries(self._call(lambda: self._redis.xrange(_keys(job, "outbox")[0])))

    def log_progress(self, job: str, events: Sequence[str]) -> None:
        """See `StateStore.log_progress`."""
        stream = _keys(job, "progress")[0]

        def append() -> None:
            with self._redis.pipeline(transaction=False) as pipe:
                for event in events:
                    pipe.xadd(stream, {"e": event}, maxlen=PROGRESS_KEPT, approximate=True)
                answers = pipe.execute(raise_on_error=False)  # which would put words before the answer's own
            for answer in answers:
                if isinstance(answer, RedisError):
                    raise answer

        self._call(append)

    def newest_progress(self, job: str, count: int) -> list[str]:
        """See `StateStore.newest_progress`."""
        stream = _keys(job, "progress")[0]
        found = self._call(lambda: self._redis.xrevrange(stream, count=count))
        return [text for _, text in redis_streams.entries(found)]

    def events(
        self, job: str, after: str = START, *, progress: bool = True, wait_seconds: float = 0.0
    ) -> list[LoggedEvent]:
        """See `StateStore.events`."""
        positions = dict(zip(_keys(job, "events", "progress"), redis_streams.positions(after), strict=True))
        if not progress:
            positions.popitem()
        deadline = time.monotonic() + wait_seconds
        while True:
            left = deadline - time.monotonic()
            block = None if left <= 0 else max(1, _ms(min(left, SLICE_SECONDS)))
            found = self._call(lambda block=block: self._redis.xread(positions, block=block))  # type: ignore[misc]
            if found or left <= 0 or self._closed:
                return redis_streams.merge(found or [], after)

    # ---- the store itself ----
    def ping(self) -> None:
        """See `StateStore.ping`."""
        self._call(self._redis.ping)

    def close(self) -> None:
        """See `StateStore.close`."""
        self._closed = True
        self._redis.close()

    def _run(self, script: str, keys: Sequence[str], *args: str | int) -> Any:  # noqa: ANN401 - redis-py's answer
        """Run a script, registered on first use."""
        registered = self._scripts.get(script)
        if registered is None:
            registered = self._scripts[script] = self._redis.register_script(script)
        return self._call(lambda: registered(keys=keys, args=args))

    @staticmethod
    def _call(ask: Callable[[], Answer]) -> Answer:
        """Ask Redis; what its client could not mend becomes StoreUnavailable."""
        try:
            return ask()
        except ResponseError as error:
            if isinstance(error, REFUSALS) or str(error).startswith(NAMELESS_REFUSALS):
                raise StoreRefuses(f"Redis takes no writes: {error}") from error
            raise
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"Redis does not answer: {tls_error(error) or error}") from error

    @staticmethod
    def _fenced(answer: Sequence[str | bytes]) -> None:
        if text_of(answer[0]) == "fenced":
            raise Fenced("another server holds the lease")


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _server(*names: str) -> list[str]:
    return [_SERVER + name for name in names]


def _keys(job: str, *names: str) -> list[str]:
    return [f"lorabbit:{{{job}}}:{name}" for name in names]

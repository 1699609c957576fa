"""The wire: versioned messages between the server and a client.

Every message is JSON of one of these models; its AMQP `type` property is ``lorabbit.<kind>.v1``.
Tensors never travel in a message: a `PayloadRef` names them by content, and their bytes follow as
chunks (see `lorabbit.transfer.chunked_transfer`). A server that meets a newer version refuses it by name.

The life of a task: `Task` -> `TaskAccepted` -> `TaskProgress`* -> `Offer` -> `Grant` | `Deny`
-> chunks -> `Commit` -> `Verdict`. The client keeps its result until the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from lorabbit.job.spec import CompressionSpec, JobSpec
from lorabbit.types import ClientCapabilities, Count, Word

VERSION = 1
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Message(BaseModel):
    """Base of every message: frozen, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: ClassVar[str]

    @classmethod
    def type_name(cls) -> str:
        """The AMQP `type` property, for example ``lorabbit.offer.v1``."""
        return f"lorabbit.{cls.kind}.v{VERSION}"


class PayloadRef(BaseModel):
    """Tensors by content: the sha256 and size of their safetensors file, and how it is cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Sha256
    size_bytes: int = Field(ge=0, le=2**40)
    chunk_bytes: int = Field(ge=1024, le=128 * 2**20)
    stream: int = Field(default=0, ge=0, le=100)
    """Which stream of this content to read: another one where the first was lost, cut or damaged."""

    @property
    def content(self) -> dict[str, str | int]:
        """What does not depend on the stream."""
        return self.model_dump(exclude={"stream"})

    @property
    def chunks(self) -> int:
        """Number of chunks; an empty payload has one empty chunk."""
        return max(1, -(-self.size_bytes // self.chunk_bytes))


class EncodedDownload(BaseModel):
    """A shorter way to a payload: a coded file, and the payload to which that tells the difference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    coded: PayloadRef
    origin: Sha256 | None = None
    """A client that does not hold it reads the payload whole."""


class Metrics(BaseModel):
    """What a client measured on its own data."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_examples: Count
    loss: float | None = None
    values: dict[Word, float] = Field(default_factory=dict, max_length=1000)
    steps: Count = 0
    seconds: float = Field(default=0.0, ge=0)
    flops: float = Field(default=0.0, ge=0)
    """Floating-point operations of the task's products of matrices; 0 where they were not counted."""
    parameters: Count = 0
    """Numbers in the tensors that the result carries."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """Free facts for the method and the report (label counts, trained parameters, ...)."""


class _FromAddress(Message):
    """The first keys of a hello, before those of its capabilities."""

    kind: ClassVar[str] = ""
    address: Identifier
    """Name of the client's inbox; unique per process, kept over restarts."""
    client: Identifier | None = None
    """The identity it owns; None asks the server for the lowest free ``client-<n>``."""


class Hello(ClientCapabilities, _FromAddress):
    """Client -> server: I am here. Repeated after every reconnect."""

    kind: ClassVar[str] = "hello"
    outbox: Annotated[tuple[Identifier, ...], Field(max_length=10_000)] = ()
    """Tasks whose result waits for a verdict."""
    process: Word = ""
    """Drawn by the process when it starts: by it two that took the same address are told apart."""

    @property
    def capabilities(self) -> ClientCapabilities:
        """What the client declares, without the rest of the message."""
        return ClientCapabilities.model_validate(
            {name: getattr(self, name) for name in ClientCapabilities.model_fields}
        )


class Alive(Message):
    """Client -> server: renew my lease."""

    kind: ClassVar[str] = "alive"
    address: Identifier
    client: Identifier
    process: Word = ""


class Goodbye(Message):
    """Client -> server: I leave on purpose."""

    kind: ClassVar[str] = "goodbye"
    address: Identifier
    client: Identifier
    process: Word = ""


class ForTask(Message):
    """Base of every message about one task."""

    kind: ClassVar[str] = ""
    job: Identifier
    task: Identifier
    client: Identifier


class TaskAccepted(ForTask):
    """Client -> server: journaled; I will do it."""

    kind: ClassVar[str] = "task-accepted"


class TaskProgress(ForTask):
    """Client -> server: renews the lease and feeds the live view."""

    kind: ClassVar[str] = "task-progress"
    fraction: float = Field(ge=0, le=1)
    loss: float | None = None


class TaskFailed(ForTask):
    """Client -> server: this task cannot be done here; `reason` is one sentence."""

    kind: ClassVar[str] = "task-failed"
    reason: str = Field(max_length=2000)
    bad_input: bool = False
    """The job itself is wrong (exit code 2), so no other client will manage either."""
    damaged: PayloadRef | None = None
    """What the task named, where its stream holds something else, or less; the server gives it another stream."""


class Offer(ForTask):
    """Client -> server: the result is in my outbox. `payload` is None when nothing but metrics returns."""

    kind: ClassVar[str] = "offer"
    payload: PayloadRef | None
    metrics: Metrics
    base_sha256: Sha256 | None = None
    """Hash of the frozen base model that the update belongs to."""
    bytes_down: Count = 0
    """Payload bytes this client read for the task (nothing for what it already held)."""
    bytes_by_role: dict[Identifier, Count] = Field(default_factory=dict)
    """The same bytes by the role under which the task named them; they add up to `bytes_down`."""

    @model_validator(mode="after")
    def _roles_add_up(self) -> Self:
        if sum(self.bytes_by_role.values()) != self.bytes_down:
            raise ValueError(f"bytes_by_role adds up to {sum(self.bytes_by_role.values())}, not {self.bytes_down}")
        return self


class Commit(ForTask):
    """Client -> server: every granted chunk is confirmed by the broker; those refused as damaged are granted again."""

    kind: ClassVar[str] = "commit"
    sha256: Sha256


class Welcome(Message):
    """Server -> client: your identity, and how often to renew its lease."""

    kind: ClassVar[str] = "welcome"
    client: Identifier
    heartbeat_seconds: float = Field(gt=0)


class AddressTaken(Message):
    """Server -> client: another process was at this address before `process`, which is to stop."""

    kind: ClassVar[str] = "address-taken"
    process: Word


class Task(Message):
    """Server -> client: one piece of work, complete in itself."""

    kind: ClassVar[str] = "task"
    job: Identifier
    task: Identifier
    """Same id, same work: a redelivered task is recognized by it."""
    client: Identifier
    index: int = Field(ge=0)
    population: int = Field(ge=1)
    round: int = Field(ge=0)
    """1-based; for EVALUATE the round whose adapter is scored; 0 for INITIALISE."""
    attempt: int = Field(ge=1)
    epoch: int = Field(ge=0)
    """Fencing epoch of the server that sent it; an older one is ignored."""
    phase: Identifier
    seed: int = Field(ge=0)
    share: float = Field(default=1.0, gt=0, le=1)
    """Of the job's local steps, that this client does: less than 1 where it would be late otherwise."""
    payloads: dict[Identifier, PayloadRef]
    ways: dict[Sha256, EncodedDownload] = Field(default_factory=dict)
    """Shorter ways to payloads, by their sha256."""
    coding: CompressionSpec = CompressionSpec()
    """How to write the result: what the job asks for, or less where this client declared less."""
    settings: dict[str, JsonValue]
    spec: JobSpec

    @property
    def published(self) -> tuple[tuple[str, PayloadRef], ...]:
        """What its client may read, each with its role: coded files, and whole ones where it may have to fall back."""
        found = []
        for role, ref in self.payloads.items():
            way = self.ways.get(ref.sha256)
            if way is not None:
                found.append((role, way.coded))
            if way is None or way.origin is not None:
                found.append((role, ref))
        return tuple(found)

    def on_streams(self, numbers: Mapping[str, int]) -> Task:
        """The same task with the numbers of its payloads' streams, by sha256; 0 for those that are not named."""

        def numbered(ref: PayloadRef) -> PayloadRef:
            return ref.model_copy(update={"stream": numbers.get(ref.sha256, 0)})

        payloads = {role: numbered(ref) for role, ref in self.payloads.items()}
        ways = {sha: way.model_copy(update={"coded": numbered(way.coded)}) for sha, way in self.ways.items()}
        return self.model_copy(update={"payloads": payloads, "ways": ways})


class CancelTask(ForTask):
    """Server -> client: stop; the result is no longer wanted."""

    kind: ClassVar[str] = "cancel-task"


class Grant(ForTask):
    """Server -> client: send these chunks (indices), all others are already here."""

    kind: ClassVar[str] = "grant"
    sha256: Sha256
    missing: tuple[int, ...]


class Deny(ForTask):
    """Server -> client: do not send; `reason` says why (stale, duplicate, too-large, ...)."""

    kind: ClassVar[str] = "deny"
    reason: str


class Verdict(ForTask):
    """Server -> client: durable. The client may forget the task."""

    kind: ClassVar[str] = "verdict"
    accepted: bool
    reason: str = "accepted"


FROM_CLIENT: tuple[type[Message], ...] = (
    Hello, Alive, Goodbye, TaskAccepted, TaskProgress, TaskFailed, Offer, Commit,
)  # fmt: skip
FROM_SERVER: tuple[type[Message], ...] = (Welcome, AddressTaken, Task, CancelTask, Grant, Deny, Verdict)
BY_TYPE: dict[str, type[Message]] = {m.type_name(): m for m in (*FROM_CLIENT, *FROM_SERVER)}

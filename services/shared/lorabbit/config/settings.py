"""Settings of a process, from the environment; the only reader of it.

Every variable is ``LORABBIT_<FIELD>``; a secret may stand in a file named by the same variable
with ``_FILE`` appended. What belongs to a run stands in its job file, not here.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationError, ValidationInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lorabbit.config.logging import FORMATS, LEVELS
from lorabbit.config.network import TlsSettings, url_of, url_of_cluster, urls_of_hosts
from lorabbit.errors import BadInput
from lorabbit.runtime import failpoints

Address = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
PREFIX = "LORABBIT_"
NOT_SETTINGS = frozenset(f"{PREFIX}{name}" for name in ("DATA", "CRASH_AT", "TAG", "CLIENTS", "PORT"))
"""Variables with another reader: sweep files, crash points, compose.yaml."""
OF_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP)(_\w+)?)$")
SECRET_NAMES = ("_URL", "_TOKEN")
"""How the names of variables end whose values are shown nowhere; a URL may hold a password."""


def default_address() -> str:
    """This machine's host name, which Docker and Kubernetes make unique per container."""
    return socket.gethostname().lower().replace("_", "-")[:63] or "client"


def variable(name: str) -> str | None:
    """Value of a variable that a sweep file names as ``${NAME}``; None when it is unset or empty."""
    return os.environ.get(name) or None


def child_environment(changes: Mapping[str, str], *, keeps_settings: bool) -> dict[str, str]:
    """Return this process's environment with changes, for a child; without its LORABBIT_* unless they are kept."""
    kept = {name: text for name, text in os.environ.items() if keeps_settings or not name.startswith("LORABBIT_")}
    return {**kept, **changes}


def _or_none(value: object) -> object:
    """Take an empty variable as one that is not set, as compose files pass what they were not given."""
    return None if value == "" else value


def _one_of(*names: str) -> Callable[[str], str]:
    """Check that a text is one of these names, in either case."""

    def check(text: str) -> str:
        if text.lower() not in {name.lower() for name in names}:
            raise ValueError(f"one of {', '.join(names)} is expected")
        return text

    return check


def _crash_point(text: str | None) -> str | None:
    """Check that a text names a crash point."""
    if text is not None:
        failpoints.parse(text)
    return text


def _two_heartbeats(lease: float, settings: ValidationInfo) -> float:
    """Check that a client does not count as lost between two heartbeats."""
    heartbeat = settings.data.get("heartbeat_seconds", 0.0)
    if lease < 2 * heartbeat:
        raise ValueError(f"at least twice LORABBIT_HEARTBEAT_SECONDS, which is {heartbeat:g}, is expected")
    return lease


def _split(value: object) -> object:
    """Take a list of names apart: ``gpu,fast``, or JSON."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.startswith("[") else [part.strip() for part in value.split(",") if part.strip()]


File = Annotated[Path | None, BeforeValidator(_or_none)]
Secret = Annotated[Annotated[str, StringConstraints(min_length=16)] | None, BeforeValidator(_or_none)]
"""A token that cannot be guessed; None where there is none."""


class Settings(BaseSettings):
    """What server and client share."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    broker_url: Annotated[str, AfterValidator(url_of_cluster("amqp", "amqps"))] = Field(
        default="amqp://guest:guest@127.0.0.1:5672/",
        description="AMQP URL of RabbitMQ; with commas between the hosts of a cluster, `amqp://USER:PASSWORD@A,B,C/`",
        repr=False,
    )
    tls_ca: File = Field(
        default=None, description="certificates of the authorities to believe, PEM; the system's when absent"
    )
    tls_cert: File = Field(default=None, description="own certificate, PEM, for services that ask for one")
    tls_key: File = Field(default=None, description="key of the own certificate, where another file holds it")
    tls_verify: bool = Field(default=True, description="check the certificates of services; false protects from nobody")
    log_level: Annotated[str, AfterValidator(_one_of(*LEVELS))] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_format: Annotated[str, AfterValidator(_one_of(*FORMATS))] = Field(
        default="auto", description="json, text, or auto: text on a terminal"
    )

    crash_at: Annotated[str | None, AfterValidator(_crash_point)] = Field(
        default=None, description="for tests: die at this crash point, `<name>` or `<name>:<n>`"
    )

    @property
    def trust(self) -> TlsSettings:
        """Whom to believe on the other end of a TLS connection."""
        return TlsSettings(self.tls_ca, self.tls_cert, self.tls_key, self.tls_verify)


Kind = TypeVar("Kind", bound=Settings)


class ServerSettings(Settings):
    """Settings of `lorabbit server`."""

    redis_url: Annotated[str, AfterValidator(url_of("redis", "rediss", "unix"))] = Field(
        default="redis://127.0.0.1:6379/0", description="URL of Redis", repr=False
    )
    folder: Path = Field(default=Path("server"), description="the server's volume: payloads and run folders")
    name: str = Field(
        default_factory=socket.gethostname,
        description="name of this server in the lease, another one for each server on one volume",
    )
    http_host: str = Field(default="127.0.0.1", description="address of the HTTP interface")
    http_port: int = Field(default=8080, ge=0, lt=65536, description="port of the HTTP interface")
    http_cert: File = Field(default=None, description="certificate of the HTTP interface, PEM; no TLS when absent")
    http_key: File = Field(default=None, description="its key, where another file holds it")
    http_token: Secret = Field(
        default=None,
        description="what the operator's commands have to show; anybody may ask when absent",
        repr=False,
    )
    management_url: Annotated[
        Annotated[str, AfterValidator(url_of_cluster("http", "https"))] | None, BeforeValidator(_or_none)
    ] = Field(
        default=None,
        description="URL of RabbitMQ's management interface with an administrator's name and password; "
        "every client then needs a user of its own; with commas between the hosts of a cluster",
        repr=False,
    )
    replicated_queues: Annotated[bool | None, BeforeValidator(_or_none)] = Field(
        default=None,
        description="let a majority of a RabbitMQ cluster's nodes keep every queue, so that the loss of one stops "
        "nobody; when absent, where the broker's URL names several hosts",
    )
    chunk_bytes: int = Field(default=2**20, ge=1024, description="bytes of a payload per message")
    max_payload_bytes: int = Field(default=4 * 2**30, ge=1024, description="largest update that is admitted")
    heartbeat_seconds: float = Field(default=5.0, gt=0, description="how often a client renews its lease")
    client_lease_seconds: Annotated[float, AfterValidator(_two_heartbeats)] = Field(
        default=15.0,
        gt=0,
        validate_default=True,
        description="silence after which a client counts as lost; at least two heartbeats",
    )
    lease_seconds: float = Field(default=15.0, gt=0, description="how long a server's lease lasts unrenewed")
    submit: Path | None = Field(default=None, description="a job file to submit on start, once")
    durable: bool = Field(default=True, description="fsync payloads before they are named in the store")

    @property
    def replicates(self) -> bool:
        """Whether queues outlive the loss of a broker's node."""
        return self.replicated_queues if self.replicated_queues is not None else len(urls_of_hosts(self.broker_url)) > 1


class ClientSettings(Settings):
    """Settings of `lorabbit client`."""

    folder: Path = Field(default=Path("client"), description="the client's volume: journal, outbox, private state")
    address: Address = Field(default_factory=default_address, description="name of this process's inbox")
    join_token: Secret = Field(
        default=None, description="from lorabbit token: gets this client a user of its own, once", repr=False
    )
    server_url: str = Field(default="http://127.0.0.1:8080", description="URL of the server's HTTP interface, to join")
    client: Address | None = Field(default=None, description="identity; the server leases client-<n> when absent")
    data_root: Path = Field(default=Path(), description="folder that a job's relative data paths start from")
    device: str = Field(default="auto", description="auto, cpu, cuda, or cuda:<n>")
    threads: int = Field(default=1, ge=1, description="torch threads; 1 makes results independent of the machine")
    tags: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(), description="labels for selection, with commas between"
    )
    pool: Annotated[str, StringConstraints(pattern=r"^([a-z0-9][a-z0-9._-]{0,62})?$")] = Field(
        default="", description="group of like clients that this one belongs to; deployments set it"
    )
    max_rank: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="largest LoRA rank that this client trains, any when absent; "
        "jobs with one larger rank for all go without it",
    )
    max_batch: int | None = Field(
        default=None,
        ge=1,
        le=2**20,
        description="rows trained at once, any when absent; larger batches are split, not by methods with own models",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="numbers that a model computes with while it trains; weights stay as they are; float16 needs a "
        "GPU; methods with own models, and private examples, compute in float32",
    )
    quantisation: Literal["none", "int8", "int4"] = Field(
        default="none",
        description="bits of the frozen linear weights under LoRA: none for all of them, int8, int4; "
        "jobs that change or read the base model go without this client",
    )
    privacy_epsilon: Annotated[float | None, BeforeValidator(_or_none)] = Field(
        default=None,
        gt=0,
        description="largest epsilon that all jobs together may cost an example of this client; it then refuses jobs "
        "without `privacy: {level: example}` and tells no scores; no demand when absent",
    )
    privacy_delta: float = Field(default=1e-5, gt=0, lt=1, description="at which LORABBIT_PRIVACY_EPSILON is counted")
    durable: bool = Field(
        default=True, description="journal tasks and fsync results; false is for simulated clients that nobody restarts"
    )
    drain_seconds: float = Field(
        default=20.0, ge=0, description="how long SIGTERM waits for the task under way; 0 hands it back at once"
    )
    idle_seconds: float | None = Field(
        default=None,
        gt=0,
        description="leave after so long without a task since the last one; never when absent; "
        "told to leave before that, the client exits with 143, so that a Job of Kubernetes starts it again",
    )


class OperatorSettings(Settings):
    """Settings of the operator's commands."""

    server_url: str = Field(default="http://127.0.0.1:8080", description="URL of the server's HTTP interface")
    http_token: Secret = Field(default=None, description="what the server's HTTP interface asks for", repr=False)


def read_settings(kind: type[Kind]) -> Kind:
    """Read settings from the environment; raises BadInput naming the variable that cannot be."""
    try:
        file_secrets()
        return kind()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"][:1]).upper()
        said = first["msg"].removeprefix("Value error, ")
        given = "" if name.endswith(SECRET_NAMES) else f", not {first['input']!r}"
        raise BadInput(f"environment variable {name}: {said}{given}") from None
    except ValueError as error:
        raise BadInput(f"the environment's settings cannot be read: {error}") from error


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Say of every variable that looks like a setting and is none what was probably meant; empty when all is well.

    Kubernetes adds variables for a service named lorabbit (``LORABBIT_PORT_8080_TCP``); they are no settings.
    """
    env = os.environ if environment is None else environment
    kinds = (ServerSettings, ClientSettings, OperatorSettings)
    known = {f"{PREFIX}{field}".upper() for kind in kinds for field in kind.model_fields}
    said = []
    for name in sorted(env):
        plain = name.removesuffix("_FILE")
        if not name.startswith(PREFIX) or plain in known | NOT_SETTINGS or OF_KUBERNETES.search(name):
            continue
        near = get_close_matches(plain, known, n=1, cutoff=0.85)
        hint = f"; did you mean {near[0]}?" if near else ""
        said.append(f"environment variable {name} is no setting and is not read{hint}")
    return said


def file_secrets(environment: dict[str, str] | None = None) -> None:
    """Fill LORABBIT_X from the file that LORABBIT_X_FILE names, for every X that is not set."""
    env = os.environ if environment is None else environment
    for name, path in list(env.items()):
        if name.startswith(PREFIX) and name.endswith("_FILE"):
            try:
                secret = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                raise BadInput(f"environment variable {name}: the file {path} cannot be read: {error}") from error
            env.setdefault(name.removesuffix("_FILE"), secret)

"""JobSpec: the one file a user writes, as a strict, typed value.

Every knob has a default that works, unknown keys are errors, and the messages of a failed
validation name the exact path, what was expected and the nearest valid name. A method's own
hyper-parameters are kept as given and validated by the method (`lorabbit.methods.registry.build`).

What a job may ask against hostile clients and against what updates tell: keys of the job file.

Participation: which clients take part in a job, and how much of a round's work each of them does.

Parts of the job file. See docs/how-to/choose-clients.md.

Transport: how a job's tensors are written for the wire, in each direction.

A coding is what a job file asks for; `lorabbit.compression` is what it does. See docs/explanation/codecs.md.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from lorabbit.job.schedules import ROUNDING, Buffered, Quorum, Schedule


class RobustSpec(BaseModel):
    """How much a few broken or hostile clients may move the model; every client then counts once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["clip", "median", "trimmed-mean", "krum", "multi-krum"] = Field(
        default="clip", description="what is done to the updates of a round; see docs/explanation/robustness.md"
    )
    norm: float | None = Field(
        default=None, gt=0, description="clip: largest norm of an update; the median of the round when absent"
    )
    trim: float = Field(default=0.2, gt=0, lt=0.5, description="trimmed-mean: share of clients cut from each end")
    attackers: int = Field(default=1, ge=1, description="krum, multi-krum: clients of a cohort that may be hostile")
    keep: int | None = Field(
        default=None, ge=1, description="multi-krum: clients that are averaged; cohort - attackers - 2 when absent"
    )


class PrivacySpec(BaseModel):
    """Differential privacy by clipping and Gaussian noise; see docs/explanation/privacy.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    level: Literal["client", "example"] = Field(
        default="client", description="client: noise on the server's mean; example: noise in each client's own steps"
    )
    noise: float = Field(default=1.0, gt=0, description="standard deviation of the noise, in units of clip")
    clip: float = Field(default=1.0, gt=0, description="largest norm of one client's update, or one example's gradient")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="at which epsilon is told")
    epsilon: float | None = Field(
        default=None,
        gt=0,
        description="budget of a client: it is asked no more before it spends more; none when absent",
    )
    seeded: bool = Field(default=False, description="noise from the job's seed: for tests, GIVES NO PRIVACY")


class _FrozenSpec(BaseModel):
    """Base: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SelectionSpec(_FrozenSpec):
    """Which clients a job takes in, by what they declare, and which of them a round asks."""

    tags: tuple[str, ...] = Field(default=(), description="a client must have declared all of these tags")
    pools: tuple[str, ...] = Field(default=(), description="a client must be of one of these pools; any when empty")
    devices: tuple[str, ...] = Field(
        default=(), description="a client must have one of these kinds of device, such as cpu or cuda; any when empty"
    )
    memory_gib: float | None = Field(default=None, gt=0, description="least memory that a client must have declared")
    order: Literal["random", "fair", "fast"] = Field(
        default="random",
        description="random: drawn anew for each round; fair: those asked least often first; fast: the fastest first",
    )


class WorkSpec(_FrozenSpec):
    """How much of a round's work each client does, by its measured speed."""

    within_seconds: Annotated[float, Field(gt=0, le=31_536_000)] | Literal["deadline"] = Field(
        default="deadline",
        description="a slow client does fewer steps to answer in this time; deadline: that of the schedule",
    )
    least_share: float = Field(default=0.1, gt=0, le=1, description="of the job's steps, that even the slowest does")
    weighting: Literal["normalised", "examples"] = Field(
        default="normalised",
        description="normalised: a change counts per step done, as in FedNova; examples: by examples alone",
    )


Codec = Literal["fp32", "bf16", "int8", "int4", "top-k"]
PLAIN = "fp32"
TOP_K = "top-k"
BLOCKS = frozenset({"int8", "int4"})
"""Codecs in which a block of values shares a scale."""
KNOWN = ("bf16", "int8", "int4", "top-k", "delta", "zstd")
"""What a client of this version can write and read, beside tensors as they are."""


class CompressionSpec(_FrozenSpec):
    """How tensors are written for the wire."""

    codec: Codec = Field(default="fp32", description="fp32 sends tensors as they are; see docs/explanation/codecs.md")
    block: int = Field(default=64, ge=2, le=65536, description="int8, int4: values that share a scale")
    share: float = Field(default=0.05, gt=0, le=0.5, description="top-k: share of each tensor's values that is sent")
    delta: bool | None = Field(
        default=None,
        description="send the difference to what the other side holds; when absent, a lossy upload does",
    )
    feedback: bool | None = Field(
        default=None,
        description="uploads: add what one round left unsent to the next; when absent, top-k does",
    )
    zstd: bool = Field(default=False, description="compress each tensor where that makes it smaller; loses nothing")

    @property
    def is_lossy(self) -> bool:
        """Tell whether tensors arrive changed."""
        return self.codec != PLAIN

    @property
    def is_plain(self) -> bool:
        """Tell whether tensors travel as the files that they are."""
        return not (self.is_lossy or self.delta or self.zstd)

    @property
    def needs(self) -> frozenset[str]:
        """What both sides must know; see `KNOWN`."""
        wanted = {self.codec: self.is_lossy, "delta": bool(self.delta), "zstd": self.zstd}
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)

    @property
    def word(self) -> str:
        """What is on the wire, as logs and reports name it: for example ``int8+delta``."""
        more = [name for name in ("delta", "zstd") if getattr(self, name)]
        return "+".join([self.codec, *more])


class TransportSpec(_FrozenSpec):
    """How adapters and updates are written for the wire; a client that lacks a codec is served without."""

    up: CompressionSpec = Field(default=CompressionSpec(), description="updates, from a client to the server")
    down: CompressionSpec = Field(default=CompressionSpec(), description="the adapter, from the server to its clients")

    @property
    def uploads(self) -> CompressionSpec:
        """The coding of updates, with what is absent decided."""
        up = self.up
        delta = up.is_lossy if up.delta is None else up.delta
        feedback = up.codec == TOP_K if up.feedback is None else up.feedback
        return up.model_copy(update={"delta": delta, "feedback": feedback})

    @property
    def downloads(self) -> CompressionSpec:
        """The coding of adapters, with what is absent decided."""
        return self.down.model_copy(update={"delta": bool(self.down.delta), "feedback": False})


Task = Literal[
    "text-classification",
    "text-pair-classification",
    "token-classification",
    "question-answering",
    "causal-lm",
    "image-classification",
]
Trainable = Literal["lora", "full", "bitfit", "adapter", "head", "prompt", "p-tuning", "prefix"]
Aggregation = Literal["factors", "freeze-a", "zero-padded", "svd", "stack", "exact"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class StrictSpec(BaseModel):
    """Base of every part of the job file: frozen, no unknown keys, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PruneSpec(StrictSpec):
    """How clients lower their own ranks, as HetLoRA's do."""

    keep: float = Field(default=0.75, gt=0, lt=1, description="share of its components that a client then goes on with")
    weight: float = Field(default=0.001, ge=0, description="of the penalty on the components that may go")


class LoraSpec(StrictSpec):
    """Shape of the LoRA factors."""

    rank: int = Field(default=8, ge=1, le=1024, description="columns of A and B; more learn more and travel longer")
    alpha: float = Field(default=16.0, gt=0, description="scale: the update is alpha / rank times B A")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="on the input of the factors while training")
    targets: tuple[str, ...] | None = Field(default=None, description="module names; PEFT's choice when absent")
    layers: tuple[int, ...] | None = Field(default=None, description="blocks that get factors, from 0; all when absent")
    client_ranks: tuple[Annotated[int, Field(ge=1, le=1024)], ...] | None = Field(
        default=None, min_length=1, description="rank of each client by its index, over and over; `rank` when absent"
    )
    prune: PruneSpec | None = Field(
        default=None, description="clients give up components that fade; with aggregation 'zero-padded'"
    )


class ModelSpec(StrictSpec):
    """The base model and which of its parameters are trained."""

    name: str = Field(default="sentence-transformers/all-MiniLM-L6-v2", description="folder, hub id, or tiny:NAME")
    task: Task = Field(default="text-classification", description="what is learned; decides head, fields and metrics")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the base model, and of the tensors on the wire"
    )
    trainable: Trainable = Field(default="lora", description="what is trained and travels")
    lora: LoraSpec = LoraSpec()
    dropout: float | None = Field(
        default=None, ge=0.0, lt=1.0, description="of the base model's own layers; as its config says when absent"
    )
    bottleneck: int = Field(default=16, ge=1, description="width of the bottleneck when trainable is 'adapter'")
    virtual_tokens: int = Field(default=16, ge=1, le=1024, description="length of prompt, p-tuning and prefix")
    variants: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="a model by client index, over and over, for methods with own models"
    )


class PartitionSpec(StrictSpec):
    """How an experiment splits one dataset over its clients."""

    kind: Literal["natural", "iid", "dirichlet", "pathological", "quantity", "own"] = Field(
        default="iid", description="own: each client keeps what its own files hold"
    )
    field: str | None = Field(default=None, description="natural: the field that names the group of a row")
    alpha: float = Field(default=0.5, gt=0, description="dirichlet, quantity: small is skewed")
    classes: int = Field(default=2, ge=1, description="pathological: classes a client holds")
    min_examples: int = Field(default=1, ge=1, description="least training examples of a client")


class DataSpec(StrictSpec):
    """Where examples come from and how they are split."""

    source: str = Field(default="stdlib-docs", description="stdlib-docs, digits, a file, a folder, or a hub name")
    config: str | None = Field(default=None, description="configuration of a hub dataset")
    fields: dict[str, str] = Field(default_factory=dict, description="role (text, label, ...) to column name")
    labels: tuple[str, ...] | None = Field(
        default=None, min_length=2, description="label names in order; those stated by or found in the data when absent"
    )
    partition: PartitionSpec = PartitionSpec()
    test_share: float = Field(
        default=0.15, gt=0, lt=1, description="held out of every client where no test split exists"
    )
    max_length: int = Field(default=64, ge=4, le=131072, description="tokens; longer texts are cut")
    limit: int | None = Field(default=None, ge=1, description="use the first N rows (after a seeded shuffle)")
    chat_template: bool = Field(default=False, description="causal-lm: format with the tokenizer's chat template")


class MethodSpec(BaseModel):
    """A method by name; every other key is one of its hyper-parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(default="fedavg", description="see lorabbit methods")

    @property
    def settings(self) -> dict[str, JsonValue]:
        """The hyper-parameters as written in the job file."""
        return dict(self.__pydantic_extra__ or {})


class LocalSpec(StrictSpec):
    """What one client does in one round; give `epochs` or `steps`, not both."""

    epochs: float | None = Field(
        default=None, gt=0, description="passes over the client's data; 1 when neither is given"
    )
    steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    batch_size: int = Field(default=16, ge=1, description="examples of one step")
    optimizer: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="starts afresh in every round")
    learning_rate: float = Field(default=1e-3, gt=0, description="highest of the schedule")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled in adamw, L2 in adam and sgd")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="sgd only")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="learning rate over all rounds of the job"
    )
    warmup_share: float = Field(default=0.0, ge=0, lt=1, description="share of all rounds spent warming up")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="gradients are clipped to it; null: never")

    @model_validator(mode="after")
    def _one_length(self) -> LocalSpec:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both")
        return self


class EvaluationSpec(StrictSpec):
    """When and where the aggregated adapter is scored."""

    every: int = Field(default=1, ge=1, description="rounds between evaluations; the last round is always scored")
    on: Literal["clients", "central"] = Field(
        default="clients",
        description="clients: each scores its own test split; central: the first client scores the whole test set",
    )
    batch_size: int = Field(default=64, ge=1, description="examples scored at once")
    metric: str | None = Field(default=None, description="metric that picks best/; the task's main metric when absent")


class OutputSpec(StrictSpec):
    """What is kept of a run."""

    keep_checkpoints: int = Field(default=2, ge=0, description="checkpoint-<round> folders kept, newest first")
    checkpoint_every: int = Field(default=1, ge=1, description="rounds between checkpoints; the last is always one")
    keep_updates: bool = Field(default=False, description="every update that counts stays in updates/, for a replay")


class JobSpec(StrictSpec):
    """One federated fine-tuning run."""

    name: Name = Field(default="job", description="of the run and its folder")
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    method: MethodSpec = MethodSpec()
    aggregation: Aggregation = Field(
        default="factors", description="how LoRA updates become one; see docs/explanation/aggregation.md"
    )
    robust: RobustSpec | None = Field(default=None, description="bounds what hostile clients can do; off when absent")
    privacy: PrivacySpec | None = Field(default=None, description="differential privacy; off when absent")
    selection: SelectionSpec | None = Field(default=None, description="which clients; any, drawn anew, when absent")
    work: WorkSpec | None = Field(
        default=None, description="how much each client does by its speed; all of it when absent"
    )
    transport: TransportSpec = Field(
        default=TransportSpec(), description="how tensors travel; see docs/explanation/codecs.md"
    )
    rounds: int = Field(default=5, ge=1, description="how often the clients' work is averaged")
    clients: int = Field(default=4, ge=1, description="population: the job starts once so many clients are there")
    min_clients: int | None = Field(
        default=None,
        ge=1,
        description="a client that fails for good is set aside while so many are left; more than half when absent",
    )
    patience_seconds: float | None = Field(
        default=604_800.0,
        gt=0,
        description="a client that is lost for so long is set aside like one that fails for good; null waits for ever",
    )
    join: bool | None = Field(
        default=None,
        description="clients that come later join the running job; where data.partition is own when absent",
    )
    cohort: int | float = Field(default=1.0, gt=0, description="asked in a round: 1.0 is all, 0.1 a tenth, 10 ten")
    local: LocalSpec = LocalSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    output: OutputSpec = OutputSpec()
    schedule: Schedule = Field(
        default="sync", description="sync: a round waits for everybody asked; quorum and buffered do not"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="everything random hangs on it")

    @model_validator(mode="after")
    def _cohort_fits(self) -> JobSpec:
        if isinstance(self.cohort, float) and self.cohort > 1.0:
            raise ValueError(f"cohort is {self.cohort}: a fraction is at most 1.0; write a whole number for a count")
        if isinstance(self.cohort, int) and self.cohort > self.clients:
            raise ValueError(f"cohort is {self.cohort}, but there are only {self.clients} clients")
        return self

    @model_validator(mode="after")
    def _fewest_fit(self) -> JobSpec:
        if self.min_clients is not None and self.min_clients > self.clients:
            raise ValueError(f"min_clients is {self.min_clients}, but there are only {self.clients} clients")
        return self

    @model_validator(mode="after")
    def _pruning_fits(self) -> JobSpec:
        if self.model.lora.prune is not None and self.aggregation != "zero-padded":
            raise ValueError(
                f"model.lora.prune: clients lower their own ranks under aggregation 'zero-padded' alone, and it is "
                f"{self.aggregation!r}; set aggregation, or leave prune out"
            )
        return self

    @model_validator(mode="after")
    def _concurrency_fits(self) -> JobSpec:
        if not isinstance(self.schedule, Buffered):
            return self
        if self.schedule.concurrency is not None and self.schedule.concurrency > self.clients:
            raise ValueError(
                f"schedule.concurrency is {self.schedule.concurrency}, but there are only {self.clients} clients"
            )
        if self.cohort != 1.0:
            raise ValueError(
                "cohort: a buffered schedule has no rounds to ask a cohort for; leave it out, "
                "and write schedule.concurrency for the clients that train at a time"
            )
        return self

    @property
    def fewest_clients(self) -> int:
        """Clients without which the job ends."""
        return self.clients // 2 + 1 if self.min_clients is None else self.min_clients

    @model_validator(mode="after")
    def _deadline_is_there(self) -> JobSpec:
        if self.work is not None and self.work.within_seconds == "deadline" and not isinstance(self.schedule, Quorum):
            raise ValueError(
                "work.within_seconds: only a quorum has a deadline; give a number of seconds, or choose schedule quorum"
            )
        return self

    def cohort_of(self, population: int) -> int:
        """Clients of a round where so many belong to the job, at least one."""
        if isinstance(self.cohort, float):
            return max(1, round(self.cohort * population))
        return self.cohort

    def asked_of(self, population: int) -> int:
        """Clients asked for a version of so many, or where they never wait the updates that make one."""
        if isinstance(self.schedule, Buffered):
            return self.schedule.buffer
        more = self.schedule.over_select if isinstance(self.schedule, Quorum) else 1.0
        return min(population, math.ceil(more * self.cohort_of(population) - ROUNDING))

    @property
    def cohort_size(self) -> int:
        """Clients of a round before any client has joined later."""
        return self.cohort_of(self.clients)

    @property
    def asked_in_a_round(self) -> int:
        """Clients asked for a version before any client has joined later."""
        return self.asked_of(self.clients)

    def evaluates(self, round_number: int) -> bool:
        """Tell whether the adapter of a 1-based round is scored."""
        return round_number == self.rounds or round_number % self.evaluation.every == 0

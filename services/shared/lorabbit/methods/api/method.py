"""Method: one paper's algorithm as one frozen value with four verbs.

A method file holds both halves. The server half (`start`, `plan`, `aggregate`) sees named tensors
only; the client half (`local_update`) sees one client through a `Session`. Both speak NumPy, so a
method imports neither torch nor transformers; the session hides them. Further verbs have defaults
that fit a method with one shared adapter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr

from lorabbit.aggregation.rules import RULES
from lorabbit.aggregation.staleness import CorrectedUpdate, StalenessCorrection
from lorabbit.job.spec import JobSpec
from lorabbit.types import ADAPTER, EVALUATE, ClientProfile, ClientUpdate, Facts, Plan, ServerState, Tensors


@dataclass(frozen=True, slots=True)
class Export:
    """What a user gets of a server state: an adapter folder that PEFT loads, and its base where it has one."""

    tensors: Tensors
    config: Facts = field(default_factory=dict)
    """Keys of adapter_config.json that differ from the first adapter's, such as `r` and `lora_alpha`."""
    base: Tensors | None = None
    """A whole model that the adapter stands on, written to base/; None: the job's own base model."""


class Method(BaseModel):
    """Base of every method; fields are its hyper-parameters, validated when the job is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `lorabbit methods`."""
    paper: ClassVar[str]
    """Authors, title, year, identifier."""

    prepares: ClassVar[bool] = False
    """Whether a round 0 comes first, in which every client of the population is asked.

    A field `quorum` in (0, 1], where a method has one, is the share of answers at which round 0 closes.
    """
    personal: ClassVar[bool] = False
    """Clients keep models of their own: their sessions are `PersonalSession`s, and nothing central is scored."""
    scores_first: ClassVar[bool] = False
    """Clients score a version before they train on it, because scores read what training changes; so do all
    `personal` methods. Otherwise training goes first and scoring fills the gaps."""

    needs_each: ClassVar[str] = ""
    """Why each client's own update must reach `aggregate`, so that no robust or noisy mean may stand in for it."""
    absolute: ClassVar[str] = ""
    """Why its factors must not be rounded as they are, but only the change of them; empty where they may be."""
    schedules: ClassVar[frozenset[str]] = frozenset({"sync"})
    """Kinds of schedule under which the method's rule holds. `buffered` says more than that: an upload is a value
    of the tensors that `uploads` names at the version it started from, all versions stand on one base and one
    choice of coordinates, and no client keeps parameters that must fit the newest version. Then the change that a
    late update makes may be carried over to a newer version. A quorum that keeps late updates asks for it too."""
    because: ClassVar[str] = "nobody has shown that its rule holds for updates that come late or not at all"
    """Why not under the others, in the terms of its paper."""

    _job: JobSpec = PrivateAttr(default_factory=JobSpec)

    @property
    def job(self) -> JobSpec:
        """The job that this method was built for (`lorabbit.methods.registry.build`); the default job in isolation."""
        return self._job

    def with_job(self, job: JobSpec) -> Self:
        """The same hyper-parameters for another job."""
        method = self.model_copy()
        method._job = job  # noqa: SLF001 - of the same class
        return method

    def check(self, job: JobSpec) -> None:
        """Raise BadInput when the job asks for what this method's maths forbids."""

    @property
    def works_on_base(self) -> bool:
        """Whether clients read or change weights of the base model, beside what `model.trainable` names."""
        return False

    def needs_whole_base(self) -> str:
        """Why clients must hold the base model's weights as they are, not quantized; empty where they need not."""
        if self.personal:
            return f"clients of {self.name} keep models of their own"
        if self.job.model.trainable != "lora":
            return f"the job trains {self.job.model.trainable!r}, and only LoRA is trained over quantized weights"
        if self.works_on_base:
            return f"{self.name} works on the weights of the base model"
        if RULES[self.job.aggregation].shifts_base:
            return f"aggregation {self.job.aggregation!r} changes the base model"
        return ""

    # ---- client ----
    def initialize(self, session: Any) -> Tensors:  # noqa: ANN401 - Session or PersonalSession, as `personal` says
        """Make the first adapter; one client does it, since the server holds no base model."""
        tensors: Tensors = session.tensors()
        return tensors

    @abstractmethod
    def local_update(self, plan: Plan, session: Any) -> ClientUpdate:  # noqa: ANN401
        """Do one client's work for one round."""

    def restore(self, plan: Plan, session: Any) -> None:  # noqa: ANN401
        """Make the session's model the one that a scoring plan describes."""
        session.load(plan.payloads[ADAPTER])

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """Make the first server state from the adapter that one client initialized."""
        return ServerState(dict(adapter))

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - same plan for all by default
        """Say what one client does in the coming round."""
        return Plan(payloads={ADAPTER: state.tensors})

    def uploads(self, state: ServerState, client: ClientProfile) -> Tensors:  # noqa: ARG002 - the same for all
        """Tensors like which this client's update must be (names, shapes, dtypes): admission's template.

        Empty where an update of the coming round carries no tensors.
        """
        return state.tensors

    @abstractmethod
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """Fold a round's updates, in ascending client index, into the next server state.

        `updates` may be walked more than once; the tensors of each are read from disk when asked for.
        """

    def corrected(self, update: Tensors, correction: StalenessCorrection) -> Tensors:
        """A late update as it comes to the newest version: its change, discounted, on top of that, value by value."""
        return CorrectedUpdate(update, correction)

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """Say what one client needs to score a server state; `restore` takes it."""
        return Plan(EVALUATE, {ADAPTER: self.adapter(state)})

    def adapter(self, state: ServerState) -> Tensors:
        """The tensors that clients score."""
        return state.tensors

    def export(self, state: ServerState) -> Export:
        """What a user gets: the adapter as it is, on the job's base model."""
        return Export(self.adapter(state))

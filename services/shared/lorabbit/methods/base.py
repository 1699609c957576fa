"""Method: one paper's algorithm as one frozen value with four verbs.

A method file holds both halves. The server half (`start`, `plan`, `aggregate`) sees named tensors
only; the client half (`local_update`) sees one client through a `Session`. Both speak NumPy, so a
method imports neither torch nor transformers; the session hides them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict

from lorabbit.jobspec import JobSpec
from lorabbit.types import ADAPTER, ClientProfile, ClientUpdate, Json, Plan, ServerState, Tensors

GradientTerm: TypeAlias = Callable[[str, Any, Any], Any]
"""(name, value, value at the start of the round) -> what to add to the gradient of that tensor.

Values are of the session's own kind (torch or NumPy): write it with operators only.
"""


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a local training returned."""

    tensors: Tensors
    num_examples: int
    loss: float
    steps: int


class Session(Protocol):
    """One client's model, data and private state, for the length of one task."""

    @property
    def client(self) -> ClientProfile:
        """Who this client is."""

    @property
    def num_examples(self) -> int:
        """Training examples of this client."""

    @property
    def private(self) -> MutableMapping[str, Json]:
        """Kept on this client between tasks, committed atomically with the task's result; never sent."""

    def tensors(self) -> Tensors:
        """The model's trainable tensors as they are now; a copy."""

    def load(self, tensors: Tensors) -> None:
        """Overwrite trainable tensors by name; raises Refused for an unknown name, wrong shape or dtype."""

    def train(
        self, *, gradient_term: GradientTerm | None = None, frozen: Callable[[str], bool] | None = None
    ) -> LocalResult:
        """Tune on local data as the job's `local` says, from the tensors loaded, with a fresh optimiser.

        Tensors whose name satisfies `frozen` get no gradient and do not move. Everything random
        comes from the task's seed.
        """


class Method(BaseModel):
    """Base of every method; fields are its hyper-parameters, validated when the job is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `lorabbit methods`."""
    paper: ClassVar[str]
    """Authors, title, year, identifier."""

    def check(self, job: JobSpec) -> None:
        """Raise BadInput when the job asks for what this method's maths forbids."""

    def start(self, adapter: Tensors) -> ServerState:
        """Make the first server state from the adapter that one client initialised."""
        return ServerState(dict(adapter))

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - same plan for all by default
        """Say what one client does in the coming round."""
        return Plan(payloads={ADAPTER: state.tensors})

    @abstractmethod
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """Do one client's work for one round."""

    @abstractmethod
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """Fold a stream of updates, in ascending client index, into the next server state."""

    def adapter(self, state: ServerState) -> Tensors:
        """The tensors to evaluate and to export."""
        return state.tensors

    def uploads(self, state: ServerState) -> Tensors:
        """Tensors like which every update must be (names, shapes, dtypes): admission's template."""
        return state.tensors

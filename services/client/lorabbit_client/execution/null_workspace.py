"""The null model: tensors of a chosen size and no learning, for measuring everything else.

``model.name: null:4MB`` makes 24 float32 tensors of 4,000,000 bytes together (KB, MB, GB are powers
of 1000, KiB, MiB, GiB of 1024). Training adds a constant that depends on client and round; nothing
is held in memory but the tensor being computed, so a client stays small whatever the payload.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np

from lorabbit.aggregation.partial_work import shortened
from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Task
from lorabbit.runtime.seeds import derive_seed
from lorabbit.training_session import Difficulty, LocalResult, Part, TrainOptions
from lorabbit.types import Array, ClientId, ClientProfile, Facts, Json, Tensors
from lorabbit_client.execution.interface import InitialAdapter, OnProgress, OperationCount
from lorabbit_client.execution.private_state import PrivateState

PREFIX = "null:"
TENSORS = 24
FIRST_EXAMPLES = 10
STEP = 1e-3
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1024, "MI": 1024**2, "GI": 1024**3}


def is_null(name: str) -> bool:
    """Tell whether a model name asks for the null model."""
    return name.startswith(PREFIX)


def size_of(name: str) -> int:
    """Bytes that a null model's tensors have together; raises BadInput for an unreadable size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMG]I?)B", name.removeprefix(PREFIX).strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 4 * TENSORS:
        raise BadInput(
            f"model.name: {name!r} is no size of at least {4 * TENSORS} bytes; write for example 'null:0.3MB'"
        )
    return size


class Computed(Mapping[str, Array]):
    """Named tensors that are computed each time they are asked for."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Array]) -> None:
        """Remember how to make each of `names`."""
        self._names = tuple(names)
        self._known = frozenset(self._names)
        self._compute = compute

    def __getitem__(self, name: str) -> Array:
        """Compute one tensor."""
        if name not in self._known:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        """Answer without computing."""
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Count the names."""
        return len(self._names)


def initial_tensors(name: str, seed: int) -> Computed:
    """Make the null model's first tensors; equal seeds give equal bytes."""
    values = size_of(name) // 4
    share, rest = divmod(values, TENSORS)
    sizes = {f"null.{i:02d}.weight": share + (i < rest) for i in range(TENSORS)}

    def compute(tensor: str) -> Array:
        generator = np.random.default_rng(derive_seed(seed, "null", tensor))
        return generator.standard_normal(sizes[tensor], dtype=np.float32) * np.float32(0.02)

    return Computed(sizes, compute)


class NullSession:
    """A session whose training adds one constant to every tensor. It has no base model and no LoRA."""

    def __init__(self, task: Task, private: PrivateState, on_progress: OnProgress) -> None:
        """Start from the job's initial tensors."""
        self.client = ClientProfile(ClientId(task.client), task.index)
        self.private: MutableMapping[str, Json] = private.values
        self.private_tensors: MutableMapping[str, Tensors] = private.tensors
        self.round = task.round
        self.seed = task.seed
        self.local = shortened(task.spec.local, task.share)
        self.scaling = task.spec.model.lora.alpha / task.spec.model.lora.rank
        self.num_examples = FIRST_EXAMPLES + task.index
        self.steps = 0
        self.label_counts: Facts = {}
        self._constant = np.float32(STEP * (task.round + task.index / task.population))
        self._on_progress = on_progress
        self._tensors: Tensors = initial_tensors(task.spec.model.name, task.spec.seed)

    def tensors(self) -> Tensors:
        """Return the tensors as they are now."""
        return self._tensors

    def load(self, tensors: Tensors) -> None:
        """Take tensors by name; raises Refused for a name that the model lacks."""
        unknown = [name for name in tensors if name not in self._tensors]
        if unknown:
            raise Refused("names", f"the null model has no tensor {unknown[0]!r}")
        below = self._tensors
        self._tensors = Computed(below, lambda name: tensors[name] if name in tensors else below[name])

    def select(self, part: Part) -> None:
        """Refuse the whole model: there is only the adapter."""
        if part != "adapter":
            raise _without("a whole model")

    def set_rank(self, rank: int) -> None:
        """Refuse: there are no factors."""
        raise _without(f"LoRA of rank {rank}")

    def base_weights(self) -> Tensors:
        """Return nothing: there is no base model."""
        return {}

    def use_base(self, base: Tensors, sha256: str) -> None:  # noqa: ARG002
        """Refuse: there is no base model."""
        raise _without("a base model")

    def set_base_delta(self, factors: Tensors) -> None:
        """Take no shift but none."""
        if factors:
            raise _without("a base model to shift")

    def labels(self) -> Array:
        """Return one class for all."""
        return np.zeros(self.num_examples, np.int64)

    def difficulty(self, kind: Difficulty) -> Array:
        """Refuse: there are no examples."""
        raise _without(f"examples ({kind})")

    def fisher(self, examples: Sequence[int]) -> Tensors:
        """Refuse: there are no examples."""
        raise _without(f"gradients of {len(examples)} examples")

    def importance(self) -> Mapping[str, Array]:
        """Refuse: there are no gradients."""
        raise _without("gradients")

    def sensitivity(self, **how: object) -> Array:  # noqa: ARG002
        """Refuse: there are no blocks."""
        raise _without("blocks")

    def lossless_share(self, rule: Literal["slq", "eigengap"]) -> float:
        """Refuse: there is no loss."""
        raise _without(f"curvature ({rule})")

    def train(self, **options: Unpack[TrainOptions]) -> LocalResult:
        """Add the constant to everything that is not frozen; nothing else makes a difference."""
        frozen = options.get("frozen")
        below, constant = self._tensors, self._constant

        def compute(name: str) -> Array:
            value = below[name]
            if frozen is not None and frozen(name):
                return value
            moved: Array = np.add(value, constant, dtype=np.float32)
            return moved

        self._tensors = Computed(below, compute)
        self.steps += 1
        self._on_progress(1.0, float(constant))
        return LocalResult(self._tensors, self.num_examples, float(constant), 1)


def _without(what: str) -> BadInput:
    return BadInput(f"model.name: the null model has no {what}; take a real one for this method")


@dataclass(frozen=True, slots=True)
class _NoOperations:
    """Operations of the null model."""

    flops: float = 0.0


_NOTHING = _NoOperations()


class NullWorkspace:
    """Tasks of the null model."""

    base_sha256: str | None = None

    def __init__(self, spec: JobSpec) -> None:
        """Check the size that the model's name asks for."""
        self._spec = spec
        self._bytes = size_of(spec.model.name)

    def preload(self, population: int, indices: Iterable[int]) -> None:
        """Do nothing: there is nothing to load."""

    def initialize(self, task: Task, tensors: Tensors) -> InitialAdapter:
        """Put the facts of nothing beside the first tensors."""
        facts: dict[str, Json] = {
            "base_parameters": 0,
            "adapter_parameters": self._bytes // 4,
            "rank": None,
            "export": {"format": "partial", "files": {}},
            "main_metric": "accuracy",
            "versions": {"numpy": np.__version__},
            "label_counts": {},
            "model": {"source": "null", "where": self._spec.model.name},
        }
        return InitialAdapter(tensors, facts, FIRST_EXAMPLES + task.index)

    def session(self, task: Task, private: PrivateState, on_progress: OnProgress) -> NullSession:
        """Open a session."""
        return NullSession(task, private, on_progress)

    def count_flops(self) -> AbstractContextManager[OperationCount]:
        """Count nothing: nothing is learned."""
        return nullcontext(_NOTHING)

    def evaluate(self, task: Task, session: NullSession, on_progress: OnProgress) -> Metrics:
        """Call the first value's distance from zero the loss, so that it tells one adapter from another."""
        tensors = session.tensors()
        loss = abs(float(tensors[min(tensors)].reshape(-1)[0]))
        on_progress(1.0, loss)
        return Metrics(num_examples=FIRST_EXAMPLES + task.index, loss=loss, values={"accuracy": 1.0 / (1.0 + loss)})

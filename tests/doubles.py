"""A session whose learning can be solved on paper: loss 1/2 a ||w - b||^2, plain gradient descent."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import numpy as np

from lorabbit.errors import Refused
from lorabbit.job.spec import LocalSpec
from lorabbit.tensors import lora_math
from lorabbit.tensors.serialization import tensors_sha256
from lorabbit.training_session import Difficulty, Direction, LocalResult, Part, Sensitivity, TrainOptions
from lorabbit.types import Array, ClientId, ClientProfile, Facts, Json, Tensors


@dataclass(frozen=True)
class Training:
    """What one call of `train` was asked for."""

    part: Part
    stream: str
    local: LocalSpec
    batches: list[list[int]] | None
    frozen: frozenset[str]
    mask: Tensors | None


@dataclass
class QuadraticSession:
    """One client with target `b` (one array per tensor) and curvature `a`.

    After n steps of rate eta from w0, without further terms:  w_n = b + (1 - eta a)^n (w0 - b).
    A mask holds values exactly where it is False. Explicit batches only say how many steps there are.
    At another rank the targets of LoRA factors are cut, or filled with zeros.
    """

    b: Mapping[str, Array]
    a: float = 1.0
    eta: float = 0.1
    steps: int = 5
    num_examples: int = 10
    client: ClientProfile = field(default_factory=lambda: ClientProfile(ClientId("client-1"), 0))
    private: MutableMapping[str, Json] = field(default_factory=dict)
    private_tensors: MutableMapping[str, Tensors] = field(default_factory=dict)
    round: int = 1
    seed: int = 0
    scaling: float = 1.0
    whole: Mapping[str, Array] = field(default_factory=dict)
    """Targets of the whole model, by its own names; it starts at zero."""
    base: Mapping[str, Array] = field(default_factory=dict)
    """What `base_weights` gives."""
    difficulties: Mapping[str, Array] = field(default_factory=dict)
    """What `difficulty` gives, by kind; 0, 1, 2, ... where absent."""
    fishers: Tensors | None = None
    """What `fisher` gives; the squared gradient of every LoRA factor where absent."""
    classes: Sequence[int] | None = None
    """What `labels` gives; zeros where absent."""
    sensitivities: Array = field(default_factory=lambda: np.ones(2))
    share: float = 0.5
    """What `lossless_share` gives."""
    job_local: LocalSpec | None = None
    """The job's `local`; made of `eta` and `steps` where absent."""
    facts: Facts | None = None

    def __post_init__(self) -> None:
        self.part: Part = "adapter"
        self.trainings: list[Training] = []
        self.asked: list[tuple[Any, ...]] = []
        """Calls of difficulty, fisher, sensitivity and lossless_share."""
        self.shift: Tensors = {}
        self.rank: int | None = None
        self._targets: dict[Part, dict[str, Array]] = {"adapter": dict(self.b), "whole": dict(self.whole)}
        self._values: dict[Part, dict[str, Array]] = {
            part: {name: np.zeros_like(value) for name, value in targets.items()}
            for part, targets in self._targets.items()
        }

    @property
    def local(self) -> LocalSpec:
        return self.job_local or LocalSpec(
            steps=self.steps, learning_rate=self.eta or 1e-30, optimizer="sgd", max_grad_norm=None
        )

    # ---- tensors ----
    def select(self, part: Part) -> None:
        self.part = part

    @property
    def _w(self) -> dict[str, Array]:
        return self._values[self.part]

    def tensors(self) -> Tensors:
        return {name: value.copy() for name, value in self._w.items()}

    def load(self, tensors: Tensors) -> None:
        for name, value in tensors.items():
            if name not in self._w:
                raise Refused("names", f"no tensor {name}")
            if self._w[name].shape != value.shape:
                raise Refused("shapes", f"{name} has shape {value.shape}, expected {self._w[name].shape}")
            if self._w[name].dtype != value.dtype:
                raise Refused("dtypes", f"{name} is {value.dtype}, expected {self._w[name].dtype}")
        for name, value in tensors.items():
            self._w[name] = np.array(value)

    def set_rank(self, rank: int) -> None:
        self.rank = rank
        targets, values = self._targets["adapter"], self._values["adapter"]
        for name in targets:
            if lora_math.is_factor(name):
                targets[name] = at_rank(self.b[name], name, rank)
                values[name] = np.zeros_like(targets[name])

    def base_weights(self) -> Tensors:
        return {name: value.copy() for name, value in self.base.items()}

    def use_base(self, base: Tensors, sha256: str) -> None:
        if tensors_sha256(base) != sha256:
            raise Refused("base", "the base that came is not the one that the plan names")
        self._values["whole"] = {name: np.array(base[name]) for name in base}

    def set_base_delta(self, factors: Tensors) -> None:
        unknown = set(lora_math.modules(factors)) - self.base.keys()
        if unknown:
            raise Refused("names", f"no module {min(unknown)}")
        self.shift = {name: value.copy() for name, value in factors.items()}

    def shifted(self) -> Tensors:
        """The base weights with the shift that is installed: W + s B A."""
        moved = {
            module: lora_math.read(self.shift, module, self.scaling).product()
            for module in lora_math.modules(self.shift)
        }
        return {name: value + moved[name] if name in moved else value.copy() for name, value in self.base.items()}

    # ---- training ----
    def train(self, **options: Unpack[TrainOptions]) -> LocalResult:
        gradient_term, frozen, mask = options.get("gradient_term"), options.get("frozen"), options.get("mask")
        batches, local = options.get("batches"), options.get("local")
        used = local or self.local
        eta = self.eta if local is None and self.job_local is None else used.learning_rate
        start, w, b = self.tensors(), self._w, self._targets[self.part]
        held = frozenset(name for name in w if frozen is not None and frozen(name))
        cut = None if batches is None else [list(batch) for batch in batches]
        self.trainings.append(Training(self.part, options.get("stream", ""), used, cut, held, mask))
        steps = _steps(used, self.steps, cut)
        for _ in range(steps):
            for name in w.keys() - held:
                gradient = self.a * (w[name] - b[name])
                if gradient_term is not None:
                    gradient = gradient + gradient_term(name, w[name], start[name])
                moved = (w[name] - eta * gradient).astype(w[name].dtype)
                w[name] = moved if mask is None or name not in mask else np.where(mask[name], moved, w[name])
        return LocalResult(self.tensors(), self.num_examples, self.loss(), steps, self.facts)

    def loss(self) -> float:
        w, b = self._w, self._targets[self.part]
        return 0.5 * self.a * float(sum(np.sum((w[n] - b[n]) ** 2) for n in w))

    # ---- looking ----
    def labels(self) -> Array:
        return np.zeros(self.num_examples, np.int64) if self.classes is None else np.asarray(self.classes, np.int64)

    def difficulty(self, kind: Difficulty) -> Array:
        self.asked.append(("difficulty", kind))
        given = self.difficulties.get(kind)
        return np.arange(self.num_examples, dtype=np.float64) if given is None else np.asarray(given, np.float64)

    def fisher(self, examples: Sequence[int]) -> Tensors:
        self.asked.append(("fisher", tuple(int(i) for i in examples)))
        if self.fishers is not None:
            return {name: np.array(value, np.float32) for name, value in self.fishers.items()}
        w, b = self._values["adapter"], self._targets["adapter"]
        return {n: np.square(self.a * (w[n] - b[n])).astype(np.float32) for n in w if lora_math.is_factor(n)}

    def importance(self) -> dict[str, Array]:
        w, b = self._w, self._targets[self.part]
        squares = {name: np.square(self.a * (w[name] - b[name])) for name in w}
        most = max(float(value.max()) for value in squares.values())
        return {name: value / most for name, value in squares.items()}

    def sensitivity(
        self, *, noise: float, draws: int, probes: int, variant: Sensitivity, direction: Direction = "random"
    ) -> Array:
        self.asked.append(("sensitivity", noise, draws, probes, variant, direction))
        return np.array(self.sensitivities, np.float64)

    def lossless_share(self, rule: Literal["slq", "eigengap"]) -> float:
        self.asked.append(("lossless_share", rule))
        return self.share


def at_rank(value: Array, name: str, rank: int) -> Array:
    """One LoRA factor cut to a rank, or filled with zeros up to it."""
    axis = 0 if ".lora_A." in name else 1
    kept = np.take(value, range(min(rank, value.shape[axis])), axis=axis)
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, rank - kept.shape[axis])
    return np.pad(kept, widths)


def _steps(local: LocalSpec, steps: int, batches: list[list[int]] | None) -> int:
    """Steps of a training: as many as asked, else one for each batch of each epoch."""
    if local.steps is not None:
        return local.steps
    return steps if batches is None else max(1, math.ceil(len(batches) * (local.epochs or 1.0)))


def profile(index: int) -> ClientProfile:
    """The profile of the client at a 0-based index."""
    return ClientProfile(ClientId(f"client-{index + 1}"), index)

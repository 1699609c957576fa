"""A session whose learning can be solved on paper: loss 1/2 a ||w - b||^2, plain gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field

import numpy as np

from lorabbit.errors import Refused
from lorabbit.methods.base import GradientTerm, LocalResult
from lorabbit.types import Array, ClientId, ClientProfile, Json, Tensors


@dataclass
class QuadraticSession:
    """One client with target `b` (one array per tensor) and curvature `a`.

    After n steps of rate eta from w0, without further terms:  w_n = b + (1 - eta a)^n (w0 - b).
    """

    b: Mapping[str, Array]
    a: float = 1.0
    eta: float = 0.1
    steps: int = 5
    num_examples: int = 10
    client: ClientProfile = field(default_factory=lambda: ClientProfile(ClientId("client-1"), 0))
    private: MutableMapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._w: dict[str, Array] = {name: np.zeros_like(value) for name, value in self.b.items()}

    def tensors(self) -> Tensors:
        return {name: value.copy() for name, value in self._w.items()}

    def load(self, tensors: Tensors) -> None:
        for name, value in tensors.items():
            if name not in self._w or self._w[name].shape != value.shape:
                raise Refused("names", f"no tensor {name} of shape {value.shape}")
            self._w[name] = np.array(value)

    def train(
        self, *, gradient_term: GradientTerm | None = None, frozen: Callable[[str], bool] | None = None
    ) -> LocalResult:
        start = self.tensors()
        for _ in range(self.steps):
            for name, value in self._w.items():
                if frozen is not None and frozen(name):
                    continue
                gradient = self.a * (value - self.b[name])
                if gradient_term is not None:
                    gradient = gradient + gradient_term(name, value, start[name])
                self._w[name] = value - self.eta * gradient
        return LocalResult(self.tensors(), self.num_examples, self.loss(), self.steps)

    def loss(self) -> float:
        return 0.5 * self.a * float(sum(np.sum((self._w[n] - self.b[n]) ** 2) for n in self._w))


def profile(index: int) -> ClientProfile:
    """The profile of the client at a 0-based index."""
    return ClientProfile(ClientId(f"client-{index + 1}"), index)

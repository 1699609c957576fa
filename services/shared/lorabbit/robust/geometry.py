"""The updates of a round as points of one Euclidean space, whatever factors they came in.

The point of a client is what it would change: Delta W - Delta W_global of every module with LoRA factors, and
x - x_global of every other tensor. Delta W = s B A is never formed. The columns of all B, the global one
included, lie in the span of one thin Q_b and the rows of all A in that of one Q_a, so that

    s_k B_k A_k - s B A = Q_b C_k Q_a^T,     C_k = s_k R_b,k R_a,k^T - s R_b,0 R_a,0^T

with R the triangles of QR. Norms, distances and inner products of the small cores C_k are those of the updates,
exactly. They depend on products only: (B R, R^-1 A) is the same point. QR is the factor of the Gram matrices
B^T B and A A^T that does not square their condition, so small updates of large weights keep their digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabbit.aggregation.client_side import FROZEN, scaling_of
from lorabbit.errors import Refused
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import is_floating
from lorabbit.tensors.lora_math import Factors, Matrix
from lorabbit.types import Array, ClientUpdate, ServerState, Tensors

Stacked = NDArray[np.float64]
"""(clients, ...)."""


@dataclass(frozen=True, slots=True)
class FactorUpdates:
    """One module with LoRA factors: the server's and every client's."""

    module: str
    base: Factors
    received: tuple[Factors, ...]
    shares_a: bool = False
    """A is frozen and the same for all: B alone travels, and has no freedom of gauge."""


@dataclass(frozen=True, slots=True)
class TensorUpdates:
    """One tensor without factors: the server's and every client's, float64."""

    name: str
    base: Matrix
    received: Stacked


class CohortUpdates:
    """The updates of one round beside the server's state, read one module or tensor at a time."""

    def __init__(self, state: ServerState, received: Sequence[ClientUpdate], scaling: float) -> None:
        """Take updates of one set of names; raises Refused ("names") for others, or where the server has no such."""
        frozen = state.shared.get(FROZEN, {})
        self._frozen: Tensors = {name: frozen[name] for name in frozen if name not in state.tensors}
        self._base, self.received, self.scaling = state.tensors, received, scaling
        names = received[0].tensors.keys()
        if any(update.tensors.keys() != names for update in received) or any(
            name not in state.tensors for name in names
        ):
            raise Refused("names", "updates of one round hold different tensors")
        self.names = list(names)
        self.modules = lora_math.modules([*self._frozen, *self.names])
        paired = {name for module in self.modules for name in lora_names(module)}
        self.plain = [name for name in self.names if name not in paired and is_floating(state.tensors[name])]

    def pairs(self) -> Iterator[FactorUpdates]:
        """Read the modules, one after the other."""
        for module in self.modules:
            a, b = lora_names(module)
            shared = self._frozen.get(a)
            base = Factors(self._base[a] if shared is None else shared, self._base[b], self.scaling)
            received = tuple(
                Factors(u.tensors[a] if shared is None else shared, u.tensors[b], scaling_of(u, self.scaling))
                for u in self.received
            )
            yield FactorUpdates(module, base, received, shares_a=shared is not None)

    def tensors(self) -> Iterator[TensorUpdates]:
        """Read the tensors without factors, one after the other."""
        for name in self.plain:
            values = np.stack([np.asarray(update.tensors[name], np.float64) for update in self.received])
            yield TensorUpdates(name, np.asarray(self._base[name], np.float64), values)

    def gram(self) -> Matrix:
        """Inner products of all updates, clients x clients."""
        total = np.zeros((len(self.received), len(self.received)))
        for pair in self.pairs():
            total += _products(cores(pair, bases=False).values)
        for plain in self.tensors():
            total += _products(plain.received - plain.base)
        return total


@dataclass(frozen=True, slots=True)
class JointBasis:
    """What a module's updates are in the joint basis of all their factors."""

    values: Stacked
    """C_k: clients x rows x columns."""
    left: Matrix | None = None
    """Q_b: d_out x rows."""
    right: Matrix | None = None
    """Q_a: d_in x columns."""


def lora_names(module: str) -> tuple[str, str]:
    """Names of a module's A and B."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def cores(pair: FactorUpdates, *, bases: bool = True) -> JointBasis:
    """Express every client's change of a module in one joint basis; without the basis itself where only C_k count."""
    every = [pair.base, *pair.received]
    b = np.concatenate([np.asarray(f.b, np.float64) for f in every], axis=1)
    a = np.concatenate([np.asarray(f.a, np.float64) for f in every])
    left, r_b = _qr(b, bases=bases)
    right, r_a = _qr(a.T, bases=bases)
    ends = np.cumsum([f.rank for f in every])
    parts = [
        f.scaling * r_b[:, end - f.rank : end] @ r_a[:, end - f.rank : end].T
        for f, end in zip(every, ends, strict=True)
    ]
    return JointBasis(np.stack(parts[1:]) - parts[0], left, right)


def _qr(matrix: Matrix, *, bases: bool) -> tuple[Matrix | None, Matrix]:
    found: Any = np.linalg.qr(matrix, mode="reduced" if bases else "r")
    return (found[0], found[1]) if bases else (None, found)


def _products(values: Stacked) -> Matrix:
    flat = values.reshape(len(values), -1)
    product: Matrix = flat @ flat.T
    return product


def norms(gram: Matrix) -> NDArray[np.float64]:
    """Norm of each update."""
    return np.sqrt(np.maximum(np.diag(gram), 0.0))


def squared_distances(gram: Matrix) -> Matrix:
    """Between every two updates."""
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2.0 * gram, 0.0)


def cast(matrix: Array, like: Array) -> Array:
    """Give a result the dtype of what arrived."""
    return matrix.astype(like.dtype)

"""LoRA factors as mathematics: truncate, stack, compare products without ever forming them.

A module's update is Delta W = s B A with A (r x d_in), B (d_out x r) and scaling s. Averages that
are exact in Delta W live in the product, while the factors are only one of its many gauges: (B R,
R^-1 A) is the same update. Everything here therefore works on products through thin QR and small
SVDs in float64, at a cost of O(r^2 (d_in + d_out)), with signs fixed so that results are the same
on every machine that runs the same LAPACK.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabbit.types import Array, Tensors

Matrix = NDArray[np.float64]
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's update s B A."""

    a: Array
    """r x d_in."""
    b: Array
    """d_out x r."""
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return int(self.a.shape[0])

    def product(self) -> Matrix:
        """Delta W = s B A, dense (d_out x d_in): for tests and merging, never for aggregation."""
        return self.scaling * _double(self.b) @ _double(self.a)


def modules(names: Iterable[str]) -> list[str]:
    """Module paths that have both LoRA factors, sorted."""
    seen: dict[str, set[str]] = {}
    for name in names:
        if match := _FACTOR.match(name):
            seen.setdefault(match["module"], set()).add(match["factor"])
    return sorted(module for module, factors in seen.items() if factors == {"A", "B"})


def is_factor(name: str) -> bool:
    """Tell whether a tensor is one of a module's LoRA factors."""
    return _FACTOR.match(name) is not None


def read(tensors: Tensors, module: str, scaling: float = 1.0) -> Factors:
    """Take one module's factors out of named tensors."""
    return Factors(tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"], scaling)


def write(module: str, factors: Factors) -> dict[str, Array]:
    """Name one module's factors as PEFT does."""
    return {f"{module}.lora_A.weight": factors.a, f"{module}.lora_B.weight": factors.b}


def stack(weighted: Iterable[tuple[float, Factors]], scaling: float = 1.0) -> Factors:
    """Concatenate factors so that the product is exactly the weighted sum of products (FLoRA).

    With weights p_k: B = [p_1 s_1 B_1 | p_2 s_2 B_2 | ...] / s, A = [A_1; A_2; ...]. Ranks may differ.
    """
    pairs = list(weighted)
    a = np.concatenate([_double(f.a) for _, f in pairs])
    b = np.concatenate([(p * f.scaling / scaling) * _double(f.b) for p, f in pairs], axis=1)
    return Factors(a, b, scaling)


@dataclass(frozen=True, slots=True)
class Truncated:
    """The best approximation of a lower rank, balanced: A A^T = B^T B, diagonal and descending."""

    factors: Factors
    lost: float
    """Frobenius norm of what was cut off."""
    norm: float
    """Frobenius norm of the whole product."""


def truncate(factors: Factors, rank: int, *, scaling: float | None = None) -> Truncated:
    """Cut a product to its best approximation of rank `rank` (Eckart-Young), without forming it.

    Thin QR of B and A^T, SVD of the small core s R_b R_a^T, singular values split evenly between
    the factors. In each column of the left singular vectors the entry of largest magnitude is made
    positive. Because the result is balanced and ordered, its first q rows and columns are the best
    approximation of rank q. The dtype of the given factors is kept. A stack of more components than the
    weight has rows or columns is larger than the weight itself: then the product is formed.
    """
    target = factors.scaling if scaling is None else scaling
    left, s, right = _singular(factors)
    largest = np.abs(left).argmax(axis=0)
    signs = np.where(left[largest, np.arange(left.shape[1])] < 0, -1.0, 1.0)
    keep = min(rank, len(s))
    root = np.sqrt(s[:keep] / target)
    b = _pad((left * signs)[:, :keep] * root, rank, axis=1).astype(factors.b.dtype)
    a = _pad(root[:, None] * (right * signs[:, None])[:keep], rank, axis=0).astype(factors.a.dtype)
    return Truncated(Factors(a, b, target), float(np.linalg.norm(s[keep:])), float(np.linalg.norm(s)))


def _singular(factors: Factors) -> tuple[Matrix, Matrix, Matrix]:
    """U, the singular values in descending order, and V^T of s B A."""
    a, b = _double(factors.a), _double(factors.b)
    if factors.rank > min(a.shape[1], b.shape[0]):
        u, s, vt = np.linalg.svd(factors.scaling * b @ a, full_matrices=False)
        return u, s, vt
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(factors.scaling * r_b @ r_a.T)
    return q_b @ u, s, vt @ q_a.T


def split(weight: Array, rank: int, *, scaling: float, smallest: bool = False) -> Factors:
    """Factors of a dense weight's largest (or smallest) singular components, in float64, balanced.

    B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T by an exact SVD; in each column of U the entry of largest
    magnitude is made positive. Raises ValueError when the weight has fewer than `rank` components.
    """
    u, sigma, vt = np.linalg.svd(_double(weight), full_matrices=False)
    if rank > len(sigma):
        raise ValueError(f"a {weight.shape[0]} x {weight.shape[1]} weight has {len(sigma)} components, not {rank}")
    chosen = slice(len(sigma) - rank, None) if smallest else slice(rank)
    left, root = u[:, chosen], np.sqrt(sigma[chosen] / scaling)
    signs = np.where(left[np.abs(left).argmax(axis=0), np.arange(rank)] < 0, -1.0, 1.0)
    return Factors((root * signs)[:, None] * vt[chosen], left * (root * signs), scaling)


def norm(factors: Factors) -> float:
    """Frobenius norm of s B A through the Gram matrices of the factors: sqrt(tr(B^T B  A A^T)) s."""
    a, b = _double(factors.a), _double(factors.b)
    return abs(factors.scaling) * float(np.sqrt(max(0.0, np.sum((b.T @ b) * (a @ a.T)))))


def inner(left: Factors, right: Factors) -> float:
    """Frobenius inner product of two products: s s' tr((B^T B')(A' A^T))."""
    core = (_double(left.b).T @ _double(right.b)) * (_double(left.a) @ _double(right.a).T)
    return left.scaling * right.scaling * float(np.sum(core))


def aggregation_error(weighted: Sequence[tuple[float, Factors]], aggregate: Factors) -> tuple[float, float]:
    """Norms of mean(s B A) - (what was aggregated), and of mean(s B A), for one module.

    Weights must sum to one. The difference is a stacked product, reduced by QR before its norm is taken, so
    that a small error is not lost in the difference of two large squares. A stack of more components than the
    weight has rows or columns is larger than the weight itself: then the product is formed.
    """
    difference = stack([*weighted, (-1.0, aggregate)])
    a, b, clients = _double(difference.a), _double(difference.b), difference.rank - aggregate.rank
    if difference.rank > min(a.shape[1], b.shape[0]):
        mean = b[:, :clients] @ a[:clients]
        return float(np.linalg.norm(mean + b[:, clients:] @ a[clients:])), float(np.linalg.norm(mean))
    left, right = _triangle(b), _triangle(a.T)
    return float(np.linalg.norm(left @ right.T)), float(np.linalg.norm(left[:, :clients] @ right[:, :clients].T))


def _triangle(matrix: Matrix) -> Matrix:
    """R of a thin QR."""
    r: Any = np.linalg.qr(matrix, mode="r")
    return np.asarray(r, np.float64)


def _double(array: Array) -> Matrix:
    return np.asarray(array, dtype=np.float64)


def _pad(matrix: Matrix, rank: int, *, axis: int) -> Matrix:
    """Fill with zero components up to `rank` when the product has fewer."""
    missing = rank - matrix.shape[axis]
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, max(0, missing))
    return np.pad(matrix, widths)

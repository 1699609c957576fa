"""Late updates: how one that started from an older version comes to the newest, in the terms of a rule.

With the start w^(t - tau), the update w_k and the newest version w^t, a share s of the change is put on top:

    values      w_k' = w^t + s (w_k - w^(t - tau)), entry by entry: factors keep their coordinates between versions
    products    B_k' A_k' = B^t A^t + s (B_k A_k - B^(t - tau) A^(t - tau)), by stacking: coordinates or the base change
                between versions, but a product means the same on each; the rule truncates, or puts it into the base

Where factors start afresh on a moved base (B = 0), what is left of the second is the discounted product s B_k A_k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lorabbit.aggregation.client_side import is_a
from lorabbit.job.schedules import Schedule
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import is_floating
from lorabbit.types import Array, Tensors


def staleness_weight(schedule: Schedule, staleness: int) -> float:
    """Return (1 + tau)^-a: the share of an update's change that counts, tau versions after the one it started from."""
    if isinstance(schedule, str) or staleness <= 0:
        return 1.0
    return float((1.0 + staleness) ** -schedule.staleness_exponent)


@dataclass(frozen=True, slots=True)
class StalenessCorrection:
    """How an update that started from an older version comes to the newest: its change, discounted, on top of it."""

    start: Tensors
    """What the client started from."""
    head: Tensors
    """The same tensors of the newest version."""
    weight: float
    """Share of the change that counts."""


class CorrectedUpdate(Mapping[str, Array]):
    """head + worth (update - start), tensor by tensor, in float64; what has no real numbers stays as it came."""

    def __init__(self, update: Tensors, correction: StalenessCorrection) -> None:
        """Compute nothing yet."""
        self._update, self._correction = update, correction

    def __getitem__(self, name: str) -> Array:
        """Compute one tensor, of the type in which it came."""
        value = self._update[name]
        if not is_floating(value):
            return value
        correction = self._correction
        change = value.astype(np.float64) - correction.start[name].astype(np.float64)
        return (correction.head[name].astype(np.float64) + correction.weight * change).astype(value.dtype)

    def __iter__(self) -> Iterator[str]:
        """Names of the update."""
        return iter(self._update)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._update)


class CorrectedProducts(CorrectedUpdate):
    """The same for the products of LoRA factors, whose rank grows by stacking; other tensors by value."""

    def __getitem__(self, name: str) -> Array:
        """Compute one tensor, of the type in which it came."""
        if not lora_math.is_factor(name):
            return super().__getitem__(name)
        down, up = _pair(name)
        parts = [(tensors, scale) for tensors, scale in self._scaled() if scale and np.any(tensors[up])]
        parts = parts or [(self._update, 0.0)]
        if is_a(name):
            return np.concatenate([tensors[down] for tensors, _ in parts], axis=0)
        columns = [(scale * tensors[up].astype(np.float64)).astype(tensors[up].dtype) for tensors, scale in parts]
        return np.concatenate(columns, axis=1)

    def _scaled(self) -> tuple[tuple[Tensors, float], ...]:
        correction = self._correction
        return ((correction.head, 1.0), (self._update, correction.weight), (correction.start, -correction.weight))


def _pair(name: str) -> tuple[str, str]:
    """Names of both factors of the module that one of them belongs to."""
    if is_a(name):
        return name, name.replace(".lora_A", ".lora_B").replace(".lora_embedding_A", ".lora_embedding_B")
    return name.replace(".lora_B", ".lora_A").replace(".lora_embedding_B", ".lora_embedding_A"), name

"""How much work a curriculum and masks saved, counted; seconds are measured elsewhere.

A pass is one example forward and backward. Masks save no pass: they only keep values where they are,
so what they save is counted apart, as updates of single parameters, and is theory until whole factors
stand still.

Which neurons of LoRA factors move: Fisher information smoothed over rounds, and masks made of it.

A neuron is a row of a linear layer's weight: `lora_B` has d_out of r weights, `lora_A` r of d_in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lorabbit.tensors.arithmetic import count, subset
from lorabbit.tensors.lora_math import is_factor
from lorabbit.types import Array, Facts, Json, Tensors

if TYPE_CHECKING:
    from lorabbit.training_session import LocalResult, Session

Granularity = Literal["neuron", "element"]
ROUNDING = 1e-9


def smoothed(before: Tensors | None, now: Tensors, momentum: float) -> dict[str, Array]:
    """Return F_t = gamma F_{t-1} + (1 - gamma) F~ in float32; F~ where there is no F_{t-1} yet."""
    return {
        name: value.astype(np.float32)
        if before is None or name not in before
        else (momentum * before[name].astype(np.float64) + (1.0 - momentum) * value.astype(np.float64)).astype(
            np.float32
        )
        for name, value in now.items()
    }


def mask(fisher: Array, share: float, granularity: Granularity) -> NDArray[np.bool_]:
    """Return where one factor may move: its ceil(share rows) rows of the largest summed Fisher, (rows, 1).

    With granularity "element" single weights instead, in the factor's shape. Ties go to the lower
    index. A factor without any information moves whole: behind a zero B, a fresh A has none yet.
    """
    scores = fisher.astype(np.float64)
    if granularity == "neuron":
        scores = scores.reshape(len(scores), -1).sum(axis=1, keepdims=True)
    if share > 0 and not np.any(scores > 0):
        return np.ones(scores.shape, np.bool_)
    flat = scores.ravel()
    chosen = np.zeros(flat.size, np.bool_)
    chosen[np.argsort(-flat, kind="stable")[: math.ceil(share * flat.size - ROUNDING)]] = True
    return chosen.reshape(scores.shape)


@dataclass(frozen=True, slots=True)
class MaskStats:
    """How many neurons and parameters masks freeze."""

    masked: int
    """Neurons, or weights where masks are of single weights."""
    maskable: int
    parameters: int
    """Weights in them."""


def mask_stats(masks: Tensors, tensors: Tensors) -> MaskStats:
    """Count what masks hold of these tensors."""
    maskable = sum(value.size for value in masks.values())
    masked = {name: int(np.sum(np.logical_not(value))) for name, value in masks.items()}
    parameters = sum(masked[name] * tensors[name].size // max(1, value.size) for name, value in masks.items())
    return MaskStats(sum(masked.values()), maskable, parameters)


ROUNDING = 1e-9
COUNTED = ("m_k", "batches", "n_used", "steps", "steps_full", "passes", "passes_full", "updates", "updates_full")


@dataclass(slots=True)
class ComputeStats:
    """One client's task."""

    used: int = 0
    """Batches of the curriculum that were used: m_k."""
    batches: int = 0
    """All of them: M_k."""
    n_used: int = 0
    """Examples in the batches used."""
    n_all: int = 0
    steps: int = 0
    steps_full: int = 0
    """Steps that all batches would have taken."""
    extra: int = 0
    """Passes beside the training: difficulty, Fisher information, trial steps."""
    moving: int = 0
    """LoRA parameters that were free to move."""
    parameters: int = 0
    """All LoRA parameters."""

    def told(self, session: Session, result: LocalResult, masks: Tensors) -> dict[str, Json]:
        """Take in a training, and say what the task did and measured; nothing of single examples or neurons."""
        stats, local = mask_stats(masks, result.tensors), session.local
        self.steps, self.parameters = result.steps, count(subset(result.tensors, filter(is_factor, result.tensors)))
        self.moving = self.parameters - stats.parameters
        self.steps_full = local.steps or max(1, math.ceil(self.batches * (local.epochs or 1.0) - ROUNDING))
        return {**self.facts(), "masked": stats.masked, "maskable": stats.maskable, **(result.facts or {})}

    def facts(self) -> dict[str, Json]:
        """Return what is reported of this task."""
        trained = self.steps * self.n_used / max(1, self.used)
        return {
            "m_k": self.used,
            "batches": self.batches,
            "n_used": self.n_used,
            "steps": self.steps,
            "steps_full": self.steps_full,
            "passes": trained + self.extra,
            "passes_full": self.steps_full * self.n_all / max(1, self.batches),
            "updates": self.steps * self.moving,
            "updates_full": self.steps_full * self.parameters,
        }


def sum_stats(told: Iterable[Facts]) -> dict[str, Json]:
    """Add up clients' counts, with the shares saved.

    saved_batches: steps that were not taken; saved_passes: the same in passes, less those that measuring
    took (it can be negative); saved_updates: in theory, parameter updates left out by batches and masks.
    """
    sums: dict[str, float] = dict.fromkeys(COUNTED, 0.0)
    for facts in told:
        for name in COUNTED:
            value = facts.get(name, 0)
            sums[name] += float(value) if isinstance(value, (int, float)) else 0.0
    pairs = {"batches": "steps", "passes": "passes", "updates": "updates"}
    saved = {
        f"saved_{name}": 1.0 - sums[key] / sums[f"{key}_full"] if sums[f"{key}_full"] else 0.0
        for name, key in pairs.items()
    }
    return {**sums, **saved}

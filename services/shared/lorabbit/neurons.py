"""Which neurons of LoRA factors move: Fisher information smoothed over rounds, and masks made of it.

A neuron is a row of a linear layer's weight: `lora_B` has d_out of r weights, `lora_A` r of d_in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorabbit.types import Array, Tensors

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
class Held:
    """What masks hold."""

    masked: int
    """Neurons, or weights where masks are of single weights."""
    maskable: int
    parameters: int
    """Weights in them."""


def held(masks: Tensors, tensors: Tensors) -> Held:
    """Count what masks hold of these tensors."""
    maskable = sum(value.size for value in masks.values())
    masked = {name: int(np.sum(np.logical_not(value))) for name, value in masks.items()}
    parameters = sum(masked[name] * tensors[name].size // max(1, value.size) for name, value in masks.items())
    return Held(sum(masked.values()), maskable, parameters)

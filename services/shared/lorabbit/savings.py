"""How much work a curriculum and masks saved, counted; seconds are measured elsewhere.

A pass is one example forward and backward. Masks save no pass: they only keep values where they are,
so what they save is counted apart, as updates of single parameters, and is theory until whole factors
stand still.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabbit import neurons
from lorabbit.lora import is_factor
from lorabbit.tensors import count, subset
from lorabbit.types import Facts, Json, Tensors

if TYPE_CHECKING:
    from lorabbit.methods.session import LocalResult, Session

ROUNDING = 1e-9
COUNTED = ("m_k", "batches", "n_used", "steps", "steps_full", "passes", "passes_full", "updates", "updates_full")


@dataclass(slots=True)
class Work:
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
        held, local = neurons.held(masks, result.tensors), session.local
        self.steps, self.parameters = result.steps, count(subset(result.tensors, filter(is_factor, result.tensors)))
        self.moving = self.parameters - held.parameters
        self.steps_full = local.steps or max(1, math.ceil(self.batches * (local.epochs or 1.0) - ROUNDING))
        return {**self.facts(), "masked": held.masked, "maskable": held.maskable, **(result.facts or {})}

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


def summed(told: Iterable[Facts]) -> dict[str, Json]:
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

"""Pruning: clients that give up the last components of their factors where these fade (HetLoRA, arXiv 2401.06432).

With r the rank of a client, g = max(1, floor(keep r)), and B_g A_g the product of the components from g on:

    (1)  F_k + (weight / 2) (||A_g||^2 + ||B_g||^2)   is what the client minimizes
    (2)  when ||B_g A_g|| over all modules is smaller than it was in what the client received, these components are
         zero in its upload, and its rank is g from then on

D1  The paper's penalty is the product of the norms, weight ||B_g|| ||A_g||. Half the sum of their squares is never
    less and has the same minimum over balanced factors; its gradient needs one factor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorabbit.aggregation.client_side import is_a, rank_of
from lorabbit.job.spec import PruneSpec
from lorabbit.tensors import lora_math
from lorabbit.types import Array, Tensors

PRUNED_TO = "pruned_to"
"""Fact of an update: the client's rank from now on."""
Term = Callable[[str, Any, Any], Any]
"""A gradient term of a session."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """What one client may give up in one task."""

    rank: int
    kept: int
    """g."""
    weight: float

    def term(self, other: Term | None = None) -> Term:
        """The gradient of the penalty in (1), added to that of another term."""

        def pull(name: str, value: Any, start: Any) -> Any:  # noqa: ANN401 - the session's own array kind
            added = value * 0 if other is None else other(name, value, start)
            if lora_math.is_factor(name):
                fading = value * 0
                if is_a(name):
                    fading[self.kept :] = value[self.kept :]
                else:
                    fading[:, self.kept :] = value[:, self.kept :]
                added = added + self.weight * fading
            return added

        return pull

    def applied(self, before: Tensors, after: Tensors) -> tuple[Tensors, bool]:
        """(2): the tensors to send, and whether components were given up."""
        if not self._size(after) < self._size(before):
            return after, False
        return {name: self._without(name, value) for name, value in after.items()}, True

    def _size(self, tensors: Tensors) -> float:
        """||B_g A_g|| over all modules."""
        factors = [lora_math.read(tensors, module) for module in lora_math.modules(tensors)]
        return math.hypot(
            *(lora_math.norm(lora_math.Factors(f.a[self.kept :], f.b[:, self.kept :], f.scaling)) for f in factors)
        )

    def _without(self, name: str, value: Array) -> Array:
        if not lora_math.is_factor(name):
            return value
        cut = value.copy()
        if is_a(name):
            cut[self.kept :] = 0
        else:
            cut[:, self.kept :] = 0
        return cut


def pruning(spec: PruneSpec | None, received: Tensors) -> Pruning | None:
    """What a client that received these tensors may give up; None where that is nothing."""
    rank = rank_of(received)
    if spec is None or rank < 2:  # noqa: PLR2004 - one component stays
        return None
    return Pruning(rank, max(1, math.floor(spec.keep * rank)), spec.weight)

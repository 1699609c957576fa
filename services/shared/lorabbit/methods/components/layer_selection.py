"""Which transformer blocks are shared: LoRA factors by block, the blocks' importance, the choice, and what it does.

A factor's block is the first whole number in its name (`...encoder.layer.3.attention...` is in block 3).
What belongs to no block, such as a head, is always shared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorabbit.errors import Refused
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors import lora_math
from lorabbit.types import ADAPTER, Array, Json, ServerState, Tensors

Pick = Literal["top", "random", "bottom"]
DEFAULT_SHARE, LOWEST, HIGHEST = 0.5, 0.2, 0.9
ROUNDING = 1e-9
OUTSIDE, LEFT = "outside", "left"
"""Groups of factors outside the shared blocks: as at the start, and as they were when their block was last shared."""


def block_of(name: str) -> int | None:
    """Return the 0-based block of a LoRA factor; None for any other tensor, and for factors in no block."""
    if not lora_math.is_factor(name):
        return None
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def blocks_of(names: Iterable[str]) -> tuple[int, ...]:
    """Return the blocks that have factors, ascending."""
    return tuple(sorted({block for name in names if (block := block_of(name)) is not None}))


def is_outside(name: str, shared: Collection[Json]) -> bool:
    """Tell whether a tensor is a factor of a block that is not shared."""
    block = block_of(name)
    return block is not None and block not in shared


def importance(answers: Iterable[tuple[int, Json]], blocks: Sequence[int]) -> NDArray[np.float64]:
    """Return I^l = sum_k (n_k / N) I_k^l / sum_l I_k^l over these blocks, from (n_k, I_k) in canonical order.

    None is no answer; without any, all blocks are alike.

    Each client's values are normalized first: one with large activations must not decide alone. Raises
    Refused when a client's values do not fit the blocks or are no sensitivities.
    """
    alike = np.full(len(blocks), 1.0 / max(1, len(blocks)))
    total, weights = np.zeros(len(blocks)), 0
    for count, values in answers:
        if values is None:
            continue
        mine = _sensitivities(values, blocks)
        whole = float(mine.sum())
        total += count * (mine / whole if whole > 0 else alike)
        weights += count
    return total / weights if weights else alike


def _sensitivities(values: Json, blocks: Sequence[int]) -> NDArray[np.float64]:
    """Read a client's answer."""
    numbers = [float(v) for v in values if isinstance(v, (int, float))] if isinstance(values, list) else []
    if not isinstance(values, list) or len(numbers) != len(values):
        raise Refused("facts", "sensitivities must be a list of numbers")
    if len(numbers) <= max(blocks, default=-1):
        raise Refused("facts", f"sensitivities of {len(numbers)} blocks, but block {max(blocks)} has LoRA factors")
    mine = np.array([numbers[block] for block in blocks], np.float64)
    if not np.all(np.isfinite(mine)) or np.any(mine < 0):
        raise Refused("facts", "sensitivities must be finite and not negative")
    return mine


def lossless(answers: Iterable[tuple[int, Json]]) -> float:
    """Return R = sum_k (n_k / N) R_k of those that measured it, within [0.2, 0.9]; 0.5 when nobody did."""
    known = [(count, share) for count, share in answers if isinstance(share, float) and math.isfinite(share)]
    weights = sum(count for count, _ in known)
    mean = sum(count * share for count, share in known) / weights if weights else DEFAULT_SHARE
    return min(HIGHEST, max(LOWEST, mean))


def enough(share: float, blocks: int) -> int:
    """Return N* = ceil(R L), at least one block and at most all."""
    return max(min(1, blocks), min(blocks, math.ceil(share * blocks - ROUNDING)))


def enough_for_energy(values: NDArray[np.float64], energy: float) -> int:
    """Return the fewest blocks whose importance sums to `energy` of the whole."""
    sums = np.cumsum(np.sort(values)[::-1])
    reached = np.flatnonzero(sums >= energy * sums[-1] - ROUNDING) if len(sums) else np.zeros(0)
    return int(reached[0]) + 1 if len(reached) else len(values)


def choose(
    blocks: Sequence[int], values: NDArray[np.float64], count: int, *, pick: Pick = "top", seed: int = 0
) -> tuple[int, ...]:
    """Return `count` blocks, ascending: the most important ones, the least, or any; ties go to the lower block."""
    if pick == "random":
        order = np.random.default_rng(derive_seed(seed, "blocks")).permutation(len(blocks))
    else:
        order = np.argsort(-values if pick == "top" else values, kind="stable")
    return tuple(sorted(blocks[int(i)] for i in order[:count]))


# ---- what a choice does to the server's tensors ----
def everything(state: ServerState) -> Tensors:
    """All factors and the head: shared ones, last shared values of others, and the start of those never shared."""
    return {**state.shared.get(OUTSIDE, {}), **state.shared.get(LEFT, {}), **state.tensors}


def regrouped(state: ServerState, chosen: Sequence[int]) -> ServerState:
    """Share these blocks from now on, and no others; only the choice is among the facts.

    A block that leaves goes on from its last mean; one that enters from where it left, or else from the start.
    `left` says with which version of the choice each block left.
    """
    whole, version = everything(state), versions({**state.facts})["gal_version"] + 1
    before = state.facts.get("gal")
    since = {block: at for block, at in versions(state.facts.get("left")).items() if int(block) not in chosen}
    since |= {str(block): version for block in (before if isinstance(before, list) else []) if block not in chosen}
    shared = {name: value for name, value in whole.items() if not is_outside(name, [*chosen])}
    groups: dict[str, dict[str, Array]] = {OUTSIDE: {}, LEFT: {}}
    for name, value in whole.items():
        if name not in shared:
            groups[LEFT if str(block_of(name)) in since else OUTSIDE][name] = value
    facts: dict[str, Json] = {"gal_version": version, "gal": [*chosen], "left": {**since}}
    return ServerState(shared, facts, {name: group for name, group in groups.items() if group or name == OUTSIDE})


def sent(state: ServerState) -> dict[str, Tensors]:
    """What every client is sent: the shared tensors, and those of blocks that left, for clients without own ones."""
    left = state.shared.get(LEFT)
    return {ADAPTER: state.tensors} | ({LEFT: left} if left else {})


def still_own(tensors: Tensors, left: Json, version: Json) -> Tensors:
    """Of a client's own factors, tuned under one version of the choice, those whose block was not shared since."""
    since, mine = versions(left), version if isinstance(version, int) else 0
    return {name: value for name, value in tensors.items() if since.get(str(block_of(name)), 0) <= mine}


def versions(facts: Json) -> dict[str, int]:
    """Read whole numbers by name."""
    return {k: v for k, v in facts.items() if isinstance(v, int)} if isinstance(facts, dict) else {}

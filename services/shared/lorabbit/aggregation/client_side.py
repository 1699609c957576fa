"""What travels for an aggregation: prefixes of factors down, rank and scaling up, and how a client installs it."""

from __future__ import annotations

from collections.abc import Callable

from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import subset
from lorabbit.training_session import ClientSession, LocalResult, Session
from lorabbit.types import ADAPTER, SHIFT, Array, ClientUpdate, Facts, Json, Plan, Tensors

FROZEN = "frozen-a"
"""Payload role of A factors that all clients share and nobody trains."""


def is_a(name: str) -> bool:
    """Tell whether a tensor is a LoRA A factor."""
    return ".lora_A." in name or ".lora_embedding_A" in name


def install(plan: Plan, session: Session) -> None:
    """Make a client's model the one that a plan describes: rank, shift of the base, tensors."""
    rank = plan.settings.get("rank")
    if isinstance(rank, int):
        session.set_rank(rank)
    if SHIFT in plan.payloads:
        session.set_base_delta(plan.payloads[SHIFT])
    adapter, fixed = plan.payloads[ADAPTER], plan.payloads.get(FROZEN)
    session.load({**fixed, **adapter} if fixed else adapter)


def frozen(plan: Plan) -> Callable[[str], bool] | None:
    """Which tensors a plan forbids to move: the A factors where they came under a role of their own."""
    return is_a if FROZEN in plan.payloads else None


def answer(
    plan: Plan, session: ClientSession, trained: LocalResult, *, scaling: float, facts: Facts | None = None
) -> ClientUpdate:
    """Return what was trained of the plan's adapter, with the rank and scaling that it has."""
    tensors = subset(trained.tensors, plan.payloads[ADAPTER]) if FROZEN in plan.payloads else trained.tensors
    told = dict(facts or {})
    if rank := rank_of(tensors):
        told |= {"rank": rank, "scaling": scaling}
    me = session.client
    return ClientUpdate(me.client, me.index, tensors, trained.num_examples, trained.loss, told)


def rank_of(tensors: Tensors) -> int:
    """Largest rank of the LoRA factors among tensors; 0 where there are none."""
    return max((tensors[name].shape[1] for name in tensors if name.endswith(".lora_B.weight")), default=0)


def scaling_of(update: ClientUpdate, default: float) -> float:
    """The scaling with which a client trained; the server's own where it does not say."""
    told = update.facts.get("scaling")
    return float(told) if isinstance(told, (int, float)) and told > 0 else default


def config_of(rank: int, scaling: float) -> dict[str, Json]:
    """The keys of adapter_config.json that give factors of a rank their scaling."""
    alpha = scaling * rank
    return {"r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}


def prefix(tensors: Tensors, rank: int) -> Tensors:
    """The first components of every pair of factors, other tensors whole; the mapping itself where that is all."""
    if rank_of(tensors) <= rank:
        return tensors
    return {name: _cut(name, tensors[name], rank) for name in tensors}


def _cut(name: str, value: Array, rank: int) -> Array:
    if not lora_math.is_factor(name):
        return value
    return value[:rank] if is_a(name) else value[:, :rank]

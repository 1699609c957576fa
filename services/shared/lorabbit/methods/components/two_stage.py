"""Methods of two stages: one tunes the whole model, the next LoRA on the base that came of it.

A whole model travels under its own names, an adapter under PEFT's; the first payload of a job carries
both, the whole one behind a prefix. PEFT names a head of the model by the model's own name behind
"base_model.model.", which is how the second stage finds what the first one learned of it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from lorabbit.aggregation import base_delta
from lorabbit.aggregation.aggregator import Aggregation
from lorabbit.aggregation.client_side import rank_of
from lorabbit.aggregation.rules import FactorShape, fresh, revived
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors import lora_math
from lorabbit.tensors.lora_math import Factors
from lorabbit.tensors.serialization import tensors_sha256
from lorabbit.training_session import Session
from lorabbit.types import BASE, Array, Facts, Plan, Tensors

WHOLE = "whole."
"""Before the names of a whole model, beside an adapter in one payload."""
FIRST = "first-adapter"
"""Group of the server state that keeps the adapter as one client drew it; it is never sent."""
PEFT = "base_model.model."


def with_whole(session: Session) -> dict[str, Array]:
    """Return a client's adapter and its whole model, in one payload."""
    adapter = dict(session.tensors())
    session.select("whole")
    model = {WHOLE + name: value for name, value in session.tensors().items()}
    session.select("adapter")
    return adapter | model


def split(tensors: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
    """Take the whole model, and the adapter, out of the payload that `with_whole` made."""
    model = {name.removeprefix(WHOLE): tensors[name] for name in tensors if name.startswith(WHOLE)}
    return model, {name: tensors[name] for name in tensors if not name.startswith(WHOLE)}


def own_name(name: str) -> str:
    """The model's own name of a tensor that PEFT names."""
    return name.removeprefix(PEFT)


def digest(base: Tensors) -> str:
    """Hash of a base: over names, types, shapes and bytes, whatever file or memory holds it."""
    return tensors_sha256(base)


def install_base(plan: Plan, session: Session) -> None:
    """Make the base that a plan brings a client's base; raises Refused where it is not the one that it names."""
    session.use_base(plan.payloads[BASE], str(plan.settings.get("base_hash")))


def first_factors(adapter: Tensors, model: Tensors, setting: Aggregation) -> dict[str, Array]:
    """An adapter drawn from the job's seed (A Kaiming-uniform, B = 0), with the heads of a whole model.

    Like `adapter` in names and types, at the setting's rank.
    """
    tensors = {name: model.get(own_name(name), adapter[name]) for name in adapter if not lora_math.is_factor(name)}
    for module in lora_math.modules(adapter):
        tensors |= lora_math.write(module, _drawn(lora_math.read(adapter, module), module, setting, 0))
    return {name: tensors[name] for name in adapter}


def merge(adapter: Tensors, merged: Tensors, coming: Aggregation, stage: int) -> tuple[Tensors, Tensors]:
    """Begin with fresh factors, as the setting draws them at a stage, and add the present ones to a shift of the base.

    Nothing is lost: what the shift and the factors add up to is the same before and after. Returns both.
    """
    tensors, moved = dict(adapter), dict(merged)
    for module in lora_math.modules(adapter):
        factors = lora_math.read(adapter, module, coming.scaling)
        moved |= base_delta.add(merged, module, factors)
        seed = derive_seed(coming.seed, "factors", "merged", stage, module)
        tensors |= lora_math.write(module, fresh(factors, FactorShape(coming.rank, coming.scaling, seed)))
    return tensors, moved


def change_rank(
    adapter: Tensors, coming: int, setting: Aggregation, *, by: Literal["svd", "importance"]
) -> tuple[Tensors, Facts]:
    """Give factors the rank of the coming round, and tell the share of the update's norm that is lost.

    A higher rank gets fresh components that add nothing: components of zeros would never move.
    """
    present = rank_of(adapter)
    if coming == present:
        return adapter, {"lost": 0.0}
    tensors = dict(adapter)
    lost = size = most = 0.0
    for module in lora_math.modules(adapter):
        factors = lora_math.read(adapter, module, setting.scaling)
        changed, missed, norm = _changed(factors, coming, by, _drawn(factors, module, setting, coming))
        tensors |= lora_math.write(module, changed)
        lost, size, most = lost + missed**2, size + norm**2, max(most, missed / norm if norm else 0.0)
    share = math.sqrt(lost / size) if size else 0.0
    return tensors, {"lost": _digits(share), "lost_most": _digits(most)}


def _changed(factors: Factors, rank: int, by: str, drawn: Factors) -> tuple[Factors, float, float]:
    """One module at another rank, the norm of what was cut off, and the norm of the whole."""
    if rank > factors.rank:
        a = np.concatenate([factors.a, drawn.a[factors.rank : rank]])
        b = np.concatenate([factors.b, drawn.b[:, factors.rank : rank]], axis=1)
        return Factors(a, b, factors.scaling), 0.0, lora_math.norm(factors)
    if by == "svd":
        cut = lora_math.truncate(factors, rank)
        return revived(cut.factors, drawn), cut.lost, cut.norm
    weight = np.linalg.norm(factors.b.astype(np.float64), axis=0) * np.linalg.norm(factors.a.astype(np.float64), axis=1)
    order = np.argsort(-weight, kind="stable")
    kept, dropped = order[:rank], order[rank:]
    rest = Factors(factors.a[dropped], factors.b[:, dropped], factors.scaling)
    return Factors(factors.a[kept], factors.b[:, kept], factors.scaling), lora_math.norm(rest), lora_math.norm(factors)


def _drawn(like: Factors, module: str, setting: Aggregation, stage: int) -> Factors:
    rank = max(stage, setting.rank)
    return fresh(like, FactorShape(rank, setting.scaling, derive_seed(setting.seed, "factors", stage, module)))


def _digits(value: float) -> float:
    return float(f"{value:.6g}")

"""Shifts of the base: what accumulates beside the adapter, and how a plain adapter carries it.

A shift is kept as factors named as PEFT names them, in float32, with the scaling of the job. Its rank
grows with every round until min(d_out, d_in), where a QR of one factor holds the same product.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorabbit.aggregation.client_side import config_of
from lorabbit.aggregation.rules import padded
from lorabbit.tensors import lora_math
from lorabbit.tensors.lora_math import Factors
from lorabbit.types import Array, Facts, Tensors


def add(old: Tensors, module: str, more: Factors) -> dict[str, Array]:
    """One module's shift after a round: the earlier one and `more`, as named factors."""
    parts = [(1.0, more)]
    if f"{module}.lora_A.weight" in old:
        parts.insert(0, (1.0, lora_math.read(old, module, more.scaling)))
    whole = compressed(lora_math.stack(parts, more.scaling))
    return lora_math.write(module, Factors(whole.a.astype(np.float32), whole.b.astype(np.float32), whole.scaling))


def compressed(factors: Factors) -> Factors:
    """The same product with the least rank that holds any product of its shape, if it has more now."""
    d_out, d_in = factors.b.shape[0], factors.a.shape[1]
    if factors.rank <= min(d_out, d_in):
        return factors
    a, b = np.asarray(factors.a, np.float64), np.asarray(factors.b, np.float64)
    if d_out <= d_in:
        q, r = np.linalg.qr(b)
        return Factors(r @ a, q, factors.scaling)
    q, r = np.linalg.qr(a.T)
    return Factors(q.T, b @ r.T, factors.scaling)


def combined(adapter: Tensors, shift: Tensors, scaling: float) -> tuple[Tensors, Facts]:
    """Adapter and shift as one adapter of summed rank on the unmodified base, and its `r` and `lora_alpha`.

    B = [B | B_shift], A = [A; A_shift]. Modules are filled with zeros to one rank, since PEFT reads one `r`.
    """
    modules = lora_math.modules(adapter)
    pairs: Mapping[str, Factors] = {
        module: _joined(lora_math.read(adapter, module, scaling), lora_math.read(shift, module, scaling))
        if f"{module}.lora_A.weight" in shift
        else lora_math.read(adapter, module, scaling)
        for module in modules
    }
    rank = max((pair.rank for pair in pairs.values()), default=0)
    tensors = {name: adapter[name] for name in adapter if not lora_math.is_factor(name)}
    for module, pair in pairs.items():
        tensors |= lora_math.write(module, padded(pair, rank))
    config = config_of(rank, scaling) if rank else {}
    return {name: tensors[name] for name in sorted(tensors)}, config


def _joined(factors: Factors, shift: Factors) -> Factors:
    a = np.concatenate([factors.a, shift.a.astype(factors.a.dtype)])
    b = np.concatenate([factors.b, shift.b.astype(factors.b.dtype)], axis=1)
    return Factors(a, b, factors.scaling)

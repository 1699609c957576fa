"""A batch learnt in pieces, and the dtype that a training computes with.

The loss of a batch is a mean over its units: rows, or the tokens that have a label. A piece counts by its share of
the units, so the pieces' gradients add up to the batch's own, up to rounding. Pieces keep the padding of the whole
batch. Where dropout is on, every piece draws its own; where batch statistics travel, every piece has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from lorabbit_client.capability import Capability
from lorabbit_client.features import Batch, Features

FIRST_SCALE = 2.0**12
"""Factor on a float16 loss at first, so that small gradients do not vanish; it is halved when they overflow."""


def cut(features: Features, batch: Batch, most: int) -> Iterator[tuple[slice, Batch, float]]:
    """Yield pieces of at most so many rows: where they stand, their tensors, and their share of the loss.

    A piece without a unit is left out, since its own mean is none.
    """
    rows = len(next(iter(batch.values())))
    places = [slice(start, min(start + most, rows)) for start in range(0, rows, most)]
    pieces = [{name: value[place] for name, value in batch.items()} for place in places]
    units = [features.units(piece) for piece in pieces]
    total = sum(units)
    for place, piece, count in zip(places, pieces, units, strict=True):
        if count or not total:
            yield place, piece, count / total if total else 1 / len(pieces)


def computing(capability: Capability, device: torch.device) -> AbstractContextManager[object]:
    """Let torch compute in a client's dtype where it is not float32."""
    if capability.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, capability.dtype))


def scaler_of(capability: Capability, device: torch.device) -> torch.amp.GradScaler:
    """Return what keeps float16 gradients from vanishing; it does nothing for other dtypes."""
    return torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=capability.dtype == "float16")

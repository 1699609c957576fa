"""Float32 copies of half-precision parameters: what an optimiser moves in their place."""

from __future__ import annotations

import torch
from torch import nn

HALF = frozenset({torch.float16, torch.bfloat16})


def make_masters(moving: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return what the optimiser moves: float32 copies of half-precision parameters, others themselves.

    In float16 Adam's epsilon is zero and its first step is 0 / 0; in bfloat16 a step below a 256th
    of a weight is rounded away.
    """
    return {
        name: nn.Parameter(value.detach().float()) if value.dtype in HALF else value for name, value in moving.items()
    }


def hand_gradients(moving: dict[str, nn.Parameter], masters: dict[str, nn.Parameter]) -> None:
    """Move the gradients of half-precision parameters to their float32 copies."""
    for name, value in moving.items():
        if masters[name] is not value and value.grad is not None:
            masters[name].grad = value.grad.float()
            value.grad = None


def hand_values(masters: dict[str, nn.Parameter], moving: dict[str, nn.Parameter]) -> None:
    """Round the float32 copies back into the model."""
    with torch.no_grad():
        for name, value in moving.items():
            if masters[name] is not value:
                value.copy_(masters[name])

"""What a client can hold while it trains, by its own settings; found without torch.

A larger batch is learnt in pieces, whose gradients add up to the whole batch's. A narrower dtype is what the
model computes with; the weights and the optimiser stay in theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorabbit.errors import BadInput


@dataclass(frozen=True, slots=True)
class Capability:
    """Limits of one client."""

    max_batch: int | None = None
    """Most rows of which gradients are computed at once; None: whatever a job asks."""
    dtype: str = "float32"
    """What a training computes with: float32 (as the model is), bfloat16 or float16."""

    def check(self, device: str) -> None:
        """Raise BadInput where a kind of device, such as ``cpu`` or ``cuda:0``, cannot train in this dtype."""
        if self.dtype == "float16" and not device.startswith("cuda"):
            raise BadInput(
                f"LORABBIT_DTYPE: float16 is for GPUs, and this client trains on {device}; use bfloat16 or float32"
            )


UNLIMITED = Capability()

"""Participation: which clients take part in a job, and how much of a round's work each of them does.

Parts of the job file. See docs/how-to/choose-clients.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    """Base: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SelectionSpec(_Part):
    """Which clients a job takes in, by what they declare, and which of them a round asks."""

    tags: tuple[str, ...] = Field(default=(), description="a client must have declared all of these tags")
    pools: tuple[str, ...] = Field(default=(), description="a client must be of one of these pools; any when empty")
    devices: tuple[str, ...] = Field(
        default=(), description="a client must have one of these kinds of device, such as cpu or cuda; any when empty"
    )
    memory_gib: float | None = Field(default=None, gt=0, description="least memory that a client must have declared")
    order: Literal["random", "fair", "fast"] = Field(
        default="random",
        description="random: drawn anew for each round; fair: those asked least often first; fast: the fastest first",
    )


class WorkSpec(_Part):
    """How much of a round's work each client does, by its measured speed."""

    within_seconds: Annotated[float, Field(gt=0, le=31_536_000)] | Literal["deadline"] = Field(
        default="deadline",
        description="a slow client does fewer steps to answer in this time; deadline: that of the schedule",
    )
    least_share: float = Field(default=0.1, gt=0, le=1, description="of the job's steps, that even the slowest does")
    weighting: Literal["normalised", "examples"] = Field(
        default="normalised",
        description="normalised: a change counts per step done, as in FedNova; examples: by examples alone",
    )

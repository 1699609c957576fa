"""What a job may ask against hostile clients and against what updates tell: keys of the job file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RobustSpec(BaseModel):
    """How much a few broken or hostile clients may move the model; every client then counts once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["clip", "median", "trimmed-mean", "krum", "multi-krum"] = Field(
        default="clip", description="what is done to the updates of a round; see docs/explanation/robustness.md"
    )
    norm: float | None = Field(
        default=None, gt=0, description="clip: largest norm of an update; the median of the round when absent"
    )
    trim: float = Field(default=0.2, gt=0, lt=0.5, description="trimmed-mean: share of clients cut from each end")
    attackers: int = Field(default=1, ge=1, description="krum, multi-krum: clients of a cohort that may be hostile")
    keep: int | None = Field(
        default=None, ge=1, description="multi-krum: clients that are averaged; cohort - attackers - 2 when absent"
    )


class PrivacySpec(BaseModel):
    """Differential privacy by clipping and Gaussian noise; see docs/explanation/privacy.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    level: Literal["client", "example"] = Field(
        default="client", description="client: noise on the server's mean; example: noise in each client's own steps"
    )
    noise: float = Field(default=1.0, gt=0, description="standard deviation of the noise, in units of clip")
    clip: float = Field(default=1.0, gt=0, description="largest norm of one client's update, or one example's gradient")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="at which epsilon is told")
    epsilon: float | None = Field(
        default=None,
        gt=0,
        description="budget of a client: it is asked no more before it spends more; none when absent",
    )
    seeded: bool = Field(default=False, description="noise from the job's seed: for tests, GIVES NO PRIVACY")

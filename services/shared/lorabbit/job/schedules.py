"""Schedules: when a round closes, and what an update is worth that started from an older version.

`sync` is a word: a round waits for everybody asked. `quorum` closes at K of N, `buffered` at K arrivals
from clients that never wait (FedBuff: Nguyen et al., "Federated Learning with Buffered Asynchronous
Aggregation", AISTATS 2022, arXiv 2106.06639; with K = 1 it is asynchronous in the sense of FedAsync: Xie et
al., 2019, arXiv 1903.03934). See docs/explanation/schedules.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

SYNC = "sync"
ROUNDING = 1e-9
"""A share times a number of clients may lie this much above a whole number."""
KINDS = (SYNC, "quorum", "buffered")


class _Schedule(BaseModel):
    """Base of schedules with settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Quorum(_Schedule):
    """A round closes once enough of its cohort has answered."""

    kind: Literal["quorum"] = Field(default="quorum", description="a round closes at K of N")
    quorum: float = Field(default=0.8, gt=0, le=1, description="share of the cohort whose updates close a round")
    over_select: float = Field(default=1.25, ge=1, le=10, description="clients asked, as a multiple of the cohort")
    deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        le=31_536_000,
        description="then a round closes with what there is; from the clients' measured speed when absent",
    )
    late: Literal["refuse", "keep"] = Field(
        default="refuse", description="keep: an update that comes late joins the next round, discounted"
    )
    staleness_exponent: float = Field(
        default=0.5, ge=0, le=100, description="a in (1 + tau)^-a, the worth of an update tau versions old"
    )


class Buffered(_Schedule):
    """Clients never wait for each other; every `buffer` updates make a version."""

    kind: Literal["buffered"] = Field(default="buffered", description="a version for every K updates, asynchronously")
    buffer: int = Field(default=2, ge=1, description="K: updates that make a version")
    concurrency: int | None = Field(
        default=None, ge=1, description="clients that train at a time; all of them when absent"
    )
    staleness_exponent: float = Field(
        default=0.5, ge=0, le=100, description="a in (1 + tau)^-a, the worth of an update tau versions old"
    )
    max_staleness: int = Field(default=20, ge=0, description="updates that are more versions old are refused")


def _kind(value: Any) -> str | None:  # noqa: ANN401 - whatever a job file holds, or a schedule
    return value if isinstance(value, str) else value.get("kind") if isinstance(value, dict) else value.kind


def _spelled_out(value: Any) -> Any:  # noqa: ANN401 - whatever a job file holds
    """A word for a schedule with its defaults, or keys and values with their kind."""
    if isinstance(value, Quorum | Buffered):
        return value
    if not isinstance(value, str | dict):
        raise ValueError(  # noqa: TRY004 - what pydantic reports
            f"expected sync, quorum or buffered, or keys and values with a kind, not {value!r}"
        )
    if isinstance(value, dict) and "kind" not in value:
        raise ValueError("it has no kind; write kind: quorum or kind: buffered beside its settings")
    kind = _kind(value)
    if kind not in KINDS:
        raise ValueError(f"there is no schedule {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == SYNC:
        if isinstance(value, dict) and len(value) > 1:
            surplus = sorted(str(key) for key in value if key != "kind")
            raise ValueError(f"sync has no settings, but {', '.join(surplus)} stands there; leave it out")
        return SYNC
    return {"kind": kind} if isinstance(value, str) else value


Schedule: TypeAlias = Annotated[
    Annotated[Literal["sync"], Tag(SYNC)] | Annotated[Quorum, Tag("quorum")] | Annotated[Buffered, Tag("buffered")],
    Discriminator(_kind),
    BeforeValidator(_spelled_out),
]


def kind_of(schedule: Schedule) -> str:
    """The word for a schedule."""
    return schedule if isinstance(schedule, str) else schedule.kind


def takes_late(schedule: Schedule) -> bool:
    """Tell whether an update may be folded that started from an older version than the newest."""
    return isinstance(schedule, Buffered) or (isinstance(schedule, Quorum) and schedule.late == "keep")

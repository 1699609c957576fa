"""Which jobs may ask for a defence, decided when a job is read."""

from __future__ import annotations

import math

from lorabbit.defences import RobustSpec
from lorabbit.errors import BadInput
from lorabbit.jobspec import JobSpec
from lorabbit.robust.rules import ROUNDING, check_size
from lorabbit.schedules import Quorum, takes_late

KEYS = {"norm": {"clip"}, "trim": {"trimmed-mean"}, "attackers": {"krum", "multi-krum"}, "keep": {"multi-krum"}}
"""Keys and the kinds that read them."""
UNFIT = {
    "zero-padded": "weighs clients by the norm of their update, which an attacker chooses",
    "exact": "puts into the base what the mean of factors misses, and a robust product has no such mean",
}


def check(job: JobSpec, *, personal: bool, needs_each: str = "") -> None:
    """Raise BadInput where a robust aggregate of the job's updates would mean nothing."""
    spec, name = job.robust, job.method.name
    if spec is None:
        return
    if personal:
        raise BadInput(f"robust: clients of {name} keep models of their own, and do not vote on one; "
                       "leave robust out")  # fmt: skip
    if needs_each:
        raise BadInput(f"robust: {name} must see every update, since {needs_each}; leave robust out")
    if job.aggregation in UNFIT:
        raise BadInput(f"robust: aggregation {job.aggregation!r} {UNFIT[job.aggregation]}; choose 'svd' or 'stack'")
    for key, kinds in KEYS.items():
        if spec.kind not in kinds and getattr(spec, key) != RobustSpec.model_fields[key].default:
            raise BadInput(f"robust.{key}: {spec.kind} does not read it (it belongs to {', '.join(sorted(kinds))})")
    if takes_late(job.schedule):
        raise BadInput(
            "robust: every round gives the factors new coordinates, in which an older update means something "
            "else; choose a schedule that refuses late updates"
        )
    check_size(spec, _least(job))


def _least(job: JobSpec) -> int:
    """Fewest updates that a round may close with."""
    share = job.schedule.quorum if isinstance(job.schedule, Quorum) else 1.0
    return math.ceil(share * job.cohort_size - ROUNDING)

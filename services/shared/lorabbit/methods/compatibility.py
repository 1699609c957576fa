"""Which jobs may ask for which coding, decided when a job is read.

Joining: whether a client that comes later may belong to a job that runs, and why not.

A client's index decides its part of a dataset that an experiment deals out, so a job with such a partition has fixed
indices. Clients with data of their own (`data.partition: own`) take the next free index, which decides nothing else
than the rank or model that the job gives out by index.

Which jobs may promise privacy, decided when a job is read.

Which jobs may ask for a defense, decided when a job is read.
"""

from __future__ import annotations

import math

from lorabbit.errors import BadInput
from lorabbit.job.schedules import Quorum, takes_late
from lorabbit.job.spec import BLOCKS, TOP_K, CompressionSpec, JobSpec, RobustSpec
from lorabbit.privacy.accountant import epsilon_of_rounds
from lorabbit.robust.rules import ROUNDING, check_size

COMPRESSION_KEYS = {"block": BLOCKS, "share": frozenset({TOP_K})}
"""Keys and the codecs that read them."""


def check_compression(job: JobSpec, *, personal: bool, keeps_coordinates: bool, absolute: str = "") -> None:
    """Raise BadInput where a coding would break what the job asks for.

    `personal`: clients have models of their own. `keeps_coordinates`: a number means the same in every round.
    `absolute`: why the adapter itself must not be rounded, empty where it may.
    """
    up, down, name = job.transport.uploads, job.transport.downloads, job.method.name
    for where, coding in (("up", up), ("down", down)):
        _check_keys(f"transport.{where}", coding)
        if personal and (coding.is_lossy or coding.delta):
            raise BadInput(f"transport.{where}: clients of {name} keep models of their own, and what they send is "
                           "no change of a shared one; leave all but zstd out")  # fmt: skip
    _check_down(job, absolute)
    if up.is_lossy and not up.delta and (absolute or up.codec == TOP_K):
        why = absolute or "top-k leaves most values out, which is sense for changes only"
        raise BadInput(f"transport.up.delta: {why}; leave it out, or set it to true")
    if up.codec == TOP_K and not up.feedback:
        raise BadInput("transport.up.feedback: what top-k does not send would be lost for good; leave it out")
    if up.feedback:
        _check_feedback(job, up, keeps_coordinates=keeps_coordinates)


def _check_keys(where: str, coding: CompressionSpec) -> None:
    """Refuse keys that the codec does not read, and codings that change nothing."""
    for key, codecs in COMPRESSION_KEYS.items():
        if coding.codec not in codecs and getattr(coding, key) != CompressionSpec.model_fields[key].default:
            belongs = ", ".join(sorted(codecs))
            raise BadInput(f"{where}.{key}: {coding.codec} does not read it (it belongs to {belongs})")
    if coding.delta and not coding.is_lossy and not coding.zstd:
        raise BadInput(f"{where}.delta: a difference in fp32 is as long as the whole; set {where}.zstd to true")


def _check_down(job: JobSpec, absolute: str) -> None:
    """Refuse adapters that clients could not train from."""
    down = job.transport.downloads
    if down.codec == TOP_K:
        raise BadInput("transport.down.codec: an adapter of which only some values travel cannot be trained from; "
                       "choose fp32, bf16, int8 or int4")  # fmt: skip
    if job.transport.down.feedback:
        raise BadInput("transport.down.feedback: the server sends one adapter to all and owes none of them anything; "
                       "leave it out")  # fmt: skip
    if down.is_lossy and down.delta:
        raise BadInput("transport.down.delta: a client that lost one of a chain of rounded differences would need "
                       "them all; leave it out, or set transport.down.codec to fp32")  # fmt: skip
    if down.is_lossy and takes_late(job.schedule):
        raise BadInput("transport.down.codec: what a late update adds to its start would hold the rounding of that "
                       "start; set it to fp32, or choose a schedule that refuses late updates")  # fmt: skip
    if down.is_lossy and absolute:
        raise BadInput(f"transport.down.codec: {absolute}; set it to fp32")


def _check_feedback(job: JobSpec, up: CompressionSpec, *, keeps_coordinates: bool) -> None:
    """Refuse to add what one round left unsent to something else in the next."""
    where = "transport.up.codec: top-k feeds back, and" if up.codec == TOP_K else "transport.up.feedback:"
    if not up.is_lossy or not up.delta:
        raise BadInput("transport.up.feedback: nothing is left unsent, or nothing can be added to it; set "
                       "transport.up.codec to int8, int4 or top-k, and leave delta out")  # fmt: skip
    if not keeps_coordinates:
        raise BadInput(f"{where} {job.method.name} does not promise that a number means the same in the next round; "
                       "choose int8 or int4 without feedback")  # fmt: skip
    if job.aggregation not in {"factors", "freeze-a"}:
        raise BadInput(f"{where} aggregation {job.aggregation!r} gives the factors new coordinates or another size; "
                       "choose int8 or int4 without feedback")  # fmt: skip
    if job.robust is not None:
        raise BadInput(f"{where} a client that a defense leaves out would have its change told twice as loud later; "
                       "choose int8 or int4 without feedback, or leave robust out")  # fmt: skip


def objection(job: JobSpec, *, prepares: bool) -> str:
    """Say why no client can join a job that runs; empty where one can."""
    kind = job.data.partition.kind
    if kind != "own":
        return (
            f"data.partition {kind!r} deals one dataset to {job.clients} clients by their index, and every part has "
            "its client"
        )
    if prepares:
        return f"{job.method.name} hears every client in round 0, which a client that comes later has missed"
    if job.privacy is not None:
        return "the accountant of `privacy` counts on a fixed population"
    return ""


def check_joining(job: JobSpec, *, prepares: bool) -> None:
    """Raise BadInput where a job wants later clients to join and they cannot."""
    why = objection(job, prepares=prepares)
    if job.join and why:
        raise BadInput(f"join: no client can join this job once it runs: {why}; leave join out")


def takes_in(job: JobSpec, *, prepares: bool) -> bool:
    """Tell whether a client that comes later joins."""
    return job.join is not False and not objection(job, prepares=prepares)


def check_privacy(job: JobSpec, *, personal: bool, prepares: bool, needs_each: str = "") -> None:
    """Raise BadInput where a job's noise would not give what it promises."""
    spec, name = job.privacy, job.method.name
    if spec is None:
        return
    if personal:
        raise BadInput(f"privacy: {name} works on models of the clients' own, and "
                       "noise is worked out for none of them; leave privacy out")  # fmt: skip
    if prepares:
        raise BadInput(f"privacy: {name} prepares by measuring the data without noise; leave privacy out")
    if needs_each:
        raise BadInput(f"privacy: {name} must see every update, since {needs_each}; leave privacy out")
    if job.schedule != "sync":
        raise BadInput("privacy: clients are counted, and budgets kept, by rounds in which each is at most once; set "
                       "schedule to 'sync'")  # fmt: skip
    if spec.level == "example":
        _check_examples(job)
        return
    if job.robust is not None:
        raise BadInput("privacy.level: 'client' clips and averages by itself; leave robust out")
    if job.aggregation not in {"factors", "freeze-a"} or job.model.lora.client_ranks is not None:
        raise BadInput("privacy.level: noise goes onto the mean of tensors of one shape; leave aggregation and "
                       "model.lora.client_ranks out")  # fmt: skip
    first = epsilon_of_rounds(spec.noise, 1, spec.delta)
    if spec.epsilon is not None and first > spec.epsilon:
        raise BadInput(f"privacy.epsilon: one round costs a client {first:.3g} with noise {spec.noise}, and the budget "
                       f"is {spec.epsilon}; raise privacy.noise or privacy.epsilon")  # fmt: skip


def _check_examples(job: JobSpec) -> None:
    if job.model.dtype != "float32":
        raise BadInput(f"model.dtype: noise is added in float32, not {job.model.dtype}; set it to 'float32', or leave "
                       "privacy out")  # fmt: skip
    if job.model.task == "question-answering":
        raise BadInput("privacy.level: a long text has several rows here, and noise is worked out for one row an "
                       "example; leave privacy out")  # fmt: skip


ROBUST_KEYS = {"norm": {"clip"}, "trim": {"trimmed-mean"}, "attackers": {"krum", "multi-krum"}, "keep": {"multi-krum"}}
"""Keys and the kinds that read them."""
UNFIT = {
    "zero-padded": "weighs clients by the norm of their update, which an attacker chooses",
    "exact": "puts into the base what the mean of factors misses, and a robust product has no such mean",
}


def check_robust(job: JobSpec, *, personal: bool, needs_each: str = "") -> None:
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
    for key, kinds in ROBUST_KEYS.items():
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

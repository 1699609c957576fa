"""Which jobs may ask for which coding, decided when a job is read."""

from __future__ import annotations

from lorabbit.errors import BadInput
from lorabbit.jobspec import JobSpec
from lorabbit.schedules import takes_late
from lorabbit.transport import BLOCKS, TOP_K, Coding

KEYS = {"block": BLOCKS, "share": frozenset({TOP_K})}
"""Keys and the codecs that read them."""


def check(job: JobSpec, *, personal: bool, keeps_coordinates: bool, absolute: str = "") -> None:
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


def _check_keys(where: str, coding: Coding) -> None:
    """Refuse keys that the codec does not read, and codings that change nothing."""
    for key, codecs in KEYS.items():
        if coding.codec not in codecs and getattr(coding, key) != Coding.model_fields[key].default:
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


def _check_feedback(job: JobSpec, up: Coding, *, keeps_coordinates: bool) -> None:
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
        raise BadInput(f"{where} a client that a defence leaves out would have its change told twice as loud later; "
                       "choose int8 or int4 without feedback, or leave robust out")  # fmt: skip

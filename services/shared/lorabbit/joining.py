"""Joining: whether a client that comes later may belong to a job that runs, and why not.

A client's index decides its part of a dataset that an experiment deals out, so a job with such a partition has fixed
indices. Clients with data of their own (`data.partition: own`) take the next free index, which decides nothing else
than the rank or model that the job gives out by index.
"""

from __future__ import annotations

from lorabbit.errors import BadInput
from lorabbit.jobspec import JobSpec


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


def check(job: JobSpec, *, prepares: bool) -> None:
    """Raise BadInput where a job wants later clients to join and they cannot."""
    why = objection(job, prepares=prepares)
    if job.join and why:
        raise BadInput(f"join: no client can join this job once it runs: {why}; leave join out")


def takes_in(job: JobSpec, *, prepares: bool) -> bool:
    """Tell whether a client that comes later joins."""
    return job.join is not False and not objection(job, prepares=prepares)

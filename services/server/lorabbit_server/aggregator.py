"""Fold a round's updates into the next server state, from disk, one tensor at a time.

Updates are read lazily in ascending client index, so memory is one accumulator and one tensor
whatever the number of clients, and the sum is the same to the bit whatever the order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from lorabbit import codec
from lorabbit.methods import Method
from lorabbit.payloads import PayloadStore
from lorabbit.types import ClientUpdate, ServerState
from lorabbit_server.jobstate import TaskState


def updates(tasks: Iterable[TaskState], payloads: PayloadStore) -> Iterator[ClientUpdate]:
    """Stream the updates of accepted tasks; each one's tensors are read when asked for."""
    for task in tasks:
        if task.offered is None or task.offered.payload is None:
            continue
        metrics = task.offered.metrics
        yield ClientUpdate(
            task.client,
            task.index,
            codec.read_tensors(payloads.path(task.offered.payload.sha256)),
            metrics.num_examples,
            math.nan if metrics.loss is None else metrics.loss,
            metrics.facts,
        )


def aggregate(method: Method, state: ServerState, tasks: Sequence[TaskState], *, payloads: PayloadStore) -> ServerState:
    """Let the method fold the round's updates, in ascending client index."""
    in_order = sorted(tasks, key=lambda task: task.index)
    return method.aggregate(state, updates(in_order, payloads))

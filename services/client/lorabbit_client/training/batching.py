"""Batches of rows of similar length in random order, or the batches that a method names.

Batches of similar length need little padding: on short texts this halves the time of a step. Each epoch shuffles the
rows, forms batches, and shuffles the batches, so rows of a batch have nothing but their length in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lorabbit.job.spec import LocalSpec
from lorabbit.runtime.seeds import derive_seed
from lorabbit_client.data.table import IntArray
from lorabbit_client.dataset import Examples

WINDOW_BATCHES = 64
"""Batches' worth of shuffled rows that are sorted by length together."""


def steps_of(local: LocalSpec, rows: int) -> int:
    """Return the optimizer steps of one round; a fraction of an epoch is rounded up."""
    return steps_over(local, -(-rows // local.batch_size))


def steps_over(local: LocalSpec, per_epoch: int) -> int:
    """Return the optimizer steps of one round whose epochs have so many batches."""
    if local.steps is not None:
        return local.steps
    return max(1, math.ceil(per_epoch * (local.epochs or 1.0) - 1e-9))


def batches(lengths: IntArray, batch_size: int, steps: int, *, seed: int) -> Iterator[IntArray]:
    """Yield the positions of each step's rows, epoch after epoch until `steps` are given."""
    yielded, epoch = 0, 0
    while yielded < steps:
        order = epoch_order(lengths, batch_size, seed=derive_seed(seed, "batches", epoch))
        yield from order[: steps - yielded]
        yielded, epoch = yielded + len(order), epoch + 1


def epoch_order(lengths: IntArray, batch_size: int, *, seed: int) -> list[IntArray]:
    """Split one epoch into batches of rows of similar length, in random order; every row occurs once."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    window = WINDOW_BATCHES * batch_size
    batches_of_epoch: list[IntArray] = []
    for start in range(0, len(shuffled), window):
        part = shuffled[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches_of_epoch.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    return [batches_of_epoch[i] for i in generator.permutation(len(batches_of_epoch))]


def repeated(batches_of_epoch: Sequence[IntArray], steps: int) -> Iterator[IntArray]:
    """Yield the same batches in the same order, epoch after epoch until `steps` are given."""
    for step in range(steps):
        yield batches_of_epoch[step % len(batches_of_epoch)]


def rows_of(examples: Examples, batch: Sequence[int]) -> IntArray:
    """Return the positions of all rows of some of a client's examples; a long text may have several rows."""
    chosen = np.asarray(batch, dtype=np.int64)
    if len(examples) == examples.num_examples:
        return chosen
    owner = examples.features.examples_of(examples.rows)
    starts = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    ends = np.append(starts[1:], len(owner))
    return np.concatenate([np.arange(starts[i], ends[i]) for i in chosen])

"""A client's data: its share of a dataset that is read, split and encoded once per process, and again once it changed.

`load_client` gives one client's training and test examples, `load_test` the whole test set,
`describe` the sizes without any model. However many clients live in a process, they hold index
arrays into one encoded copy, and a fork shares its pages. Which rows a client gets depends on the
job's data section, seed and population alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec, JobSpec
from lorabbit.runtime.seeds import derive_seed
from lorabbit_client.data.features import Batch, Features, ProcessorKey, Scorer
from lorabbit_client.data.partitioners import ClientSplit, PartitionKeys, hold_out, partition
from lorabbit_client.data.sources import Stamp, read_source, stamp
from lorabbit_client.data.table import IntArray, Source, Table
from lorabbit_client.tasks.base import LearningTask, Records
from lorabbit_client.tasks.registry import TASKS

_LOCK = threading.RLock()
"""Threads of one process wait for one reading instead of each doing it."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Some of the encoded rows of a split."""

    features: Features
    rows: IntArray
    num_examples: int
    """Examples; fewer than rows where long texts have several."""

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    @property
    def lengths(self) -> IntArray:
        """Size of each row (tokens)."""
        return self.features.lengths[self.rows]

    def batch(self, positions: IntArray) -> Batch:
        """Return the model's keyword arguments for rows at these positions, labels among them."""
        return self.features.batch(self.rows[positions])

    def scorer(self) -> Scorer:
        """Return a scorer; give it `rows[positions]` with each batch."""
        return self.features.scorer()


@dataclass(frozen=True, slots=True)
class ClientData:
    """What one client trains and is scored on."""

    train: Examples
    test: Examples
    """May be empty: a small share of a class can round to no test example."""
    labels: tuple[str, ...]
    label_counts: Mapping[str, int]
    """Training examples by label name; empty where the task has no classes."""
    task: LearningTask


@dataclass(frozen=True, slots=True)
class ShareSize:
    """How much one client has."""

    index: int
    train: int
    test: int
    label_counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DataOutline:
    """What a job's data is, without a model."""

    labels: tuple[str, ...]
    train: int
    test: int
    clients: tuple[ShareSize, ...]


@dataclass(frozen=True, slots=True)
class _CheckedExamples:
    """Checked examples in training and test, with what partitioners may see of them."""

    labels: tuple[str, ...]
    train: Records
    test: Records
    train_keys: PartitionKeys
    test_keys: PartitionKeys


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A dataset as it stays in memory."""

    labels: tuple[str, ...]
    train: Features
    test: Features
    train_keys: PartitionKeys
    test_keys: PartitionKeys


@dataclass(frozen=True, slots=True)
class _Request:
    """What a dataset depends on; equal requests share one copy."""

    data: str
    task: str
    seed: int
    root: Path

    @classmethod
    def of(cls, spec: JobSpec, data_root: Path) -> _Request:
        return cls(spec.data.model_dump_json(), spec.model.task, spec.seed, data_root)

    @property
    def spec(self) -> DataSpec:
        return DataSpec.model_validate_json(self.data)


def load_client(
    spec: JobSpec,
    index: int,
    population: int,
    *,
    processor: Any,  # noqa: ANN401 - a tokenizer, or an ImageFormat
    data_root: Path = Path(),
) -> ClientData:
    """Return the data of client `index` of `population`, encoded for the model's tokenizer or image format.

    Raises BadInput when the source cannot be read, a row is bad or the partition is impossible.
    """
    request = _Request.of(spec, data_root)
    with _LOCK:
        dataset = _encoded(request, ProcessorKey.of(processor))
        share = _shares(request, population)[index]
    return ClientData(
        train=_examples(dataset.train, share.train),
        test=_examples(dataset.test, share.test),
        labels=dataset.labels,
        label_counts=_label_counts(dataset.labels, dataset.train_keys, share.train),
        task=TASKS[spec.model.task],
    )


def load_test(spec: JobSpec, *, processor: Any, data_root: Path = Path()) -> Examples:  # noqa: ANN401 - as above
    """Return the whole test set; raises BadInput as `load_client` does."""
    with _LOCK:
        dataset = _encoded(_Request.of(spec, data_root), ProcessorKey.of(processor))
    return _examples(dataset.test, np.arange(len(dataset.test_keys)))


def load_test_records(spec: JobSpec, data_root: Path = Path()) -> Records:
    """Return the whole test set as read, without encoding."""
    with _LOCK:
        return _read(_Request.of(spec, data_root)).test


def load_labels(spec: JobSpec, data_root: Path = Path()) -> tuple[str, ...]:
    """Return the label table, empty where the task has no labels."""
    with _LOCK:
        return _keys(_Request.of(spec, data_root))[0]


def describe(spec: JobSpec, population: int, data_root: Path = Path()) -> DataOutline:
    """Return the sizes and label counts of every client's share; needs no model."""
    request = _Request.of(spec, data_root)
    with _LOCK:
        labels, train, test = _keys(request)
        shares = _shares(request, population)
    clients = (
        ShareSize(index, len(share.train), len(share.test), _label_counts(labels, train, share.train))
        for index, share in enumerate(shares)
    )
    return DataOutline(labels, len(train), len(test), tuple(clients))


_STAMPS: dict[_Request, Stamp] = {}
"""Stamps of the files from which a dataset was read."""
MOST_STAMPS = 8
"""As many as there are datasets whose keys are kept."""


def drop_stale_data() -> bool:
    """Clear the caches if a file changed since it was read, or the caches are large; tell whether they were cleared.

    Call it at the start of a job, so that one job uses one state of its files.
    """
    with _LOCK:
        is_as_read = all(stamp(request.spec, request.root) == before for request, before in _STAMPS.items())
        if is_as_read and len(_STAMPS) <= MOST_STAMPS:
            return False
        for known in (_encoded, _shares, _keys, _read):
            known.cache_clear()
        _STAMPS.clear()
        return True


@lru_cache(maxsize=2)
def _encoded(request: _Request, reader: ProcessorKey) -> _Encoded:
    """Encode a dataset; the texts it was made from are not kept."""
    labels, train_keys, test_keys = _keys(request)
    task, spec, split = TASKS[request.task], request.spec, _read(request)
    train = task.encode(split.train, reader.processor, labels, spec=spec)
    test = task.encode(split.test, reader.processor, labels, spec=spec)
    _read.cache_clear()
    return _Encoded(labels, train, test, train_keys, test_keys)


@lru_cache(maxsize=8)
def _shares(request: _Request, population: int) -> tuple[ClientSplit, ...]:
    """Split a dataset over the population."""
    _, train, test = _keys(request)
    return partition(request.spec.partition, population, request.seed, train=train, test=test)


@lru_cache(maxsize=MOST_STAMPS)
def _keys(request: _Request) -> tuple[tuple[str, ...], PartitionKeys, PartitionKeys]:
    """Return the label table and the keys of both splits."""
    split = _read(request)
    return split.labels, split.train_keys, split.test_keys


@lru_cache(maxsize=1)
def _read(request: _Request) -> _CheckedExamples:
    """Read and check a dataset and set its test examples apart."""
    spec, task = request.spec, TASKS[request.task]
    task.check(spec)
    _STAMPS.setdefault(request, stamp(spec, request.root))
    source = read_source(spec, request.root)
    labels = task.labels(source, spec)
    train, train_keys = _checked(source.train, source, labels, request=request)
    if source.test is not None:
        test, test_keys = _checked(source.test, source, labels, request=request)
        return _CheckedExamples(labels, train, test, train_keys, test_keys)
    if len(train) < 2:  # noqa: PLR2004 - one to train, one to test
        raise BadInput(f"{source.train.name} has {len(train)} rows; at least 2 are needed to hold some out for testing")
    kept, held = hold_out(train_keys, spec.test_share, request.seed)
    return _CheckedExamples(
        labels, train.take(kept), train.take(held), _take(train_keys, kept), _take(train_keys, held)
    )


def _checked(
    table: Table, source: Source, labels: tuple[str, ...], *, request: _Request
) -> tuple[Records, PartitionKeys]:
    """Limit and check one table, and read what partitioners may see of it."""
    spec = request.spec
    if spec.limit is not None and len(table) > spec.limit:
        rng = np.random.default_rng(derive_seed(request.seed, "limit", len(table)))
        table = table.take(np.sort(rng.permutation(len(table))[: spec.limit]))
    task = TASKS[request.task]
    records = task.parse(table, labels, spec)
    group = spec.partition.field or source.group
    if group is None:
        return records, PartitionKeys(records.classes, classed=task.has_classes)
    if group not in table.columns:
        raise BadInput(f"data.partition.field: {table.name} has no field {group!r}; it has {', '.join(table.columns)}")
    return records, PartitionKeys(
        records.classes,
        tuple(str(table.value(group, row)) for row in range(len(table))),
        classed=task.has_classes,
    )


def _take(keys: PartitionKeys, rows: IntArray) -> PartitionKeys:
    groups = keys.groups
    return replace(
        keys, classes=keys.classes[rows], groups=None if groups is None else tuple(groups[row] for row in rows)
    )


def _examples(features: Features, examples: IntArray) -> Examples:
    return Examples(features, features.rows_of(examples), len(examples))


def _label_counts(labels: tuple[str, ...], keys: PartitionKeys, rows: IntArray) -> dict[str, int]:
    """Count a client's training examples by label; nothing where examples have no class."""
    if not keys.classed:
        return {}
    counts = np.bincount(keys.classes[rows], minlength=len(labels))
    return {label: int(count) for label, count in zip(labels, counts, strict=False)}

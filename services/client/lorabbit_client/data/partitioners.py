"""Split rows over clients: pure, seeded, no row twice and none lost.

Training rows are dealt by one of the partitioners; test rows follow the training rows: a client
gets of each class's test rows the part it has of that class's training rows, or, split by field,
the test rows of its groups. What cannot be done (fewer rows or groups than clients) is BadInput
with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorabbit.errors import BadInput
from lorabbit.job.spec import PartitionSpec
from lorabbit.runtime.seeds import derive_seed
from lorabbit_client.data.table import IntArray

HOLDER_SHARE = (0.4, 0.6)
"""Range of a holder's share of a class before normalizing: the pathological recipe of pFedHN and pFedLoRA."""


@dataclass(frozen=True, slots=True)
class PartitionKeys:
    """What a partitioner may see of the rows of one split."""

    classes: IntArray
    """Class of each row; all zero where the task has no classes."""
    groups: tuple[str, ...] | None = None
    """Natural group of each row."""
    classed: bool = True
    """Whether rows have classes at all."""

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.classes)


@dataclass(frozen=True, slots=True)
class ClientSplit:
    """The rows of one client, ascending."""

    train: IntArray
    test: IntArray


@dataclass(frozen=True, slots=True)
class _PartitionRequest:
    """What is to be split, over how many."""

    spec: PartitionSpec
    clients: int
    rng: np.random.Generator
    train: PartitionKeys
    test: PartitionKeys


def partition(
    spec: PartitionSpec, clients: int, seed: int, *, train: PartitionKeys, test: PartitionKeys
) -> tuple[ClientSplit, ...]:
    """Return the share of each client; raises BadInput when the split is impossible."""
    if spec.kind == "own":
        everything = ClientSplit(np.arange(len(train)), np.arange(len(test)))
        return (everything,) * clients
    if len(train) < clients * spec.min_examples:
        raise BadInput(
            f"data.partition: {len(train)} training examples are too few for {clients} clients"
            f" with at least {spec.min_examples} each"
        )
    rng = np.random.default_rng(derive_seed(seed, "partition", spec.kind, clients))
    owners, test_owners = _PARTITIONERS[spec.kind](_PartitionRequest(spec, clients, rng, train, test))
    sizes = np.bincount(owners, minlength=clients)
    if sizes.min() < spec.min_examples:
        raise BadInput(
            f"data.partition: {spec.kind} over {clients} clients leaves client {int(sizes.argmin())} with"
            f" {int(sizes.min())} of {len(train)} training examples, fewer than min_examples {spec.min_examples}"
        )
    return tuple(ClientSplit(np.flatnonzero(owners == k), np.flatnonzero(test_owners == k)) for k in range(clients))


def hold_out(keys: PartitionKeys, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Return (train, test) rows with `share` of every class and of every group in test, as near as whole rows allow.

    Rows are laid out by class, group and chance, and every 1/share-th is held out; a class keeps at
    least one row for training. The split does not depend on the partition.
    """
    rng = np.random.default_rng(derive_seed(seed, "test-split"))
    _, group = np.unique(np.array(keys.groups or ("",) * len(keys)), return_inverse=True)
    order = np.lexsort((rng.permutation(len(keys)), group, keys.classes))
    ticks = np.floor(rng.random() + share * np.arange(len(keys) + 1))
    held = np.zeros(len(keys), dtype=bool)
    held[order[np.diff(ticks) > 0]] = True
    for label in np.setdiff1d(keys.classes, keys.classes[~held]):
        held[np.flatnonzero(keys.classes == label)[0]] = False
    return np.flatnonzero(~held), np.flatnonzero(held)


def apportion(weights: NDArray[np.float64], total: int, rng: np.random.Generator) -> IntArray:
    """Split a whole number in proportion to weights by largest remainders; ties fall at random."""
    exact = weights / weights.sum() * total
    counts: IntArray = np.floor(exact).astype(np.int64)
    order = np.lexsort((rng.random(len(weights)), np.round(counts - exact, 9)))
    counts[order[: total - counts.sum()]] += 1
    return counts


def _assign_rows(rows: IntArray, counts: IntArray, owners: IntArray, rng: np.random.Generator) -> None:
    """Assign shuffled rows to clients by their counts."""
    owners[rng.permutation(rows)] = np.repeat(np.arange(len(counts)), counts)


def _assign_test_rows(split: _PartitionRequest, owners: IntArray, *, by_class: bool) -> IntArray:
    """Assign test rows in the proportions of the training rows of their class (or of all)."""
    train, test = split.train.classes, split.test.classes
    if not by_class:
        train, test = np.zeros_like(train), np.zeros_like(test)
    test_owners = np.zeros(len(test), dtype=np.int64)
    sizes = np.bincount(owners, minlength=split.clients).astype(np.float64)
    for label in np.unique(test):
        held = np.bincount(owners[train == label], minlength=split.clients).astype(np.float64)
        rows = np.flatnonzero(test == label)
        _assign_rows(rows, apportion(held if held.any() else sizes, len(rows), split.rng), test_owners, split.rng)
    return test_owners


def _by_sizes(split: _PartitionRequest, weights: NDArray[np.float64]) -> tuple[IntArray, IntArray]:
    """Assign all rows at random by size alone, min_examples to each client first."""
    least, total = split.spec.min_examples, len(split.train)
    counts = least + apportion(weights, total - least * split.clients, split.rng)
    owners = np.zeros(total, dtype=np.int64)
    _assign_rows(np.arange(total), counts, owners, split.rng)
    return owners, _assign_test_rows(split, owners, by_class=False)


def _iid(split: _PartitionRequest) -> tuple[IntArray, IntArray]:
    """Equal sizes, any row anywhere."""
    return _by_sizes(split, np.ones(split.clients))


def _quantity(split: _PartitionRequest) -> tuple[IntArray, IntArray]:
    """Sizes from a Dirichlet(alpha) beyond min_examples, any row anywhere."""
    return _by_sizes(split, split.rng.dirichlet(np.full(split.clients, split.spec.alpha)))


def _dirichlet(split: _PartitionRequest) -> tuple[IntArray, IntArray]:
    """For each class q ~ Dirichlet_N(alpha), the class split by q; then every client gets min_examples.

    A client below min_examples takes single rows from the largest client, so that a small alpha over many clients
    needs no repeated draws.
    """
    classes, rng = split.train.classes, split.rng
    _need_classes(split)
    owners = np.zeros(len(classes), dtype=np.int64)
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        q = rng.dirichlet(np.full(split.clients, split.spec.alpha))
        _assign_rows(rows, apportion(q, len(rows), rng), owners, rng)
    _ensure_minimum(owners, split.clients, split.spec.min_examples, rng=rng)
    return owners, _assign_test_rows(split, owners, by_class=True)


def _ensure_minimum(owners: IntArray, clients: int, least: int, *, rng: np.random.Generator) -> None:
    """Move single rows from the largest clients to those with fewer than `least`."""
    sizes = np.bincount(owners, minlength=clients)
    for poor in np.flatnonzero(sizes < least):
        while sizes[poor] < least:
            rich = int(sizes.argmax())
            owners[rng.choice(np.flatnonzero(owners == rich))] = poor
            sizes[rich] -= 1
            sizes[poor] += 1


def _pathological(split: _PartitionRequest) -> tuple[IntArray, IntArray]:
    """Each client holds exactly k classes; a class's holders share it by U(0.4, 0.6), normalized.

    As in pFedHN, but places are spread so that every class has a holder and every client k classes
    also when k N is no multiple of the number of classes, and rows left by rounding are dealt too.
    """
    _need_classes(split)
    labels, sizes = np.unique(split.train.classes, return_counts=True)
    owners = np.zeros(len(split.train), dtype=np.int64)
    for label, size, held in zip(labels, sizes, _clients_of_labels(split, labels, sizes), strict=True):
        counts = np.zeros(split.clients, dtype=np.int64)
        weights = split.rng.uniform(*HOLDER_SHARE, len(held))
        counts[held] = 1 + apportion(weights, int(size) - len(held), split.rng)
        _assign_rows(np.flatnonzero(split.train.classes == label), counts, owners, split.rng)
    return owners, _assign_test_rows(split, owners, by_class=True)


def _clients_of_labels(split: _PartitionRequest, labels: IntArray, sizes: IntArray) -> list[list[int]]:
    """Return the clients that hold each class: every client takes the k classes with most free places."""
    k, clients, rng = split.spec.classes, split.clients, split.rng
    if k > len(labels):
        raise BadInput(f"data.partition.classes: {k} classes a client, but the examples have {len(labels)}")
    if k * clients < len(labels):
        raise BadInput(
            f"data.partition: {clients} clients with {k} classes each hold at most {k * clients} of"
            f" {len(labels)} classes; raise data.partition.classes or clients"
        )
    places = apportion(np.ones(len(labels)), k * clients, rng)
    if (places > sizes).any():
        worst = int((places - sizes).argmax())
        raise BadInput(
            f"data.partition: class {int(labels[worst])} has {int(sizes[worst])} training examples for the"
            f" {int(places[worst])} clients that would hold it; lower data.partition.classes or clients"
        )
    holders: list[list[int]] = [[] for _ in labels]
    for client in range(clients):
        free = places - np.array([len(held) for held in holders])
        for place in np.lexsort((rng.random(len(labels)), -free))[:k]:
            holders[place].append(client)
    return holders


def _natural(split: _PartitionRequest) -> tuple[IntArray, IntArray]:
    """Every group wholly on one client: the largest first, each to the client with fewest rows so far."""
    train, test, clients = split.train.groups, split.test.groups, split.clients
    if train is None or (test is None and len(split.test)):
        raise BadInput("data.partition: a natural split needs data.partition.field, the field that names the group")
    client_of_group = _assign_groups(train, clients)
    if len(client_of_group) < clients:
        raise BadInput(
            f"data.partition: {len(client_of_group)} groups in the training examples are too few for {clients} clients"
        )
    later = test or ()
    client_of_group = {
        **_assign_groups([group for group in later if group not in client_of_group], clients),
        **client_of_group,
    }
    return np.array([client_of_group[g] for g in train]), np.array([client_of_group[g] for g in later], dtype=np.int64)


def _assign_groups(groups: Sequence[str], clients: int) -> dict[str, int]:
    """Return the client of each group; ties go to the first name and the lowest client."""
    names, sizes = np.unique(np.array(groups, dtype=object), return_counts=True)
    load = np.zeros(clients, dtype=np.int64)
    client_of_group: dict[str, int] = {}
    for place in np.lexsort((np.arange(len(names)), -sizes)):
        client = int(load.argmin())
        client_of_group[str(names[place])] = client
        load[client] += sizes[place]
    return client_of_group


def _need_classes(split: _PartitionRequest) -> None:
    if not split.train.classed or len(np.unique(split.train.classes)) < 2:  # noqa: PLR2004 - one class cannot be skewed
        raise BadInput(
            f"data.partition.kind: {split.spec.kind} splits by class, but these examples have one class or none;"
            " use iid, quantity or natural"
        )


_PARTITIONERS: dict[str, Callable[[_PartitionRequest], tuple[IntArray, IntArray]]] = {
    "iid": _iid,
    "quantity": _quantity,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "natural": _natural,
}

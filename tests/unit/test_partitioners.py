"""Partition laws: what every split promises, whatever the labels, groups, clients and seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from lorabbit.errors import BadInput
from lorabbit.job.spec import PartitionSpec
from lorabbit_client.data.partitioners import ClientSplit, PartitionKeys, apportion, hold_out, partition

SPLITS = st.sampled_from(["iid", "dirichlet", "pathological", "quantity", "natural"])


def keys(classes: list[int], groups: list[str] | None = None) -> PartitionKeys:
    return PartitionKeys(np.array(classes, dtype=np.int64), None if groups is None else tuple(groups))


@st.composite
def labeled(draw: st.DrawFn, least: int = 20, most: int = 200) -> PartitionKeys:
    classes = draw(st.lists(st.integers(0, 4), min_size=least, max_size=most))
    groups = draw(st.lists(st.sampled_from("abcdefgh"), min_size=len(classes), max_size=len(classes)))
    return keys(classes, groups)


def try_partition(
    spec: PartitionSpec, clients: int, seed: int, train: PartitionKeys, test: PartitionKeys
) -> tuple[ClientSplit, ...]:
    try:
        return partition(spec, clients, seed, train=train, test=test)
    except BadInput:
        reject()


def classes_of(share: ClientSplit, train: PartitionKeys) -> set[int]:
    return set(train.classes[share.train].tolist())


@settings(deadline=None, max_examples=150)
@given(SPLITS, labeled(), labeled(least=0, most=60), st.integers(1, 8), st.integers(0, 2**62))
def test_every_row_belongs_to_exactly_one_client(
    kind: str, train: PartitionKeys, test: PartitionKeys, clients: int, seed: int
):
    spec = PartitionSpec(kind=kind, classes=2)

    shares = try_partition(spec, clients, seed, train, test)

    assert len(shares) == clients
    assert sorted(np.concatenate([share.train for share in shares]).tolist()) == list(range(len(train)))
    assert sorted(np.concatenate([share.test for share in shares]).tolist()) == list(range(len(test)))


@settings(deadline=None, max_examples=60)
@given(SPLITS, labeled(), labeled(least=1), st.integers(1, 6), st.integers(0, 2**62))
def test_the_same_seed_gives_the_same_split(
    kind: str, train: PartitionKeys, test: PartitionKeys, clients: int, seed: int
):
    spec = PartitionSpec(kind=kind)

    first = try_partition(spec, clients, seed, train, test)
    second = partition(spec, clients, seed, train=train, test=test)

    for one, other in zip(first, second, strict=True):
        assert one.train.tolist() == other.train.tolist()
        assert one.test.tolist() == other.test.tolist()


@settings(deadline=None, max_examples=100)
@given(labeled(least=40), st.integers(2, 8), st.integers(1, 5), st.sampled_from([0.01, 0.1, 1.0]), st.integers(0, 99))
def test_dirichlet_and_quantity_leave_nobody_below_the_minimum(
    train: PartitionKeys, clients: int, least: int, alpha: float, seed: int
):
    assume(len(set(train.classes.tolist())) > 1)

    for kind in ("dirichlet", "quantity", "iid"):
        spec = PartitionSpec(kind=kind, alpha=alpha, min_examples=least)
        shares = partition(spec, clients, seed, train=train, test=keys([]))
        assert min(len(share.train) for share in shares) >= least


@settings(deadline=None, max_examples=100)
@given(labeled(least=60), labeled(least=0), st.integers(2, 10), st.integers(1, 4), st.integers(0, 99))
def test_a_pathological_client_holds_exactly_k_classes_and_is_tested_on_them_alone(
    train: PartitionKeys, test: PartitionKeys, clients: int, k: int, seed: int
):
    shares = try_partition(PartitionSpec(kind="pathological", classes=k), clients, seed, train, test)

    for share in shares:
        assert len(classes_of(share, train)) == k
        known = set(train.classes.tolist())
        assert set(test.classes[share.test].tolist()) & known <= classes_of(share, train)


@pytest.mark.parametrize("seed", range(3))
def test_J11_two_of_ten_classes_a_client_and_one_table_of_shares_for_training_and_test(seed: int):
    train, test = keys([c for c in range(10) for _ in range(100)]), keys([c for c in range(10) for _ in range(50)])

    shares = partition(PartitionSpec(kind="pathological", classes=2), 10, seed, train=train, test=test)

    holders = np.zeros(10, dtype=int)
    for share in shares:
        assert len(classes_of(share, train)) == 2
        assert set(test.classes[share.test].tolist()) == classes_of(share, train)
        for label in classes_of(share, train):
            part, tested = np.sum(train.classes[share.train] == label), np.sum(test.classes[share.test] == label)
            assert 100 * 0.4 / (0.4 + 0.6) - 1 <= part <= 100 * 0.6 / (0.4 + 0.6) + 1
            assert abs(tested - part / 2) <= 1
            holders[label] += 1
    assert holders.tolist() == [2] * 10


@settings(deadline=None, max_examples=100)
@given(labeled(), labeled(least=0), st.integers(1, 6))
def test_a_natural_group_is_never_torn_apart(train: PartitionKeys, test: PartitionKeys, clients: int):
    shares = try_partition(PartitionSpec(kind="natural"), clients, 0, train, test)

    assert train.groups is not None
    assert test.groups is not None
    homes: dict[str, set[int]] = {}
    for index, share in enumerate(shares):
        for row in share.train:
            homes.setdefault(train.groups[row], set()).add(index)
        for row in share.test:
            homes.setdefault(test.groups[row], set()).add(index)
    assert all(len(clients_of_group) == 1 for clients_of_group in homes.values())


def test_natural_groups_are_packed_largest_first_onto_the_emptiest_client():
    train = keys([0] * 16, [*"aaaaaa", *"bbbbb", *"ccc", *"dd"])

    first, second = partition(PartitionSpec(kind="natural"), 2, 0, train=train, test=keys([], []))

    assert train.groups is not None
    assert {train.groups[row] for row in first.train} == {"a", "d"}
    assert {train.groups[row] for row in second.train} == {"b", "c"}


def test_iid_shares_differ_by_one_row_at_most():
    train = keys([0, 1] * 50)

    shares = partition(PartitionSpec(kind="iid"), 7, 3, train=train, test=keys([0] * 20))

    assert sorted(len(share.train) for share in shares) == [14, 14, 14, 14, 14, 15, 15]
    assert sum(len(share.test) for share in shares) == 20


def test_a_large_alpha_splits_every_class_almost_evenly():
    train = keys([0] * 1000 + [1] * 1000)

    shares = partition(PartitionSpec(kind="dirichlet", alpha=1e6), 4, 1, train=train, test=keys([]))

    for share in shares:
        counts = np.bincount(train.classes[share.train], minlength=2)
        assert abs(counts - 250).max() <= 5


def test_a_small_alpha_skews_classes():
    train = keys([0] * 1000 + [1] * 1000)

    shares = partition(PartitionSpec(kind="dirichlet", alpha=0.05), 4, 1, train=train, test=keys([]))

    largest = [np.bincount(train.classes[share.train], minlength=2).max() / len(share.train) for share in shares]
    assert max(largest) > 0.9


def test_pathological_holders_share_a_class_between_two_fifths_and_three_fifths_of_the_mean():
    train = keys([label for label in range(10) for _ in range(1000)])

    shares = partition(PartitionSpec(kind="pathological", classes=2), 10, 5, train=train, test=keys([]))

    for share in shares:
        counts = np.bincount(train.classes[share.train], minlength=10)
        assert all(390 <= count <= 610 for count in counts[counts > 0])


@settings(deadline=None, max_examples=50)
@given(labeled(least=50), st.integers(2, 5), st.integers(0, 99))
def test_test_rows_follow_the_class_shares_of_training_rows(train: PartitionKeys, clients: int, seed: int):
    assume(len(set(train.classes.tolist())) > 1)
    shares = partition(PartitionSpec(kind="dirichlet", alpha=0.3), clients, seed, train=train, test=train)

    for share in shares:
        here = np.bincount(train.classes[share.train], minlength=5)
        there = np.bincount(train.classes[share.test], minlength=5)
        assert abs(here - there).max() <= 1


def test_a_client_that_owns_its_data_keeps_all_of_it():
    shares = partition(PartitionSpec(kind="own"), 3, 0, train=keys([0, 1]), test=keys([0]))

    assert [share.train.tolist() for share in shares] == [[0, 1]] * 3
    assert [share.test.tolist() for share in shares] == [[0]] * 3


@pytest.mark.parametrize(
    ("spec", "clients", "train", "sentence"),
    [
        (PartitionSpec(kind="iid"), 5, keys([0, 1, 0]), "3 training examples are too few for 5 clients"),
        (PartitionSpec(kind="iid", min_examples=2), 2, keys([0, 1, 0]), "at least 2 each"),
        (PartitionSpec(kind="natural"), 3, keys([0] * 9, list("aaaabbbbb")), "2 groups .* too few for 3 clients"),
        (PartitionSpec(kind="natural"), 2, keys([0] * 9), "needs data.partition.field"),
        (PartitionSpec(kind="pathological", classes=3), 2, keys([0, 1] * 9), "3 classes a client, .* have 2"),
        (PartitionSpec(kind="pathological", classes=1), 2, keys([0, 1, 2] * 9), "at most 2 of 3 classes"),
        (PartitionSpec(kind="pathological", classes=2), 4, keys([0] * 9 + [1] * 2), "class 1 has 2 training examples"),
        (PartitionSpec(kind="dirichlet"), 2, keys([0] * 9), "one class or none"),
    ],
)
def test_an_impossible_split_says_why_in_numbers(
    spec: PartitionSpec, clients: int, train: PartitionKeys, sentence: str
):
    with pytest.raises(BadInput, match=sentence):
        partition(spec, clients, 0, train=train, test=keys([]))


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=20), st.integers(0, 500))
def test_apportioning_gives_everyone_its_exact_part_rounded_up_or_down(weights: list[float], total: int):
    exact = np.array(weights) / sum(weights) * total

    counts = apportion(np.array(weights), total, np.random.default_rng(0))

    assert counts.sum() == total
    assert (np.abs(counts - exact) < 1.0 + 1e-6).all()


@settings(deadline=None)
@given(labeled(least=10), st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 99))
def test_holding_out_takes_the_share_asked_for_and_leaves_every_class_to_train_on(
    rows: PartitionKeys, share: float, seed: int
):
    train, test = hold_out(rows, share, seed)

    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(rows)))
    assert set(rows.classes[train].tolist()) == set(rows.classes.tolist())
    assert len(rows) * share - 1 - 5 <= len(test) <= len(rows) * share + 1


def test_holding_out_takes_its_part_of_every_class_and_group():
    rows = keys([0] * 100 + [1] * 100, ["a"] * 60 + ["b"] * 40 + ["c"] * 100)

    _, test = hold_out(rows, 0.2, 7)

    assert rows.groups is not None
    counts = {group: sum(rows.groups[row] == group for row in test) for group in "abc"}
    assert counts == {"a": 12, "b": 8, "c": 20}

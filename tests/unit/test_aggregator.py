"""The aggregator: right sums, any order of arrival, memory that does not grow with the clients."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lorabbit.aggregation.staleness import CorrectedUpdate, StalenessCorrection
from lorabbit.methods.shared_model.fedavg import FedAvg
from lorabbit.protocol.messages import Metrics
from lorabbit.tensors import serialization
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import ClientId, ServerState
from lorabbit_server.aggregation.aggregator import AcceptedUpdates, UpdateContext, aggregate
from lorabbit_server.aggregation.model_versions import ModelVersionStore
from lorabbit_server.engine.state import TaskState, UploadOffer

SHAPE = (64, 64)


@pytest.fixture
def payloads(tmp_path):
    return PayloadStore(tmp_path / "payloads", durable=False)


def task(payloads, index, value, *, examples=1):
    ref = payloads.add_tensors({name: np.full(SHAPE, value, np.float32) for name in ("a", "b", "c")})
    name = ClientId(f"client-{index}")
    return TaskState(f"t{index}", "train", 1, name, index, offered=UploadOffer(Metrics(num_examples=examples), ref))


def test_updates_are_weighted_by_examples(payloads):
    tasks = [task(payloads, 0, 1.0, examples=1), task(payloads, 1, 5.0, examples=3)]

    state = aggregate(FedAvg(), ServerState({}), tasks, payloads=payloads)

    assert np.array_equal(state.tensors["b"], np.full(SHAPE, 4.0, np.float32))


def test_an_update_from_an_older_version_brings_its_change_discounted_to_the_newest(payloads):
    def whole(value):
        return {name: np.full(SHAPE, value, np.float32) for name in ("a", "b", "c")}

    fresh, stale = task(payloads, 0, 12.0, examples=1), task(payloads, 1, 5.0, examples=3)
    corrections = {stale.id: StalenessCorrection(whole(1.0), whole(10.0), 0.5)}

    state = aggregate(
        FedAvg(), ServerState({}), [fresh, stale], payloads=payloads, background=UpdateContext(corrections)
    )

    # FedBuff: w + mean over n_k of s(tau_k) (w_k - w^(t - tau_k)) = 10 + (1 * 2 + 3 * 0.5 * 4) / 4
    assert np.array_equal(state.tensors["b"], np.full(SHAPE, 12.0, np.float32))


def test_one_update_alone_is_discounted_too(payloads):
    head = {name: np.full(SHAPE, 10.0, np.float32) for name in ("a", "b", "c")}
    start = {name: np.full(SHAPE, 1.0, np.float32) for name in head}
    stale = task(payloads, 0, 5.0)

    background = UpdateContext({stale.id: StalenessCorrection(start, head, 0.25)})
    state = aggregate(FedAvg(), ServerState({}), [stale], payloads=payloads, background=background)

    assert np.array_equal(state.tensors["a"], np.full(SHAPE, 11.0, np.float32))


def test_what_has_no_real_numbers_is_carried_as_it_came():
    counts = {"n": np.array([3], np.int64)}

    assert CorrectedUpdate(counts, StalenessCorrection({"n": np.array([1])}, {"n": np.array([9])}, 0.5))[
        "n"
    ].tolist() == [3]


def test_the_order_of_arrival_does_not_change_a_bit(payloads):
    generator = np.random.default_rng(1)
    tasks = [task(payloads, i, v, examples=i + 1) for i, v in enumerate(generator.normal(size=7))]
    expected = aggregate(FedAvg(), ServerState({}), tasks, payloads=payloads).tensors

    for _ in range(5):
        generator.shuffle(tasks)
        got = aggregate(FedAvg(), ServerState({}), tasks, payloads=payloads).tensors

        assert serialization.tensors_sha256(got) == serialization.tensors_sha256(expected)


def test_a_loss_that_a_client_did_not_measure_is_not_a_number(payloads):
    (update,) = AcceptedUpdates(FedAvg(), [task(payloads, 0, 1.0)], payloads)

    assert np.isnan(update.loss)


def test_memory_grows_by_the_headers_of_updates_and_not_by_their_tensors(payloads):
    peaks = []
    for clients in (2, 40):
        tasks = [task(payloads, i, float(i)) for i in range(clients)]
        tracemalloc.start()
        aggregate(FedAvg(), ServerState({}), tasks, payloads=payloads)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    one_update = 3 * 64 * 64 * 4
    assert peaks[1] - peaks[0] < 38 * one_update / 8


def test_a_server_state_survives_its_file_and_hands_its_own_file_out(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)
    state = ServerState({"a": np.arange(6, dtype=np.float32)})

    saved = versions.save(state)
    loaded = versions.load(saved)

    assert saved.state == saved.adapter
    assert np.array_equal(loaded.tensors["a"], state.tensors["a"])
    assert versions.payload_refs({"adapter": loaded.tensors}) == {"adapter": saved.state}
    assert list(payloads.stored()) == [saved.state.sha256]


def test_facts_travel_with_the_state_and_stay_out_of_what_clients_get(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)
    saved = versions.save(ServerState({"a": np.ones(3, np.float32)}, {"round": 3, "who": ["x"]}))

    loaded = versions.load(saved)

    assert loaded.facts == {"round": 3, "who": ["x"]}
    assert saved.state != saved.adapter
    assert serialization.read_facts(payloads.path(saved.adapter.sha256)) == {}
    assert versions.payload_refs({"adapter": loaded.tensors}) == {"adapter": saved.adapter}


def test_one_object_in_many_plans_is_written_once(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)
    versions.load(versions.save(ServerState({"a": np.ones(3, np.float32)})))
    shared, other = {"b": np.zeros(2, np.float32)}, {"b": np.ones(2, np.float32)}

    first = [versions.payload_refs({"adapter": shared}) for _ in range(3)]
    second = versions.payload_refs({"adapter": other})

    assert first[0] == first[1] == first[2] != second
    assert {first[0]["adapter"].sha256, second["adapter"].sha256} < versions.current

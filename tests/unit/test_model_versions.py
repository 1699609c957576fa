"""Versions of a server state: what is written, what is not written again, and which objects come back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from wide_methods import Surveying

from lorabbit.job.spec import JobSpec
from lorabbit.methods.shared_model.fedavg import FedAvg
from lorabbit.tensors import serialization
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import BASE, ServerState
from lorabbit_server.aggregation.model_versions import ModelVersionStore
from lorabbit_server.engine.state import JobState, dump_header, load_state


class CountingStore(PayloadStore):
    """Notes what was serialized."""

    def __init__(self, folder):
        super().__init__(folder, durable=False)
        self.written = []

    def add_tensors(self, tensors, facts=None, **what):
        self.written.append(sorted(tensors))
        return super().add_tensors(tensors, facts, **what)


@pytest.fixture
def payloads(tmp_path):
    return CountingStore(tmp_path / "payloads")


def state(value=1.0, **what):
    shared = {BASE: {"w": np.arange(6, dtype=np.float32)}}
    return ServerState({"a": np.full(3, value, np.float32)}, **{"shared": shared, **what})


def test_every_shared_group_is_a_file_of_its_own(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)

    saved = versions.save(state())

    assert saved.hashes == set(payloads.stored())
    assert len(saved.hashes) == 2
    assert serialization.read_tensors(payloads.path(saved.shared[BASE].sha256))["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_group_that_is_handed_on_is_not_serialized_again(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)
    first = versions.save(state())
    loaded = versions.load(first)

    second = versions.save(replace(loaded, tensors={"a": np.zeros(3, np.float32)}))

    assert payloads.written == [["w"], ["a"], ["a"]]
    assert second.shared == first.shared


def test_two_versions_in_use_hand_out_the_same_group_and_its_one_file(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)
    head = versions.save(state())
    loaded = versions.load(head)
    scored = versions.save(replace(loaded, tensors={"a": np.zeros(3, np.float32)}))

    other = versions.load(scored)

    assert versions.load(head) is loaded
    assert versions.load(scored) is other
    assert other.shared[BASE] is loaded.shared[BASE]
    assert versions.payload_refs(other.shared) == {BASE: head.shared[BASE]}


def test_files_of_plans_are_needed_until_their_version_is_no_longer_in_use(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)
    head, scored = versions.save(state()), versions.save(state(2.0))
    versions.load(scored)
    made = versions.payload_refs({"adapter": {"z": np.ones(2, np.float32)}})["adapter"].sha256
    versions.load(head)

    versions.retain([head, scored])
    both = versions.current
    versions.retain([head])

    assert made in both
    assert versions.current == head.hashes


def test_the_report_of_a_round_is_in_the_version_and_costs_no_second_file(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)

    saved = versions.save(state(facts={"report": {"rank": 4}}))

    assert saved.report == {"rank": 4}
    assert saved.state == saved.adapter
    assert versions.load(saved).report == {"rank": 4}


def test_a_state_with_facts_hands_out_the_adapter_that_is_written_already(payloads):
    versions = ModelVersionStore(FedAvg(), payloads, 1024)
    saved = versions.save(state(facts={"best": 4}))
    loaded, before = versions.load(saved), list(payloads.written)

    refs = versions.payload_refs({"adapter": loaded.tensors})

    assert (refs["adapter"], payloads.written) == (saved.adapter, before)
    assert serialization.read_facts(payloads.path(refs["adapter"].sha256)) == {}


def test_a_version_comes_back_from_the_store_as_it_was(payloads):
    method = Surveying()
    saved = ModelVersionStore(method, payloads, 1024).save(
        state(facts={"report": {"rank": 4, "aggregation_error": 0.25}})
    )
    job = JobState("job", JobSpec(), head=saved, scored={3: saved})

    back = load_state(dump_header(job), job.spec, {})

    assert back == job
    assert (saved.base, saved.config) == (saved.shared[BASE], {"r": 4, "lora_alpha": 16})
    assert back.payloads == saved.hashes

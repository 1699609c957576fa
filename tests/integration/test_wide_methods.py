"""The server with methods that prepare a job, share tensors between rounds, or keep models on their clients."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from cases import tiered
from scripted_client import EXPORT, SHAPES, ScriptedClient
from server_rig import Fuse, Rig
from wide_methods import register

from lorabbit.job.spec import JobSpec
from lorabbit.tensors import serialization
from lorabbit.types import ADAPTER, BASE, EVALUATE, INITIALIZE, TRAIN


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    register(monkeypatch)


@pytest.fixture
def rig(tmp_path):
    made = new_rig(tmp_path)
    yield made
    if made.service is not None:
        made.service.close()


def new_rig(folder):
    rig = Rig(folder)
    for client in rig.clients:
        client.work = without_tensors
    return rig


def without_tensors(client, task):
    """Say how many examples there are where the method wants no tensors."""
    if task.phase != TRAIN or task.settings.get("index") == 0 or task.spec.method.name == "ffa-lora":
        return False
    client.tell(task)
    return True


def spec(name="surveying", **what):
    return JobSpec(**{"name": "job", "clients": 2, "rounds": 2, "seed": 7, "method": {"name": name}, **what})


def asked(client):
    return [(task.phase, task.round) for task in client.tasks]


# ---- preparation ----


def test_a_preparation_asks_the_whole_population_and_is_neither_scored_nor_kept(rig):
    report = rig.run(spec(cohort=1))

    assert asked(rig.clients[0])[:2] == [(INITIALIZE, 0), (TRAIN, 0)]
    assert asked(rig.clients[1])[0] == (TRAIN, 0)
    assert [row.round for row in report.rounds] == [1, 2]
    assert (report.preparation.round, report.preparation.accepted, report.preparation.metrics) == (0, 2, {})
    assert sorted(path.name for path in rig.runs("job").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_what_the_preparation_made_is_what_the_first_round_starts_from(rig):
    rig.run(spec(rounds=1))

    (task,) = [task for task in rig.clients[0].tasks if (task.phase, task.round) == (TRAIN, 1)]
    base = serialization.read_tensors(rig.clients[0].store.path(task.payloads[BASE].sha256))["w"]
    assert np.array_equal(base, np.arange(600, dtype=np.float32) + 20)


def test_with_a_quorum_the_preparation_closes_early_and_calls_the_others_off(rig):
    def silent(client, task):
        return (task.phase, task.round) == (TRAIN, 0) or without_tensors(client, task)

    rig.clients[1].work = silent
    report = rig.run(spec(method={"name": "surveying", "quorum": 0.5}))

    assert (report.status, report.preparation.accepted) == ("done", 1)
    assert report.preparation.facts["answers"] == [0]
    assert "CancelTask" in {type(message).__name__ for message in rig.clients[1].received}


# ---- updates without tensors ----


def test_an_update_without_tensors_takes_part_in_the_aggregation(rig):
    report = rig.run(spec())

    assert [row.facts["answers"] for row in report.rounds] == [[0, 1], [0, 1]]
    assert [row.accepted for row in report.rounds] == [2, 2]


def test_tensors_where_the_method_wants_none_are_refused_by_name(rig):
    tries = []

    def wrong(client, task):
        if task.phase == TRAIN and task.round == 1 and not tries:
            tries.append(task.task)
            client.offer(task, client.tensors_like(1.0))
            return True
        return without_tensors(client, task)

    rig.clients[1].work = wrong
    report = rig.run(spec())

    assert report.rounds[0].rejected == {"payload": 1}
    assert report.status == "done"


def test_an_update_that_lacks_the_tensors_the_method_wants_is_refused_by_name(rig):
    tries = []

    def wrong(client, task):
        if task.phase == TRAIN and task.round == 1 and not tries:
            tries.append(task.task)
            client.tell(task)
            return True
        return without_tensors(client, task)

    rig.clients[0].work = wrong
    report = rig.run(spec())

    assert report.rounds[0].rejected == {"payload": 1}


# ---- shared groups, scoring, exports, facts ----


def test_a_shared_group_is_published_once_for_all_rounds(rig):
    rig.run(spec(rounds=3))

    published = [event.role for event in rig.events if event.kind == "payload-published"]
    assert published.count(BASE) == 1
    assert published.count(ADAPTER) == 4
    hashes = {task.payloads[BASE].sha256 for client in rig.clients for task in client.tasks if BASE in task.payloads}
    assert len(hashes) == 1


def test_an_evaluation_brings_what_the_methods_scoring_plan_says(rig):
    rig.run(spec(rounds=1))

    (task,) = [task for task in rig.clients[1].tasks if task.phase == EVALUATE]
    assert task.payloads.keys() == {ADAPTER, BASE}
    assert task.settings == {"told": 7, "on": "clients"}


def test_an_exported_version_has_its_own_configuration_and_its_base_model(rig, monkeypatch):
    monkeypatch.setitem(EXPORT, "files", {"adapter_config.json": {"peft_type": "LORA", "r": 1}})
    rig.run(spec(rounds=1))

    for name in ("adapter", "best", "checkpoint-1"):
        folder = rig.runs("job") / name
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config == {"peft_type": "LORA", "r": 2, "lora_alpha": 16}
        assert serialization.read_tensors(folder / "base" / "model.safetensors")["w"][0] == 20
        assert serialization.read_tensors(folder / "adapter_model.safetensors").keys() == SHAPES.keys()


def test_what_a_method_tells_of_a_round_is_in_the_report(rig):
    report = rig.run(spec())

    assert [(row.facts["rank"], row.facts["aggregation_error"]) for row in report.rounds] == [(2, 0.5)] * 2


# ---- models of their own ----


def test_clients_with_models_of_their_own_score_a_round_before_they_train_the_next(rig):
    rig.run(spec("hoarding", rounds=3))

    rounds = [(TRAIN, 1), (EVALUATE, 1), (TRAIN, 2), (EVALUATE, 2), (TRAIN, 3), (EVALUATE, 3)]
    assert asked(rig.clients[1]) == rounds


def test_clients_with_models_of_their_own_may_begin_without_an_adapter_and_none_is_exported(rig):
    def nothing(client, task):
        if task.phase == INITIALIZE:
            client.tell(task)
            return True
        return without_tensors(client, task)

    rig.clients[0].work = nothing
    report = rig.run(spec("hoarding"))

    assert (report.status, report.final.metrics["accuracy"]) == ("done", 0.25)
    assert not (rig.runs("job") / "adapter").exists()


# ---- restarts ----


def outcome(rig):
    """What must be the same however often the server died."""
    report = rig.report("job")
    rows = [row for row in (report.preparation, *report.rounds) if row is not None]
    return {
        "status": (report.status, report.final, report.best, report.adapter),
        "rounds": [(row.round, row.cohort, row.accepted, row.sha256, row.metrics, row.facts) for row in rows],
        "folder": {
            str(path.relative_to(rig.runs("job"))): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in rig.runs("job").rglob("*")
            if path.suffix in {".safetensors", ".json"} and path.name != "report.json"
        },
        "left": sorted(rig.service.payloads.folder.iterdir()),
        "streams": sorted(name for name in rig.broker._queues if "adapter" in name),
    }


def play(folder, fuse, job=None):
    """Run the job; when the server dies, start another on what it left."""
    rig = new_rig(folder)
    rig.serve(fuse)
    rig.start_clients()
    job = rig.service.submit(job or spec())
    rig.run_to_end_over_death(job)
    result = outcome(rig)
    rig.service.close()
    return fuse.count, result


@pytest.mark.parametrize("after", tiered([False, True], slow=[True]), ids=["before", "after"])
def test_a_server_killed_at_any_effect_ends_with_the_same_files_and_leaves_no_stream(tmp_path, after):
    count, expected = play(tmp_path / "undisturbed", Fuse())
    assert expected["streams"] == expected["left"] == []

    for at in range(1, count + 1):
        _, result = play(tmp_path / str(at), Fuse(at, after=after))

        assert result == expected, f"killed {'after' if after else 'before'} effect {at} of {count}"


@pytest.mark.slow
def test_ffa_lora_ends_with_the_same_adapter_whenever_the_server_died(tmp_path, monkeypatch):
    monkeypatch.setattr("scripted_client.SHAPES", {"m.lora_A.w": (2, 3), "m.lora_B.w": (3, 2)})
    monkeypatch.setattr(ScriptedClient, "finish", trained_or_scored)
    job = spec("ffa-lora")
    count, expected = play(tmp_path / "undisturbed", Fuse(), job)
    assert expected["streams"] == expected["left"] == []

    for at in range(1, count + 1, 3):
        _, result = play(tmp_path / str(at), Fuse(at, after=True), job)

        assert result == expected, f"killed after effect {at} of {count}"


def trained_or_scored(client, task):
    """Add to B what the client's index says; A is under its own role and stays."""
    if task.phase == EVALUATE:
        client.tell(task, accuracy=0.5)
    else:
        client.offer(task, client.tensors(task))

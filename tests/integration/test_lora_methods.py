"""Methods and aggregations of LoRA on small transformers, and their exports as plain PEFT reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cases import tiered
from learning import job, silent, task_of, write_reviews
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lorabbit.errors import Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods import registry
from lorabbit.methods.api.method import Method
from lorabbit.methods.shared_model.sa_fedlora import SaFedLora
from lorabbit.tensors import serialization
from lorabbit.tensors.arithmetic import size_bytes
from lorabbit.types import BASE, INITIALIZE, ServerState
from lorabbit_cli.local.dry_run import dry_run
from lorabbit_cli.local.embedded_run import ComputeOptions, run_local
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models import tiny
from lorabbit_client.models.loading import quiet, seeded
from lorabbit_client.training.session import TorchSession
from lorabbit_client.training.workspace import LearningWorkspace

MIXED = {"lora": {"rank": 4, "alpha": 8, "client_ranks": [4, 2]}}
PLAIN = {"lora": {"rank": 4, "alpha": 8}}
SA: dict[str, Any] = {"name": "sa-fedlora", "t0": 1, "r_min": 1, "t_heat": 1, "t_cool": 1, "ladder": [1, 2, 4]}
JOBS: dict[str, dict[str, Any]] = {
    "factors": {"model": PLAIN},
    "freeze-a": {"model": PLAIN, "aggregation": "freeze-a"},
    "zero-padded": {"model": MIXED, "aggregation": "zero-padded"},
    "svd": {"model": MIXED, "aggregation": "svd", "method": {"name": "fedprox"}},
    "stack": {"model": MIXED, "aggregation": "stack"},
    "exact": {"model": PLAIN, "aggregation": "exact"},
    "sa-fedlora": {"model": PLAIN, "method": SA, "rounds": 5},
    "sa-fedlora-svd": {"model": MIXED, "method": SA, "aggregation": "svd", "rounds": 5},
    "sa-fedlora-lora": {"model": PLAIN, "method": {**SA, "initiating": "lora"}, "rounds": 5},
    "federa": {"model": PLAIN, "method": {"name": "federa"}},
    "slora": {"model": PLAIN, "method": {"name": "slora", "sparse_rounds": 1}},
    "adalora": {"model": PLAIN, "method": {"name": "adalora", "r_min": 1}, "rounds": 4},
    "federa-mixed": {"model": MIXED, "method": {"name": "federa"}},
}


@pytest.fixture(autouse=True)
def _as_quiet_as_a_client() -> Iterator[None]:
    with quiet():
        yield


def opened(folder: Path, **parts: Any) -> tuple[LearningWorkspace, JobSpec]:
    """A job of two clients on a small BERT that is a folder, as a hub would hold it."""
    torch.set_num_threads(1)
    write_reviews(folder)
    base = folder / "base"
    with seeded(7):
        transformers.AutoModel.from_config(tiny.tiny_config("bert")).save_pretrained(base)
    tiny.tiny_tokenizer("bert").save_pretrained(base)
    spec = job(folder, **{**parts, "model": {"name": str(base), **parts.get("model", {})}})
    return LearningWorkspace(spec, data_root=Path(), device=torch.device("cpu")), spec


def session(space: LearningWorkspace, spec: JobSpec, index: int = 0, number: int = 1) -> TorchSession:
    return space.session(task_of(spec, index, round=number), PrivateState(), silent)


def begin(space: LearningWorkspace, spec: JobSpec) -> tuple[Method, ServerState]:
    method = registry.build(spec)
    return method, method.start(method.initialize(session(space, spec)))


def one_round(space: LearningWorkspace, spec: JobSpec, method: Method, state: ServerState, number: int) -> ServerState:
    updates = []
    for index in range(spec.clients):
        one = session(space, spec, index, number)
        updates.append(method.local_update(method.plan(state, one.client), one))
    return method.aggregate(state, iter(updates))


def federated(space: LearningWorkspace, spec: JobSpec, rounds: int | None = None) -> tuple[Method, ServerState]:
    method, state = begin(space, spec)
    for number in range(1, (rounds or spec.rounds) + 1):
        state = one_round(space, spec, method, state, number)
    return method, state


def restored(space: LearningWorkspace, spec: JobSpec, method: Method, state: ServerState) -> TorchSession:
    one = session(space, spec)
    method.restore(method.scoring(state, one.client), one)
    return one


def batch(space: LearningWorkspace, spec: JobSpec) -> dict[str, torch.Tensor]:
    rows = space._data(0, spec.clients).train.batch(np.arange(6))
    return {name: value for name, value in rows.items() if name in {"input_ids", "attention_mask"}}


def answers(model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**rows).logits
    return logits


def exported(folder: Path, space: LearningWorkspace, spec: JobSpec, method: Method, state: ServerState) -> Any:
    """Load with peft and transformers alone what a server writes of an export."""
    export, folder = method.export(state), folder / "adapter"
    one = session(space, spec)
    facts: Any = space.initialize(task_of(spec, phase=INITIALIZE), one.tensors()).facts
    folder.mkdir()
    config = {**facts["export"]["files"]["adapter_config.json"], **export.config}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    serialization.write_tensors(folder / "adapter_model.safetensors", export.tensors)
    base: Any = spec.model.name
    if export.base is not None:
        base = folder / "base"
        base.mkdir()
        for file, content in facts["export_base"]["files"].items():
            (base / file).write_text(json.dumps(content), encoding="utf-8")
        serialization.write_tensors(base / "model.safetensors", export.base)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    return PeftModel.from_pretrained(plain, folder)


@pytest.mark.parametrize("name", JOBS)
def test_an_export_loads_with_peft_alone_and_answers_as_the_model_that_was_scored(name: str, tmp_path: Path) -> None:
    space, spec = opened(tmp_path, **JOBS[name])
    method, state = federated(space, spec)

    scored = answers(restored(space, spec, method, state).prepared_model().model, batch(space, spec))
    theirs = answers(exported(tmp_path, space, spec, method, state), batch(space, spec))

    assert scored.abs().max() > 0.01
    torch.testing.assert_close(theirs, scored, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", JOBS)
def test_a_client_sees_the_same_base_after_every_task(name: str, tmp_path: Path) -> None:
    space, spec = opened(tmp_path, **JOBS[name])
    before = answers(session(space, spec).prepared_model().model, batch(space, spec))

    federated(space, spec, 2)

    assert torch.equal(answers(session(space, spec).prepared_model().model, batch(space, spec)), before)


def test_I1_federa_starts_as_the_pre_trained_model(tmp_path: Path) -> None:
    space, spec = opened(tmp_path, **JOBS["federa"])
    plain = answers(session(space, spec).prepared_model().model, batch(space, spec))
    method, state = begin(space, spec)

    ours = answers(restored(space, spec, method, state).prepared_model().model, batch(space, spec))

    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_U2_the_second_stage_leaves_the_base_to_the_bit(tmp_path: Path) -> None:
    space, spec = opened(tmp_path, **JOBS["sa-fedlora"])
    method, state = federated(space, spec, 2)
    one = session(space, spec)

    method.local_update(method.plan(state, one.client), one)
    one.select("whole")

    kept = {name for name in state.shared[BASE] if not name.startswith("classifier")}
    after = one.tensors()
    assert all(np.array_equal(after[name], state.shared[BASE][name]) for name in kept)


def test_U5_attaching_the_factors_changes_no_answer(tmp_path: Path) -> None:
    space, spec = opened(tmp_path, **JOBS["sa-fedlora"])
    method, first = begin(space, spec)
    state = one_round(space, spec, method, first, 1)
    whole = session(space, spec)
    whole.select("whole")
    whole.load(state.shared[BASE])
    before = answers(whole.prepared_model().model, batch(space, spec))

    after = answers(restored(space, spec, method, state).prepared_model().model, batch(space, spec))

    assert torch.equal(after, before)


@pytest.mark.parametrize("rank", [4, 2, 1])
def test_U6_the_scaling_in_peft_stays_whatever_the_rank(rank: int, tmp_path: Path) -> None:
    space, spec = opened(tmp_path, model=PLAIN)
    one = session(space, spec)

    one.set_rank(rank)

    layers = [layer for layer in space._model.model.modules() if isinstance(layer, LoraLayer)]
    assert layers
    assert {layer.scaling["default"] for layer in layers} == {2.0}


def test_U9_components_of_zeros_stay_zero_whatever_the_optimizer_does(tmp_path: Path) -> None:
    space, spec = opened(tmp_path, model=PLAIN, local={"steps": 20, "weight_decay": 0.1})
    one = session(space, spec)
    first = dict(one.tensors())
    for name, value in first.items():
        if ".lora_A." in name:
            value[2:] = 0

    trained = one
    trained.load(first)
    after = trained.train().tensors

    assert any(".lora_A." in name for name in after)
    for name, value in after.items():
        if ".lora_A." in name:
            assert not value[2:].any()
            assert value[:2].any()
        if ".lora_B." in name:
            assert not value[:, 2:].any()
            assert value[:, :2].any()


def test_U10_tensors_of_another_rank_are_refused_and_the_head_survives_a_change(tmp_path: Path) -> None:
    space, spec = opened(tmp_path, model=PLAIN)
    one = session(space, spec)
    tensors = {name: value + 1 for name, value in one.tensors().items()}
    heads = {name: value for name, value in tensors.items() if "lora_" not in name}
    one.load(tensors)

    one.set_rank(2)

    assert all(np.array_equal(one.tensors()[name], value) for name, value in heads.items())
    with pytest.raises(Refused, match="shape"):
        one.load(tensors)


def test_U8_U13_a_whole_run_learns_and_moves_what_the_ledger_says(tmp_path: Path) -> None:
    space, spec = opened(tmp_path, model=PLAIN, method=SA, rounds=12, local={"steps": 4})
    schedule = SaFedLora.model_validate(spec.method.settings).with_job(spec).ranks_by_round
    widths = sum(value.size for name, value in session(space, spec).tensors().items() if ".lora_" in name) // 4

    report = run_local(spec, tmp_path / "runs", compute=ComputeOptions(device="cpu", workers=1)).report

    up = [r.bytes_up for r in report.rounds]
    ranks = [r.facts["rank"] for r in report.rounds[1:]]
    assert ranks == [schedule.rank(t) for t in range(1, 12)]
    assert up[0] > max(up[1:])
    for rank, moved in zip(ranks, up[1:], strict=True):
        assert moved - up[-1] == pytest.approx(spec.clients * 4 * widths * (rank - ranks[-1]), abs=256)
    assert report.bytes_by_role[BASE] == pytest.approx(up[0], rel=0.01)
    losses = [r.train_loss for r in report.rounds if r.train_loss is not None]
    assert losses[-1] < losses[0]


def test_U8_the_bytes_of_an_update_are_four_a_parameter_and_a_header(tmp_path: Path) -> None:
    space, spec = opened(tmp_path, **JOBS["sa-fedlora"])
    method, state = federated(space, spec, 2)
    one = session(space, spec)
    update = method.local_update(method.plan(state, one.client), one)

    serialization.write_tensors(tmp_path / "update", update.tensors)

    header = (tmp_path / "update").stat().st_size - size_bytes(update.tensors)
    assert size_bytes(update.tensors) == 4 * sum(value.size for value in update.tensors.values())
    assert 0 < header < 4096


@pytest.mark.parametrize("name", tiered(["sa-fedlora", "stack", "adalora", "federa-mixed"], slow=["federa-mixed"]))
def test_a_run_gives_the_same_adapter_whatever_the_number_of_processes(name: str, tmp_path: Path) -> None:
    _, spec = opened(tmp_path, **JOBS[name])

    one, two = (
        run_local(spec, tmp_path / "runs", compute=ComputeOptions(device="cpu", workers=n)).report for n in (1, 2)
    )

    assert one.status == two.status == "done"
    assert one.adapter.sha256 == two.adapter.sha256


@pytest.mark.parametrize("name", ["slora", "adalora", "federa"])
def test_a_forecast_is_not_exceeded(name: str, tmp_path: Path) -> None:
    _, spec = opened(tmp_path, **JOBS[name])

    found = dry_run(spec, ComputeOptions(device="cpu"))
    report = run_local(spec, tmp_path / "runs", compute=ComputeOptions(device="cpu", workers=1)).report

    assert report.rounds[0].bytes_up == pytest.approx(found.round_bytes_up, rel=0.01)
    assert sum(r.bytes_up + r.bytes_down for r in report.rounds) <= found.total_bytes

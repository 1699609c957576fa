"""The executor asks the method in every phase, and keeps what it left on the client."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from learning import job, silent, task_of, write_reviews

from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import METHODS
from lorabbit.methods.shared_model.fedavg import FedAvg
from lorabbit.tensors import lora_math, serialization
from lorabbit.types import ADAPTER, EVALUATE, INITIALIZE, SHIFT, TRAIN
from lorabbit_client.execution.interface import TaskInput
from lorabbit_client.executor import Executor


class Shifting(FedAvg):
    """Starts at rank 2, scores on a shifted base, and counts its tasks in a tensor that stays at home."""

    name: ClassVar[str] = "shifting"

    def initialize(self, session: Any) -> Any:
        session.set_rank(2)
        return session.tensors()

    def restore(self, plan: Any, session: Any) -> None:
        session.set_base_delta(plan.payloads[SHIFT])
        super().restore(plan, session)

    def local_update(self, plan: Any, session: Any) -> Any:
        kept = session.private_tensors.get("tasks", {"count": np.zeros(1, np.int64)})
        session.private_tensors["tasks"] = {"count": kept["count"] + 1}
        update = super().local_update(plan, session)
        return type(update)(update.client, update.index, session.private_tensors["tasks"], 1, 0.0)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    write_reviews(tmp_path)
    monkeypatch.setitem(METHODS, "shifting", Shifting)
    return job(tmp_path, method={"name": "shifting"})


def do(  # noqa: PLR0913, PLR0917
    executor: Executor, spec: JobSpec, folder: Path, phase: str, task: str, roles: dict[str, Any]
) -> Any:
    """Do one task; returns its tensors where it has some, else its metrics."""
    paths = {role: folder / f"{role}.in" for role in roles}
    for role, tensors in roles.items():
        serialization.write_tensors(paths[role], tensors)
    order = task_of(spec, phase=phase, task=task)
    outcome = executor.execute(
        TaskInput(order, paths, folder / task, folder / "private", folder / "privacy.json"), silent
    )
    assert outcome.error is None
    return serialization.read_tensors(folder / task) if outcome.has_tensors else outcome.metrics


def adapter_of(executor: Executor, spec: JobSpec, folder: Path) -> dict[str, Any]:
    plain = spec.model_copy(update={"method": type(spec.method)(name="fedavg")})
    return dict(do(executor, plain, folder, INITIALIZE, "first", {}))


def test_a_method_makes_the_first_adapter(spec: JobSpec, tmp_path: Path):
    first = do(Executor(), spec, tmp_path, INITIALIZE, "first", {})

    assert {value.shape[0] for name, value in first.items() if ".lora_A." in name} == {2}


def test_a_score_is_of_what_the_method_restores(spec: JobSpec, tmp_path: Path):
    """A base shifted by factors scores as an adapter that holds them."""
    executor = Executor()
    adapter = adapter_of(executor, spec, tmp_path)
    drawn = np.random.default_rng(1)
    factors = {n: drawn.normal(0, 0.3, v.shape).astype(v.dtype) for n, v in adapter.items() if lora_math.is_factor(n)}
    scored = {
        name: do(executor, spec, tmp_path, EVALUATE, name, {ADAPTER: given, SHIFT: shift}).loss
        for name, given, shift in (
            ("plain", adapter, {}),
            ("held", {**adapter, **factors}, {}),
            ("shifted", adapter, factors),
        )
    }

    assert scored["shifted"] == pytest.approx(scored["held"], rel=1e-4)
    assert scored["plain"] != pytest.approx(scored["held"], rel=1e-3)


def test_private_tensors_are_kept_between_tasks_and_a_repeat_counts_once(spec: JobSpec, tmp_path: Path):
    executor = Executor()
    roles = {ADAPTER: adapter_of(executor, spec, tmp_path), SHIFT: {}}

    counts = [
        int(do(executor, spec, tmp_path, TRAIN, task, roles)["count"][0]) for task in ("one", "two", "two", "three")
    ]
    do(executor, spec, tmp_path, EVALUATE, "score", roles)
    counts.append(int(do(Executor(), spec, tmp_path, TRAIN, "four", roles)["count"][0]))

    assert counts == [1, 2, 2, 3, 4]

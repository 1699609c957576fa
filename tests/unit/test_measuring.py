"""A client that measures says that it is at work, and stops where the task is called off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import data_of, job, task_of

from lorabbit_client.execution.interface import Cancelled, OnProgress
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.training.session import TorchSession
from lorabbit_client.training.workspace import LearningWorkspace

MEASUREMENTS: dict[str, Callable[[TorchSession], Any]] = {
    "difficulty by Fisher information": lambda session: session.difficulty("fisher"),
    "difficulty by loss": lambda session: session.difficulty("loss"),
    "Fisher information": lambda session: session.fisher([0, 1, 2]),
    "sensitivity": lambda session: session.sensitivity(noise=0.1, draws=1, probes=2, variant="relative"),
}


def session(folder: Path, on_progress: OnProgress) -> TorchSession:
    torch.set_num_threads(1)
    data = data_of(folder, "text-classification")
    spec = job(folder, data={**data, "max_length": 32}, local={"steps": 1})
    space = LearningWorkspace(spec, data_root=folder, device=torch.device("cpu"))
    return space.session(task_of(spec), PrivateState(), on_progress)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_is_reported_as_progress(tmp_path: Path, name: str) -> None:
    told: list[tuple[float, float | None]] = []

    MEASUREMENTS[name](session(tmp_path, lambda *what: told.append(what)))

    assert set(told) == {(0.0, None)}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_ends_where_its_task_is_called_off(tmp_path: Path, name: str) -> None:
    def call_off(_fraction: float, _loss: float | None) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        MEASUREMENTS[name](session(tmp_path, call_off))


def test_a_measurement_after_training_does_not_take_progress_back(tmp_path: Path) -> None:
    told: list[float] = []
    one = session(tmp_path, lambda fraction, _: told.append(fraction))
    one.train()

    one.fisher([0, 1])

    assert told == sorted(told)
    assert told[-1] == 1.0

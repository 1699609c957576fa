"""A serving client reads data below its data root and refuses whatever else a job names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Task
from lorabbit_client.execution.data_sandbox import SandboxedExecutor, check_source
from lorabbit_client.execution.interface import OnProgress, TaskInput, TaskResult
from lorabbit_client.execution.runners import InlineRunner


class Recording:
    """An executor that notes which sources it was given."""

    def __init__(self) -> None:
        self.sources: list[str] = []

    def execute(self, work: TaskInput, _on_progress: OnProgress) -> TaskResult:
        self.sources.append(work.task.spec.data.source)
        return TaskResult(Metrics(num_examples=1), has_tensors=False)


def outcome_of(executor: Recording, root: Path, source: str) -> TaskResult:
    """What a confined runner makes of a task of a job with this source."""
    spec = JobSpec.model_validate({"data": {"source": source}})
    ids = {"job": "job", "task": "job.1", "client": "client-1", "phase": "train"}
    numbers = {"index": 0, "population": 1, "round": 1, "attempt": 1, "epoch": 1, "seed": 0}
    task = Task.model_validate({**ids, **numbers, "payloads": {}, "settings": {}, "spec": spec})
    outcomes: list[TaskResult] = []
    runner = InlineRunner(SandboxedExecutor(executor, root))
    runner.submit(TaskInput(task, {}, root / "output", root, root / "privacy.json"), lambda *_: None, outcomes.append)
    return outcomes[0]


@pytest.mark.parametrize("source", ["/etc/x", "../../etc/x", "reviews/../../x", "..", "~/x", "~root/x", "/"])
def test_a_source_outside_of_the_data_root_is_refused_in_one_sentence(source, tmp_path):
    executor = Recording()

    outcome = outcome_of(executor, tmp_path, source)

    assert executor.sources == []
    assert outcome.bad_input
    assert outcome.error.startswith(f"data.source: {source!r} is outside of this client's data folder {tmp_path};")


@pytest.mark.parametrize("source", ["stdlib-docs", "digits", "reviews.csv", "reviews/2024", "./reviews", "imdb", "a/b"])
def test_a_source_below_the_data_root_or_of_the_hub_is_executed(source, tmp_path):
    executor = Recording()

    outcome = outcome_of(executor, tmp_path, source)

    assert (executor.sources, outcome.error) == ([source], None)


def test_an_absolute_path_below_the_data_root_is_allowed(tmp_path):
    check_source(str(tmp_path / "reviews.csv"), tmp_path)


def test_a_neighbor_of_the_data_root_with_its_name_as_a_beginning_is_outside(tmp_path):
    with pytest.raises(BadInput, match="outside"):
        check_source(f"{tmp_path / 'data'}-of-others/x.csv", tmp_path / "data")


def test_a_relative_data_root_confines_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    check_source(str(tmp_path / "data" / "x.csv"), Path("data"))
    with pytest.raises(BadInput, match="outside"):
        check_source(str(tmp_path / "x.csv"), Path("data"))

"""The executor: files in, a file and an outcome out, whatever happens in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from learning import fingerprint, job, silent, task_of, write_reviews

from lorabbit.job.spec import JobSpec
from lorabbit.tensors import serialization
from lorabbit.types import ADAPTER, EVALUATE, INITIALIZE, TRAIN
from lorabbit_client.execution.interface import Cancelled, TaskInput, TaskResult
from lorabbit_client.executor import Executor

TESTS = Path(__file__).resolve().parents[1]


def work(folder: Path, spec: JobSpec, phase: str = TRAIN, index: int = 0, **extra: Any) -> TaskInput:
    """One task, with the adapter of `folder` as its payload where there is one."""
    task = task_of(spec, index, phase, **extra)
    adapter = folder / "adapter.safetensors"
    inputs = {ADAPTER: adapter} if phase != INITIALIZE and adapter.exists() else {}
    return TaskInput(
        task, inputs, folder / f"{task.task}.safetensors", folder / f"private-{index}", folder / f"privacy-{index}.json"
    )


def initialize(executor: Executor, folder: Path, spec: JobSpec) -> TaskResult:
    """Do the first task of a job and lay its tensors where later tasks find them."""
    first = work(folder, spec, INITIALIZE)
    outcome = executor.execute(first, silent)
    if outcome.error is None:
        first.output.rename(folder / "adapter.safetensors")
    return outcome


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_reviews(tmp_path)
    return tmp_path


def test_the_first_task_returns_tensors_and_what_the_server_cannot_know(folder: Path):
    spec = job(folder)

    outcome = initialize(Executor(), folder, spec)

    tensors = serialization.read_tensors(folder / "adapter.safetensors")
    facts: Any = outcome.metrics.facts
    assert outcome.error is None
    assert outcome.has_tensors
    assert facts["adapter_parameters"] == sum(value.size for value in tensors.values())
    assert facts["rank"] == 4
    assert facts["main_metric"] == "accuracy"
    assert facts["labels"] == ["good", "poor"]
    assert sum(facts["label_counts"].values()) == outcome.metrics.num_examples == 24
    assert {"torch", "transformers", "peft"} <= facts["versions"].keys()
    assert facts["model"] == {"source": "built-in", "where": "tiny:bert"}
    config = facts["export"]["files"]["adapter_config.json"]
    assert (config["r"], config["base_model_name_or_path"], config["inference_mode"]) == (4, "tiny:bert", True)
    json.dumps(facts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_job_runs_from_the_first_adapter_to_a_score(folder: Path, dtype: str):
    spec, executor = job(folder, model={"dtype": dtype}, local={"steps": 40}), Executor()
    first = initialize(executor, folder, spec)
    start = executor.execute(work(folder, spec, EVALUATE), silent)

    trained = executor.execute(work(folder, spec), silent)
    (folder / "train-1-0.safetensors").replace(folder / "adapter.safetensors")
    scored = executor.execute(work(folder, spec, EVALUATE), silent)

    assert [o.error for o in (first, start, trained, scored)] == [None] * 4
    assert trained.has_tensors
    assert trained.metrics.steps == 40
    assert trained.metrics.num_examples == 24
    assert trained.metrics.flops > 0
    assert trained.metrics.parameters == first.metrics.facts["adapter_parameters"]
    assert scored.metrics.flops == scored.metrics.parameters == 0
    assert sum(trained.metrics.facts["label_counts"].values()) == 24  # type: ignore[union-attr]
    assert trained.base_sha256 == first.base_sha256
    assert not scored.has_tensors
    assert not (folder / "evaluate-1-0.safetensors").exists()
    assert scored.metrics.num_examples == 8
    assert scored.metrics.loss < start.metrics.loss  # type: ignore[operator]
    expected = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    assert {v.dtype for v in serialization.read_tensors(folder / "adapter.safetensors").values()} == {expected}


def test_the_next_job_reads_a_file_anew_that_changed_and_the_same_job_does_not(folder: Path):
    spec, executor = job(folder), Executor()
    initialize(executor, folder, spec)
    write_reviews(folder, copies=16)

    same = executor.execute(work(folder, spec), silent)
    other = executor.execute(work(folder, spec, job="another"), silent)
    (folder / "reviews.jsonl").unlink()
    gone = executor.execute(work(folder, spec, job="a-third"), silent)

    assert (same.error, same.metrics.num_examples) == (None, 24)
    assert (other.error, other.metrics.num_examples) == (None, 48)
    assert gone.bad_input
    assert "there is no file or folder" in str(gone.error)


def test_the_next_job_keeps_data_that_did_not_change(folder: Path):
    spec, executor = job(folder), Executor()
    initialize(executor, folder, spec)
    before = executor._workspace

    executor.execute(work(folder, spec, job="another"), silent)

    assert executor._workspace is before


def test_a_central_score_covers_the_test_rows_of_every_client(folder: Path):
    spec, executor = job(folder), Executor()
    initialize(executor, folder, spec)

    each = [executor.execute(work(folder, spec, EVALUATE, index), silent).metrics for index in range(2)]
    whole = executor.execute(work(folder, spec, EVALUATE, settings={"on": "central"}), silent).metrics

    rows = sum(m.num_examples for m in each)
    assert whole.num_examples == rows == 16
    pooled = {name: sum(m.num_examples * m.values[name] for m in each) / rows for name in ("accuracy",)}
    assert whole.values["accuracy"] == pytest.approx(pooled["accuracy"])
    assert whole.loss == pytest.approx(sum(m.num_examples * m.loss for m in each if m.loss is not None) / rows)


def test_the_order_of_tasks_changes_no_byte(folder: Path):
    """One process trains every client on one model; another one would train each on its own."""
    spec = job(folder, model={"dropout": 0.1, "lora": {"rank": 4, "dropout": 0.1}})
    shared = Executor()
    initialize(shared, folder, spec)

    for index in (1, 0):
        shared.execute(work(folder, spec, index=index), silent)
        shared.execute(work(folder, spec, EVALUATE, index), silent)
    together = [(folder / f"train-1-{index}.safetensors").read_bytes() for index in range(2)]
    for index in range(2):
        Executor().execute(work(folder, spec, index=index), silent)
    apart = [(folder / f"train-1-{index}.safetensors").read_bytes() for index in range(2)]

    assert together == apart
    assert together[0] != together[1]


def test_proximal_training_of_no_strength_is_federated_averaging(folder: Path):
    files = []
    for method in ({"name": "fedavg"}, {"name": "fedprox", "mu": 0.0}, {"name": "fedprox", "mu": 1.0}):
        spec, executor = job(folder, method=method), Executor()
        initialize(executor, folder, spec)
        executor.execute(work(folder, spec), silent)
        files.append((folder / "train-1-0.safetensors").read_bytes())

    assert files[0] == files[1]
    assert files[0] != files[2]


def test_an_upload_with_a_frozen_half_leaves_it_out(folder: Path):
    spec, executor = job(folder, method={"name": "ffa-lora"}), Executor()
    initialize(executor, folder, spec)
    tensors = serialization.read_tensors(folder / "adapter.safetensors")
    halves = {
        "frozen-a": {n: v for n, v in tensors.items() if ".lora_A." in n},
        ADAPTER: {n: v for n, v in tensors.items() if ".lora_A." not in n},
    }
    paths = {role: folder / f"{role}.payload" for role in halves}
    for role, half in halves.items():
        serialization.write_tensors(paths[role], half)

    outcome = executor.execute(
        TaskInput(task_of(spec), paths, folder / "up.safetensors", folder / "private", folder / "privacy.json"), silent
    )

    assert outcome.error is None
    assert set(serialization.read_tensors(folder / "up.safetensors")) == set(halves[ADAPTER])


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"model": {"name": "tiny:brt"}}, "did you mean 'tiny:bert'"),
        ({"model": {"lora": {"targets": ["qury"]}}}, "model.lora.targets: qury is no layer"),
        ({"data": {"source": "no/such/file.jsonl"}}, "no/such/file.jsonl"),
        ({"data": {"fields": {"text": "txet"}}}, "txet"),
        ({"model": {"name": "null:7 parsecs"}}, "'null:7 parsecs' is no size"),
    ],
)
def test_what_the_user_got_wrong_is_bad_input(folder: Path, parts: dict[str, Any], sentence: str):
    outcome = initialize(Executor(), folder, job(folder, **parts))

    assert outcome.bad_input
    assert sentence in str(outcome.error)
    assert not outcome.has_tensors
    assert "traceback" not in outcome.details


def test_a_failed_job_does_not_spoil_the_next_one(folder: Path):
    executor = Executor()
    initialize(executor, folder, job(folder, model={"lora": {"targets": ["qury"]}}))

    assert initialize(executor, folder, job(folder)).error is None


def test_an_adapter_that_does_not_fit_fails_the_task_and_names_the_tensor(folder: Path):
    spec, executor = job(folder), Executor()
    serialization.write_tensors(folder / "adapter.safetensors", {"strange": np.zeros(3, dtype=np.float32)})

    outcomes = [executor.execute(work(folder, spec, phase), silent) for phase in (TRAIN, EVALUATE)]

    assert all("'strange'" in str(outcome.error) for outcome in outcomes)
    assert not any(outcome.bad_input for outcome in outcomes)


def test_a_damaged_payload_fails_the_task(folder: Path):
    (folder / "adapter.safetensors").write_bytes(b"\0" * 20)

    outcome = Executor().execute(work(folder, job(folder), EVALUATE), silent)

    assert outcome.error is not None
    assert not outcome.bad_input


def test_a_score_without_an_adapter_is_refused(folder: Path):
    outcome = Executor().execute(work(folder, job(folder), EVALUATE), silent)

    assert outcome.error is not None
    assert "without the payload 'adapter'" in outcome.error


def test_a_training_that_diverges_ends_with_advice_and_writes_nothing(folder: Path):
    spec = job(folder, local={"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": None})
    executor = Executor()
    initialize(executor, folder, spec)

    outcome = executor.execute(work(folder, spec), silent)

    assert "lower local.learning_rate" in str(outcome.error)
    assert not (folder / "train-1-0.safetensors").exists()


def test_a_defect_fails_the_task_and_keeps_its_traceback(folder: Path):
    def broken(_fraction: float, _loss: float | None) -> None:
        raise ZeroDivisionError("a defect")

    spec, executor = job(folder), Executor()
    initialize(executor, folder, spec)

    outcome = executor.execute(work(folder, spec), broken)

    assert outcome.error == "ZeroDivisionError in phase 'train': a defect"
    assert not outcome.bad_input
    assert "in broken" in outcome.details["traceback"]


def test_a_cancelled_task_returns_nothing_and_the_next_one_runs_as_ever(folder: Path):
    def cancel(_fraction: float, _loss: float | None) -> None:
        raise Cancelled

    spec, executor = job(folder), Executor()
    initialize(executor, folder, spec)
    executor.execute(work(folder, spec), silent)
    expected = (folder / "train-1-0.safetensors").read_bytes()
    (folder / "train-1-0.safetensors").unlink()

    with pytest.raises(Cancelled):
        executor.execute(work(folder, spec), cancel)

    assert not (folder / "train-1-0.safetensors").exists()
    executor.execute(work(folder, spec), silent)
    assert (folder / "train-1-0.safetensors").read_bytes() == expected


def run_script(code: str, folder: Path, **environment: str) -> str:
    """Run another Python on the tests' own jobs; returns the last line that it printed."""
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(  # noqa: S603 - our own interpreter on the texts below
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=240,
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_two_processes(folder: Path):
    code = "import sys, pathlib, learning; print(learning.fingerprint(pathlib.Path(sys.argv[1])))"
    other_hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"

    theirs = run_script(code, folder, PYTHONHASHSEED=other_hashes)

    assert fingerprint(folder) == theirs


def test_the_null_model_runs_every_phase_without_torch(folder: Path):
    code = """if True:
        import sys
        from pathlib import Path
        from learning import job, silent, task_of
        from lorabbit.tensors import serialization
        from lorabbit.types import ADAPTER
        from lorabbit_client.execution.interface import TaskInput
        from lorabbit_client.executor import Executor
        folder = Path(sys.argv[1])
        spec, executor, before = job(folder, model={"name": "null:4KB"}), Executor(), {}
        for phase in ("initialise", "train", "evaluate"):
            files = (folder / phase, folder / "p", folder / "privacy.json")
            work = TaskInput(task_of(spec, 1, phase), dict(before), *files)
            outcome = executor.execute(work, silent)
            assert outcome.error is None, outcome
            before = {ADAPTER: folder / "initialise"}
        start, end = (serialization.read_tensors(folder / phase) for phase in ("initialise", "train"))
        assert sum(value.nbytes for value in start.values()) == 4000
        assert all(abs(end[name] - start[name] - 0.0015).max() < 1e-6 for name in start)
        heavy = {"torch", "transformers", "peft", "datasets", "pandas", "sklearn", "pyarrow"}
        print(sorted(heavy & sys.modules.keys()))
    """

    loaded = run_script(code, folder)

    assert loaded == "[]"

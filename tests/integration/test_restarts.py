"""Server or client is killed in every phase of each of the four methods, and the job ends as if nothing had happened.

Clients train for real; what must be the same is the adapter of every round, the scores, the bytes, the files of the
run, and what clients keep for themselves.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from mortal_rig import Fate, Moment, MortalRig, new_executor

from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit.types import EVALUATE, TRAIN
from lorabbit_client.executor import Executor

CLIENTS = 3
LORA: dict[str, Any] = {
    "model": {"name": "tiny:vit", "task": "image-classification", "lora": {"rank": 4, "alpha": 8}},
    "local": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
}
OWN: dict[str, Any] = {
    "model": {"variants": ["cnn:5", "cnn:4"], "name": "cnn:5", "task": "image-classification", "trainable": "full"},
    "local": {"steps": 2, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05},
}
STAGES = {"t0": 2, "r_min": 1, "t_heat": 0, "t_cool": 1, "ladder": [1, 2, 4]}
CURRICULUM = {"n_fisher": 8, "probes": 2, "draws": 1, "warmup_steps": 1}
METHODS: dict[str, dict[str, Any]] = {
    "sa-fedlora": {**LORA, "method": {"name": "sa-fedlora", **STAGES}, "rounds": 5},
    "federa": {**LORA, "method": {"name": "federa"}},
    "fibecfed": {**LORA, "method": {"name": "fibecfed", **CURRICULUM}},
    "pfedlora": {**OWN, "method": {"name": "pfedlora", "mu": 0.3, "align": "linear"}},
}
LAST = {"phase": TRAIN, "nth": CLIENTS}
MOMENTS: dict[str, dict[str, Moment]] = {
    "sa-fedlora": {
        "initialise": Moment("adapter-initialised"),
        "initiating": Moment("update-accepted", 1, TRAIN),
        "transition-folds": Moment("update-accepted", 2, **LAST),
        "transition-publishes": Moment("round-closed", 2, effects=3),
        "annealing": Moment("update-accepted", 4, TRAIN),
        "rank-falls": Moment("round-closed", 3),
        "scoring": Moment("update-accepted", 3, EVALUATE),
    },
    "federa": {
        "initialise": Moment("adapter-initialised"),
        "tuning": Moment("update-accepted", 2, TRAIN),
        "scoring": Moment("update-accepted", 2, EVALUATE),
    },
    "fibecfed": {
        "initialise": Moment("adapter-initialised"),
        "measuring": Moment("update-accepted", 0, TRAIN),
        "blocks-are-chosen": Moment("update-accepted", 0, **LAST),
        "blocks-are-told": Moment("round-closed", 0, effects=3),
        "tuning": Moment("update-accepted", 2, TRAIN),
        "scoring": Moment("update-accepted", 2, EVALUATE),
    },
    "pfedlora": {
        "initialise": Moment("adapter-initialised"),
        "training": Moment("update-accepted", 2, TRAIN),
        "scoring": Moment("update-accepted", 2, EVALUATE),
    },
}
TASKS: dict[str, list[tuple[int, str]]] = {
    "sa-fedlora": [(1, TRAIN), (4, TRAIN)],
    "federa": [(2, TRAIN)],
    "fibecfed": [(0, TRAIN), (1, TRAIN), (2, TRAIN)],
    "pfedlora": [(1, TRAIN), (2, TRAIN)],
}
pytestmark = pytest.mark.slow
Undisturbed = dict[str, tuple[Executor, dict[str, Any]]]


def spec_of(method: str) -> JobSpec:
    data = {"source": "digits", "limit": 120}
    parts = {"name": "job", "data": data, "rounds": 3, "clients": CLIENTS, "seed": 7, **METHODS[method]}
    return JobSpec.model_validate(parts)


def outcome(rig: MortalRig, report: Report) -> dict[str, Any]:
    """What nobody's death may change."""
    rows = [row for row in (report.preparation, *report.rounds) if row is not None]
    return {
        "status": (report.status, report.final, report.best, report.adapter),
        "rounds": [(row.round, row.accepted, row.rejected, row.sha256, row.metrics, row.bytes_up) for row in rows],
        "files": contents(rig.runs("job"), "**/*.safetensors"),
        "private": contents(rig.folder / "clients", "*/private/**/*.safetensors"),
    }


def contents(folder: Path, pattern: str) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern)
    }


def play(folder: Path, method: str, executor: Executor, moment: Moment | None = None, fate: Fate | None = None):
    rig = MortalRig(folder, spec_of(method), executor, fate)
    report = rig.play(moment)
    result = outcome(rig, report)
    assert rig.service is not None
    rig.service.close()
    return rig.deaths, result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What each method comes to when nobody dies, and the executor that did it."""
    made: Undisturbed = {}
    for method in METHODS:
        executor = new_executor()
        made[method] = executor, play(tmp_path_factory.mktemp(method), method, executor)[1]
    return made


@pytest.mark.parametrize(("method", "phase"), [(m, phase) for m, moments in MOMENTS.items() for phase in moments])
def test_a_server_killed_in_any_phase_changes_nothing(
    undisturbed: Undisturbed, tmp_path: Path, method: str, phase: str
) -> None:
    executor, expected = undisturbed[method]

    deaths, result = play(tmp_path, method, executor, MOMENTS[method][phase])

    assert deaths == 1
    assert result == expected


@pytest.mark.parametrize("after_writing", [False, True], ids=["while-it-trains", "after-private-state-was-written"])
@pytest.mark.parametrize(("method", "task"), [(m, task) for m, tasks in TASKS.items() for task in tasks])
def test_a_client_killed_in_any_phase_changes_nothing(
    undisturbed: Undisturbed, tmp_path: Path, method: str, task: tuple[int, str], *, after_writing: bool
) -> None:
    executor, expected = undisturbed[method]

    deaths, result = play(tmp_path, method, executor, fate=Fate("host-2", *task, after_writing))

    assert deaths == 1
    assert result == expected


@pytest.mark.parametrize("method", ["fibecfed", "pfedlora"])
def test_clients_keep_what_only_they_hold(undisturbed: Undisturbed, method: str) -> None:
    _, result = undisturbed[method]

    assert {path.partition("/")[0] for path in result["private"]} == {"host-1", "host-2", "host-3"}

"""Small jobs over small files, for tests of the learning half; importing this imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Task
from lorabbit.runtime.seeds import derive_seed
from lorabbit.types import ADAPTER, EVALUATE, INITIALIZE, TRAIN, Tensors
from lorabbit_client.execution.interface import TaskInput
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.executor import Executor

POSITIVE = ("good fine great", "nice warm bright", "a lovely happy day", "sweet calm joy")
NEGATIVE = ("bad cold dark", "ugly grim sour", "a sad nasty night", "bitter harsh pain")


def write_reviews(folder: Path, copies: int = 8) -> Path:
    """Write a text classification file whose two classes share no word; returns it."""
    lines = [
        {"text": f"{text} {'and so it is ' * (i % 3)}", "label": label}
        for i in range(copies)
        for label, texts in (("good", POSITIVE), ("poor", NEGATIVE))
        for text in texts
    ]
    path = folder / "reviews.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


ROWS: dict[str, list[dict[str, Any]]] = {
    "text-pair-classification": [
        {"text_a": "good day", "text_b": "fine day", "label": "same"},
        {"text_a": "good day", "text_b": "sad night", "label": "other"},
    ],
    "token-classification": [
        {"tokens": ["ann", "met", "bob"], "tags": ["B-per", "O", "B-per"]},
        {"tokens": ["rain", "fell"], "tags": ["O", "O"]},
    ],
    "question-answering": [
        {"context": "ann met bob at noon", "question": "who met bob?", "answers": "ann"},
        {"context": "it rained at dawn", "question": "when did it rain?", "answers": "dawn"},
    ],
    "causal-lm": [{"prompt": "one two", "completion": "three"}, {"prompt": "four five", "completion": "six"}],
}


def data_of(folder: Path, task: str, copies: int = 8) -> dict[str, Any]:
    """Write a data file of a task where it needs one; returns the job's `data` section."""
    if task == "image-classification":
        return {"source": "digits", "limit": 40}
    if task == "text-classification":
        return {"source": str(write_reviews(folder, copies=max(1, copies // 4)))}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task] * copies), encoding="utf-8")
    return {"source": str(path)}


def write_normed(folder: Path) -> Path:
    """Write a small ResNet, since every model built from code does without BatchNorm; returns its folder."""
    import transformers  # noqa: PLC0415 - heavy, and for few tests

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=10)
    transformers.ResNetForImageClassification(config).save_pretrained(folder / "resnet")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "resnet")
    return folder / "resnet"


def job(folder: Path, **parts: Any) -> JobSpec:
    """Make a job of two clients on `reviews.jsonl`; `parts` replace or extend its sections."""
    sections: dict[str, Any] = {
        "model": {"name": "tiny:bert", "lora": {"rank": 4}},
        "data": {"source": str(folder / "reviews.jsonl"), "max_length": 32, "test_share": 0.25},
        "local": {"steps": 10, "batch_size": 8, "learning_rate": 0.01},
        "clients": 2,
        "rounds": 2,
    }
    for name, value in parts.items():
        sections[name] = {**sections[name], **value} if isinstance(value, dict) and name in sections else value
    return JobSpec.model_validate(sections)


def task_of(spec: JobSpec, index: int = 0, phase: str = TRAIN, **extra: Any) -> Task:
    """Make one client's task of round 1."""
    fields: dict[str, Any] = {
        "job": "job", "task": f"{phase}-1-{index}", "client": f"client-{index + 1}", "index": index,
        "population": spec.clients, "round": 1, "attempt": 1, "epoch": 0, "phase": phase,
        "seed": derive_seed(spec.seed, phase, 1, index), "payloads": {}, "settings": {}, "spec": spec,
    }  # fmt: skip
    return Task(**{**fields, **extra})


def silent(fraction: float, loss: float | None) -> None:
    """Take progress and do nothing with it."""


def first(space: Any, spec: JobSpec, index: int = 0) -> Any:
    """Make the first adapter of a job as a method without one of its own does."""
    task = task_of(spec, index, INITIALIZE)
    return space.initialize(task, space.session(task, PrivateState(), silent).tensors())


def score(space: Any, spec: JobSpec, tensors: Tensors, index: int = 0) -> Any:
    """Score an adapter on one client's test rows."""
    task = task_of(spec, index, EVALUATE)
    session = space.session(task, PrivateState(), silent)
    session.load(tensors)
    return space.evaluate(task, session, silent)


def fingerprint(folder: Path) -> str:
    """Make a job's first adapter, train it on one client, and tell all that must not depend on the process."""
    model = {"dropout": 0.1, "lora": {"rank": 4, "dropout": 0.1, "targets": ["query", "key", "value", "dense"]}}
    spec, executor = job(folder, model=model), Executor()
    start, end = folder / "start.safetensors", folder / "end.safetensors"
    first = executor.execute(
        TaskInput(task_of(spec, phase=INITIALIZE), {}, start, folder / "private", folder / "privacy.json"), silent
    )
    then = executor.execute(
        TaskInput(task_of(spec), {ADAPTER: start}, end, folder / "private", folder / "privacy.json"), silent
    )
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (start, end)]
    return json.dumps([digests, first.base_sha256, first.metrics.facts, then.metrics.loss])


def workspace(spec: JobSpec) -> Any:
    """Open the workspace of a job on one CPU thread."""
    import torch  # noqa: PLC0415 - only tests that train need it

    from lorabbit_client.training.workspace import LearningWorkspace  # noqa: PLC0415 - as above

    torch.set_num_threads(1)
    return LearningWorkspace(spec, data_root=Path(), device=torch.device("cpu"))


def session(space: Any, spec: JobSpec, index: int = 0) -> Any:
    """Open the session of one client."""
    return space.session(task_of(spec, index), PrivateState(), silent)


def same(a: Tensors, b: Tensors) -> bool:
    """Whether two mappings hold the same tensors, to the bit."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )

"""Batches in pieces, and training in a narrower dtype: what a client can hold changes memory, not the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, silent, task_of, write_reviews

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.types import Tensors
from lorabbit_client.capabilities import UNLIMITED, TrainingLimits
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.training.workspace import LearningWorkspace, open_workspace

TASKS = [
    ("tiny:bert", "text-classification", "lora"),
    ("tiny:bert", "text-classification", "head"),
    ("tiny:bert", "token-classification", "lora"),
    ("tiny:bert", "question-answering", "lora"),
    ("tiny:gpt2", "causal-lm", "lora"),
    ("tiny:vit", "image-classification", "lora"),
]
PRIVACY = {"level": "example", "noise": 1.0, "clip": 0.1, "seeded": True}


def spec_of(folder: Path, name: str, task: str, trainable: str = "lora", **more: Any) -> JobSpec:
    return job(
        folder,
        model={"name": name, "task": task, "trainable": trainable},
        data={**data_of(folder, task, 32), "max_length": 32},
        local={"steps": 3, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": None},
        **more,
    )


def trained(spec: JobSpec, folder: Path, limits: TrainingLimits, watch: Any = None) -> tuple[Tensors, float]:
    torch.set_num_threads(1)
    space = LearningWorkspace(spec, data_root=folder, device=torch.device("cpu"), limits=limits)
    session = space.session(task_of(spec), PrivateState(), silent)
    hook = space._model.model.register_forward_hook(watch, with_kwargs=True) if watch else None
    result = session.train()
    if hook is not None:
        hook.remove()
    return result.tensors, result.loss


@pytest.mark.parametrize(("name", "task", "trainable"), TASKS)
def test_a_batch_in_pieces_teaches_what_the_whole_batch_does(name: str, task: str, trainable: str, tmp_path: Path):
    spec, rows = spec_of(tmp_path, name, task, trainable), []
    whole, loss = trained(spec, tmp_path, UNLIMITED)

    pieces, again = trained(
        spec,
        tmp_path,
        TrainingLimits(max_batch=3),
        lambda _m, _a, own, _o: rows.append(len(next(iter(own.values())))),
    )

    assert 0 < max(rows) <= 3
    assert again == pytest.approx(loss, rel=1e-5)
    for key, value in whole.items():
        assert np.allclose(pieces[key], value, rtol=1e-4, atol=1e-5), key


def test_tagged_pieces_count_by_their_tokens(tmp_path: Path):
    spec = spec_of(tmp_path, "tiny:bert", "token-classification")
    space = LearningWorkspace(spec, data_root=tmp_path, device=torch.device("cpu"))
    examples = space._data(0, spec.clients).train

    counts = {examples.features.units(examples.batch(np.array([row]))) for row in range(len(examples))}

    assert counts == {2, 3}


def test_private_examples_in_pieces_give_the_same_noisy_gradient(tmp_path: Path):
    spec = spec_of(tmp_path, "tiny:bert", "text-classification", privacy=PRIVACY)
    rows: list[int] = []

    whole, _ = trained(spec, tmp_path, UNLIMITED)
    pieces, _ = trained(
        spec, tmp_path, TrainingLimits(max_batch=2), lambda _m, _a, named, _o: rows.append(len(named["labels"]))
    )

    assert 0 < max(rows) <= 2
    assert all(np.allclose(pieces[key], value, rtol=1e-4, atol=1e-5) for key, value in whole.items())


def test_a_limit_that_no_batch_reaches_changes_no_bit(tmp_path: Path):
    write_reviews(tmp_path)
    spec = job(tmp_path)

    results = [trained(spec, tmp_path, limit)[0] for limit in (UNLIMITED, TrainingLimits(max_batch=8))]

    assert all(results[0][key].tobytes() == results[1][key].tobytes() for key in results[0])


@pytest.mark.parametrize(("name", "task", "trainable"), TASKS)
def test_bfloat16_is_computed_with_and_weights_stay_float32(name: str, task: str, trainable: str, tmp_path: Path):
    spec, seen = spec_of(tmp_path, name, task, trainable), set()

    def watch(module: Any, _args: Any, _named: Any, out: Any) -> None:
        answers = [value for key, value in out.items() if key.endswith("logits")]
        seen.update((answer.dtype, value.dtype) for answer in answers for value in module.parameters())

    full, loss = trained(spec, tmp_path, UNLIMITED)
    narrow, near = trained(spec, tmp_path, TrainingLimits(dtype="bfloat16"), watch)

    assert seen == {(torch.bfloat16, torch.float32)}
    assert near == pytest.approx(loss, rel=0.05)
    assert all(value.dtype == np.float32 for value in narrow.values())
    assert any(not np.array_equal(narrow[key], full[key]) for key in full)


def test_scores_are_computed_in_float32_whatever_the_dtype_of_training(tmp_path: Path):
    spec, seen = spec_of(tmp_path, "tiny:bert", "text-classification"), set()
    limits = TrainingLimits(dtype="bfloat16")
    space = LearningWorkspace(spec, data_root=tmp_path, device=torch.device("cpu"), limits=limits)
    session = space.session(task_of(spec, phase="evaluate"), PrivateState(), silent)
    space._model.model.register_forward_hook(lambda _m, _a, out: seen.add(out.logits.dtype))

    space.evaluate(task_of(spec, phase="evaluate"), session, silent)

    assert seen == {torch.float32}


def test_float16_is_refused_without_a_gpu(tmp_path: Path):
    write_reviews(tmp_path)

    with pytest.raises(BadInput, match="LORABBIT_DTYPE: float16 is for GPUs"):
        open_workspace(
            job(tmp_path), threads=1, data_root=tmp_path, device="cpu", limits=TrainingLimits(dtype="float16")
        )

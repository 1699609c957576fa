"""Every kind of trainable parameters, with every model that is built from code, on every task it can do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import pairwise, tiered
from learning import data_of, first, job, score, silent, task_of

from lorabbit.errors import BadInput
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.training.workspace import LearningWorkspace

KINDS = ("lora", "full", "bitfit", "adapter", "head")
ENCODERS = ("tiny:bert", "tiny:roberta", "tiny:distilbert")
DECODERS = ("tiny:gpt2", "tiny:llama")
MODELS = {
    "text-classification": (*ENCODERS, *DECODERS),
    "text-pair-classification": ("tiny:bert", "tiny:gpt2"),
    "token-classification": (*ENCODERS, *DECODERS),
    "question-answering": (*ENCODERS, *DECODERS),
    "causal-lm": DECODERS,
    "image-classification": ("tiny:vit", "cnn:1", "cnn:5"),
}
ONE_LABEL_A_ROW = {"text-classification", "text-pair-classification", "image-classification"}
WITHOUT_BIASES = {"tiny:llama"}
CASES = [
    (task, model, kind)
    for task, models in MODELS.items()
    for model in models
    for kind in KINDS
    if not (kind == "bitfit" and model in WITHOUT_BIASES)
]


def workspace(folder: Path, task: str, model: str, kind: str) -> tuple[LearningWorkspace, Any]:
    torch.set_num_threads(1)
    # Batches of eight of few rows: two steps see most of them.
    spec = job(
        folder,
        model={"name": model, "task": task, "trainable": kind},
        data=data_of(folder, task),
        local={"steps": 2, "batch_size": 8},
    )
    return LearningWorkspace(spec, data_root=Path(), device=torch.device("cpu")), spec


@pytest.mark.parametrize(("task", "model", "kind"), tiered(CASES, fast=pairwise(CASES)))
def test_every_kind_is_scored_trained_and_scored_again(task: str, model: str, kind: str, tmp_path: Path):
    space, spec = workspace(tmp_path, task, model, kind)
    initial = first(space, spec)
    before = score(space, spec, initial.tensors)

    trained = space.session(task_of(spec), PrivateState(), silent).train()

    after = score(space, spec, trained.tensors)
    assert trained.steps == 2
    assert trained.tensors.keys() == initial.tensors.keys()
    assert any(value.tobytes() != initial.tensors[name].tobytes() for name, value in trained.tensors.items())
    assert all(np.isfinite(value).all() for value in trained.tensors.values())
    assert initial.facts["main_metric"] in after.values
    assert before.loss is not None
    assert after.loss is not None
    assert math.isfinite(after.loss)
    assert after.loss != before.loss


@pytest.mark.parametrize("task", MODELS)
def test_every_task_says_what_a_report_needs(task: str, tmp_path: Path):
    space, spec = workspace(tmp_path, task, MODELS[task][0], "lora")

    initial = first(space, spec)

    facts: dict[str, Any] = dict(initial.facts)
    assert facts["adapter_parameters"] == sum(value.size for value in initial.tensors.values())
    assert facts["base_parameters"] > facts["adapter_parameters"] > 0
    assert facts["rank"] == 4
    assert facts["export"]["format"] == "peft"
    assert sum(facts["label_counts"].values()) == (initial.num_examples if task in ONE_LABEL_A_ROW else 0)


@pytest.mark.parametrize("task", [task for task in MODELS if "tiny:llama" in MODELS[task]])
def test_a_model_without_biases_cannot_train_them(task: str, tmp_path: Path):
    space, spec = workspace(tmp_path, task, "tiny:llama", "bitfit")

    with pytest.raises(BadInput, match="'bitfit' trains biases, and tiny:llama has none"):
        first(space, spec)

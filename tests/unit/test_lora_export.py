"""What a job exports, loaded by peft and transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from learning import data_of, first, job, score, silent, task_of
from peft import PeftModel

from lorabbit.job.spec import JobSpec
from lorabbit.tensors import serialization
from lorabbit.types import Tensors
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models import tiny
from lorabbit_client.models.loading import AUTO_CLASSES, quiet, seeded
from lorabbit_client.models.lora import default_targets
from lorabbit_client.training.session import write_tensors
from lorabbit_client.training.workspace import LearningWorkspace

WEIGHTS = {"peft": "adapter_model.safetensors", "transformers": "model.safetensors"}
ENCODERS = ("bert", "roberta", "distilbert")
PAIRS = [
    *((task, name) for task in ("text-classification", "token-classification", "question-answering")
      for name in (*ENCODERS, "gpt2", "llama")),
    ("causal-lm", "gpt2"), ("causal-lm", "llama"), ("image-classification", "vit"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _as_quiet_as_a_client() -> Any:
    with quiet():
        yield


def save_base(folder: Path, name: str, task: str) -> Path:
    """Save a model without any head of the task, as a hub would hold it."""
    causal = task == "causal-lm"
    auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    with seeded(7):
        auto.from_config(tiny.tiny_config(name)).save_pretrained(folder)
    if name == "vit":
        side = {"height": tiny.IMAGE_SIDE, "width": tiny.IMAGE_SIDE}
        transformers.ViTImageProcessorPil(size=side).save_pretrained(folder)
    else:
        tiny.tiny_tokenizer(name).save_pretrained(folder)
    return folder


def moved(tensors: Tensors) -> Tensors:
    """Tensors far from where they began."""
    drawn = np.random.default_rng(3)
    return {name: (value + drawn.normal(0, 0.1, value.shape)).astype(value.dtype) for name, value in tensors.items()}


def opened(folder: Path, task: str, name: str, **model: Any) -> tuple[LearningWorkspace, JobSpec]:
    torch.set_num_threads(1)
    base = str(save_base(folder / "base", name, task))
    spec = job(folder, model={"name": base, "task": task, **model}, data=data_of(folder, task))
    return LearningWorkspace(spec, data_root=Path(), device=torch.device("cpu")), spec


def export(folder: Path, facts: Any, tensors: Tensors) -> Path:
    """Write what a server writes of a job's `export` fact."""
    folder.mkdir()
    for name, content in facts["export"]["files"].items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    serialization.write_tensors(folder / WEIGHTS[facts["export"]["format"]], tensors)
    return folder


def inputs(space: LearningWorkspace, spec: JobSpec) -> dict[str, torch.Tensor]:
    batch = space._data(0, spec.clients).train.batch(np.arange(4))
    return {name: value for name, value in batch.items() if name in {"input_ids", "attention_mask", "pixel_values"}}


def answers(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    return out.start_logits if hasattr(out, "start_logits") else out.logits


@pytest.mark.parametrize(("task", "name"), PAIRS)
def test_a_lora_adapter_loads_with_peft_alone_and_answers_alike(task: str, name: str, tmp_path: Path):
    """The base has no head, so peft's user draws another one at random: it must come with the adapter."""
    space, spec = opened(tmp_path, task, name)
    initial = first(space, spec)
    tensors = moved(initial.tensors)
    folder = export(tmp_path / "adapter", initial.facts, tensors)

    auto = getattr(transformers, AUTO_CLASSES[spec.model.task])
    labels: Any = initial.facts["labels"]
    theirs = PeftModel.from_pretrained(
        auto.from_pretrained(spec.model.name, **({"num_labels": len(labels)} if labels else {})), folder
    )

    write_tensors(space._model, tensors)
    batch = inputs(space, spec)
    assert torch.equal(answers(theirs, batch), answers(space._model.model, batch))


@pytest.mark.parametrize(
    ("task", "name"),
    [("text-classification", "bert"), ("causal-lm", "gpt2"), ("causal-lm", "llama"), ("image-classification", "vit")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fully_tuned_model_loads_with_transformers_alone_and_answers_alike(
    task: str, name: str, dtype: str, tmp_path: Path
):
    space, spec = opened(tmp_path, task, name, trainable="full", dtype=dtype)
    initial = first(space, spec)
    tensors = moved(initial.tensors)
    folder = export(tmp_path / "model", initial.facts, tensors)

    theirs = getattr(transformers, AUTO_CLASSES[spec.model.task]).from_pretrained(folder)

    write_tensors(space._model, tensors)
    batch = inputs(space, spec)
    assert theirs.dtype == getattr(torch, dtype)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(theirs.dtype)
    assert torch.equal(answers(theirs, batch), answers(space._model.model, batch))


def test_an_adapter_on_a_base_of_its_own_loads_with_both_and_answers_alike(tmp_path: Path):
    """What the server writes to base/ of a whole model that clients trained."""
    space, spec = opened(tmp_path, "text-classification", "bert")
    initial = first(space, spec)
    one = space.session(task_of(spec), PrivateState(), silent)
    one.select("whole")
    whole = moved(one.tensors())
    base = tmp_path / "own-base"
    base.mkdir()
    facts: Any = initial.facts
    for file, content in facts["export_base"]["files"].items():
        (base / file).write_text(json.dumps(content), encoding="utf-8")
    serialization.write_tensors(base / WEIGHTS["transformers"], whole)
    one.load(whole)
    one.select("adapter")
    tensors = moved(initial.tensors)
    one.load(tensors)
    folder = export(tmp_path / "adapter", initial.facts, tensors)

    theirs = PeftModel.from_pretrained(transformers.AutoModelForSequenceClassification.from_pretrained(base), folder)

    batch = inputs(space, spec)
    assert torch.equal(answers(theirs, batch), answers(one.prepared_model().model, batch))


def test_a_trained_adapter_scores_the_same_when_peft_loads_it(tmp_path: Path):
    space, spec = opened(tmp_path, "text-classification", "distilbert")
    initial = first(space, spec)
    trained = space.session(task_of(spec), PrivateState(), silent).train().tensors
    folder = export(tmp_path / "adapter", initial.facts, trained)

    base = transformers.AutoModelForSequenceClassification.from_pretrained(spec.model.name, num_labels=2)
    theirs = PeftModel.from_pretrained(base, folder)

    test = space._data(0, spec.clients).test
    batch = test.batch(np.arange(len(test)))
    guessed = answers(theirs, {n: v for n, v in batch.items() if n != "labels"}).argmax(-1)
    accuracy = (guessed == batch["labels"]).float().mean().item()
    assert score(space, spec, trained).values["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_lora_goes_to_the_attention_of_every_family_by_default(name: str):
    """Queries and values, as in LoRA's paper (GPT-2 keeps both in one layer)."""
    targets = default_targets(transformers.AutoModel.from_config(tiny.tiny_config(name)))

    assert targets in (
        ["query", "value"],
        ["q_proj", "v_proj"],
        ["query_proj", "value_proj"],
        ["q_lin", "v_lin"],
        ["c_attn"],
    )

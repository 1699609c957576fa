"""Prompt tuning, p-tuning and prefix tuning: trained, refused where peft cannot, loaded by peft alone."""

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

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.tensors import serialization, soft_prompts
from lorabbit.types import Tensors
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models import tiny
from lorabbit_client.models.loading import AUTO_CLASSES, quiet, seeded
from lorabbit_client.training.session import write_tensors
from lorabbit_client.training.workspace import LearningWorkspace

KINDS = ("prompt", "p-tuning", "prefix")
POSSIBLE = [
    *(("text-classification", "bert", kind) for kind in KINDS),
    ("text-classification", "roberta", "prompt"),
    ("text-pair-classification", "bert", "p-tuning"),
    *((task, "bert", "prefix") for task in ("token-classification", "question-answering")),
    *(("causal-lm", name, kind) for name in ("gpt2", "llama") for kind in KINDS),
]


@pytest.fixture(autouse=True)
def _as_quiet_as_a_client() -> Any:
    with quiet():
        yield


def workspace(folder: Path, task: str, name: str, kind: str, **parts: Any) -> tuple[LearningWorkspace, JobSpec]:
    torch.set_num_threads(1)
    model = {"name": name, "task": task, "trainable": kind, "virtual_tokens": 4, **parts.pop("model", {})}
    data = {**data_of(folder, task), **parts.pop("data", {})}
    spec = job(folder, model=model, data=data, local={"steps": 4, "batch_size": 8})
    return LearningWorkspace(spec, data_root=Path(), device=torch.device("cpu")), spec


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize(("task", "name", "kind"), POSSIBLE)
def test_a_soft_prompt_is_trained_and_scored(task: str, name: str, kind: str, tmp_path: Path):
    space, spec = workspace(tmp_path, task, f"tiny:{name}", kind)
    start = first(space, spec).tensors
    before = score(space, spec, start)
    one = space.session(task_of(spec), PrivateState(), silent)

    end = one.train().tensors

    encoder = "prompt_encoder.embedding.weight" if kind == "p-tuning" else "prompt_embeddings"
    assert start[encoder].shape[0] == 4
    assert not np.array_equal(end[encoder], start[encoder])
    assert score(space, spec, end).loss != before.loss
    again = LearningWorkspace(spec, data_root=Path(), device=torch.device("cpu"))
    assert same(again.session(task_of(spec), PrivateState(), silent).train().tensors, end)


def test_a_prompt_starts_at_words_of_the_vocabulary(tmp_path: Path):
    space, spec = workspace(tmp_path, "causal-lm", "tiny:gpt2", "prompt")
    start = first(space, spec).tensors["prompt_embeddings"]

    words = space._model.model.get_input_embeddings().weight.detach().numpy()

    assert all(any(np.array_equal(row, word) for word in words) for row in start)


def test_the_whole_model_stands_without_its_prompt(tmp_path: Path):
    space, spec = workspace(tmp_path, "causal-lm", "tiny:gpt2", "prefix")
    full, full_spec = workspace(tmp_path, "causal-lm", "tiny:gpt2", "full")
    one = space.session(task_of(spec), PrivateState(), silent)

    one.select("whole")

    assert same(one.tensors(), first(full, full_spec).tensors)
    assert space.evaluate(task_of(spec), one, silent).loss == score(full, full_spec, one.tensors()).loss
    assert same(one.train().tensors, full.session(task_of(spec), PrivateState(), silent).train().tensors)


@pytest.mark.parametrize(
    ("task", "name", "kind", "sentence"),
    [
        ("image-classification", "vit", "prompt", "writes tokens before a text, and image-classification has none"),
        ("token-classification", "bert", "prompt", "token-classification answers by token; use prefix or lora"),
        ("question-answering", "bert", "p-tuning", "question-answering answers by token"),
        ("text-classification", "gpt2", "prompt", "would read its answer off the padding"),
        ("text-classification", "distilbert", "prefix", "peft cannot do 'prefix' with tiny:distilbert"),
    ],
)
def test_what_peft_cannot_do_is_one_clear_sentence(task: str, name: str, kind: str, sentence: str, tmp_path: Path):
    space, spec = workspace(tmp_path, task, f"tiny:{name}", kind)

    with pytest.raises(BadInput, match=rf"^model\.trainable: .*{sentence}"):
        first(space, spec)


def test_a_prompt_that_leaves_no_room_for_the_text_is_bad_input(tmp_path: Path):
    space, spec = workspace(
        tmp_path, "causal-lm", "tiny:gpt2", "prompt", model={"virtual_tokens": 500}, data={"max_length": 32}
    )

    with pytest.raises(BadInput, match=r"model\.virtual_tokens: 500 and data\.max_length 32 are more than the 512"):
        first(space, spec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("task", "name"), [("text-classification", "bert"), ("causal-lm", "gpt2")])
def test_an_exported_prompt_loads_with_peft_alone_and_answers_alike(task: str, name: str, kind: str, tmp_path: Path):
    base = tmp_path / "base"
    auto: Any = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModel
    with seeded(7):
        auto.from_config(tiny.tiny_config(name)).save_pretrained(base)
    tiny.tiny_tokenizer(name).save_pretrained(base)
    space, spec = workspace(tmp_path, task, str(base), kind)
    facts: Any = first(space, spec).facts
    trained = space.session(task_of(spec), PrivateState(), silent).train().tensors
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file, content in facts["export"]["files"].items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    exported = soft_prompts.finished(trained) if soft_prompts.has_encoder(trained) else trained
    serialization.write_tensors(folder / "adapter_model.safetensors", exported)

    labels = {"num_labels": len(facts["labels"])} if facts["labels"] else {}
    model = getattr(transformers, AUTO_CLASSES[spec.model.task]).from_pretrained(base, **labels)
    theirs = PeftModel.from_pretrained(model, folder).eval()

    write_tensors(space._model, trained)
    batch = space._data(0, spec.clients).train.batch(np.arange(4))
    batch.pop("labels")
    with torch.no_grad():
        ours = space._model.model.eval()(**batch).logits
        found = theirs(**batch).logits
    torch.testing.assert_close(found[:, -ours.shape[1] :] if task == "causal-lm" else found, ours, rtol=1e-5, atol=1e-5)

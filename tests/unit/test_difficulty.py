"""The four measures of how hard an example is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, write_reviews

from lorabbit.errors import BadInput
from lorabbit_client.data import Examples
from lorabbit_client.difficulty import difficulties
from lorabbit_client.learning import LearningWorkspace


def client(folder: Path, **parts: Any) -> tuple[Any, Examples]:
    torch.set_num_threads(1)
    spec = job(folder, **parts)
    space = LearningWorkspace(spec, data_root=folder, device=torch.device("cpu"))
    return space._model, space._data(0, spec.clients).train


def test_the_loss_of_an_example_is_the_models_own(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    model, rows = client(tmp_path)
    model.model.eval()
    with torch.no_grad():
        expected = [float(model.model(**rows.batch(np.array([i]))).loss) for i in range(len(rows))]

    np.testing.assert_allclose(difficulties(model, rows, "loss"), expected, rtol=1e-4)


def test_a_long_answer_is_not_hard_by_its_length(tmp_path: Path) -> None:
    model, rows = client(
        tmp_path, model={"name": "tiny:gpt2", "task": "causal-lm"}, data=data_of(tmp_path, "causal-lm")
    )
    model.model.eval()
    with torch.no_grad():
        expected = [float(model.model(**rows.batch(np.array([i]))).loss) for i in range(len(rows))]

    np.testing.assert_allclose(difficulties(model, rows, "loss"), expected, rtol=1e-4)


def test_length_counts_tokens(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    model, rows = client(tmp_path)

    assert difficulties(model, rows, "length").tolist() == rows.lengths.tolist()


def test_rarity_is_the_mean_of_minus_the_logarithm_of_its_tokens_shares(tmp_path: Path) -> None:
    texts = ["a a a", "a a a", "a a b", "a a a"]
    lines = [{"text": text, "label": "xy"[i % 2]} for i, text in enumerate(texts)] * 2
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model, rows = client(tmp_path, clients=1)

    found = difficulties(model, rows, "rarity")
    tokens = [rows.batch(np.array([i]))["input_ids"][0].tolist() for i in range(len(rows))]
    flat = [token for row in tokens for token in row]
    expected = [np.mean([-np.log(flat.count(token) / len(flat)) for token in row]) for row in tokens]

    np.testing.assert_allclose(found, expected)
    assert len(set(found.round(6))) > 1


def test_images_have_no_rare_words(tmp_path: Path) -> None:
    model, rows = client(
        tmp_path,
        model={"name": "tiny:vit", "task": "image-classification"},
        data=data_of(tmp_path, "image-classification"),
    )

    with pytest.raises(BadInput, match=r"^method\.difficulty: "):
        difficulties(model, rows, "rarity")

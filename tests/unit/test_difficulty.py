"""The five measures of how hard an example is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import data_of, job, write_reviews

from lorabbit.errors import BadInput
from lorabbit_client.analysis.difficulty import classes, difficulties
from lorabbit_client.dataset import Examples
from lorabbit_client.training.workspace import LearningWorkspace


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


@pytest.mark.parametrize(("kind", "of"), [("rarity", np.sum), ("rarity-mean", np.mean)])
def test_rarity_is_the_sum_of_minus_the_logarithms_of_its_tokens_shares_or_their_mean(
    kind: Any, of: Any, tmp_path: Path
) -> None:
    texts = ["a a a", "a a a a a", "a a b", "a a a"]
    lines = [{"text": text, "label": "xy"[i % 2]} for i, text in enumerate(texts)] * 2
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model, rows = client(tmp_path, clients=1)

    found = difficulties(model, rows, kind)
    tokens = [rows.batch(np.array([i]))["input_ids"][0].tolist() for i in range(len(rows))]  # none is padded
    flat = [token for row in tokens for token in row]
    expected = [of([-np.log(flat.count(token) / len(flat)) for token in row]) for row in tokens]

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


def test_an_example_of_several_rows_has_one_difficulty_the_mean_of_theirs(tmp_path: Path) -> None:
    long, short = "ann met bob at noon and " * 20 + "left", "it rained at dawn"
    lines = [{"context": text, "question": "who?", "answers": text.split()[0]} for text in (long, short)] * 6
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model, rows = client(
        tmp_path,
        model={"name": "tiny:bert", "task": "question-answering"},
        data={"source": str(tmp_path / "rows.jsonl"), "max_length": 32},
        clients=1,
    )
    owners = rows.features.examples_of(rows.rows)
    first = rows.lengths[owners == owners[0]]

    found = difficulties(model, rows, "length")

    assert len(rows) > rows.num_examples == len(found)
    assert found[0] == pytest.approx(first.mean())


def test_classes_are_those_of_the_labels_and_zeros_where_there_are_none(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    _, rows = client(tmp_path)
    expected = rows.batch(np.arange(len(rows)))["labels"].tolist()
    _, texts = client(tmp_path, model={"name": "tiny:gpt2", "task": "causal-lm"}, data=data_of(tmp_path, "causal-lm"))

    assert classes(rows).tolist() == expected
    assert classes(texts).tolist() == [0] * texts.num_examples

"""Extractive question answering: windows, the span that is found in them, SQuAD's two measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.table import Table
from lorabbit_client.models import tiny
from lorabbit_client.tasks.question_answering import Windows, best_of, exact, f1
from lorabbit_client.tasks.registry import TASKS

CONTEXT = "The quick brown fox jumps over the lazy dog near the river bank at dawn."
BERT = tiny.tiny_tokenizer("bert")


def windows(answers: list[Any], *, context: str = CONTEXT, tokenizer: Any = BERT, max_length: int = 64) -> Windows:
    task, spec = TASKS["question-answering"], DataSpec(max_length=max_length)
    columns = {"question": ["who?"] * len(answers), "context": [context] * len(answers), "answers": answers}
    records = task.parse(Table("data file q.jsonl", columns), (), spec)
    features = task.encode(records, tokenizer, (), spec=spec)
    assert isinstance(features, Windows)
    return features


def sure_of(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    length = batch["input_ids"].shape[1]
    logits = {
        f"{end}_logits": torch.nn.functional.one_hot(batch[f"{end}_positions"], length).float() * 10
        for end in ("start", "end")
    }
    return {"loss": 1.0, **logits}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("max_length", [256, 30])
def test_the_right_positions_give_the_whole_answer_also_over_several_windows(name: str, max_length: int):
    answer = {"text": ["lazy dog"], "answer_start": [CONTEXT.index("lazy")]}
    features = windows([answer], tokenizer=tiny.tiny_tokenizer(name), max_length=max_length)
    every = np.arange(len(features))
    assert (len(features) > 1) == (max_length == 30)
    batch = features.batch(every)
    scorer = features.scorer()

    scorer.add(every, batch, sure_of(batch))
    scores = scorer.result()

    assert scores.num_examples == 1
    assert dict(scores.values) == {"f1": 1.0, "exact_match": 1.0}


def test_an_answer_outside_of_a_window_is_at_position_zero():
    features = windows([{"text": ["dawn"], "answer_start": [CONTEXT.index("dawn")]}], max_length=30)

    batch = features.batch(np.arange(len(features)))

    assert batch["start_positions"][0] == batch["end_positions"][0] == 0
    assert batch["start_positions"][-1] > 0


def test_rows_of_an_example_are_all_its_windows():
    features = windows(["fox", "dog"], max_length=30)
    half = len(features) // 2

    assert features.rows_of(np.array([1])).tolist() == list(range(half, 2 * half))
    assert features.rows_of(np.array([], dtype=np.int64)).tolist() == []


def test_a_span_never_ends_before_it_starts():
    features = windows(["fox"])
    batch = features.batch(np.arange(1))
    outputs = sure_of(batch)
    outputs["start_logits"], outputs["end_logits"] = outputs["end_logits"].clone(), outputs["start_logits"].clone()
    outputs["start_logits"][0, batch["end_positions"][0] + 1] = 20.0
    scorer = features.scorer()

    scorer.add(np.arange(1), batch, outputs)

    assert scorer.result().num_examples == 1
    assert all(begin < end for _, begin, end in scorer._best.values())


def test_an_offset_that_is_off_is_replaced_by_the_nearest_occurrence():
    features = windows([{"text": ["the"], "answer_start": [CONTEXT.index("the river") + 3]}])

    batch = features.batch(np.arange(1))

    begin = int(features.starts[0][int(batch["start_positions"][0])])
    assert begin == CONTEXT.index("the river")


def test_an_answer_that_is_not_in_the_context_is_named():
    with pytest.raises(BadInput, match=r"data file q.jsonl, row 1: answer 'cat' does not stand in the context"):
        windows(["cat"])


def test_a_question_longer_than_half_a_window_is_cut_and_leaves_room_for_the_context():
    task, spec = TASKS["question-answering"], DataSpec(max_length=32)
    columns = {"question": ["why " * 200], "context": [CONTEXT], "answers": ["fox"]}

    features = task.encode(task.parse(Table("q", columns), (), spec), BERT, (), spec=spec)

    assert len(features) > 1
    assert features.lengths.max() == 32


@pytest.mark.parametrize(
    ("text", "reference", "exactly", "shared"),
    [
        ("The Cat!", "cat", 1.0, 1.0),
        ("a black cat", "the cat", 0.0, 2 / 3),
        ("dog", "cat", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
        ("an a-b", "ab", 1.0, 1.0),
    ],
)
def test_exact_match_and_f1_follow_the_official_script(text: str, reference: str, exactly: float, shared: float):
    assert exact(text, reference) == exactly
    assert f1(text, reference) == pytest.approx(shared)


def test_the_best_reference_counts_and_no_reference_wants_no_answer():
    assert best_of(exact, "cat", ["dog", "the cat"]) == 1.0
    assert best_of(f1, "", []) == 1.0
    assert best_of(f1, "cat", []) == 0.0

"""Learning tasks: how rows become tensors, and scores, with tokenizers made from code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.features import IGNORED, Features
from lorabbit_client.data.table import Source, Table
from lorabbit_client.models import tiny
from lorabbit_client.tasks.causal_lm import truncate
from lorabbit_client.tasks.image_classification import ImageFormat
from lorabbit_client.tasks.registry import TASKS
from lorabbit_client.tasks.token_classification import align

BERT, GPT2, LLAMA = (tiny.tiny_tokenizer(name) for name in ("bert", "gpt2", "llama"))


def encode(task: str, columns: dict[str, Any], processor: Any, **spec: Any) -> Features:
    data = DataSpec.model_validate(spec)
    table = Table("data file x.jsonl", columns)
    labels = TASKS[task].labels(Source(table), data)
    return TASKS[task].encode(TASKS[task].parse(table, labels, data), processor, labels, spec=data)


def rows(count: int) -> Any:
    return np.arange(count)


def perfect_logits(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels.clamp(min=0), classes).float()


def test_a_batch_is_padded_to_its_longest_row_and_masked():
    features = encode("text-classification", {"text": ["ab", "ab cd ef"], "label": ["x", "y"]}, BERT)

    batch = features.batch(rows(2))

    assert features.lengths.tolist() == [3, 5]
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][0, 3:].tolist() == [BERT.pad_token_id] * 2
    assert batch["labels"].tolist() == [0, 1]
    assert "token_type_ids" not in batch


def test_two_texts_are_told_apart_by_type():
    columns = {"text_a": ["ab"], "text_b": ["cd ef"], "label": [1]}

    batch = encode("text-pair-classification", columns, BERT, labels=["no", "yes"]).batch(rows(1))

    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_a_long_text_is_cut_to_the_same_tokens_as_by_the_tokenizer_alone():
    text = " ".join(["word"] * 500)

    features = encode("text-classification", {"text": [text, "b"], "label": ["x", "y"]}, BERT, max_length=16)

    expected = BERT(text, truncation=True, max_length=16)["input_ids"]
    assert features.batch(rows(1))["input_ids"].tolist() == [expected]


def test_accuracy_and_f1_of_pairs_are_those_of_the_confusion_table():
    columns = {"text_a": ["a"] * 6, "text_b": ["b"] * 6, "label": [1, 1, 1, 0, 0, 0]}
    features = encode("text-pair-classification", columns, BERT, labels=["no", "yes"])
    scorer = features.scorer()
    predicted = torch.tensor([1, 1, 0, 1, 0, 0])

    scorer.add(rows(6), features.batch(rows(6)), {"loss": 0.5, "logits": perfect_logits(predicted, 2)})
    scores = scorer.result()

    assert scores.num_examples == 6
    assert scores.loss == pytest.approx(0.5)
    assert scores.values["accuracy"] == pytest.approx(4 / 6)
    assert scores.values["f1"] == pytest.approx(2 * 2 / (3 + 3))  # 2 right of 3 found, of 3 wanted


def test_the_mean_loss_weighs_batches_by_their_rows():
    features = encode("text-classification", {"text": ["a", "b", "c"], "label": ["x", "y", "x"]}, BERT)
    scorer = features.scorer()

    for batch_rows, loss in ((np.array([0, 1]), 1.0), (np.array([2]), 4.0)):
        batch = features.batch(batch_rows)
        scorer.add(batch_rows, batch, {"loss": loss, "logits": perfect_logits(batch["labels"], 2)})

    assert scorer.result().loss == pytest.approx((2 * 1.0 + 4.0) / 3)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_nothing_scored_gives_no_loss_and_no_values(task: str):
    columns: dict[str, Any] = {
        "text": ["a"], "text_a": ["a"], "text_b": ["b"], "tokens": [["a"]], "tags": [["O"]], "context": ["a b"],
        "question": ["b"], "answers": ["a"], "image": np.zeros((1, 4, 4), dtype=np.uint8), "label": [0],
    }  # fmt: skip
    processor = ImageFormat(8, 8) if task == "image-classification" else GPT2 if task == "causal-lm" else BERT
    spec = {"labels": ["O", "B-x"]} if task == "token-classification" else {}

    scores = encode(task, columns, processor, **spec).scorer().result()

    assert (scores.num_examples, scores.loss, dict(scores.values)) == (0, None, {})


def test_a_tag_stands_on_the_first_piece_of_its_word():
    words = [None, 0, 0, 1, 2, 2, 2, None]

    assert align(words, [5, 6, 7]) == [IGNORED, 5, IGNORED, 6, 7, IGNORED, IGNORED, IGNORED]


@pytest.mark.parametrize("tokenizer", [BERT, GPT2], ids=["word-pieces", "byte-pairs"])
def test_every_word_has_exactly_one_label_whatever_the_tokenizer(tokenizer: Any):
    columns = {"tokens": [["EU", "rejects", "German", "call"]], "tags": [["B-ORG", "O", "B-MISC", "O"]]}

    features = encode("token-classification", columns, tokenizer)
    labels = features.batch(rows(1))["labels"][0]

    # label table: O first, then by name
    assert labels[labels != IGNORED].tolist() == [2, 0, 1, 0]


def test_entity_f1_counts_whole_entities():
    columns = {"tokens": [["a", "b", "c", "d"]], "tags": [["B-x", "I-x", "O", "B-y"]]}
    features = encode("token-classification", columns, BERT)
    batch = features.batch(rows(1))
    names = ("O", "B-x", "B-y", "I-x")
    guess = batch["labels"].clone()
    words = (guess[0] != IGNORED).nonzero().flatten()
    guess[0, words[1]] = names.index("O")  # the first entity ends too early
    scorer = features.scorer()

    scorer.add(rows(1), batch, {"loss": 0.0, "logits": perfect_logits(guess, 4)})
    values = scorer.result().values

    assert values["f1"] == pytest.approx(0.5)  # one of two found entities is right, one of two wanted is found
    assert values["accuracy"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("tokens", "tags", "sentence"),
    [
        (["a", "b"], ["O"], "row 1: 2 tokens but 1 tags"),
        ([], [], "field 'tokens' is not a list, or is an empty one"),
        (["a"], ["B-z"], "label 'B-z' is not in the label table"),
        (["a", 3], ["O", "O"], "holds something other than words"),
    ],
)
def test_a_bad_tagged_row_is_named(tokens: list[Any], tags: list[str], sentence: str):
    with pytest.raises(BadInput, match=sentence):
        encode("token-classification", {"tokens": [tokens], "tags": [tags]}, BERT, labels=["O", "B-x"])


def test_only_the_completion_and_the_end_are_learnt():
    columns = {"prompt": ["say hi"], "completion": ["hi"]}

    batch = encode("causal-lm", columns, LLAMA).batch(rows(1))

    wanted = [*LLAMA("hi", add_special_tokens=False)["input_ids"], LLAMA.eos_token_id]
    prompt = LLAMA("say hi\n")["input_ids"]
    assert batch["input_ids"][0].tolist() == prompt + wanted
    assert batch["labels"][0].tolist() == [IGNORED] * len(prompt) + wanted


def test_all_of_a_plain_text_is_learnt():
    batch = encode("causal-lm", {"text": ["to be"]}, GPT2).batch(rows(1))

    tokens = [*GPT2("to be")["input_ids"], GPT2.eos_token_id]
    assert batch["labels"][0].tolist() == tokens


def test_only_what_the_template_adds_for_the_assistant_is_learnt():
    talk = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "four"},
    ]

    batch = encode("causal-lm", {"messages": [talk]}, LLAMA, chat_template=True).batch(rows(1))

    labels = batch["labels"][0]
    assert LLAMA.decode(batch["input_ids"][0]) == "user: one?\nassistant: two\nuser: three?\nassistant: four\n"
    assert LLAMA.decode(labels[labels != IGNORED]).replace("assistant: ", "") == "two\nfour\n"


def test_turns_without_an_assistant_are_named():
    with pytest.raises(BadInput, match="row 1: field 'messages' must be a list of turns"):
        encode("causal-lm", {"messages": [[{"role": "user", "content": "hello?"}]]}, LLAMA)


def test_a_long_prompt_gives_way_to_the_completion():
    opening, prompt, said = [1], list(range(10, 30)), list(range(50, 60))

    tokens, learned = truncate([(opening, False), (prompt, False), (said, True)], 12)

    assert tokens == [24, 25, 26, 27, 28, 29, *range(50, 56)]
    assert learned == [0] * 6 + [1] * 6


def test_a_long_completion_is_cut_at_its_end():
    tokens, learned = truncate([([1, 2], False), (range(50, 80), True)], 10)

    assert tokens == [1, 2, *range(50, 58)]
    assert learned == [0, 0] + [1] * 8


def test_perplexity_and_token_accuracy_count_target_tokens():
    features = encode("causal-lm", {"prompt": ["a", "b"], "completion": ["xyz", "x y z"]}, GPT2)
    batch = features.batch(rows(2))
    targets = int((batch["labels"][:, 1:] != IGNORED).sum())
    scorer = features.scorer()
    logits = torch.zeros((*batch["input_ids"].shape, len(GPT2)))
    logits[:, :-1] = perfect_logits(batch["labels"][:, 1:], len(GPT2))

    scorer.add(rows(2), batch, {"loss": torch.tensor(2.0), "logits": logits})
    scores = scorer.result()

    assert scores.num_examples == targets
    assert scores.values["perplexity"] == pytest.approx(math.exp(2.0))
    assert scores.values["token_accuracy"] == 1.0


def test_gray_images_become_normalized_color_of_the_models_size():
    images = np.full((2, 4, 4), 255, dtype=np.uint8)

    features = encode("image-classification", {"image": images, "label": [0, 1]}, ImageFormat(8, 6))
    batch = features.batch(rows(2))

    assert batch["pixel_values"].shape == (2, 3, 8, 6)
    assert torch.allclose(batch["pixel_values"], torch.ones(()))  # (1 - 0.5) / 0.5


def test_color_becomes_gray_where_the_model_wants_one_channel():
    images = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    images[..., 0] = 255
    form = ImageFormat(4, 4, mean=(0.0,), std=(1.0,))

    batch = encode("image-classification", {"image": images, "label": [0]}, form).batch(rows(1))

    assert batch["pixel_values"].shape == (1, 1, 4, 4)
    assert torch.allclose(batch["pixel_values"], torch.tensor(1 / 3))


def test_images_of_unlike_sizes_are_brought_to_one():
    images = [np.zeros((4, 5, 3), dtype=np.uint8), np.zeros((9, 7), dtype=np.uint8)]

    batch = encode("image-classification", {"image": images, "label": [0, 1]}, ImageFormat(6, 6)).batch(rows(2))

    assert batch["pixel_values"].shape == (2, 3, 6, 6)


def test_an_own_data_set_needs_stated_labels():
    columns = {"text": ["a", "b"], "label": ["x", "y"]}

    with pytest.raises(BadInput, match=r"data\.labels: every client reads its own data"):
        encode("text-classification", columns, BERT, partition={"kind": "own"})

    assert len(encode("text-classification", columns, BERT, partition={"kind": "own"}, labels=["x", "y"])) == 2

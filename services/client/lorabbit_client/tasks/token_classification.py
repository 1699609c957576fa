"""Token classification: one tag a word, scored by entities (seqeval).

The first piece of a word carries its tag, the other pieces have no part in the loss. Words beyond
the longest length are neither trained nor scored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.features import IGNORED, Batch, Features, MeanLoss, RaggedRows, Scorer, Scores, TokenRows
from lorabbit_client.data.table import IntArray, LabelTable, Source, Table
from lorabbit_client.tasks.base import LearningTask, Records, max_tokens, pad_id

OUTSIDE = "O"


class TokenClassification(LearningTask):
    """Words, a tag each; BIO tags give entities."""

    name: ClassVar[str] = "token-classification"
    main_metric: ClassVar[str] = "f1"
    has_classes: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokens": ("tokens", "words"),
        "label": ("tags", "ner_tags", "labels", "pos_tags"),
    }

    def labels_from_examples(self, source: Source, column: str) -> tuple[str, ...]:
        """Return the tags that occur, those of no entity first."""
        tags = {str(tag) for table in source.tables for row in range(len(table)) for tag in _list(table, column, row)}
        return tuple(sorted(tags, key=lambda tag: (tag != OUTSIDE, tag)))

    def parse(self, table: Table, labels: tuple[str, ...], spec: DataSpec) -> Records:
        """Check that every row has as many tags as words, all of them known."""
        words, tags = self.column(table, "tokens", spec), self.column(table, "label", spec)
        known = LabelTable(labels)
        columns: dict[str, list[list[Any]]] = {"tokens": [], "label": []}
        for row in range(len(table)):
            one, other = _list(table, words, row), _list(table, tags, row)
            if len(one) != len(other):
                raise BadInput(f"{table.place(row)}: {len(one)} {words} but {len(other)} {tags}")
            if not all(isinstance(word, str) and word for word in one):
                raise BadInput(f"{table.place(row)}: field {words!r} holds something other than words")
            columns["tokens"].append(one)
            columns["label"].append([known.code(table, row, tag) for tag in other])
        return Records(columns, np.zeros(len(table), dtype=np.int64))

    def encode(self, records: Records, processor: Any, labels: tuple[str, ...], *, spec: DataSpec) -> Features:  # noqa: ANN401
        """Tokenize word by word and put each tag on its word's first piece."""
        if not len(records):
            return TaggedTokens(TokenRows({}, 0), RaggedRows([]), labels)
        encoded = _word_tokenizer(processor)(
            list(records.columns["tokens"]),
            is_split_into_words=True,
            truncation=True,
            max_length=max_tokens(processor, spec),
        )
        tags = (align(encoded.word_ids(row), of) for row, of in enumerate(records.columns["label"]))
        return TaggedTokens(TokenRows(encoded, pad_id(processor)), RaggedRows(tags), labels)


def _list(table: Table, column: str, row: int) -> list[Any]:
    value = table.value(column, row)
    if not isinstance(value, list | tuple | np.ndarray) or len(value) == 0:
        raise BadInput(f"{table.place(row)}: field {column!r} is not a list, or is an empty one")
    return list(value)


def align(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Return a label for each token from the word it belongs to: the tag on a word's first piece, else IGNORED."""
    before = (None, *words[:-1])
    return [
        IGNORED if word is None or word == previous else tags[word]
        for word, previous in zip(words, before, strict=True)
    ]


def _word_tokenizer(tokenizer: Any) -> Any:  # noqa: ANN401 - any fast tokenizer
    """Return a tokenizer that takes words: byte-level ones need `add_prefix_space`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadInput("model.name: token-classification needs a model with a fast tokenizer")
    if not hasattr(backend.pre_tokenizer, "add_prefix_space") or backend.pre_tokenizer.add_prefix_space:
        return tokenizer
    spaced = copy.deepcopy(tokenizer)
    pre_tokenizer = spaced.backend_tokenizer.pre_tokenizer
    pre_tokenizer.add_prefix_space = True
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizer
    spaced.add_prefix_space = True
    return spaced


class TaggedTokens(Features):
    """Token rows with a label for each token."""

    def __init__(self, tokens: TokenRows, tags: RaggedRows, labels: tuple[str, ...]) -> None:
        """Keep the rows."""
        self._tokens, self._tags, self._labels = tokens, tags, labels

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._tags)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row."""
        return self._tags.lengths

    def batch(self, rows: IntArray) -> Batch:
        """Return tokens and `labels`, one a token."""
        import torch  # noqa: PLC0415 - only where a model runs

        return {**self._tokens.batch(rows), "labels": torch.from_numpy(self._tags.padded(rows, IGNORED))}

    def units(self, batch: Batch) -> int:
        """Count the tokens with a label."""
        return int((batch["labels"] != IGNORED).sum())

    def scorer(self) -> Scorer:
        """Return entity F1 and token accuracy."""
        return TagScorer(self._labels)


class TagScorer:
    """Entity precision, recall and F1 by seqeval, and accuracy over words."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        """Keep the names of the tags."""
        self._labels = np.array(labels, dtype=object)
        self._loss = MeanLoss()
        self._expected: list[list[str]] = []
        self._predicted: list[list[str]] = []

    def add(self, rows: IntArray, batch: Batch, outputs: Mapping[str, Any]) -> None:  # noqa: ARG002 - rows tell nothing more
        """Take in the most likely tag of each word."""
        expected, predicted = batch["labels"].cpu().numpy(), outputs["logits"].argmax(-1).cpu().numpy()
        counted = expected != IGNORED
        self._loss.add(outputs, int(counted.sum()))
        self._expected += list(self._named(expected, counted))
        self._predicted += list(self._named(predicted, counted))

    def _named(self, codes: IntArray, counted: Any) -> Iterator[list[str]]:  # noqa: ANN401 - a mask
        return (self._labels[line[mask]].tolist() for line, mask in zip(codes, counted, strict=True))

    def result(self) -> Scores:
        """Return f1, precision, recall, accuracy; weighted by rows."""
        from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score  # noqa: PLC0415 - heavy

        if not self._expected:
            return Scores(0, None)
        given = (self._expected, self._predicted)
        values = {
            "f1": float(f1_score(*given, zero_division=0)),
            "precision": float(precision_score(*given, zero_division=0)),
            "recall": float(recall_score(*given, zero_division=0)),
            "accuracy": float(accuracy_score(*given)),
        }
        return Scores(len(self._expected), self._loss.value, values)

"""Windows of contexts, the best answer over them, and SQuAD's exact match and F1.

The two measures follow the official SQuAD evaluation script (Rajpurkar et al., 2016): answers are
compared without case, punctuation, articles and spacing; an example counts its best reference.

Extractive question answering: where in the context the answer stands (SQuAD's form and measures).

A context longer than the model takes is cut into overlapping windows; training sees each window
(an answer outside of it is at position 0), scoring takes the best span over all windows of an example.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.features import Batch, Features, MeanLoss, RaggedRows, Scorer, Scores, TokenRows
from lorabbit_client.data.table import IntArray, Source, Table
from lorabbit_client.tasks.base import LearningTask, Records, max_tokens, pad_id

LONGEST_ANSWER_TOKENS = 30
CONTEXT = 1
"""Sequence number of the context in a pair."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A text and its position in the context, in characters."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ContextWindow:
    """A question and a part of its context, in tokens."""

    example: int
    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    starts: NDArray[np.int32]
    """First character of each token in the context, -1 outside of it."""
    ends: NDArray[np.int32]
    """Character behind each token in the context, -1 outside of it."""


def windows_of(encoded: Any, first: int) -> Iterator[ContextWindow]:  # noqa: ANN401 - a tokenizer's BatchEncoding
    """Yield the windows of what a tokenizer returned for examples counted from `first`."""
    for row, example in enumerate(encoded["overflow_to_sample_mapping"]):
        ids = np.asarray(encoded["input_ids"][row], dtype=np.int32)
        types = encoded["token_type_ids"][row] if "token_type_ids" in encoded else np.zeros_like(ids)
        inside = np.array([sequence == CONTEXT for sequence in encoded.sequence_ids(row)])
        places = np.where(inside[:, None], np.asarray(encoded["offset_mapping"][row], dtype=np.int32), -1)
        yield ContextWindow(first + example, ids, np.asarray(types, dtype=np.int32), *places.T.astype(np.int32))


class Windows(Features):
    """Windows of (question, part of a context) with the answer's first and last token."""

    def __init__(
        self, windows: list[ContextWindow], contexts: list[str], answers: list[list[Answer]], *, pad: int
    ) -> None:
        """Keep the tokens, each token's place in the context, and what scoring needs."""
        self.contexts, self.answers = contexts, answers
        self._tokens = TokenRows(
            {"input_ids": [w.ids for w in windows], "token_type_ids": [w.types for w in windows]}, pad
        )
        self.starts, self.ends = RaggedRows(w.starts for w in windows), RaggedRows(w.ends for w in windows)
        self.example = np.array([w.example for w in windows], dtype=np.int64)
        spans = [self._tokens_of(row, answers[window.example]) for row, window in enumerate(windows)]
        self._spans = np.array(spans, dtype=np.int64).reshape(len(windows), 2)
        self._first = np.searchsorted(self.example, np.arange(len(contexts) + 1))

    def _tokens_of(self, row: int, answers: list[Answer]) -> tuple[int, int]:
        """Return the first and last token of the first answer in a window, (0, 0) where it is not wholly inside."""
        starts, ends = self.starts[row], self.ends[row]
        if not answers:
            return 0, 0
        held = np.flatnonzero((starts >= 0) & (ends > answers[0].start) & (starts < answers[0].end))
        if not len(held) or starts[held[0]] > answers[0].start or ends[held[-1]] < answers[0].end:
            return 0, 0
        return int(held[0]), int(held[-1])

    def __len__(self) -> int:
        """Count the windows."""
        return len(self.example)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each window."""
        return self._tokens.ids.lengths

    def rows_of(self, examples: IntArray) -> IntArray:
        """Return all windows of some examples."""
        parts = [np.arange(self._first[example], self._first[example + 1]) for example in examples]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def examples_of(self, rows: IntArray) -> IntArray:
        """Return the example that each window was cut from."""
        owners: IntArray = self.example[rows]
        return owners

    def batch(self, rows: IntArray) -> Batch:
        """Return tokens, `start_positions` and `end_positions`."""
        import torch  # noqa: PLC0415 - only where a model runs

        spans = torch.from_numpy(self._spans[rows])
        return {**self._tokens.batch(rows), "start_positions": spans[:, 0], "end_positions": spans[:, 1]}

    def scorer(self) -> Scorer:
        """Return exact match and F1."""
        return SpanScorer(self)


class SpanScorer:
    """Best span of each example over its windows."""

    def __init__(self, windows: Windows) -> None:
        """Keep the windows for their places, contexts and answers."""
        self._windows = windows
        self._loss = MeanLoss()
        self._best: dict[int, tuple[float, int, int]] = {}
        self._unanswered = any(not answers for answers in windows.answers)

    def add(self, rows: IntArray, batch: Batch, outputs: Mapping[str, Any]) -> None:  # noqa: ARG002 - rows say all
        """Take in the best span of each window."""
        self._loss.add(outputs, len(rows))
        starts, ends = (outputs[f"{end}_logits"].float().cpu().numpy() for end in ("start", "end"))
        for row, start, end in zip(rows, starts, ends, strict=True):
            example = int(self._windows.example[row])
            found = self._best_span(int(row), start, end)
            if example not in self._best or found[0] > self._best[example][0]:
                self._best[example] = found

    def _best_span(self, row: int, start: NDArray[np.float32], end: NDArray[np.float32]) -> tuple[float, int, int]:
        """Return (score, first character, end character); no characters where "no answer" scores best."""
        starts, ends = self._windows.starts[row], self._windows.ends[row]
        inside = np.flatnonzero(starts >= 0)
        if not len(inside):
            return -np.inf, 0, 0
        scores = start[inside][:, None] + end[inside][None, :]
        allowed = np.triu(np.ones_like(scores, dtype=bool)) & ~np.triu(
            np.ones_like(scores, dtype=bool), LONGEST_ANSWER_TOKENS
        )
        first, last = np.unravel_index(np.where(allowed, scores, -np.inf).argmax(), scores.shape)
        best = float(scores[first, last])
        if self._unanswered and float(start[0] + end[0]) > best:
            return float(start[0] + end[0]), 0, 0
        return best, int(starts[inside[first]]), int(ends[inside[last]])

    def result(self) -> Scores:
        """Return f1 and exact_match in 0..1, weighted by examples."""
        if not self._best:
            return Scores(0, None)
        pairs = [
            (self._windows.contexts[example][begin:end], [answer.text for answer in self._windows.answers[example]])
            for example, (_, begin, end) in self._best.items()
        ]
        values = {
            "f1": float(np.mean([best_of(f1, text, references) for text, references in pairs])),
            "exact_match": float(np.mean([best_of(exact, text, references) for text, references in pairs])),
        }
        return Scores(len(pairs), self._loss.value, values)


def normalized(text: str) -> list[str]:
    """Return an answer's words without case, punctuation and articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact(text: str, reference: str) -> float:
    """Return 1.0 for equal answers, else 0.0."""
    return float(normalized(text) == normalized(reference))


def f1(text: str, reference: str) -> float:
    """Return the F1 of the words that two answers share."""
    words, wanted = normalized(text), normalized(reference)
    if not words or not wanted:
        return float(words == wanted)
    shared = (Counter(words) & Counter(wanted)).total()
    return 2.0 * shared / (len(words) + len(wanted))


def best_of(measure: Any, text: str, references: Sequence[str]) -> float:  # noqa: ANN401 - exact or f1
    """Return a measure against the best reference; without references the right answer is an empty one."""
    return max((float(measure(text, reference)) for reference in references), default=float(not text))


STRIDE_SHARE = 0.25
"""Part of a window that it shares with the next."""
PORTION = 1000
"""Examples encoded at once: a tokenizer's own lists take a hundred bytes a token until they are compacted."""


class QuestionAnswering(LearningTask):
    """A question, a context, and one or more answers in the context."""

    name: ClassVar[str] = "question-answering"
    main_metric: ClassVar[str] = "f1"
    has_classes: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "question": ("question", "query"),
        "context": ("context", "passage", "document"),
        "answers": ("answers", "answer"),
    }

    def labels(self, source: Source, spec: DataSpec) -> tuple[str, ...]:  # noqa: ARG002 - there are none
        """Return nothing: answers are places, not labels."""
        return ()

    def parse(self, table: Table, labels: tuple[str, ...], spec: DataSpec) -> Records:  # noqa: ARG002
        """Check that every answer is in its context."""
        question, context, answers = (self.column(table, role, spec) for role in self.roles)
        columns: dict[str, list[Any]] = {
            "question": table.texts(question),
            "context": table.texts(context),
            "answers": [],
        }
        for row, text in enumerate(columns["context"]):
            columns["answers"].append(list(_answers(table, answers, row, context=text)))
        return Records(columns, np.zeros(len(table), dtype=np.int64))

    def encode(self, records: Records, processor: Any, labels: tuple[str, ...], *, spec: DataSpec) -> Features:  # noqa: ANN401, ARG002
        """Cut contexts into windows and find each answer's tokens."""
        length = max_tokens(processor, spec)
        rows = (records.columns["question"], records.columns["context"], records.columns["answers"])
        windows: list[ContextWindow] = []
        for start in range(0, len(records), PORTION):
            questions, contexts, _ = (list(column[start : start + PORTION]) for column in rows)
            encoded = processor(
                _truncate_questions(questions, processor, length // 2),
                contexts,
                truncation="only_second",
                max_length=length,
                stride=int(length * STRIDE_SHARE),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            windows += windows_of(encoded, start)
        return Windows(windows, list(rows[1]), list(rows[2]), pad=pad_id(processor))


def _answers(table: Table, column: str, row: int, *, context: str) -> Iterator[Answer]:
    """Yield the answers of a row: SQuAD's two lists, a list of objects, one object or a plain text.

    An offset that does not lead to the text is replaced by the text's nearest occurrence: published
    sets have some that are off. No answers at all means that the context holds none.
    """
    given = table.value(column, row)
    if isinstance(given, Mapping):
        texts, starts = given.get("text", ()), given.get("answer_start")
        texts = [texts] if isinstance(texts, str) else list(texts)
        starts = [starts] if isinstance(starts, int) else list(starts or [])
    else:
        items = [{"text": given}] if isinstance(given, str) else list(given)
        texts = [item["text"] if isinstance(item, Mapping) else item for item in items]
        starts = [item.get("answer_start", 0) for item in items if isinstance(item, Mapping)]
    starts += [0] * (len(texts) - len(starts))
    for text, start in zip(texts, starts, strict=False):
        place = _nearest(context, text, start) if isinstance(text, str) and text.strip() else None
        if place is None:
            raise BadInput(f"{table.place(row)}: answer {text!r} does not stand in the context")
        yield Answer(text, place + len(text) - len(text.lstrip()), place + len(text.rstrip()))


def _nearest(context: str, text: str, start: int) -> int | None:
    """Return the occurrence of a text that is nearest to `start`."""
    before, after = context.rfind(text, 0, start + len(text)), context.find(text, start)
    found = [place for place in (before, after) if place >= 0]
    return min(found, key=lambda place: abs(place - start)) if found else None


def _truncate_questions(questions: list[str], tokenizer: Any, most: int) -> list[str]:  # noqa: ANN401 - any tokenizer
    """Cut questions that would leave no room for the context."""
    encoded = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=most, return_offsets_mapping=True
    )
    ends = (offsets[-1][1] if len(offsets) == most else None for offsets in encoded["offset_mapping"])
    return [question[:end] for question, end in zip(questions, ends, strict=True)]

"""Extractive question answering: where in the context the answer stands (SQuAD's form and measures).

A context longer than the model takes is cut into overlapping windows; training sees each window
(an answer outside of it is at position 0), scoring takes the best span over all windows of an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from lorabbit.errors import BadInput
from lorabbit.jobspec import DataSpec
from lorabbit_client.features import Features
from lorabbit_client.tables import Source, Table
from lorabbit_client.tasks.base import LearningTask, Records, longest, pad_id
from lorabbit_client.tasks.spans import Answer, Window, Windows, windows_of

STRIDE_SHARE = 0.25
"""Part of a window that it shares with the next."""
PORTION = 1000
"""Examples encoded at once: a tokenizer's own lists take a hundred bytes a token until they are compacted."""


class QuestionAnswering(LearningTask):
    """A question, a context, and one or more answers that stand in the context."""

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
        """Check that every answer stands in its context."""
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
        length = longest(processor, spec)
        rows = (records.columns["question"], records.columns["context"], records.columns["answers"])
        windows: list[Window] = []
        for start in range(0, len(records), PORTION):
            questions, contexts, _ = (list(column[start : start + PORTION]) for column in rows)
            encoded = processor(
                _cut_questions(questions, processor, length // 2),
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


def _cut_questions(questions: list[str], tokenizer: Any, most: int) -> list[str]:  # noqa: ANN401 - any tokenizer
    """Cut questions that would leave no room for the context."""
    encoded = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=most, return_offsets_mapping=True
    )
    ends = (offsets[-1][1] if len(offsets) == most else None for offsets in encoded["offset_mapping"])
    return [question[:end] for question, end in zip(questions, ends, strict=True)]

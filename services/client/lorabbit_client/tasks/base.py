"""A learning task: how rows become examples, examples tensors, and outputs scores.

`parse` checks rows and names what is wrong with file and line; it needs no model, so a job can be
validated without one. `encode` does the model-specific part once, before any training.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lorabbit.errors import BadInput
from lorabbit.job.spec import DataSpec
from lorabbit_client.data.features import Features
from lorabbit_client.data.table import Column, IntArray, Source, Table, find_labels


@dataclass(frozen=True, slots=True)
class Records:
    """Checked examples of one split, not yet encoded."""

    columns: Mapping[str, Column]
    """Role (text, label, ...) to values."""
    classes: IntArray
    """Class of each example for partitioners and label counts; all zero where the task has none."""

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.classes)

    def take(self, rows: IntArray) -> Records:
        """Return some examples, in the order of `rows`."""
        columns = {
            role: values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
            for role, values in self.columns.items()
        }
        return Records(columns, self.classes[rows])


class LearningTask(ABC):
    """One of the tasks that a job's `model.task` names."""

    name: ClassVar[str]
    main_metric: ClassVar[str]
    """Picks `best/` unless the job names another."""
    roles: ClassVar[Mapping[str, tuple[str, ...]]]
    """Role to the field names that are tried for it, in order."""
    has_classes: ClassVar[bool] = True
    """Whether an example has one class, by which it can be partitioned."""

    def labels(self, source: Source, spec: DataSpec) -> tuple[str, ...]:
        """Return the label table: the job's, the source's, or as found in the examples; empty for no labels.

        Raises BadInput where clients that own their data could each find another table.
        """
        column = self.column(source.train, "label", spec)
        declared_labels = spec.labels or source.declared_labels(column)
        if declared_labels is None and spec.partition.kind == "own":
            raise BadInput(
                f"data.labels: every client reads its own data, so the job must name the labels of field {column!r}"
            )
        return declared_labels or self.labels_from_examples(source, column)

    def labels_from_examples(self, source: Source, column: str) -> tuple[str, ...]:
        """Return the labels that occur in a field."""
        return find_labels(source.tables, column)

    @abstractmethod
    def parse(self, table: Table, labels: tuple[str, ...], spec: DataSpec) -> Records:
        """Check a table's rows; raises BadInput naming file and line of the first bad one."""

    @abstractmethod
    def encode(self, records: Records, processor: Any, labels: tuple[str, ...], *, spec: DataSpec) -> Features:  # noqa: ANN401 - a tokenizer, or an ImageFormat
        """Encode examples for the model whose tokenizer (or image format) is given."""

    def check(self, spec: DataSpec) -> None:
        """Raise BadInput when the job names a role that this task does not have."""
        for role in spec.fields:
            if role not in self.roles:
                raise BadInput(f"data.fields: {self.name} has no role {role!r}; it has {', '.join(self.roles)}")

    def column(self, table: Table, role: str, spec: DataSpec) -> str:
        """Return the field that plays a role."""
        return table.column(role, self.roles[role], spec.fields)


def max_tokens(tokenizer: Any, spec: DataSpec) -> int:  # noqa: ANN401 - any tokenizer
    """Return the length at which texts are cut: the job's, or less where the model takes less."""
    return min(spec.max_length, int(tokenizer.model_max_length))


def first_words(texts: Iterable[str], words: int) -> list[str]:
    """Cut texts after twice so many words, because a tokenizer reads a whole text before it cuts it.

    A word is a token or more, so what is left out would have been cut off anyway.
    """
    beginning = re.compile(rf"\s*+(?:\S++\s++){{{2 * words}}}")
    cuts = ((text, beginning.match(text)) for text in texts)
    return [text if found is None else text[: found.end()] for text, found in cuts]


def pad_id(tokenizer: Any) -> int:  # noqa: ANN401 - any tokenizer
    """Return the padding id; 0 without one, since padding is masked."""
    return int(tokenizer.pad_token_id or 0)

"""Rows as a source gave them, before any task has looked at them.

A table remembers where each row stood, so that whatever is wrong with a row can be said with file
and line, and what is wrong with a field with the fields that exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lorabbit.errors import BadInput

Column: TypeAlias = "Sequence[Any] | NDArray[Any]"
IntArray: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length; None stands for a field that a row lacks."""

    name: str
    """What it is called in messages, for example ``data file train.jsonl``."""
    columns: Mapping[str, Column]
    lines: Sequence[int] | None = None
    """1-based line of each row where the table came from a file with lines."""

    def __len__(self) -> int:
        """Count the rows."""
        return next((len(column) for column in self.columns.values()), 0)

    def place(self, row: int) -> str:
        """Say where a row stands."""
        return f"{self.name}, row {row + 1}" if self.lines is None else f"{self.name}, line {self.lines[row]}"

    def take(self, rows: IntArray) -> Table:
        """Return the table of some rows, in their order."""
        columns = {
            name: column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows]
            for name, column in self.columns.items()
        }
        return Table(self.name, columns, None if self.lines is None else [self.lines[row] for row in rows])

    def find(self, role: str, candidates: Sequence[str], given: Mapping[str, str]) -> str | None:
        """Return the column that plays a role: the one given, else the first candidate that exists.

        Raises BadInput when a given column does not exist.
        """
        if role in given:
            if given[role] not in self.columns:
                raise BadInput(f"data.fields.{role}: {self.name} has no field {given[role]!r}; it has {self._names()}")
            return given[role]
        return next((name for name in candidates if name in self.columns), None)

    def column(self, role: str, candidates: Sequence[str], given: Mapping[str, str]) -> str:
        """Return the column that plays a role; raises BadInput with the fields that exist when none does."""
        found = self.find(role, candidates, given)
        if found is None:
            raise BadInput(
                f"{self.name} has no field {candidates[0]!r}; it has {self._names()}"
                f" (say which one it is with data.fields: {{{role}: ...}})"
            )
        return found

    def value(self, column: str, row: int) -> Any:  # noqa: ANN401 - whatever the file held
        """Return one value; raises BadInput when the row lacks it."""
        value = self.columns[column][row]
        if value is None:
            present = ", ".join(name for name, values in self.columns.items() if values[row] is not None)
            raise BadInput(f"{self.place(row)}: field {column!r} is missing; the row has {present or 'nothing'}")
        return value

    def text(self, column: str, row: int) -> str:
        """Return one non-empty text; raises BadInput when it is missing, empty or no text."""
        value = self.value(column, row)
        if not isinstance(value, str):
            raise BadInput(f"{self.place(row)}: field {column!r} holds {_shown(value)}, expected a text")
        if not value.strip():
            raise BadInput(f"{self.place(row)}: field {column!r} is empty")
        return value

    def texts(self, column: str) -> list[str]:
        """Return a column of non-empty texts."""
        return [self.text(column, row) for row in range(len(self))]

    def _names(self) -> str:
        return ", ".join(self.columns) or "no fields"


@dataclass(frozen=True, slots=True)
class Source:
    """What a data source holds."""

    train: Table
    test: Table | None = None
    """The source's own test split, when it has one."""
    label_names: tuple[str, ...] | None = None
    """The label table, when the source states it."""
    names_by_field: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The label table of single fields, when the source states them by field."""
    group: str | None = None
    """Field of the natural groups, when the source knows one."""

    @property
    def tables(self) -> tuple[Table, ...]:
        """Both splits, or the one there is."""
        return (self.train,) if self.test is None else (self.train, self.test)

    def declared_labels(self, column: str) -> tuple[str, ...] | None:
        """Return the label table of a field where it is stated."""
        return self.names_by_field.get(column) or self.label_names


def find_labels(tables: Sequence[Table], column: str) -> tuple[str, ...]:
    """Return the distinct labels of some tables: numbers in their order, names sorted."""
    found: set[Any] = set()
    for table in tables:
        found.update(_plain(table.value(column, row)) for row in range(len(table)))
    if all(isinstance(value, int) for value in found):
        return tuple(str(value) for value in sorted(found))
    return tuple(sorted(str(value) for value in found))


class LabelTable:
    """Names of the labels, in the order of their codes."""

    def __init__(self, names: Sequence[str]) -> None:
        """Index the names."""
        self._codes = {name: code for code, name in enumerate(names)}
        self._numeric = all(_is_number(name) for name in names)

    def code(self, table: Table, row: int, value: Any) -> int:  # noqa: ANN401 - from a file
        """Return the code of one label, given by name or, where names are no numbers, by code.

        Raises BadInput naming the row of a label that is not in the table.
        """
        plain = _plain(value)
        for name in (str(value), str(plain)):
            if name in self._codes:
                return self._codes[name]
        if isinstance(plain, int) and not self._numeric and 0 <= plain < len(self._codes):
            return plain
        shown = ", ".join(list(self._codes)[:12]) + (", ..." if len(self._codes) > 12 else "")  # noqa: PLR2004
        raise BadInput(f"{table.place(row)}: label {_shown(value)} is not in the label table ({shown})")

    def codes(self, table: Table, column: str) -> IntArray:
        """Return the code of each row's label."""
        values = (self.code(table, row, table.value(column, row)) for row in range(len(table)))
        return np.fromiter(values, dtype=np.int64, count=len(table))


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit()


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever the file held
    """Turn NumPy scalars, booleans, whole floats and numbers written as text (CSV) into plain integers."""
    whole = isinstance(value, float) and value.is_integer()
    if whole or isinstance(value, bool | np.integer | np.bool_) or (isinstance(value, str) and _is_number(value)):
        return int(value)
    return value


def _shown(value: Any) -> str:  # noqa: ANN401 - whatever the file held
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 - one glance

"""Encoded rows: compact NumPy arrays made once, turned into padded torch tensors batch by batch.

A hundred clients of one process share these arrays through index arrays, and forked processes share
their pages; so nothing here holds a Python object per token, an Arrow table or an open file.

Readers: a tokenizer or image format, equal to another one that encodes alike.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lorabbit_client.data.table import IntArray

if TYPE_CHECKING:
    import torch

Row: TypeAlias = "Sequence[int] | NDArray[np.int32]"
Batch: TypeAlias = "dict[str, torch.Tensor]"
IGNORED = -100
"""Label of a token that has no part in the loss."""


class RaggedRows:
    """Rows of integers of unlike length, in one flat array."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Copy the rows into int32."""
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        self.values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        self.offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays], dtype=np.int64)])

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        """Return one row, unpadded."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> IntArray:
        """Length of each row."""
        return np.diff(self.offsets)

    def padded(self, rows: IntArray, fill: int) -> IntArray:
        """Return rows as one array, padded on the right with `fill` to the longest of them."""
        parts = [self[int(row)] for row in rows]
        block = np.full((len(parts), max((len(part) for part in parts), default=0)), fill, dtype=np.int64)
        for line, part in zip(block, parts, strict=True):
            line[: len(part)] = part
        return block


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model reached on some examples."""

    num_examples: int
    """Weight with which loss and values are pooled over clients: examples, or target tokens of a language model."""
    loss: float | None
    values: Mapping[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """Gathers predictions batch by batch."""

    def add(self, rows: IntArray, batch: Batch, outputs: Mapping[str, Any]) -> None:
        """Take in a batch: its rows, its tensors, and the model's outputs (`loss`, `logits`, ...) on any device."""

    def result(self) -> Scores:
        """Return the scores of everything added; no examples give no loss and no values."""


class Features(ABC):
    """Encoded rows of one split."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the rows; a long text may have several."""

    @property
    @abstractmethod
    def lengths(self) -> IntArray:
        """Size of each row (tokens), for batches of rows of like length."""

    @abstractmethod
    def batch(self, rows: IntArray) -> Batch:
        """Return rows as the model's keyword arguments, labels among them."""

    @abstractmethod
    def scorer(self) -> Scorer:
        """Return a scorer for batches of these rows."""

    def units(self, batch: Batch) -> int:
        """Count what the model's mean loss of a batch is a mean over: its rows, or labeled tokens."""
        return len(next(iter(batch.values())))

    def rows_of(self, examples: IntArray) -> IntArray:
        """Return the rows of some examples; the same numbers where every example has one row."""
        return examples

    def examples_of(self, rows: IntArray) -> IntArray:
        """Return the example that each row belongs to; rows of one example are contiguous."""
        return rows


class TokenRows:
    """Token ids of each row, with the tokenizer's other outputs."""

    def __init__(self, encoded: Mapping[str, Sequence[Row]], pad: int) -> None:
        """Keep `input_ids`, and `token_type_ids` where they are not all zero."""
        self.ids = RaggedRows(encoded.get("input_ids", ()))
        types = encoded.get("token_type_ids")
        self.types = RaggedRows(types) if types is not None and any(np.any(row) for row in types) else None
        self.pad = pad

    def batch(self, rows: IntArray) -> Batch:
        """Return input_ids, attention_mask and, where they matter, token_type_ids."""
        import torch  # noqa: PLC0415 - only where a model runs

        ids = self.ids.padded(rows, self.pad)
        mask = np.arange(ids.shape[1])[None, :] < self.ids.lengths[rows][:, None]
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self.types is not None:
            batch["token_type_ids"] = torch.from_numpy(self.types.padded(rows, 0))
        return batch


class MeanLoss:
    """Mean loss over units (rows or tokens), from means over batches."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.units = 0
        self._total = 0.0

    def add(self, outputs: Mapping[str, Any], units: int) -> None:
        """Take in a batch's mean loss over its units."""
        if units:
            self.units += units
            self._total += float(outputs["loss"]) * units

    @property
    def value(self) -> float | None:
        """The mean, None before anything was added."""
        return self._total / self.units if self.units else None


@dataclass(frozen=True)
class ProcessorKey:
    """Hashable key of a tokenizer or image processor, equal if it encodes alike."""

    fingerprint: str
    processor: Any = field(compare=False)

    @classmethod
    def of(cls, processor: Any) -> ProcessorKey:  # noqa: ANN401 - a tokenizer, or an ImageFormat
        """Wrap a tokenizer or an ImageFormat."""
        return cls(_fingerprint(processor), processor)


_FINGERPRINTS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _fingerprint(processor: Any) -> str:  # noqa: ANN401 - a tokenizer, or an ImageFormat
    """Hash all that decides how a processor encodes."""
    known = _FINGERPRINTS.get(processor)
    if known is None:
        backend = getattr(processor, "backend_tokenizer", None)
        state = (
            repr(processor),
            "" if backend is None else backend.to_str(),
            str(getattr(processor, "chat_template", "")),
        )
        known = _FINGERPRINTS[processor] = hashlib.sha256("\x1f".join(state).encode()).hexdigest()
    return known

"""Lossy codecs: one tensor's changes, flat in float32, to a few arrays and back.

Every step is one correctly rounded operation of IEEE 754 or one on whole numbers, so the same bytes give the
same values on every machine. With d the changes of a block and s its scale, a number of eight bits:

    int8   s = up(max|d| / 127),  q = round(d / s) in -127 .. 127,   |d - s q| <= s / 2
    int4   s = up(max|d| / 7),    q = round(d / s) in   -7 .. 7,     |d - s q| <= s / 2
    bf16   v = d rounded to eight bits,                              |d - v| <= 2^-8 |d| above 2^-126
    top-k  the k = ceil(share n) values of largest size, the first of equals, and where they stand;
           the others are zero

`up` rounds to the next larger number of eight bits, so a scale is less than 2^-7 of itself too large. What is
smaller than 2^-100 counts as zero: some processors are told to flush the smallest numbers, and must agree with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lorabbit.errors import BadInput, CorruptPayload, Refused
from lorabbit.job.spec import TOP_K, CompressionSpec
from lorabbit.types import Array

Floats = NDArray[np.float32]
Layout = tuple[tuple[np.dtype[np.generic], int], ...]
"""Element type and number of elements of each array that a codec writes."""

SCALE = np.dtype(ml_dtypes.bfloat16)
BYTE, SMALL, PLACE, SINGLE = np.dtype(np.uint8), np.dtype(np.int8), np.dtype("<u4"), np.dtype("<f4")
LEVELS = {"int8": 127, "int4": 7}
ZERO_NIBBLE = 8
LEAST = np.float32(2.0**-100)
ROUNDING = 1e-9
"""A share times a number of values may lie this much above a whole number."""


class Lossy(Protocol):
    """One codec; what it writes follows in number and type from the number of values alone."""

    def layout(self, count: int) -> Layout:
        """Arrays that so many values become."""

    def encode(self, values: Floats) -> tuple[Array, ...]:
        """Write values; raises BadInput where there are too many."""

    def decode(self, arrays: Sequence[Array], count: int) -> Floats:
        """Read them; raises CorruptPayload, and Refused for scales that are no numbers."""


def lossy(coding: CompressionSpec) -> Lossy:
    """The codec that a coding names."""
    if coding.codec == TOP_K:
        return TopK(coding.share)
    return Blocks(coding.codec, coding.block) if coding.codec in LEVELS else Rounded()


def flushed(values: Floats, least: np.float32 = LEAST) -> Floats:
    """The same with zero for what is smaller."""
    kept: Floats = np.where(np.abs(values) < least, np.float32(0), values)
    return kept


class Rounded:
    """bf16: every value by itself, to the nearest, ties to even."""

    def layout(self, count: int) -> Layout:
        """One array."""
        return ((SCALE, count),)

    def encode(self, values: Floats) -> tuple[Array, ...]:
        """Round."""
        with np.errstate(over="ignore"):
            return (values.astype(SCALE),)

    def decode(self, arrays: Sequence[Array], count: int) -> Floats:  # noqa: ARG002 - the array has it
        """Widen, which is exact."""
        return arrays[0].astype(np.float32)


@dataclass(frozen=True, slots=True)
class Blocks:
    """int8 and int4: whole numbers and a scale for every block of values."""

    codec: str
    block: int

    def layout(self, count: int) -> Layout:
        """Scales, then numbers; of int4 two to a byte, the first in the lower half."""
        numbers = (SMALL, count) if self.codec == "int8" else (BYTE, -(-count // 2))
        return (SCALE, -(-count // self.block)), numbers

    def encode(self, values: Floats) -> tuple[Array, ...]:
        """Scale and round; a block with a value that is no number gets a scale that is none."""
        levels, count = LEVELS[self.codec], values.size
        padded = np.zeros(-(-count // self.block) * self.block, np.float32)
        padded[:count] = values
        blocks = padded.reshape(-1, self.block)
        scales = _up(np.abs(blocks).max(axis=1, initial=0.0) / np.float32(levels))
        wide = scales.astype(np.float32)[:, None]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            found = np.rint(blocks / wide)
        found = np.clip(np.where(np.isfinite(found), found, np.float32(0)), -levels, levels)
        numbers = found.astype(np.int8).reshape(-1)[:count]
        return scales, numbers if self.codec == "int8" else _halves(numbers)

    def decode(self, arrays: Sequence[Array], count: int) -> Floats:
        """Multiply."""
        scales, wide = arrays[0].astype(np.float32), np.zeros(-(-count // self.block) * self.block, np.float32)
        if not bool(np.isfinite(scales).all()):
            raise Refused("not-finite", "a block's scale is no number")
        if bool(np.signbit(scales).any()):
            raise CorruptPayload("a block's scale is negative")
        numbers = arrays[1] if self.codec == "int8" else _whole(arrays[1], count)
        if numbers.size and int(numbers.min()) < -LEVELS[self.codec]:
            raise CorruptPayload(f"a value lies outside the levels of {self.codec}")
        wide[:count] = numbers
        blocks = wide.reshape(-1, self.block)
        with np.errstate(over="ignore"):
            blocks *= scales[:, None]
        return wide[:count]


@dataclass(frozen=True, slots=True)
class TopK:
    """top-k: the largest values, each with its distance from the one before."""

    share: float

    def kept(self, count: int) -> int:
        """Number of values that are sent, at least one."""
        return min(count, max(1, math.ceil(self.share * count - ROUNDING)))

    def layout(self, count: int) -> Layout:
        """Places, the first as it is and each other as its distance, then values."""
        return (PLACE, self.kept(count)), (SINGLE, self.kept(count))

    def encode(self, values: Floats) -> tuple[Array, ...]:
        """Choose; what is no number counts as largest, so that whoever checks meets it."""
        if values.size > np.iinfo(PLACE).max:
            raise BadInput(f"transport.up.codec: a tensor of {values.size} values has too many for top-k; choose int8")
        kept = self.kept(values.size)
        sizes = np.abs(values)
        sizes[np.isnan(sizes)] = np.inf
        least = np.partition(sizes, values.size - kept)[values.size - kept] if values.size else np.float32(0)
        places = np.flatnonzero(sizes > least)
        ties = np.flatnonzero(sizes == least)[: kept - places.size]
        places = np.sort(np.concatenate([places, ties]))
        return np.diff(places, prepend=0).astype(PLACE), values[places]

    def decode(self, arrays: Sequence[Array], count: int) -> Floats:
        """Put each value where it stood; refuse places out of order or range."""
        places = np.cumsum(arrays[0], dtype=np.uint64)
        if places.size and (int(places[-1]) >= count or bool((arrays[0][1:] == 0).any())):
            raise CorruptPayload(f"the places of values are not {places.size} different ones below {count}")
        wide = np.zeros(count, np.float32)
        wide[places] = arrays[1]
        return wide


def _up(scales: Floats) -> Array:
    """The next number of eight bits that is not smaller; what is not finite becomes no number."""
    bits = scales.view(np.uint32).astype(np.uint64) + 0xFFFF
    raised = (bits >> 16).astype(np.uint16).view(SCALE)
    found: Array = np.where(np.isfinite(scales), raised, SCALE.type(np.nan))
    return found


def _halves(numbers: NDArray[np.int8]) -> Array:
    """Two numbers to a byte; a last one alone has zero beside it."""
    shifted = np.full(numbers.size + numbers.size % 2, ZERO_NIBBLE, np.uint8)
    shifted[: numbers.size] = numbers + ZERO_NIBBLE
    packed: Array = shifted[0::2] | (shifted[1::2] << 4)
    return packed


def _whole(packed: Array, count: int) -> NDArray[np.int8]:
    """Take bytes apart; what nobody writes is corrupt."""
    both = np.empty(2 * packed.size, np.uint8)
    both[0::2] = np.bitwise_and(packed, 0xF, dtype=np.uint8)
    both[1::2] = np.right_shift(packed, 4, dtype=np.uint8)
    if bool((both[count:] != ZERO_NIBBLE).any()):
        raise CorruptPayload("there is something beside the last value")
    return both[:count].astype(np.int8) - np.int8(ZERO_NIBBLE)

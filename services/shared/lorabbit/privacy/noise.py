"""Gaussian noise from the operating system's random bytes."""

from __future__ import annotations

import math
import os

import numpy as np

from lorabbit.lora import Matrix

SUMMED = 4
"""Draws that are added for one value, so that nobody can tell it from the gaps between floats (arXiv 2107.10138)."""
_BITS = 53


def normal(shape: tuple[int, ...], deviation: float, seed: int | None = None) -> Matrix:
    """Draw independent N(0, deviation^2) values, float64.

    Without a seed every bit comes from the operating system's generator, as privacy needs it. With a seed the values
    are the same every time and give no privacy at all.
    """
    if seed is not None:
        return deviation * np.random.default_rng(seed).standard_normal(shape)
    count = math.prod(shape)
    total = np.zeros(count)
    for _ in range(SUMMED):
        total += _box_muller(count)
    return (deviation / math.sqrt(SUMMED) * total).reshape(shape)


def _box_muller(count: int) -> Matrix:
    """Standard normal values from uniform ones."""
    raw = np.frombuffer(os.urandom(16 * count), dtype="<u8").reshape(2, count) >> (64 - _BITS)
    first, second = (raw + 0.5) * 2.0**-_BITS
    values: Matrix = np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * math.pi * second)
    return values

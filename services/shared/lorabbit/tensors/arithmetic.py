"""Arithmetic on named tensors.

Sums are taken in float64 and in the order given, then cast back: the same inputs in the same
order give the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from lorabbit.errors import Refused
from lorabbit.types import Array, Tensors


def is_floating(array: Array) -> bool:
    """Tell whether an array holds real numbers, bfloat16 included."""
    return array.dtype.kind == "f" or array.dtype.name in {"bfloat16", "float8_e4m3fn", "float8_e5m2"}


def weighted_mean(weighted: Iterable[tuple[float, Tensors]]) -> dict[str, Array]:
    """Average named tensors, holding one accumulator and one element of the stream at a time.

    Weights need not sum to one. Integer tensors keep the element-wise maximum (step counters).
    Raises `Refused` ("names") when two elements do not hold the same names, and ValueError when
    the stream is empty or the weights sum to zero.
    """
    total = 0.0
    sums: dict[str, NDArray[np.float64]] = {}
    largest: dict[str, Array] = {}
    dtypes: dict[str, np.dtype[np.generic]] = {}
    for weight, tensors in weighted:
        if dtypes and tensors.keys() != dtypes.keys():
            raise Refused("names", "updates of one round hold different tensors")
        total += weight
        for name, value in tensors.items():
            dtypes.setdefault(name, value.dtype)
            if is_floating(value):
                _add(sums, name, value, weight)
            else:
                largest[name] = np.maximum(largest[name], value) if name in largest else value.copy()
    if not dtypes or total <= 0.0:
        raise ValueError("a weighted mean needs at least one element of positive weight")
    return {
        name: (sums.pop(name) / total).astype(dtype) if name in sums else largest[name]
        for name, dtype in dtypes.items()
    }


def _add(sums: dict[str, NDArray[np.float64]], name: str, value: Array, weight: float) -> None:
    """Add one weighted tensor to its accumulator, in place where there is one."""
    term = value.astype(np.float64)
    term *= weight
    if name in sums:
        sums[name] += term
    else:
        sums[name] = term


def subset(tensors: Tensors, names: Iterable[str]) -> dict[str, Array]:
    """Pick named tensors, in the order of `names`."""
    return {name: tensors[name] for name in names}


def squared_norm(tensors: Tensors) -> float:
    """Sum of squares over every floating-point tensor, in float64."""
    return float(sum(np.sum(np.square(v.astype(np.float64))) for v in tensors.values() if is_floating(v)))


def size_bytes(tensors: Tensors) -> int:
    """Bytes of the raw data, without any header."""
    return sum(int(v.nbytes) for v in tensors.values())


def count(tensors: Mapping[str, Array]) -> int:
    """Number of scalars."""
    return sum(int(v.size) for v in tensors.values())

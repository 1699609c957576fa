"""Admission: what an update must be before it may count.

Every refusal has a short name that is counted in the report. The order of the checks is that of
their price: the offer's numbers first, then the file's header, then every value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorabbit import codec
from lorabbit.errors import CorruptPayload, Refused
from lorabbit.messages import PayloadRef
from lorabbit.tensors import is_floating
from lorabbit.types import Tensors

HEADER_BYTES = 2**20
"""Room for the header of a safetensors file."""
MAX_CHUNKS = 2**16
"""Of a payload: their indices fit into one grant, and into memory."""
MAX_CHUNK_BYTES = 15 * 2**20
"""A chunk must fit into RabbitMQ's default of 16 MiB a message."""


@dataclass(frozen=True, slots=True)
class Template:
    """What every update of a job looks like: shape and dtype by name."""

    shapes: Mapping[str, tuple[tuple[int, ...], str]]
    size_bytes: int
    parameters: int = 0

    @property
    def is_empty(self) -> bool:
        """Tell whether an update carries no tensors at all."""
        return not self.shapes

    @classmethod
    def of(cls, tensors: Tensors) -> Template:
        """Describe tensors."""
        shapes = {}
        size = parameters = 0
        for name in tensors:
            dtype, shape = _describe(tensors, name)
            shapes[name] = (shape, dtype.name)
            parameters += math.prod(shape)
            size += math.prod(shape) * dtype.itemsize
        return cls(shapes, size, parameters)


def _describe(tensors: Tensors, name: str) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    """Element type and shape, read from the header where the tensors are a file."""
    if isinstance(tensors, codec.FileTensors):
        return tensors.describe(name)
    value = tensors[name]
    return value.dtype, value.shape


def check_offer(payload: PayloadRef, template: Template | None, *, max_bytes: int) -> None:
    """Refuse a payload that is too large to be what was asked for, before a byte of it moves."""
    limit = max_bytes if template is None else min(max_bytes, template.size_bytes + HEADER_BYTES)
    if payload.size_bytes > limit:
        raise Refused("too-large", f"it has {payload.size_bytes} bytes; at most {limit} are expected")
    if payload.chunk_bytes > MAX_CHUNK_BYTES:
        raise Refused("too-large", f"chunks of {payload.chunk_bytes} bytes do not fit through a broker")
    if payload.chunks > MAX_CHUNKS:
        raise Refused("too-large", f"{payload.chunks} chunks are more than {MAX_CHUNKS}; cut it into larger ones")


def check_update(path: Path, template: Template | None, *, may_be_empty: bool = False) -> None:
    """Refuse a file whose tensors are not those that the template names, or not all finite.

    `may_be_empty`: a file without a tensor passes, as the first adapter of clients with models of their own.
    """
    try:
        tensors = codec.read_tensors(path)
        if template is not None:
            _check_names(tensors, template)
        for name in tensors:
            _check_tensor(name, tensors, template)
    except CorruptPayload as error:
        raise Refused("corrupt", str(error)) from error
    if not tensors and not may_be_empty:
        raise Refused("names", "it holds no tensor")


def _check_names(tensors: Tensors, template: Template) -> None:
    """Refuse missing and unknown names."""
    missing = sorted(template.shapes.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - template.shapes.keys())
    if missing or unknown:
        first = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0][: codec.SHOWN]!r}"
        raise Refused("names", f"it {first} ({len(missing)} missing, {len(unknown)} unknown)")


def _check_tensor(name: str, tensors: Tensors, template: Template | None) -> None:
    """Refuse one tensor of the wrong shape or dtype, or with a value that is not finite."""
    dtype, shape = _describe(tensors, name)
    if template is not None:
        right_shape, right_dtype = template.shapes[name]
        if shape != right_shape:
            raise Refused("shape", f"{name!r} has shape {list(shape)}, not {list(right_shape)}")
        if dtype.name != right_dtype:
            raise Refused("dtype", f"{name!r} is {dtype.name}, not {right_dtype}")
    value = tensors[name]
    if is_floating(value) and not bool(np.isfinite(value).all()):
        raise Refused("not-finite", f"{name[: codec.SHOWN]!r} holds NaN or infinity")

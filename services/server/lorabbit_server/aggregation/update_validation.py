"""Validation of updates: what an offer and its tensors must be before the update may count.

Every refusal has a short name that is counted in the report. The order of the checks is that of
their price: the offer's numbers first, then the file's header, then every value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lorabbit.compression import compressed_file
from lorabbit.errors import SHOWN, CorruptPayload, Refused
from lorabbit.job.spec import CompressionSpec
from lorabbit.protocol.messages import PayloadRef
from lorabbit.tensors import serialization
from lorabbit.tensors.arithmetic import is_floating
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import Array, Tensors

HEADER_BYTES = 2**20
"""Room for the header of a safetensors file."""
FAR_OUT = 1e6
"""An update whose largest value is so many times 1, and that of what it started from, was not trained."""
MAX_CHUNKS = 2**16
"""Of a payload: their indices fit into one grant, and into memory."""
MAX_CHUNK_BYTES = 15 * 2**20
"""A chunk must fit into RabbitMQ's default of 16 MiB a message."""


@dataclass(frozen=True, slots=True)
class UpdateTemplate:
    """What every update of a job looks like: shape and dtype by name."""

    shapes: Mapping[str, tuple[tuple[int, ...], str]]
    size_bytes: int
    parameters: int = 0
    start: Tensors = field(default_factory=dict, repr=False, compare=False)
    """What the shapes were taken from: the tensors that the update started from."""

    @property
    def is_empty(self) -> bool:
        """Tell whether an update carries no tensors at all."""
        return not self.shapes

    @classmethod
    def of(cls, tensors: Tensors) -> UpdateTemplate:
        """Describe tensors."""
        shapes = {}
        size = parameters = 0
        for name in tensors:
            dtype, shape = serialization.describe(tensors, name)
            shapes[name] = (shape, dtype.name)
            parameters += math.prod(shape)
            size += math.prod(shape) * dtype.itemsize
        return cls(shapes, size, parameters, tensors)


@dataclass(frozen=True, slots=True)
class ExpectedUpdate:
    """What a result must be."""

    template: UpdateTemplate | None = None
    """None: anything finite, and only as it is."""
    coding: CompressionSpec = field(default_factory=CompressionSpec)
    """How the job asks for it; a client may send it as it is all the same."""
    origin: tuple[str, Path] | None = None
    """What a difference may be to: a payload that the task named."""
    may_be_empty: bool = False
    """A file without a tensor passes, as the first adapter of clients with models of their own."""


def check_offer(payload: PayloadRef, template: UpdateTemplate | None, *, max_bytes: int) -> None:
    """Refuse a payload that is too large to be what was asked for, before a byte of it moves."""
    limit = max_bytes if template is None else min(max_bytes, template.size_bytes + HEADER_BYTES)
    if payload.size_bytes > limit:
        raise Refused("too-large", f"it has {payload.size_bytes} bytes; at most {limit} are expected")
    if payload.chunk_bytes > MAX_CHUNK_BYTES:
        raise Refused("too-large", f"chunks of {payload.chunk_bytes} bytes do not fit through a broker")
    if payload.chunks > MAX_CHUNKS:
        raise Refused("too-large", f"{payload.chunks} chunks are more than {MAX_CHUNKS}; cut it into larger ones")


def check_payload(payloads: PayloadStore, ref: PayloadRef, expected: ExpectedUpdate) -> CompressionSpec:
    """Complete a payload in the store and validate it; raises as `PayloadStore.finish` and `check_update` do."""
    return check_update(payloads.finish(ref), expected)


def check_update(path: Path, expected: ExpectedUpdate) -> CompressionSpec:
    """Refuse a file whose tensors are not those that are expected, or not all finite; returns how it is coded.

    Names, types and shapes are compared before a coded tensor is decoded, so none becomes larger than expected.
    """
    template = expected.template
    try:
        origin = None if expected.origin is None else compressed_file.DeltaBase.of(*expected.origin)
        tensors = compressed_file.open_tensors(path, origin)
        found = compressed_file.compression_of(tensors)
        _check_coding(found, expected)
        if template is not None:
            _check_names(tensors, template)
        largest = max((_check_tensor(name, tensors, template) for name in tensors), default=0.0)
        if template is not None:
            _check_norm(largest, template)
    except CorruptPayload as error:
        raise Refused("corrupt", str(error)) from error
    if not tensors and not expected.may_be_empty:
        raise Refused("names", "it holds no tensor")
    return found


def _check_coding(found: CompressionSpec, expected: ExpectedUpdate) -> None:
    """Refuse a coding that the job did not ask for; as they are, tensors may always come."""
    if found.is_plain:
        return
    asked = expected.coding
    if expected.template is None or found != asked.model_copy(update={"feedback": None}):
        raise Refused("coding", f"it is written in {found.word}, where {asked.word} was asked for")


def _check_names(tensors: Tensors, template: UpdateTemplate) -> None:
    """Refuse missing and unknown names."""
    missing = sorted(template.shapes.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - template.shapes.keys())
    if missing or unknown:
        first = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0][:SHOWN]!r}"
        raise Refused("names", f"it {first} ({len(missing)} missing, {len(unknown)} unknown)")


def _check_tensor(name: str, tensors: Tensors, template: UpdateTemplate | None) -> float:
    """Refuse one tensor of the wrong shape or dtype, or with a value that is not finite; its largest value."""
    dtype, shape = serialization.describe(tensors, name)
    if template is not None:
        right_shape, right_dtype = template.shapes[name]
        if shape != right_shape:
            raise Refused("shape", f"{name!r} has shape {list(shape)}, not {list(right_shape)}")
        if dtype.name != right_dtype:
            raise Refused("dtype", f"{name!r} is {dtype.name}, not {right_dtype}")
    value = tensors[name]
    if is_floating(value) and not bool(np.isfinite(value).all()):
        raise Refused("not-finite", f"{name[:SHOWN]!r} holds NaN or infinity")
    return _largest(value)


def _largest(value: Array) -> float:
    """The largest absolute value of a tensor of real numbers; 0 of any other."""
    return float(np.max(np.abs(value))) if is_floating(value) and value.size else 0.0


def _check_norm(norm: float, template: UpdateTemplate) -> None:
    """Refuse an update that is larger than any training makes it; `norm` is its largest absolute value."""
    if norm <= FAR_OUT:
        return
    start = max((_largest(template.start[name]) for name in template.start), default=0.0)
    if norm > FAR_OUT * start:
        raise Refused("norm", f"its largest value, {norm:.3g}, is far from the {start:.3g} of what it started from")

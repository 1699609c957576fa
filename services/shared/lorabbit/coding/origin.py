"""Origin: what both sides hold already, to which a coded file gives the difference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorabbit import codec
from lorabbit.types import Array, Tensors


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor file by its content: the adapter that a task named, or an earlier one."""

    sha256: str
    tensors: Tensors

    @classmethod
    def of(cls, sha256: str, path: Path) -> Origin:
        """Open a file; raises CorruptPayload where it is none."""
        return cls(sha256, codec.read_tensors(path))

    def beside(self, name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array | None:
        """The tensor of a name, cut to the leading part of a shape (a lower rank); None where there is none like it."""
        if name not in self.tensors:
            return None
        own_dtype, own = codec.describe(self.tensors, name)
        if own_dtype != dtype or len(own) != len(shape) or any(a > b for a, b in zip(shape, own, strict=True)):
            return None
        value = self.tensors[name]
        return value if own == shape else value[tuple(slice(0, side) for side in shape)]

"""Lossless conversion between torch and NumPy.

NumPy has no bfloat16 of its own and torch does not know `ml_dtypes`, so bfloat16 crosses as 16-bit
integers that are only looked at differently.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from lorabbit.types import Array


def to_numpy(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Array:
    """Copy a tensor to NumPy, in `dtype` where given."""
    tensor = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return bits
    array: Array = tensor.numpy()
    return array


def to_torch(array: Array) -> torch.Tensor:
    """Copy an array to a torch tensor on the CPU."""
    own = np.array(array, order="C", copy=True)
    if own.dtype.name == "bfloat16":
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that both sides use, for example ``bfloat16``."""
    return str(dtype).removeprefix("torch.")

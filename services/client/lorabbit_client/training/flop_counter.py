"""How many floating-point operations a task's products of matrices take.

A multiplication and an addition are two operations. Counted are linear layers, products of matrices,
convolutions and attention, as torch is asked for them; everything else (normalization, activation,
optimizer) is linear in what these touch and is left out. The backward pass is not watched but follows:
each operand that needs a gradient costs one more product of the size of the forward one. So a frozen
layer costs 2/3 of a trained one, a layer below everything that moves 1/3, one that is skipped nothing.

What is computed stays bit for bit what it was: calls are looked at on their way, not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lorabbit_client.models.quantization import QuantizedLinear, product

MULTIPLY_ADD = 2


class FlopCounter(TorchFunctionMode):
    """Counts while it is entered, in the thread that entered it."""

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()
        self.flops = 0.0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever torch returns
        """Do the call, and count it."""
        given = dict(kwargs or {})
        result = func(*args, **given)
        count = COUNTS.get(func)
        if count is not None:
            self.flops += count(result, *args, **given)
        return result


def _passes(*operands: torch.Tensor) -> int:
    """Products of one size: the forward one, and one for each operand that needs a gradient."""
    return 1 + (sum(value.requires_grad for value in operands) if torch.is_grad_enabled() else 0)


def _linear(result: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:  # noqa: ANN401
    """Y (..., out) = x (..., in) W^T."""
    return MULTIPLY_ADD * result.numel() * value.shape[-1] * _passes(value, weight)


def _quantized(result: torch.Tensor, value: torch.Tensor, _layer: QuantizedLinear) -> int:
    """Y (..., out) = x (..., in) W^T with a frozen weight that is widened for it."""
    return MULTIPLY_ADD * result.numel() * value.shape[-1] * _passes(value)


def _matmul(result: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> int:  # noqa: ANN401
    """(..., n, k) (..., k, m)."""
    return MULTIPLY_ADD * result.numel() * left.shape[-1] * _passes(left, right)


def _added(result: torch.Tensor, _added_to: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **_: Any) -> int:  # noqa: ANN401
    """M + (..., n, k) (..., k, m)."""
    return _matmul(result, left, right)


def _convolution(result: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:  # noqa: ANN401
    """Each number that comes out is a product over one filter (out, in / groups, *window)."""
    return MULTIPLY_ADD * result.numel() * weight[0].numel() * _passes(value, weight)


def _attention(
    result: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,  # noqa: ANN401
    **__: Any,  # noqa: ANN401
) -> int:
    """Scores (..., n, k) of queries and keys, and their product with the values."""
    scores = query[..., 0].numel() * key.shape[-2]
    into_scores, into_values = _passes(query, key), _passes(value)
    into_values += int(into_scores > 1)  # the scores then need a gradient too
    return MULTIPLY_ADD * scores * (query.shape[-1] * into_scores + result.shape[-1] * into_values)


COUNTS: Mapping[Any, Callable[..., int]] = {
    functional.linear: _linear,
    product: _quantized,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv), _matmul),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm), _matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm), _added),
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
    functional.scaled_dot_product_attention: _attention,
}

"""Frozen linear weights in eight or four bits: what a client with little memory keeps of its base model.

The rule is int8's or int4's of `lorabbit.compression.quantizers`: integers and one scale for each block of the
flattened weight. A product dequantizes its weight and discards it afterwards, in the forward and the backward pass, so
at most one dequantized weight exists at a time. What is trained, embeddings, biases and weights that two
modules share stay as they are. As in QLoRA (arXiv 2305.14314), the adapter that comes of it stands on the whole model.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary
from transformers.pytorch_utils import Conv1D

from lorabbit.compression.quantizers import ZERO_NIBBLE, Blocks
from lorabbit.errors import LoRAbbitError
from lorabbit_client.models.arrays import to_numpy, to_torch
from lorabbit_client.models.trainable import TrainableModel

BLOCK = 64
"""Values that share a scale of 16 bits: a quarter of a bit for each."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is kept in fewer bits and widened for each product."""

    def __init__(self, layer: nn.Linear | Conv1D, codec: str) -> None:
        """Take over a layer, which may be GPT-2's kind, with a weight d_in x d_out; `codec` is int8 or int4."""
        super().__init__()
        weight: torch.Tensor = layer.weight
        self._codec, self._shape, self._dtype = codec, weight.shape, weight.dtype
        self._transposed = isinstance(layer, Conv1D)
        self.out_features, self.in_features = weight.shape[::-1] if self._transposed else weight.shape
        padded = np.zeros(-(-weight.numel() // BLOCK) * BLOCK, np.float32)
        padded[: weight.numel()] = to_numpy(weight, torch.float32).reshape(-1)
        scales, numbers = (to_torch(array).to(weight.device) for array in Blocks(codec, BLOCK).encode(padded))
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("numbers", numbers, persistent=False)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the layer had it, rounded: a new tensor at every look."""
        numbers, scales = self.get_buffer("numbers"), self.get_buffer("scales")
        if self._codec == "int4":
            numbers = torch.stack((numbers & 0xF, numbers >> 4), dim=1).to(torch.int8) - ZERO_NIBBLE
        wide = numbers.reshape(-1, BLOCK).float() * scales.float()[:, None]
        return wide.reshape(-1)[: self._shape.numel()].reshape(self._shape).to(self._dtype)

    def oriented(self) -> torch.Tensor:
        """The weight, d_out x d_in."""
        return self.weight.t() if self._transposed else self.weight

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Multiply (..., d_in) to (..., d_out), and add the bias."""
        result = product(value, self)
        return result if self.bias is None else result + self.bias.to(result.dtype)


def product(value: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    """Y = x W^T; a function of torch's to whoever watches those, such as `flop_counter`."""
    if has_torch_function_unary(value):
        overridden: torch.Tensor = handle_torch_function(product, (value,), value, layer)
        return overridden
    plain: torch.Tensor = _Product.apply(value, layer)  # type: ignore[no-untyped-call]
    return plain


class _Product(torch.autograd.Function):
    """x W^T, which keeps the layer for the backward pass and not its wide weight."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:  # noqa: ANN401
        ctx.layer = layer
        return functional.linear(value, layer.oriented())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        """Gradient of x, G W; it may be differentiated again."""
        return functional.linear(gradient, ctx.layer.oriented().t().to(gradient.dtype)), None


def quantize(trainable: TrainableModel, codec: str) -> None:
    """Quantize in place every frozen linear weight of a model under LoRA, and drop the originals."""
    if trainable.base is None or trainable.lora is None:
        raise LoRAbbitError("internal: only a model under LoRA is quantized")
    model, base = trainable.model, trainable.base
    traveling = {id(value) for value in trainable.tensors.values()}
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    names = {id(value): name for name, value in base.tensors.items()}
    quantized: list[str] = []
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear | Conv1D):
            continue
        key = id(layer.weight)
        if key not in names or key in traveling or uses[key] > 1:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(layer, codec))
        quantized.append(names[key])
    base.drop(quantized)

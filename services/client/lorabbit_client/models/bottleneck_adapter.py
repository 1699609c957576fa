"""Adapter tuning: small bottleneck modules after each attention and each feed-forward output.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019 (arXiv 1902.00751), section 2:

    (1)  h <- h + W_up gelu(W_down h + b_down) + b_up,   placed on a sub-layer's output before its residual sum

D1  W_up and b_up start at exactly zero (the paper: near zero), so the first round starts at the base model.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorabbit.errors import BadInput

OUTPUTS = re.compile(
    r"(?:attention\.output\.dense|layer\.\d+\.output\.dense"  # BERT, RoBERTa, ELECTRA, older ViT
    r"|layers?\.\d+\.(?:attention\.o_proj|mlp\.fc2)"  # ViT
    r"|attention\.out_lin|ffn\.lin2"  # DistilBERT
    r"|attn\.c_proj|mlp\.c_proj"  # GPT-2
    r"|self_attn\.(?:o_proj|out_proj)|mlp\.(?:down_proj|fc2)"  # LLaMA, Mistral, Qwen, OPT, Phi
    r"|fc[12])$"  # the CNN zoo
)
"""Names of the linear layers after which a bottleneck stands."""


class Bottleneck(nn.Module):
    """(1) for vectors of one width."""

    def __init__(self, width: int, inner: int) -> None:
        """Draw the way down; start the way up at zero (D1)."""
        super().__init__()
        self.enabled = True
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply (1), or nothing while it is not enabled."""
        if not self.enabled:
            return hidden
        adapted: torch.Tensor = hidden + self.up(functional.gelu(self.down(hidden)))
        return adapted


def _through(module: Any, _inputs: object, output: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - torch types no attributes
    """Apply the bottleneck to a layer's output."""
    adapted: torch.Tensor = module.adapter(output)
    return adapted


def enable_bottlenecks(model: nn.Module, *, enabled: bool) -> None:
    """Enable or disable the bottlenecks of a model."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.enabled = enabled


def insert_bottlenecks(model: nn.Module, inner: int) -> list[str]:
    """Put a bottleneck after every output layer; returns the new parameters' names, raises BadInput if none fits.

    A hook calls the bottleneck, so the names of the base model's own parameters stay as they are.
    """
    found = [(name, module) for name, module in model.named_modules() if OUTPUTS.search(name)]
    for _, module in found:
        weight = module.weight
        if not isinstance(weight, torch.Tensor):
            raise BadInput("model.trainable: 'adapter' needs plain linear layers")
        # GPT-2's Conv1D keeps its weight transposed and says its width in `nf`.
        width = int(getattr(module, "nf", weight.shape[0]))
        bottleneck = Bottleneck(width, inner).to(device=weight.device, dtype=weight.dtype)
        module.register_module("adapter", bottleneck)
        module.register_forward_hook(_through)
    if not found:
        raise BadInput(
            f"model.trainable: 'adapter' does not know where {type(model).__name__} ends its sub-layers; use lora"
        )
    return [f"{name}.adapter.{part}" for name, module in found for part, _ in module.adapter.named_parameters()]

"""Shared functions of analyses that do not change the model.

Everything runs in evaluation mode, in float32 whatever the base model's dtype, with autocast off:
squared gradients of 1e-8 vanish in half precision. Parameters, gradients, `requires_grad` flags,
training modes and random generators are as they were afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lorabbit.errors import LoRAbbitError
from lorabbit_client.data.features import IGNORED, Batch
from lorabbit_client.data.table import IntArray
from lorabbit_client.dataset import Examples
from lorabbit_client.models.loading import quiet
from lorabbit_client.models.trainable import TrainableModel

CHUNK = 16
"""Examples of which gradients or hidden states are held at once."""
OnChunk: TypeAlias = Callable[[], None]
"""Called before each chunk; raises Cancelled if the task was cancelled."""


@contextmanager
def evaluation_mode(model: TrainableModel, *, attention: str | None = None) -> Iterator[None]:
    """Set a model to evaluation mode, optionally with another attention; restore both afterwards."""
    modes = [(module, module.training) for module in model.model.modules()]
    usual = _attention(model.model)
    model.model.eval()
    try:
        with quiet(), torch.autocast(device_of(model).type, enabled=False):
            if attention is not None and usual is not None:
                _set_attention(model.model, attention)
            yield
    finally:
        if attention is not None and usual is not None:
            with quiet():
                _set_attention(model.model, usual)
        for module, training in modes:
            module.training = training


def _attention(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _set_attention(model: Any, name: str) -> None:  # noqa: ANN401 - transformers or PEFT's wrapper of it
    model.set_attn_implementation(name)


def device_of(model: TrainableModel) -> torch.device:
    """Return the device of a model."""
    return next(model.model.parameters()).device


def factors(model: TrainableModel) -> dict[str, nn.Parameter]:
    """Return the LoRA factors by wire name; raises LoRAbbitError when there are none."""
    found = {name: value for name, value in model.parameters().items() if ".lora_" in name}
    if not found:
        raise LoRAbbitError("the model has no LoRA factors; set model.trainable to 'lora'")
    return found


def parameter_names(model: TrainableModel) -> dict[str, str]:
    """Return the model's own name of each LoRA factor, by wire name."""
    own = {id(value): name for name, value in model.model.named_parameters()}
    return {name: own[id(value)] for name, value in factors(model).items()}


def fp32_overrides(model: TrainableModel) -> dict[str, torch.Tensor]:
    """Return float32 copies of the half-precision tensors of a model, by its own names."""
    state = dict(model.model.named_parameters()) | dict(model.model.named_buffers())
    half = {name: value for name, value in state.items() if value.dtype in {torch.float16, torch.bfloat16}}
    return {name: value.detach().float() for name, value in half.items()}


def call(model: TrainableModel, overrides: Mapping[str, torch.Tensor], batch: Batch, **extra: Any) -> Any:  # noqa: ANN401
    """Run a model with some tensors replaced by others, for this call."""
    return functional_call(model.model, dict(overrides), kwargs={**batch, **extra})


def no_progress() -> None:
    """Report nothing."""


def chunks(
    examples: Examples, positions: Sequence[int], size: int = CHUNK, *, on_chunk: OnChunk = no_progress
) -> Iterator[IntArray]:
    """Yield places in `positions`, rows of like length together."""
    order = np.argsort(examples.lengths[np.asarray(positions, dtype=np.int64)], kind="stable")
    for start in range(0, len(order), size):
        on_chunk()
        yield order[start : start + size]


def batch_at(model: TrainableModel, examples: Examples, positions: IntArray) -> Batch:
    """Return a batch on the model's device, real numbers in float32."""
    device = device_of(model)
    batch = {name: value.to(device) for name, value in examples.batch(positions).items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


def losses(outputs: Any, batch: Batch) -> torch.Tensor:  # noqa: ANN401 - a model's output
    """Return -log p(y|x) of each example, as the model's own loss of a batch of this example alone.

    A mean over its target tokens where an example has several, so that a long answer is not hard by
    its length; the mean of start and end for a span.
    """
    if "start_positions" in batch:
        start, end = (_span(outputs[f"{edge}_logits"], batch, f"{edge}_positions") for edge in ("start", "end"))
        return (start + end) / 2
    logits, labels = outputs["logits"].float(), batch["labels"]
    if labels.ndim == 1:
        return cross_entropy(logits, labels, reduction="none")
    if _continues(outputs):
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    counted = (labels != IGNORED).sum(1).clamp(min=1)
    return each.sum(1) / counted


def _span(logits: torch.Tensor, batch: Batch, edge: str) -> torch.Tensor:
    """Return one edge's loss over the true tokens; alone, an example has no padding to spread over."""
    length = logits.shape[1]
    logits = logits.float().masked_fill(batch["attention_mask"] == 0, -torch.inf)
    return cross_entropy(logits, batch[edge].clamp(0, length), ignore_index=length, reduction="none")


def _continues(outputs: Any) -> bool:  # noqa: ANN401
    """Tell a language model, whose labels are the tokens themselves, from a tagger."""
    return "Causal" in type(outputs).__name__

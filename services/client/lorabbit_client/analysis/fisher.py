"""Per-example gradients over LoRA factors: the diagonal of the empirical Fisher information.

The gradient of log p(y|x) of one example with respect to a linear layer's weight is the product of
what went in and of the gradient that came back out: G_i = sum over tokens of g_t x_t^T. One forward
and one backward pass over a batch therefore give every example's gradient, at the price of a
training step. The squared gradient of a batch's mean loss is not that: examples cancel in it. Models
whose factors are no linear layers (convolutions, embeddings) take one pass for each example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lorabbit.types import Tensors
from lorabbit_client.analysis.per_example_gradients import ExampleGradients, ForwardFn, Gradients, separate_owners
from lorabbit_client.analysis.probe import (
    CHUNK,
    OnChunk,
    batch_at,
    call,
    chunks,
    evaluation_mode,
    factors,
    fp32_overrides,
    no_progress,
)
from lorabbit_client.data.table import IntArray
from lorabbit_client.dataset import Examples
from lorabbit_client.models.arrays import to_numpy
from lorabbit_client.models.trainable import TrainableModel


def per_example_gradients(  # noqa: PLR0913 - what is looked at, and how
    model: TrainableModel,
    examples: Examples,
    positions: Sequence[int],
    *,
    loop: bool = False,
    chunk: int = CHUNK,
    on_chunk: OnChunk = no_progress,
) -> Iterator[tuple[IntArray, Gradients]]:
    """Yield places in `positions` and the gradients of -log p(y|x) of the examples there, chunk by chunk.

    By wire name: (examples, *shape of the factor), float32. `loop` takes each example by itself, whatever the layers
    are.
    """
    rows = np.asarray(positions, dtype=np.int64)
    with evaluation_mode(model), torch.enable_grad():
        run, leaves = _float32_copies(model, factors(model))
        owners = None
        if len(rows) and not loop:
            owners = separate_owners(model.model, factors(model), run, batch_at(model, examples, rows[:1]))
        gradients = ExampleGradients(run, leaves, owners)
        for places in chunks(examples, positions, chunk if gradients.is_vectorized else 1, on_chunk=on_chunk):
            (found,) = gradients.of(batch_at(model, examples, rows[places]))
            yield places, found


def traces(
    model: TrainableModel,
    examples: Examples,
    positions: Sequence[int],
    **how: Any,  # noqa: ANN401
) -> NDArray[np.float64]:
    """Return ||gradient of log p(y|x) over all LoRA factors||^2 of each example: the trace of its Fisher."""
    found = np.zeros(len(positions), dtype=np.float64)
    for places, gradients in per_example_gradients(model, examples, positions, **how):
        squares = [value.square().flatten(1).sum(1).double() for value in gradients.values()]
        found[places] = torch.stack(squares).sum(0).cpu().numpy()
    return found


def mean_squares(
    model: TrainableModel,
    examples: Examples,
    positions: Sequence[int],
    **how: Any,  # noqa: ANN401
) -> Tensors:
    """Return the mean over the examples of the squared gradient of each LoRA factor, float32."""
    sums = {name: torch.zeros(value.shape, dtype=torch.float32) for name, value in factors(model).items()}
    for _, gradients in per_example_gradients(model, examples, positions, **how):
        for name, value in gradients.items():
            sums[name] += value.square().sum(0).cpu()
    return {name: to_numpy(value / max(1, len(positions))) for name, value in sums.items()}


def shares(
    model: TrainableModel, examples: Examples, positions: Sequence[int], *, on_chunk: OnChunk = no_progress
) -> dict[str, torch.Tensor]:
    """Return the mean squared per-example gradient of every trained tensor over the largest one: in [0, 1], float32.

    Of any model, one example after the other; all ones where no gradient is above zero.
    """
    values = model.parameters()
    sums = {name: torch.zeros(value.shape, device=value.device) for name, value in values.items()}
    with evaluation_mode(model), torch.enable_grad():
        gradients = ExampleGradients(*_float32_copies(model, values), owners=None)
        for places in chunks(examples, positions, 1, on_chunk=on_chunk):
            batch = batch_at(model, examples, np.asarray(positions, dtype=np.int64)[places])
            for name, gradient in gradients.of_one(batch).items():
                sums[name] += gradient[0].float().square()
    most = max((float(value.max()) for value in sums.values() if value.numel()), default=0.0)
    return {name: value / most if most > 0 else torch.ones_like(value) for name, value in sums.items()}


def _float32_copies(
    model: TrainableModel, values: Mapping[str, nn.Parameter]
) -> tuple[ForwardFn, dict[str, torch.Tensor]]:
    """Return a model that computes with copies of some parameters, all in float32, and the copies, by wire name.

    Gradients reach the copies; the parameters stay untouched.
    """
    own, overrides = {id(value): name for name, value in model.model.named_parameters()}, fp32_overrides(model)
    leaves = {
        name: overrides.get(own[id(value)], value).detach().clone().requires_grad_() for name, value in values.items()
    }
    replaced = {**overrides, **{own[id(values[name])]: leaf for name, leaf in leaves.items()}}
    return lambda batch: call(model, replaced, batch), leaves

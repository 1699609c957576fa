"""Per-example gradients over LoRA factors: the diagonal of the empirical Fisher information.

The gradient of log p(y|x) of one example with respect to a linear layer's weight is the product of
what went in and of the gradient that came back out: G_i = sum over tokens of g_t x_t^T. One forward
and one backward pass over a batch therefore give every example's gradient, at the price of a
training step. The squared gradient of a batch's mean loss is not that: examples cancel in it. Models
whose factors are no linear layers (convolutions, embeddings) take one pass for each example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lorabbit.types import Tensors
from lorabbit_client.arrays import to_numpy
from lorabbit_client.data import Examples
from lorabbit_client.features import Batch
from lorabbit_client.probing import (
    CHUNK,
    OnChunk,
    batch_at,
    call,
    chunks,
    factors,
    in_float32,
    inner_names,
    looking,
    losses,
    unwatched,
)
from lorabbit_client.tables import Codes
from lorabbit_client.trainable import TrainableModel

Gradients = dict[str, torch.Tensor]
"""By wire name: (examples, *shape of the factor), float32."""


def per_example_gradients(  # noqa: PLR0913 - what is looked at, and how
    model: TrainableModel,
    examples: Examples,
    positions: Sequence[int],
    *,
    loop: bool = False,
    chunk: int = CHUNK,
    on_chunk: OnChunk = unwatched,
) -> Iterator[tuple[Codes, Gradients]]:
    """Yield places in `positions` and the gradients of -log p(y|x) of the examples there, chunk by chunk.

    `loop` takes each example by itself, whatever the layers are.
    """
    rows = np.asarray(positions, dtype=np.int64)
    layers = _linear_layers(model)
    one_by_one = loop or layers is None
    with looking(model), torch.enable_grad():
        stand_ins = in_float32(model)
        for places in chunks(examples, positions, 1 if one_by_one else chunk, on_chunk=on_chunk):
            batch = batch_at(model, examples, rows[places])
            if layers is None or loop:
                yield places, _gradients_of_one(model, stand_ins, batch)
            else:
                yield places, _gradients_of_batch(model, stand_ins, batch, layers=layers)


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
    model: TrainableModel, examples: Examples, positions: Sequence[int], *, on_chunk: OnChunk = unwatched
) -> dict[str, torch.Tensor]:
    """Return the mean squared per-example gradient of every trained tensor over the largest one: in [0, 1], float32.

    Of any model, one example after the other; all ones where no gradient is above zero.
    """
    values, own = model.parameters(), {id(value): name for name, value in model.model.named_parameters()}
    sums = {name: torch.zeros(value.shape, device=value.device) for name, value in values.items()}
    with looking(model), torch.enable_grad():
        stand_ins = in_float32(model)
        names = {name: own[id(value)] for name, value in values.items()}
        leaves = {
            name: stand_ins.get(names[name], value).detach().clone().requires_grad_() for name, value in values.items()
        }
        replaced = {**stand_ins, **{names[name]: leaf for name, leaf in leaves.items()}}
        for places in chunks(examples, positions, 1, on_chunk=on_chunk):
            batch = batch_at(model, examples, np.asarray(positions, dtype=np.int64)[places])
            found = torch.autograd.grad(call(model, replaced, batch).loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient.float().square()
    most = max((float(value.max()) for value in sums.values() if value.numel()), default=0.0)
    return {name: value / most if most > 0 else torch.ones_like(value) for name, value in sums.items()}


# ---- one pass for a batch ----
@dataclass(slots=True)
class _Seen:
    """What one linear layer saw in a forward pass."""

    went_in: torch.Tensor
    came_out: torch.Tensor


def _linear_layers(model: TrainableModel) -> dict[str, nn.Module] | None:
    """Return the linear layer of each factor, by wire name; None when a factor belongs to another kind."""
    owners = {id(value): module for module in model.model.modules() for value in module.parameters(recurse=False)}
    layers = {name: owners[id(value)] for name, value in factors(model).items()}
    plain = all(isinstance(layer, nn.Linear) and layer.bias is None for layer in layers.values())
    return layers if plain and len({id(layer) for layer in layers.values()}) == len(layers) else None


def _gradients_of_batch(
    model: TrainableModel, stand_ins: Mapping[str, torch.Tensor], batch: Batch, *, layers: Mapping[str, nn.Module]
) -> Gradients:
    """Watch every factor's layer through one forward and one backward pass."""
    seen: dict[str, _Seen] = {}

    def watch(name: str) -> Any:  # noqa: ANN401 - a hook
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:  # noqa: ARG001
            seen[name] = _Seen(given[0].detach(), out)

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        leaves = _leaves(model, stand_ins)
        total = losses(call(model, {**stand_ins, **leaves}, batch), batch).sum()
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name in layers if name in seen]
    back = torch.autograd.grad(total, [seen[name].came_out for name in names], allow_unused=True)
    shapes = {name: value.shape for name, value in factors(model).items()}
    rows = len(next(iter(batch.values())))
    gradients = {name: torch.zeros((rows, *shape), device=total.device) for name, shape in shapes.items()}
    for name, gradient in zip(names, back, strict=True):
        if gradient is not None:
            x = seen[name].went_in.reshape(rows, -1, shapes[name][1])
            g = gradient.reshape(rows, -1, shapes[name][0])
            gradients[name] = torch.bmm(g.transpose(1, 2), x).float()
    return gradients


def _leaves(model: TrainableModel, stand_ins: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of the factors that a graph hangs on, by the model's own names; the factors stay untouched."""
    own, values = inner_names(model), factors(model)
    return {
        own[name]: stand_ins.get(own[name], value).detach().clone().requires_grad_() for name, value in values.items()
    }


# ---- one pass for each example ----
def _gradients_of_one(model: TrainableModel, stand_ins: Mapping[str, torch.Tensor], batch: Batch) -> Gradients:
    """Differentiate the model's own loss of a batch of one example."""
    leaves = _leaves(model, stand_ins)
    loss = call(model, {**stand_ins, **leaves}, batch).loss
    own = inner_names(model)
    back = torch.autograd.grad(loss, [leaves[name] for name in own.values()], allow_unused=True)
    return {
        name: (torch.zeros_like(leaves[own[name]]) if gradient is None else gradient).unsqueeze(0)
        for name, gradient in zip(own, back, strict=True)
    }

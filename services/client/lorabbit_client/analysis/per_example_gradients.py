"""The gradient of each example's own loss: of all examples of a batch in one pass, or of one after the other.

The gradient of one example with respect to a linear layer's weight is the product of what went in and of the gradient
that came back out: G_i = sum over tokens of g_t x_t^T, summed over the layer's calls where several blocks share it.
One forward and one backward pass over a batch therefore give every example's gradient, at the price of a training
step. That holds where what goes into a layer has one entry for each example. Some models send something else through
it as well (DeBERTa its table of relative positions), or put tokens before examples (XLNet); what comes back out then
belongs to no one example, and each takes a pass of its own. So do tensors that belong to no linear layer
(convolutions, embeddings, norms) or to several layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from lorabbit_client.analysis.probe import losses
from lorabbit_client.data.features import Batch

Gradients = dict[str, torch.Tensor]
"""By the tensor's name: (examples, *shape of the tensor)."""
ForwardFn: TypeAlias = Callable[[Batch], Any]
"""A batch -> the model's output, with its loss."""
PROBE_BATCH_SIZES = (1, 2)
"""Sizes of the batches that show which axis follows the number of examples; no other axis has both."""


@dataclass(frozen=True, slots=True)
class LayerParameter:
    """Where a tensor is: a linear layer, and its "weight" or "bias"."""

    layer: nn.Linear
    part: str


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a linear layer: its input and output."""

    layer: nn.Module
    inputs: torch.Tensor
    outputs: torch.Tensor


class ExampleGradients:
    """Gradients of the examples of a batch with respect to some tensors of a model."""

    def __init__(
        self, run: ForwardFn, tensors: Mapping[str, torch.Tensor], owners: Mapping[str, LayerParameter] | None
    ) -> None:
        """Take the forward function, the tensors, and their linear layers; without layers, one pass per example."""
        self._run, self._tensors, self._owners = run, tensors, owners

    @property
    def is_vectorized(self) -> bool:
        """Whether one pass gives the gradients of a whole batch."""
        return self._owners is not None

    def of(self, batch: Batch) -> Iterator[Gradients]:
        """Yield the gradients of all examples at once, or of one after the other."""
        if self._owners is not None:
            yield self._vectorized(batch, self._owners)
            return
        for row in range(_rows(batch)):
            yield self.of_one({name: value[row : row + 1] for name, value in batch.items()})

    def of_one(self, batch: Batch) -> Gradients:
        """Differentiate the model's own loss of a batch of one example."""
        grads = torch.autograd.grad(self._run(batch).loss, list(self._tensors.values()), allow_unused=True)
        return {
            name: (torch.zeros_like(value) if gradient is None else gradient).unsqueeze(0)
            for (name, value), gradient in zip(self._tensors.items(), grads, strict=True)
        }

    def _vectorized(self, batch: Batch, owners: Mapping[str, LayerParameter]) -> Gradients:
        """Record inputs and output gradients of every layer in one forward and one backward pass."""
        with _recorded_calls(owners.values()) as calls:
            total = losses(self._run(batch), batch).sum()
        grads = torch.autograd.grad(total, [call.outputs for call in calls], allow_unused=True)
        rows = _rows(batch)
        names = {(id(owner.layer), owner.part): name for name, owner in owners.items()}
        found = {name: value.new_zeros((rows, *value.shape)) for name, value in self._tensors.items()}
        for call, gradient in zip(calls, grads, strict=True):
            if gradient is None:
                continue
            g = gradient.reshape(rows, -1, gradient.shape[-1])
            if weight := names.get((id(call.layer), "weight")):
                x = call.inputs.reshape(rows, -1, call.inputs.shape[-1])
                found[weight] += torch.bmm(g.transpose(1, 2), x)
            if bias := names.get((id(call.layer), "bias")):
                found[bias] += g.sum(1)
        return found


def separate_owners(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], run: ForwardFn, batch: Batch
) -> dict[str, LayerParameter] | None:
    """Return the linear layer of each tensor, by the tensor's name; None where examples do not stay apart there.

    The batch's first example shows it, in evaluation mode. A layer that is not called at all is no sign of no
    gradient: its weight may be used without it.
    """
    owners = linear_owners(model, tensors)
    if owners is None:
        return None
    layers = {id(owner.layer) for owner in owners.values()}
    for rows in PROBE_BATCH_SIZES:
        repeated = {name: value[:1].repeat_interleave(rows, dim=0) for name, value in batch.items()}
        with torch.no_grad(), _recorded_calls(owners.values()) as calls:
            run(repeated)
        if {id(call.layer) for call in calls} != layers or any(call.inputs.shape[0] != rows for call in calls):
            return None
    return owners


def linear_owners(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, LayerParameter] | None:
    """Return the linear layer of each tensor; None where one belongs to something else, or to several layers."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for part, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, part))
    owners = {}
    for name, value in tensors.items():
        (module, part), *others = places[id(value)]
        if others or type(module) is not nn.Linear:
            return None
        owners[name] = LayerParameter(module, part)
    return owners


@contextmanager
def _recorded_calls(owners: Iterable[LayerParameter]) -> Iterator[list[LayerCall]]:
    """Record every call of some layers."""
    calls: list[LayerCall] = []

    def record(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        calls.append(LayerCall(module, given[0].detach(), out))

    hooks = [layer.register_forward_hook(record) for layer in {owner.layer for owner in owners}]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))

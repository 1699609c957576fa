"""Values that a training must not move, whatever its optimiser does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lorabbit.errors import Refused
from lorabbit.types import Tensors
from lorabbit_client.arrays import to_torch
from lorabbit_client.trainable import TrainableModel


def make_masks(model: TrainableModel, given: Tensors) -> dict[str, torch.Tensor]:
    """Return booleans of each named tensor's own shape; raises Refused where one does not fit."""
    masks = {}
    for name in given:
        if name not in model.tensors:
            raise Refused("names", f"there is a mask for {name!r}, which the model does not train")
        value, mask = model.tensors[name], to_torch(given[name])
        if mask.dtype != torch.bool:
            raise Refused("dtypes", f"the mask of {name} is {mask.dtype}, expected booleans")
        try:
            masks[name] = mask.to(value.device).broadcast_to(value.shape)
        except RuntimeError as error:
            raise Refused(
                "shapes", f"the mask of {name} has shape {tuple(mask.shape)}, the tensor {tuple(value.shape)}"
            ) from error
    return masks


class Held:
    """Entries outside the masks, as they were when the training began."""

    def __init__(self, masters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> None:
        """Copy what must not move; a mask of nothing but True holds nothing."""
        self._masters = masters
        self._masks = {name: masks[name] for name in masters if name in masks and not masks[name].all()}
        self._values = {name: masters[name].detach().clone() for name in self._masks}

    def clear_gradients(self) -> None:
        """Leave no gradient outside the masks, so that clipping sees only what may move."""
        for name, mask in self._masks.items():
            gradient = self._masters[name].grad
            if gradient is not None:
                gradient.mul_(mask)

    def put_back(self) -> None:
        """Undo what momentum, decay or an optimiser's own terms did outside the masks, to the bit."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                value = self._masters[name]
                value.copy_(torch.where(mask, value, self._values[name]))

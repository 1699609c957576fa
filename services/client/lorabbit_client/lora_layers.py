"""The LoRA layers of one model: their factors at another rank, and the weights that they stand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit_client.base import LoraWeight

ADAPTER = "default"
"""PEFT's name of the one adapter."""


class LoraLayers:
    """PEFT's LoRA layers of a model, by module path."""

    def __init__(self, wrapped: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
        """Look at every layer; `tensors` (by wire name) is kept up to date when factors are replaced."""
        self._layers: dict[str, Any] = {
            path: layer for path, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)
        }
        self._tensors = tensors
        self._enabled = True
        self._originals = {
            f"{path}.lora_{factor}.weight": tensors[f"{path}.lora_{factor}.weight"]
            for path in self._layers
            for factor in "AB"
            if f"{path}.lora_{factor}.weight" in tensors
        }

    def weights(self, names: Mapping[int, str]) -> dict[str, LoraWeight]:
        """Say where the weight under each linear layer's factors is, by module path; `names` by the tensor's id."""
        found = {}
        for path, layer in self._layers.items():
            weight = getattr(layer.get_base_layer(), "weight", None)
            if f"{path}.lora_A.weight" in self._originals and weight is not None and weight.ndim == 2:  # noqa: PLR2004
                found[path] = LoraWeight(names[id(weight)], transposed=bool(getattr(layer, "fan_in_fan_out", False)))
        return found

    def check_linear(self, weights: Mapping[str, LoraWeight]) -> None:
        """Raise BadInput when a layer is no linear one (a convolution, an embedding): its update is no plain B A."""
        other = sorted(self._layers.keys() - weights.keys())
        if other:
            kind = type(self._layers[other[0]].get_base_layer()).__name__
            raise BadInput(
                f"model.lora.targets: {other[0].rpartition('.')[2]} is a {kind}, and this method works on the "
                "weights under LoRA, which it can only do for linear layers; name linear ones"
            )

    def enable(self, *, enabled: bool) -> None:
        """Let the factors take part in the model's answers, or not; heads that travel whole always do."""
        if enabled != self._enabled:
            for layer in self._layers.values():
                layer.enable_adapters(enabled)
            self._enabled = enabled

    def set_rank(self, rank: int) -> None:
        """Replace every pair by zeros of another rank; PEFT's factor on B A stays as it is."""
        for name, original in self._originals.items():
            shape = list(original.shape)
            shape[0 if name.endswith(".lora_A.weight") else 1] = rank
            zeros = torch.zeros(shape, dtype=original.dtype, device=original.device)
            self._put(name, nn.Parameter(zeros, requires_grad=original.requires_grad))

    def restore_rank(self) -> None:
        """Put the factors back that the model was built with."""
        for name, original in self._originals.items():
            if self._tensors[name] is not original:
                self._put(name, original)

    def _put(self, name: str, value: torch.Tensor) -> None:
        """Make a tensor one of the model's factors."""
        path, factor, _ = name.rsplit(".", 2)
        linear: nn.Module = getattr(self._layers[path], factor)[ADAPTER]
        if not isinstance(linear, nn.Linear) or not isinstance(value, nn.Parameter):
            raise LoRAbbitError(f"internal: {path} has no linear factors, so its rank cannot change")
        linear.weight = value
        linear.out_features, linear.in_features = value.shape
        self._tensors[name] = value


def active_copies(wrapped: nn.Module) -> dict[int, torch.Tensor]:
    """Return what stands in for frozen originals, by the original's id: PEFT trains copies of heads."""
    copies: dict[int, torch.Tensor] = {}
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):
            originals = _state(module.original_module)
            for name, value in _state(module.modules_to_save[ADAPTER]).items():
                copies[id(originals[name])] = value
    return copies


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())

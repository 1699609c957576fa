"""LoRA through PEFT: wrap a model, name its factors as PEFT saves them, write the config PEFT reads.

Only PEFT's own calls decide names and configuration, so a plain `PeftModel.from_pretrained` loads what
a job exports. Order in the configuration is sorted, since PEFT keeps target names in a set.

The LoRA layers of one model: their factors at another rank, and the weights that they stand on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from torch import nn

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.job.spec import JobSpec
from lorabbit.types import Json
from lorabbit_client.models.base_weights import LoraWeight

TASK_TYPES = {
    "text-classification": TaskType.SEQ_CLS,
    "text-pair-classification": TaskType.SEQ_CLS,
    "token-classification": TaskType.TOKEN_CLS,
    "question-answering": TaskType.QUESTION_ANS,
    "causal-lm": TaskType.CAUSAL_LM,
}
OWN_TARGETS = {
    "albert": ["query", "value"],
    "cnn": ["fc1", "fc2"],
    "distilbert": ["q_lin", "v_lin"],
    "vit": ["q_proj", "v_proj"],
}
"""Targets where PEFT's table has none, or names layers that this version of transformers renamed."""


def wrap_lora(spec: JobSpec, model: nn.Module, heads: Sequence[str]) -> tuple[PeftModel, dict[str, Json]]:
    """Insert LoRA into a model in place; returns PEFT's wrapper and the content of adapter_config.json.

    Raises BadInput when the named targets do not exist.
    """
    lora = spec.model.lora
    # PEFT declares an int and computes with any number.
    alpha: Any = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = LoraConfig(
        task_type=TASK_TYPES.get(spec.model.task),
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets else default_targets(model),
        layers_to_transform=list(lora.layers) if lora.layers is not None else None,
        modules_to_save=list(heads) or None,
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
        )
        blocks = "" if lora.layers is None else f" in blocks {', '.join(map(str, lora.layers))} (model.lora.layers)"
        raise BadInput(
            f"model.lora.targets: {', '.join(lora.targets or ())} is no layer of {spec.model.name}{blocks}, which has "
            f"{', '.join(linear)}"
        ) from error
    return wrapped, config_file(wrapped, spec.model.name)


def default_targets(model: nn.Module) -> list[str] | str:
    """Return PEFT's targets for an architecture, or ours, or every linear layer."""
    family = str(getattr(getattr(model, "config", None), "model_type", "cnn"))
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for table in (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, OWN_TARGETS):
        names = table.get(family)
        if names and set(names) <= leaves:
            return list(names)
    return "all-linear"


def config_file(wrapped: PeftModel, name: str) -> dict[str, Json]:
    """Let PEFT write its configuration, and make it reproducible."""
    config = wrapped.peft_config["default"]
    kept = (config.base_model_name_or_path, config.inference_mode)
    config.base_model_name_or_path, config.inference_mode = name, True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        content: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    config.base_model_name_or_path, config.inference_mode = kept
    for key in ("target_modules", "modules_to_save"):
        if isinstance(content.get(key), list):
            content[key] = sorted(set(content[key]))
    return content


def lora_names(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    """Return every trained parameter under the name by which PEFT saves it."""
    saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    by_place = {(p.data_ptr(), p.shape): p for p in wrapped.parameters() if p.requires_grad}
    named = {name: by_place.get((value.data_ptr(), value.shape)) for name, value in saved.items()}
    found = {name: value for name, value in named.items() if value is not None}
    if len(found) != len(named) or len(found) != len(by_place):
        raise LoRAbbitError("this version of peft saves other tensors than it trains; pin the version in constraints")
    return dict(found)


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
        """Enable or disable the factors; heads that are trained whole stay enabled."""
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
            self._set_factor(name, nn.Parameter(zeros, requires_grad=original.requires_grad))

    def restore_rank(self) -> None:
        """Restore the factors that the model was built with."""
        for name, original in self._originals.items():
            if self._tensors[name] is not original:
                self._set_factor(name, original)

    def _set_factor(self, name: str, value: torch.Tensor) -> None:
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

"""LoRA through PEFT: wrap a model, name its factors as PEFT saves them, write the config PEFT reads.

Only PEFT's own calls decide names and configuration, so a plain `PeftModel.from_pretrained` loads what
a job exports. Order in the configuration is sorted, since PEFT keeps target names in a set.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.jobspec import JobSpec
from lorabbit.types import Json

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

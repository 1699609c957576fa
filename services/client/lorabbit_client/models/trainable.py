"""Make the chosen parameters of a base model trainable, and name them for the wire.

LoRA's names are exactly those of PEFT's own `adapter_model.safetensors`, so the exported file is the
aggregate as it is; every other kind uses the model's own parameter names. On the wire a tensor has
the job's dtype; PEFT keeps LoRA factors of a half-precision base in float32 while it trains.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.job.spec import JobSpec
from lorabbit.runtime.seeds import derive_seed
from lorabbit.types import Facts, Json
from lorabbit_client.models import soft_prompts
from lorabbit_client.models.base_weights import BaseWeights
from lorabbit_client.models.bottleneck_adapter import enable_bottlenecks, insert_bottlenecks
from lorabbit_client.models.loading import LoadedModel, quiet, seeded
from lorabbit_client.models.lora import LoraLayers, active_copies, lora_names, wrap_lora

HEADS = ("classifier", "pre_classifier", "score", "qa_outputs", "fc3")
"""Modules on top of a base model that belong to the task."""


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """A model with trained tensors, which are exchanged with the server."""

    model: nn.Module
    """Called with a batch; anything but the named tensors is frozen. PEFT's wrapper when LoRA is trained."""
    tensors: Mapping[str, torch.Tensor]
    """Wire name -> parameter or buffer, in the order of the names."""
    dtype: torch.dtype
    """Of floating-point tensors on the wire."""
    base_parameters: int
    base_sha256: str
    rank: int | None
    export: Facts
    """Further files of an exported folder."""
    initial: Mapping[str, torch.Tensor]
    """A copy of the tensors as they were built from the job's seed."""
    base: BaseWeights | None = None
    """The model below what is trained."""
    lora: LoraLayers | None = None
    """PEFT's layers, where LoRA is trained."""
    export_base: Facts = field(default_factory=dict)
    """What stands beside the tensors of a whole model, where a method's adapters have a base of their own."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what an optimizer may move: the tensors that are parameters."""
        return {name: value for name, value in self.tensors.items() if isinstance(value, nn.Parameter)}

    def reset(self) -> None:
        """Restore the initial tensors and the job's rank, so that no client sees another's."""
        self.enable(enabled=True)
        if self.base is not None:
            self.base.release()
        if self.lora is not None:
            self.lora.restore_rank()
        with torch.no_grad():
            for name, value in self.tensors.items():
                value.copy_(self.initial[name])

    def enable(self, *, enabled: bool) -> None:
        """Enable or disable the adapter; heads stay enabled."""
        if self.lora is not None:
            self.lora.enable(enabled=enabled)
        else:
            enable_bottlenecks(self.model, enabled=enabled)

    def whole(self) -> TrainableModel:
        """Return the same model with every tensor of the base model trainable, under its own name."""
        if self.base is None:
            raise LoRAbbitError("internal: this model has no base of its own")
        model: Any = self.model
        if isinstance(model, PeftModel) and self.lora is None:
            model = model.get_base_model()  # a soft prompt stands before the model, not in it
        return replace(self, model=model, tensors=self.base.tensors, initial={}, rank=None)


def make_trainable(spec: JobSpec, loaded: LoadedModel, device: torch.device) -> TrainableModel:
    """Choose, build and name the trainable tensors; the job's seed determines everything random."""
    model: Any = loaded.model.to(device)  # first, since moving replaces buffers
    base_parameters = sum(p.numel() for p in model.parameters())
    base_names = {id(value): name for name, value in _state(model).items()}
    layers: LoraLayers | None = None
    export_base: dict[str, Json] = {"files": _config_files(spec, model)}
    rank: int | None = None
    with quiet(), seeded(derive_seed(spec.seed, "adapter")):
        if spec.model.trainable == "lora":
            model, config = wrap_lora(spec, model, head_modules(loaded))
            named: dict[str, torch.Tensor] = lora_names(model)
            rank = spec.model.lora.rank
            export: dict[str, Json] = {"format": "peft", "files": {"adapter_config.json": config}}
        elif spec.model.trainable in soft_prompts.KINDS:
            model, config = soft_prompts.wrap_prompt(spec, model, head_modules(loaded))
            named = soft_prompts.prompt_names(model)
            export = {"format": "peft", "files": {"adapter_config.json": config}}
        else:
            named = _select_parameters(spec, loaded)
            export = _export_files(spec, model)
    for value in named.values():
        value.requires_grad = value.is_floating_point() and isinstance(value, nn.Parameter)
    tensors = {name: named[name] for name in sorted(named)}
    if spec.model.trainable == "lora":
        layers = LoraLayers(model, tensors)
    exchanged = {id(value) for value in tensors.values()}
    frozen = {
        name: value for value in _values(model) if (name := base_names.get(id(value))) and id(value) not in exchanged
    }
    return TrainableModel(
        model=model,
        tensors=tensors,
        dtype=getattr(torch, spec.model.dtype),
        base_parameters=base_parameters,
        base_sha256=hash_tensors(frozen),
        rank=rank,
        export=export,
        initial={name: value.detach().clone() for name, value in tensors.items()},
        base=_base_weights(spec, model, base_names, tensors, layers),
        lora=layers,
        export_base=export_base,
    )


def _base_weights(
    spec: JobSpec,
    model: nn.Module,
    names: Mapping[int, str],
    tensors: Mapping[str, torch.Tensor],
    layers: LoraLayers | None,
) -> BaseWeights:
    """Find the base model's own tensors again, where PEFT may have put a trained copy in their place."""
    copies = active_copies(model)
    present = {id(value): value for value in _values(model)}
    whole = {name: copies.get(key, present[key]) for key, name in names.items() if key in present}
    own = {id(value) for value in tensors.values()}
    return BaseWeights(
        {name: whole[name] for name in sorted(whole)},
        layers.weights(names) if layers is not None else {},
        own=(name for name, value in whole.items() if id(value) in own),
        scaling=spec.model.lora.alpha / spec.model.lora.rank,
    )


def head_modules(loaded: LoadedModel) -> list[str]:
    """Return the modules that must travel whole: the task's head, and whatever was drawn at random.

    A module of which every parameter is fresh is named by its topmost such ancestor.
    """
    names = {name: set(_parameter_names(module, name)) for name, module in loaded.model.named_modules() if name}
    fresh = {name for name, own in names.items() if own and own <= loaded.fresh}
    selected = fresh | {name for name in names if name in HEADS and names[name]}
    return sorted(name for name in selected if not any(name.startswith(other + ".") for other in selected))


def _parameter_names(module: nn.Module, prefix: str) -> Iterable[str]:
    """Return the full names of a module's parameters."""
    return (f"{prefix}.{name}" for name, _ in module.named_parameters())


def _select_parameters(spec: JobSpec, loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Select tensors of the model itself: full, bitfit, adapter or head."""
    model = loaded.model
    if spec.model.trainable == "full":
        return _state(model)
    heads = tuple(f"{name}." for name in head_modules(loaded))
    inserted = set(insert_bottlenecks(model, spec.model.bottleneck)) if spec.model.trainable == "adapter" else set()
    state = dict(model.named_parameters())
    selected: dict[str, torch.Tensor] = {name: value for name, value in state.items() if name.startswith(heads)}
    if spec.model.trainable == "adapter":
        selected |= {name: state[name] for name in inserted}
    elif spec.model.trainable == "bitfit":
        biases = {name: value for name, value in state.items() if re.search(r"(^|[._])bias$", name)}
        if not biases.keys() - selected.keys():
            raise BadInput(f"model.trainable: 'bitfit' trains biases, and {spec.model.name} has none; use lora")
        selected |= biases
    elif not selected:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        selected = {name: value for name, value in state.items() if output is not None and value is output.weight}
    if not selected:
        raise BadInput(f"model.trainable: {spec.model.name} has no head to train for {spec.model.task}; use lora")
    return selected


def _export_files(spec: JobSpec, model: nn.Module) -> dict[str, Json]:
    """Say what else an exported folder needs: a whole model its config, a part of one nothing."""
    config: Any = getattr(model, "config", None)
    if spec.model.trainable == "full" and config is not None:
        return {"format": "transformers", "files": _config_files(spec, model)}
    facts: dict[str, Json] = {"base_model_name_or_path": spec.model.name, "trainable": spec.model.trainable}
    return {"format": "partial", "files": {"lorabbit_config.json": facts}}


def _config_files(spec: JobSpec, model: nn.Module) -> dict[str, Json]:
    """Return what makes the tensors of a whole model a folder that transformers loads; nothing for other models."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return {}
    plain = json.loads(json.dumps(config.to_diff_dict()))  # id2label has integers for keys, JSON has none
    return {"config.json": {**plain, "architectures": [type(model).__name__], "dtype": spec.model.dtype}}


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters (tied ones once) and the buffers that a checkpoint holds."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    kept = model.state_dict(keep_vars=True)
    return parameters | {name: value for name, value in model.named_buffers() if name in kept}


def _values(model: nn.Module) -> Iterable[torch.Tensor]:
    """Return every parameter and buffer once."""
    yield from model.parameters()
    yield from model.buffers()


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 over sorted name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

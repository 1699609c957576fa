"""A classifier split into trunk, head and last layer.

`SplitModel` reads the output of the trunk (`features`) and the input of the last layer (`representation`). CNNs have
methods for both. For a Hugging Face classifier forward hooks record them: the last linear layer returns the logits, and
the first module of the head receives the output of the trunk (pooled, or as a sequence, of which the first or, in a
decoder, the last token is used).

Slots name the query and value layers of the last attention blocks, independent of the model's depth. "0.query" is the
query layer of the lowest chosen block. LoRA factors in a slot add B A x to the output of its layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig

from lorabbit.errors import BadInput
from lorabbit.training_session import Layer
from lorabbit_client.data.features import Batch
from lorabbit_client.models import tiny
from lorabbit_client.models.cnn import SHAPES, Cnn
from lorabbit_client.models.loading import quiet
from lorabbit_client.models.source import ModelSource

ROLES = {
    "query": ("query", "q_proj", "q_lin", "query_proj"),
    "value": ("value", "v_proj", "v_lin", "value_proj"),
}
"""Role -> what layers of that role are called in the models of transformers."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""A (r x d_in) and B (d_out x r)."""


def slots_of(model: nn.Module, name: str, count: int) -> dict[str, nn.Linear]:
    """Return the layers in the last `count` blocks by slot; raises BadInput for a model without so many blocks."""
    roles = {own: role for role, names in ROLES.items() for own in names}
    by_block: dict[int, dict[str, nn.Linear]] = {}
    for path, module in model.named_modules():
        role = roles.get(path.rpartition(".")[2])
        block = next((int(part) for part in path.split(".") if part.isdigit()), None)
        if role is not None and block is not None and isinstance(module, nn.Linear):
            by_block.setdefault(block, {})[role] = module
    blocks = sorted(block for block, layers in by_block.items() if layers.keys() == ROLES.keys())
    if len(blocks) < count:
        raise BadInput(
            f"method.slots: {name!r} has {len(blocks)} attention blocks with a query and a value layer of their own, "
            f"not {count}; lower it, or set method.site to 'fc_stack'"
        )
    return {
        f"{slot}.{role}": by_block[block][role]
        for slot, block in enumerate(blocks[len(blocks) - count :])
        for role in ROLES
    }


@contextmanager
def lora_hooks(layers: Mapping[str, nn.Linear], pairs: Mapping[str, Pair]) -> Iterator[None]:
    """Add B A x to the outputs of the layers in these slots, until the end of the block."""

    def make_hook(pair: Pair) -> Any:  # noqa: ANN401 - a hook
        down, up = pair

        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
            return out + (given[0].to(down) @ down.T @ up.T).to(out)

        return hook

    hooks = [layers[slot].register_forward_hook(make_hook(pair)) for slot, pair in pairs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


BEFORE_LAST = "pre_classifier"
"""DistilBERT opens its head with this module, beside the last layer and not around it."""
DECODER_HEAD = "score"
"""Decoders answer from the last token and not the first."""
WIDTH_KEYS = ("hidden_size", "dim", "n_embd", "d_model")
SEQUENCE = 3
"""Dimensions of (batch, tokens, width)."""


class ForwardView(Protocol):
    """One batch in one model; each part is computed on first use."""

    def features(self) -> torch.Tensor:
        """Output of the trunk, float32 (batch, d_f)."""

    def representation(self) -> torch.Tensor:
        """Input of the last layer, float32 (batch, d)."""

    def logits(self) -> torch.Tensor:
        """Logits, float32 (batch, classes)."""


class SplitModel:
    """A classifier cut into trunk, head and last layer."""

    def __init__(self, model: nn.Module, name: str, classes: int) -> None:
        """Find the layers; raises BadInput if no linear layer has one output per class."""
        self.model, self.name = model, name
        self._known = frozenset(inspect.signature(model.forward).parameters)
        self.last, self._layer = _last_linear(model, name, classes)
        root = self.last.split(".")[0]
        children = dict(model.named_children())
        self._head_entry = children.get(BEFORE_LAST, children[root])
        self.reads_last_token = root == DECODER_HEAD
        self.widths: Mapping[Layer, int] = {
            "features": model.fc1.in_features if isinstance(model, Cnn) else _width_into(self._head_entry),
            "representation": self._layer.in_features,
        }

    def view(self, batch: Batch) -> ForwardView:
        """Return the view of a batch."""
        if isinstance(self.model, Cnn):
            return _CnnView(self.model, batch["pixel_values"])
        given = {key: value for key, value in batch.items() if key in self._known and key != "labels"}
        return _HookedView(self, given)

    def slots(self, count: int) -> dict[str, nn.Linear]:
        """Query and value layers of the last `count` attention blocks by slot; raises BadInput where there are none."""
        return slots_of(self.model, self.name, count)

    def adapted(self, batch: Batch, pairs: Mapping[str, Pair]) -> torch.Tensor:
        """Return the logits, float32, with these pairs of factors in their slots."""
        with lora_hooks(self.slots(1 + max(int(slot.partition(".")[0]) for slot in pairs)), pairs):
            return self.view(batch).logits()

    def run(self, given: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the inputs of the head and of the last layer, and the logits."""
        inputs: dict[str, torch.Tensor] = {}
        hooks = [
            self._head_entry.register_forward_pre_hook(lambda _, given: inputs.update(features=given[0])),
            self._layer.register_forward_pre_hook(lambda _, given: inputs.update(representation=given[0])),
        ]
        try:
            return inputs, self.model(**given).logits
        finally:
            for hook in hooks:
                hook.remove()


class _CnnView:
    """View of a CNN; computes only the layers that are needed."""

    def __init__(self, model: Cnn, pixels: torch.Tensor) -> None:
        self._model, self._pixels = model, pixels
        self._features: torch.Tensor | None = None
        self._representation: torch.Tensor | None = None

    def _cached_features(self) -> torch.Tensor:
        if self._features is None:
            self._features = self._model.features(self._pixels.to(self._model.conv1.weight.dtype))
        return self._features

    def _cached_representation(self) -> torch.Tensor:
        if self._representation is None:
            self._representation = self._model.represent(self._cached_features())
        return self._representation

    def features(self) -> torch.Tensor:
        return self._cached_features().float()

    def representation(self) -> torch.Tensor:
        return self._cached_representation().float()

    def logits(self) -> torch.Tensor:
        logits: torch.Tensor = self._model.fc3(self._cached_representation())
        return logits.float()


class _HookedView:
    """View of a transformer; one forward pass, recorded by hooks."""

    def __init__(self, split: SplitModel, given: Batch) -> None:
        self._split, self._given = split, given
        self._outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def _run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._outputs is None:
            inputs, logits = self._split.run(self._given)
            places = (self._token(inputs["features"]), self._token(inputs["representation"]))
            self._outputs = (places[0].float(), places[1].float(), logits.float())
        return self._outputs

    def _token(self, value: torch.Tensor) -> torch.Tensor:
        """Select the token that the head reads from a sequence."""
        if value.ndim != SEQUENCE:
            return value.flatten(1)
        mask = self._given.get("attention_mask")
        if not self._split.reads_last_token or mask is None:
            return value[:, 0]
        places = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
        return value[torch.arange(len(value), device=value.device), places]

    def features(self) -> torch.Tensor:
        return self._run()[0]

    def representation(self) -> torch.Tensor:
        return self._run()[1]

    def logits(self) -> torch.Tensor:
        return self._run()[2]


def _last_linear(model: nn.Module, name: str, classes: int) -> tuple[str, nn.Linear]:
    """Return the name and module of the last linear layer with one output per class."""
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    heads = [(path, module) for path, module in linear if module.out_features == classes]
    if not heads:
        raise BadInput(f"model.name: {name!r} has no linear layer with {classes} outputs, so no last layer to speak of")
    return heads[-1]


def _width_into(entry: nn.Module) -> int:
    """Return the width that a head's first linear layer reads."""
    return next(module.in_features for module in entry.modules() if isinstance(module, nn.Linear))


def widths_of(name: str, source: ModelSource) -> dict[Layer, int]:
    """Widths of a model by its name, from its configuration alone; no weight is loaded."""
    family, _, which = name.partition(":")
    if source.folder is None and family == "cnn":
        if which not in SHAPES:
            raise BadInput(
                f"model.variants: there is no 'cnn:{which}' (known: {', '.join(f'cnn:{n}' for n in SHAPES)})"
            )
        return {"features": Cnn.flat_width(which), "representation": Cnn.LAST_WIDTH}
    with quiet():
        if source.folder is None:
            config: Any = tiny.tiny_config(which)
        else:
            config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
    width = next((getattr(config, key) for key in WIDTH_KEYS if isinstance(getattr(config, key, None), int)), None)
    if width is None and getattr(config, "hidden_sizes", None):
        width = config.hidden_sizes[-1]
    if width is None:
        raise BadInput(f"model.variants: the configuration of {name!r} states no width ({', '.join(WIDTH_KEYS)})")
    return {"features": width, "representation": width}

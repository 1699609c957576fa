"""A client's own classifier, looked into at two places: what its trunk sees, and the input of its last layer.

The CNNs of the zoo are cut by their own methods. Any Hugging Face classifier is cut by hooks: its last
linear layer answers with the logits, and the module that opens its head receives what the trunk saw
(pooled, or as a sequence, of which the first or, in a decoder, the last token counts).

Slots: query and value layers of a classifier's last attention blocks, under names that models of any depth share.

"0.query" is the query layer of the lowest of the chosen blocks, whatever its number in the model and whatever its
own name. A pair of factors in a slot adds B A x to what the layer there answers.
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
    whole = sorted(block for block, layers in by_block.items() if layers.keys() == ROLES.keys())
    if len(whole) < count:
        raise BadInput(
            f"method.slots: {name!r} has {len(whole)} attention blocks with a query and a value layer of their own, "
            f"not {count}; lower it, or set method.site to 'fc_stack'"
        )
    return {
        f"{slot}.{role}": by_block[block][role]
        for slot, block in enumerate(whole[len(whole) - count :])
        for role in ROLES
    }


@contextmanager
def filled(layers: Mapping[str, nn.Linear], pairs: Mapping[str, Pair]) -> Iterator[None]:
    """Let the layers of these slots add B A x to their answers, until the end of the block."""

    def adds(pair: Pair) -> Any:  # noqa: ANN401 - a hook
        down, up = pair

        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
            return out + (given[0].to(down) @ down.T @ up.T).to(out)

        return hook

    hooks = [layers[slot].register_forward_hook(adds(pair)) for slot, pair in pairs.items()]
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
    """One batch seen by one model; each part is computed when it is first asked for."""

    def features(self) -> torch.Tensor:
        """What the trunk sees, float32 (batch, d_f)."""

    def representation(self) -> torch.Tensor:
        """Input of the last layer, float32 (batch, d)."""

    def logits(self) -> torch.Tensor:
        """Answers, float32 (batch, classes)."""


class SplitModel:
    """A classifier cut into trunk, head and last layer."""

    def __init__(self, model: nn.Module, name: str, classes: int) -> None:
        """Find the places; raises BadInput where no linear layer answers with the classes."""
        self.model, self.name = model, name
        self._known = frozenset(inspect.signature(model.forward).parameters)
        self.last, self._layer = _last_linear(model, name, classes)
        root = self.last.split(".")[0]
        children = dict(model.named_children())
        self._entry = children.get(BEFORE_LAST, children[root])
        self.reads_last = root == DECODER_HEAD
        self.widths: Mapping[Layer, int] = {
            "features": model.fc1.in_features if isinstance(model, Cnn) else _width_into(self._entry),
            "representation": self._layer.in_features,
        }

    def view(self, batch: Batch) -> ForwardView:
        """Look at a batch."""
        if isinstance(self.model, Cnn):
            return _CnnView(self.model, batch["pixel_values"])
        given = {key: value for key, value in batch.items() if key in self._known and key != "labels"}
        return _HookedView(self, given)

    def slots(self, count: int) -> dict[str, nn.Linear]:
        """Query and value layers of the last `count` attention blocks by slot; raises BadInput where there are none."""
        return slots_of(self.model, self.name, count)

    def adapted(self, batch: Batch, pairs: Mapping[str, Pair]) -> torch.Tensor:
        """Return the logits, float32, with these pairs of factors in their slots."""
        with filled(self.slots(1 + max(int(slot.partition(".")[0]) for slot in pairs)), pairs):
            return self.view(batch).logits()

    def run(self, given: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return what reached the head and the last layer, and the logits."""
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            self._entry.register_forward_pre_hook(lambda _, given: seen.update(features=given[0])),
            self._layer.register_forward_pre_hook(lambda _, given: seen.update(representation=given[0])),
        ]
        try:
            return seen, self.model(**given).logits
        finally:
            for hook in hooks:
                hook.remove()


class _CnnView:
    """A CNN goes no further than it is asked to."""

    def __init__(self, model: Cnn, pixels: torch.Tensor) -> None:
        self._model, self._pixels = model, pixels
        self._seen: torch.Tensor | None = None
        self._before: torch.Tensor | None = None

    def _trunk(self) -> torch.Tensor:
        if self._seen is None:
            self._seen = self._model.features(self._pixels.to(self._model.conv1.weight.dtype))
        return self._seen

    def _hidden(self) -> torch.Tensor:
        if self._before is None:
            self._before = self._model.represent(self._trunk())
        return self._before

    def features(self) -> torch.Tensor:
        return self._trunk().float()

    def representation(self) -> torch.Tensor:
        return self._hidden().float()

    def logits(self) -> torch.Tensor:
        answers: torch.Tensor = self._model.fc3(self._hidden())
        return answers.float()


class _HookedView:
    """A transformer runs once, and its hooks note what passes."""

    def __init__(self, split: SplitModel, given: Batch) -> None:
        self._split, self._given = split, given
        self._noted: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def _run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._noted is None:
            seen, answers = self._split.run(self._given)
            places = (self._token(seen["features"]), self._token(seen["representation"]))
            self._noted = (places[0].float(), places[1].float(), answers.float())
        return self._noted

    def _token(self, value: torch.Tensor) -> torch.Tensor:
        """Take the token that a head reads, where it is given all of them."""
        if value.ndim != SEQUENCE:
            return value.flatten(1)
        mask = self._given.get("attention_mask")
        if not self._split.reads_last or mask is None:
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
    """Return the layer that answers, with its name: the last linear one with an output per class."""
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

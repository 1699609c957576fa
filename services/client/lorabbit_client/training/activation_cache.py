"""The frozen prefix of an encoder, computed once for each example instead of once for each step.

Below the lowest block that moves, a frozen model without dropout gives the same activations for an
example in every epoch and round. They are kept and handed to the next block. A value must not depend
on what was kept before, or two processes would train apart: examples of one length are put through in
groups that follow from the client's data alone, without padding, and whether the prefix is kept at all
follows from the job and the data alone. Results therefore differ from uncached ones by rounding, since
there a text is padded to its batch, and are the same bytes for a cold and a warm cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lorabbit_client.data.table import IntArray
from lorabbit_client.dataset import Examples
from lorabbit_client.models.trainable import TrainableModel, hash_tensors

FAMILIES = frozenset({"bert", "camembert", "distilbert", "electra", "roberta", "vit", "xlm-roberta"})
"""Encoders whose blocks hand one tensor on and keep nothing beside it."""
GROUP = 32
"""Examples put through together."""
BUDGET_BYTES = 2**30
"""Most bytes that a process keeps."""
PAYS = 3
"""How often a job must use an example for its prefix to be kept."""


class _PrefixReached(Exception):
    """The prefix is done; carries nothing."""


class ActivationCache:
    """Activations of a process, by client and group; the oldest go when there is no room."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        """Start empty."""
        self.budget_bytes = budget_bytes
        self._key: object = None
        self._kept: OrderedDict[object, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def use(self, key: object) -> None:
        """Forget everything when the model below is not the one of before."""
        if key != self._key:
            self._kept.clear()
            self._key, self._bytes = key, 0

    def get(self, place: object) -> torch.Tensor | None:
        """Return what is kept at a place."""
        return self._kept.get(place)

    def put(self, place: object, value: torch.Tensor) -> None:
        """Keep a value, and as many of the newest others as there is room for."""
        self._kept[place] = value
        self._bytes += value.nbytes
        while self._bytes > self.budget_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


@dataclass(frozen=True, slots=True)
class ExampleUsage:
    """How often a job uses one client's examples, for the estimate."""

    rows: int
    """Rows that this task trains on, with repeats."""
    rounds: int
    clients: int


class FrozenPrefix:
    """The frozen prefix of one training."""

    def __init__(  # noqa: PLR0913
        self,
        model: TrainableModel,
        blocks: Sequence[nn.Module],
        examples: Examples,
        *,
        cache: ActivationCache,
        owner: object,
        group: int = GROUP,
    ) -> None:
        """Skip `blocks`, the lowest of the model, for one client's examples, `group` of them put through together."""
        self._model = model
        self._blocks = blocks
        self._examples = examples
        self._cache = cache
        self._owner = owner
        self._groups = canonical_groups(examples.lengths, group)
        self._group_of = np.empty(len(examples), dtype=np.int64)
        self._place_in = np.empty(len(examples), dtype=np.int64)
        for number, places in enumerate(self._groups):
            self._group_of[places], self._place_in[places] = number, np.arange(len(places))
        self._at_hand: dict[int, torch.Tensor] = {}
        self._whole: torch.Tensor | None = None
        self._current: torch.Tensor | None = None
        self.computed = 0
        """Examples put through the prefix in this training."""
        self.taken = 0
        """Examples, with repeats, whose activations were handed over."""

    @property
    def saved(self) -> int:
        """Examples, with repeats, that this training need not put through the prefix."""
        return max(0, self.taken - self.computed)

    def prepare(self, order: Iterable[IntArray]) -> None:
        """Have the activations of these rows at hand; the model must be in eval mode."""
        needed = sorted({int(number) for positions in order for number in self._group_of[positions]})
        for number in needed:
            value = self._cache.get((self._owner, number))
            if value is None:
                value = self._compute(self._groups[number])
                self._cache.put((self._owner, number), value)
                self.computed += len(value)
            self._at_hand[number] = value

    def step(self, positions: IntArray) -> None:
        """Hand the activations of a batch to the next forward pass, padded with zeros where attention is masked."""
        rows = [self._at_hand[int(self._group_of[p])][int(self._place_in[p])] for p in positions]
        self.taken += len(rows)
        self._whole = self._current = nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def narrow(self, place: slice) -> None:
        """Hand the activations of a piece of that batch alone to the next forward pass, padded as before."""
        self._current = None if self._whole is None else self._whole[place]

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Let the lowest block answer with what `step` handed over, and the others of the prefix pass it on."""
        lowest, *others = self._blocks
        try:
            lowest.forward = self._answer
            for block in others:
                block.forward = _forward
            yield
        finally:
            for block in self._blocks:
                del block.forward
            self._whole = self._current = None

    def _answer(self, _hidden: torch.Tensor, *_args: Any, **_named: Any) -> torch.Tensor:  # noqa: ANN401
        if self._current is None:
            raise RuntimeError("internal: a forward pass without its prefix")
        return self._current

    def moves(self) -> bool:
        """Tell whether a gradient would reach anything in or below these blocks, such as a soft prompt."""
        with torch.enable_grad():
            return self._reach(np.zeros(1, dtype=np.int64)).requires_grad

    def _compute(self, group: IntArray) -> torch.Tensor:
        """Put one group through the prefix."""
        with torch.no_grad():
            return self._reach(group)

    def _reach(self, group: IntArray) -> torch.Tensor:
        """Return what the highest of these blocks answers for some rows."""
        found: list[torch.Tensor] = []

        def reached(_module: nn.Module, _given: object, out: torch.Tensor) -> None:
            found.append(out)
            raise _PrefixReached

        batch = self._examples.batch(group)
        device = next(self._model.model.parameters()).device
        handle = self._blocks[-1].register_forward_hook(reached)
        try:
            self._model.model(**{name: value.to(device) for name, value in batch.items()})
        except _PrefixReached:
            pass
        finally:
            handle.remove()
        return found[0]


def _forward(hidden: torch.Tensor, *_args: Any, **_named: Any) -> torch.Tensor:  # noqa: ANN401
    return hidden


def canonical_groups(lengths: IntArray, size: int = GROUP) -> list[IntArray]:
    """Cut rows into groups of one length each, in the order of the rows: the same for every batch and history."""
    groups: list[IntArray] = []
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        groups.extend(rows[i : i + size] for i in range(0, len(rows), size))
    return groups


def find_prefix(  # noqa: PLR0913
    model: TrainableModel,
    examples: Examples,
    moving: Iterable[torch.Tensor],
    usage: ExampleUsage,
    *,
    cache: ActivationCache,
    base: object,
    owner: object,
    group: int = GROUP,
) -> FrozenPrefix | None:
    """Return the prefix that a training can skip; None where there is none, or where keeping it does not pay."""
    config: Any = getattr(model.model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or not len(examples):
        return None
    blocks = _blocks(model.model)
    moved = {id(value) for value in moving}
    frozen = _frozen_blocks(blocks, moved)
    if (
        not frozen
        or _is_random(model.model, frozen)
        or not _is_worth_caching(config, examples, usage, cache.budget_bytes)
    ):
        return None
    below = {id(value) for block in frozen for value in block.parameters()}
    below |= {id(value) for name, value in model.model.named_parameters() if "embeddings" in name}
    traveling = {name: value for name, value in model.tensors.items() if id(value) in below}
    prefix = FrozenPrefix(model, frozen, examples, cache=cache, owner=owner, group=group)
    if prefix.moves():
        return None
    cache.use((base, len(frozen), hash_tensors(traveling)))
    return prefix


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the encoder's blocks, lowest first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max((len(blocks) for blocks in lists), default=0)
    return next((list(blocks) for blocks in lists if len(blocks) == longest), [])


def _frozen_blocks(blocks: Sequence[nn.Module], moved: set[int]) -> list[nn.Module]:
    """Return the lowest blocks in which nothing moves."""
    frozen: list[nn.Module] = []
    for block in blocks:
        if any(id(value) in moved for value in block.parameters()):
            break
        frozen.append(block)
    return frozen


def _is_random(model: nn.Module, frozen: Sequence[nn.Module]) -> bool:
    """Tell whether a dropout works in the prefix."""
    config: Any = model.config
    rates = (value for name, value in config.to_dict().items() if "drop" in name and "classif" not in name)
    if any(isinstance(rate, float) and rate > 0.0 for rate in rates):
        return True
    return any(isinstance(m, nn.Dropout) and m.p > 0.0 for block in frozen for m in block.modules())


def _is_worth_caching(config: Any, examples: Examples, usage: ExampleUsage, budget_bytes: int) -> bool:  # noqa: ANN401
    """Tell from the job and the data alone whether examples are used often enough while they are kept."""
    rows = len(examples)
    width = int(getattr(config, "hidden_size", 0))
    tokens = int(examples.lengths.sum())
    if config.model_type == "vit":
        if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
            return False
        tokens = rows * (1 + (config.image_size // config.patch_size) ** 2)
    size = tokens * width * 4
    all_fit = size * usage.clients <= budget_bytes
    uses = usage.rows * (usage.rounds if all_fit else 1)
    return size <= budget_bytes and uses >= PAYS * rows

"""Cache of the activations of an encoder's frozen lowest blocks.

Below the lowest trained block, a frozen model without dropout gives the same activations for an example in every epoch
and round. The cache computes them once per example. Results must not depend on the content of the cache, so examples
of one length are grouped by the client's data alone, without padding, and the decision to cache depends on the job and
the data alone. A cold and a warm cache give the same bytes. Results with and without the cache differ by rounding,
since without it a text is padded to its batch.
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
"""Examples of one forward pass."""
BUDGET_BYTES = 2**30
"""Largest size of a process's cache."""
MIN_USES = 3
"""Smallest number of uses of an example for which caching pays."""


class _StopForward(Exception):
    """Ends a forward pass after the last frozen block."""


class ActivationCache:
    """Activations of a process, by client and group; the oldest are evicted when it is full."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        """Start empty."""
        self.budget_bytes = budget_bytes
        self._key: object = None
        self._entries: OrderedDict[object, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def use(self, key: object) -> None:
        """Clear the cache if the frozen blocks differ from those of the last call."""
        if key != self._key:
            self._entries.clear()
            self._key, self._bytes = key, 0

    def get(self, key: object) -> torch.Tensor | None:
        """Return a cached value, or None."""
        return self._entries.get(key)

    def put(self, key: object, value: torch.Tensor) -> None:
        """Cache a value, and evict the oldest ones beyond the budget."""
        self._entries[key] = value
        self._bytes += value.nbytes
        while self._bytes > self.budget_bytes and len(self._entries) > 1:
            self._bytes -= self._entries.popitem(last=False)[1].nbytes


@dataclass(frozen=True, slots=True)
class ExampleUsage:
    """How often a job uses one client's examples, to estimate the benefit of caching."""

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
        """Skip `blocks`, the lowest of the model, for one client's examples; `group` is the size of a forward pass."""
        self._model = model
        self._blocks = blocks
        self._examples = examples
        self._cache = cache
        self._owner = owner
        self._groups = canonical_groups(examples.lengths, group)
        self._group_of = np.empty(len(examples), dtype=np.int64)
        self._row_in_group = np.empty(len(examples), dtype=np.int64)
        for number, rows in enumerate(self._groups):
            self._group_of[rows], self._row_in_group[rows] = number, np.arange(len(rows))
        self._activations: dict[int, torch.Tensor] = {}
        self._batch_activations: torch.Tensor | None = None
        self._next_activations: torch.Tensor | None = None
        self.computed = 0
        """Examples whose activations were computed in this training."""
        self.reused = 0
        """Examples, with repeats, whose activations were used."""

    @property
    def saved(self) -> int:
        """Examples, with repeats, for which the frozen blocks were not computed."""
        return max(0, self.reused - self.computed)

    def prepare(self, order: Iterable[IntArray]) -> None:
        """Load or compute the activations of these rows; the model must be in eval mode."""
        needed = sorted({int(number) for positions in order for number in self._group_of[positions]})
        for number in needed:
            value = self._cache.get((self._owner, number))
            if value is None:
                value = self._compute(self._groups[number])
                self._cache.put((self._owner, number), value)
                self.computed += len(value)
            self._activations[number] = value

    def load_batch(self, positions: IntArray) -> None:
        """Use the activations of a batch in the next forward pass, padded with zeros where attention is masked."""
        rows = [self._activations[int(self._group_of[p])][int(self._row_in_group[p])] for p in positions]
        self.reused += len(rows)
        self._batch_activations = self._next_activations = nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def select_rows(self, rows: slice) -> None:
        """Use the activations of some rows of that batch in the next forward pass, with the same padding."""
        self._next_activations = None if self._batch_activations is None else self._batch_activations[rows]

    @contextmanager
    def skip_blocks(self) -> Iterator[None]:
        """Replace the forward of the frozen blocks: the lowest returns the cached activations, others their input."""
        lowest, *others = self._blocks
        try:
            lowest.forward = self._cached_forward
            for block in others:
                block.forward = _identity_forward
            yield
        finally:
            for block in self._blocks:
                del block.forward
            self._batch_activations = self._next_activations = None

    def _cached_forward(self, _hidden: torch.Tensor, *_args: Any, **_named: Any) -> torch.Tensor:  # noqa: ANN401
        if self._next_activations is None:
            raise RuntimeError("internal: a forward pass without its prefix")
        return self._next_activations

    def requires_grad_below(self) -> bool:
        """Tell whether something in or below these blocks needs a gradient, such as a soft prompt."""
        with torch.enable_grad():
            return self._run_blocks(np.zeros(1, dtype=np.int64)).requires_grad

    def _compute(self, group: IntArray) -> torch.Tensor:
        """Compute the activations of one group."""
        with torch.no_grad():
            return self._run_blocks(group)

    def _run_blocks(self, group: IntArray) -> torch.Tensor:
        """Return the output of the highest frozen block for some rows."""
        found: list[torch.Tensor] = []

        def capture(_module: nn.Module, _given: object, out: torch.Tensor) -> None:
            found.append(out)
            raise _StopForward

        batch = self._examples.batch(group)
        device = next(self._model.model.parameters()).device
        handle = self._blocks[-1].register_forward_hook(capture)
        try:
            self._model.model(**{name: value.to(device) for name, value in batch.items()})
        except _StopForward:
            pass
        finally:
            handle.remove()
        return found[0]


def _identity_forward(hidden: torch.Tensor, *_args: Any, **_named: Any) -> torch.Tensor:  # noqa: ANN401
    return hidden


def canonical_groups(lengths: IntArray, size: int = GROUP) -> list[IntArray]:
    """Split rows into groups of one length each, in row order."""
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
    """Return the frozen prefix of a training; None without one, or if caching does not pay."""
    config: Any = getattr(model.model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or not len(examples):
        return None
    blocks = _blocks(model.model)
    trained_ids = {id(value) for value in moving}
    frozen = _frozen_blocks(blocks, trained_ids)
    if (
        not frozen
        or _is_random(model.model, frozen)
        or not _is_worth_caching(config, examples, usage, cache.budget_bytes)
    ):
        return None
    prefix_ids = {id(value) for block in frozen for value in block.parameters()}
    prefix_ids |= {id(value) for name, value in model.model.named_parameters() if "embeddings" in name}
    traveling = {name: value for name, value in model.tensors.items() if id(value) in prefix_ids}
    prefix = FrozenPrefix(model, frozen, examples, cache=cache, owner=owner, group=group)
    if prefix.requires_grad_below():
        return None
    cache.use((base, len(frozen), hash_tensors(traveling)))
    return prefix


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the encoder's blocks, lowest first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max((len(blocks) for blocks in lists), default=0)
    return next((list(blocks) for blocks in lists if len(blocks) == longest), [])


def _frozen_blocks(blocks: Sequence[nn.Module], trained_ids: set[int]) -> list[nn.Module]:
    """Return the lowest blocks without trained parameters."""
    frozen: list[nn.Module] = []
    for block in blocks:
        if any(id(value) in trained_ids for value in block.parameters()):
            break
        frozen.append(block)
    return frozen


def _is_random(model: nn.Module, frozen: Sequence[nn.Module]) -> bool:
    """Tell whether the frozen blocks have dropout."""
    config: Any = model.config
    rates = (value for name, value in config.to_dict().items() if "drop" in name and "classif" not in name)
    if any(isinstance(rate, float) and rate > 0.0 for rate in rates):
        return True
    return any(isinstance(m, nn.Dropout) and m.p > 0.0 for block in frozen for m in block.modules())


def _is_worth_caching(config: Any, examples: Examples, usage: ExampleUsage, budget_bytes: int) -> bool:  # noqa: ANN401
    """Decide from the job and the data alone whether examples are used often enough while cached."""
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
    return size <= budget_bytes and uses >= MIN_USES * rows

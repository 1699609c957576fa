"""The local training loop: the job's optimizer over one client's rows, from the task's seed alone.

The optimizer updates float32 copies of half-precision parameters. Values that a mask freezes are restored after every
step, so neither momentum nor weight decay changes them. A loss that is not finite fails the task, so that it does not
reach the aggregate.

The loss of a batch is a mean over its units: rows, or the tokens that have a label. A micro-batch counts by its share
of the units, so gradients of micro-batches add up to that of the batch, up to rounding. Micro-batches keep the padding
of the whole batch. Each draws its own dropout and has its own batch statistics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from lorabbit.errors import LoRAbbitError, Refused
from lorabbit.job.spec import LocalSpec
from lorabbit.runtime.seeds import derive_seed
from lorabbit.training_session import GradientTerm
from lorabbit.types import Tensors
from lorabbit_client.capabilities import UNLIMITED, TrainingLimits
from lorabbit_client.data.features import Batch, Features
from lorabbit_client.data.table import IntArray
from lorabbit_client.dataset import Examples
from lorabbit_client.execution.interface import OnProgress
from lorabbit_client.models.arrays import to_torch
from lorabbit_client.models.loading import seeded
from lorabbit_client.models.trainable import TrainableModel
from lorabbit_client.training.activation_cache import FrozenPrefix
from lorabbit_client.training.batching import batches as cut_batches
from lorabbit_client.training.batching import repeated, rows_of, steps_of, steps_over


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


class FrozenEntries:
    """Entries outside the masks, as they were when the training began."""

    def __init__(self, masters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors that have masked entries."""
        self._masters = masters
        self._masks = {name: masks[name] for name in masters if name in masks and not masks[name].all()}
        self._values = {name: masters[name].detach().clone() for name in self._masks}

    def clear_gradients(self) -> None:
        """Set gradients outside the masks to zero, so that clipping sees trained entries only."""
        for name, mask in self._masks.items():
            gradient = self._masters[name].grad
            if gradient is not None:
                gradient.mul_(mask)

    def restore_values(self) -> None:
        """Restore the values outside the masks, which momentum or weight decay may have changed."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                value = self._masters[name]
                value.copy_(torch.where(mask, value, self._values[name]))


HALF = frozenset({torch.float16, torch.bfloat16})


def fp32_master_params(moving: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters for the optimizer: float32 copies of half-precision ones, others themselves.

    In float16 Adam's epsilon is zero and its first step is 0 / 0; in bfloat16 a step below a 256th
    of a weight is rounded away.
    """
    return {
        name: nn.Parameter(value.detach().float()) if value.dtype in HALF else value for name, value in moving.items()
    }


def copy_gradients(moving: dict[str, nn.Parameter], masters: dict[str, nn.Parameter]) -> None:
    """Move the gradients of half-precision parameters to their float32 copies."""
    for name, value in moving.items():
        if masters[name] is not value and value.grad is not None:
            masters[name].grad = value.grad.float()
            value.grad = None


def copy_values(masters: dict[str, nn.Parameter], moving: dict[str, nn.Parameter]) -> None:
    """Round the float32 copies back into the model."""
    with torch.no_grad():
        for name, value in moving.items():
            if masters[name] is not value:
                value.copy_(masters[name])


FIRST_SCALE = 2.0**12
"""Factor on a float16 loss at first, so that small gradients do not vanish; it is halved when they overflow."""


def split_micro_batches(features: Features, batch: Batch, max_rows: int) -> Iterator[tuple[slice, Batch, float]]:
    """Yield micro-batches of at most `max_rows`: their rows, tensors, and share of the loss.

    A micro-batch without units is left out, since it has no mean loss.
    """
    rows = len(next(iter(batch.values())))
    places = [slice(start, min(start + max_rows, rows)) for start in range(0, rows, max_rows)]
    micro_batches = [{name: value[place] for name, value in batch.items()} for place in places]
    units = [features.units(micro_batch) for micro_batch in micro_batches]
    total = sum(units)
    for place, micro_batch, count in zip(places, micro_batches, units, strict=True):
        if count or not total:
            yield place, micro_batch, count / total if total else 1 / len(micro_batches)


def autocast_context(limits: TrainingLimits, device: torch.device) -> AbstractContextManager[object]:
    """Return autocast to the client's dtype, or a null context for float32."""
    if limits.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, limits.dtype))


def make_grad_scaler(limits: TrainingLimits, device: torch.device) -> torch.amp.GradScaler:
    """Return a gradient scaler, enabled for float16 only."""
    return torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=limits.dtype == "float16")


PROGRESS_SECONDS = 0.25
FindPrefix: TypeAlias = Callable[[Sequence[torch.Tensor], int], FrozenPrefix | None]
"""(trained parameters, number of rows) -> frozen blocks whose activations are cached, or None."""


@dataclass(frozen=True, slots=True)
class TrainingSchedule:
    """Position of a task in the job; the learning-rate schedule runs over all rounds."""

    round: int
    rounds: int

    def share(self, step: int, steps: int) -> float:
        """Return how much of the job is done in the middle of a 0-based step of this round."""
        return (max(self.round, 1) - 1 + (step + 0.5) / steps) / self.rounds


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a training did."""

    loss: float
    steps: int
    skipped: int = 0
    """Rows, with repeats, whose frozen prefix was not computed again."""


def lr_multiplier(local: LocalSpec, share: float) -> float:
    """Return the factor on the learning rate when `share` of the whole job is done."""
    warmup = local.warmup_share
    if share < warmup:
        return share / warmup
    left = (1.0 - share) / (1.0 - warmup)
    if local.schedule == "linear":
        return left
    return 0.5 * (1.0 - math.cos(math.pi * left)) if local.schedule == "cosine" else 1.0


def make_optimizer(local: LocalSpec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the job's optimizer, fused where the tensors allow it."""
    fused = all(p.dtype == torch.float32 for p in parameters)
    rate, decay = local.learning_rate, local.weight_decay
    if local.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=local.momentum, weight_decay=decay, fused=fused)
    if local.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)


class Trainer:
    """Tunes a model on one client's rows."""

    def __init__(  # noqa: PLR0913
        self,
        model: TrainableModel,
        examples: Examples,
        local: LocalSpec,
        *,
        schedule: TrainingSchedule,
        seed: int,
        find_prefix: FindPrefix = lambda _moving, _rows: None,
        limits: TrainingLimits = UNLIMITED,
    ) -> None:
        """Train `model` on `examples` with the settings in `local`, within the client's limits."""
        self._limits = limits
        self._find_prefix = find_prefix
        self._prefix: FrozenPrefix | None = None
        self._model = model
        self.examples = examples
        self.local = local
        self._schedule = schedule
        self._seed = seed
        self._device = next(model.model.parameters()).device
        self._scaler = make_grad_scaler(limits, self._device)

    def run(
        self,
        on_progress: OnProgress,
        *,
        gradient_term: GradientTerm | None = None,
        frozen: Callable[[str], bool] | None = None,
        mask: Tensors | None = None,
        batches: Sequence[Sequence[int]] | None = None,
    ) -> TrainingResult:
        """Train from the model's present tensors with a fresh optimizer; raises LoRAbbitError if it diverges."""
        masks = make_masks(self._model, mask or {})
        fully_masked = {name for name, trained in masks.items() if not trained.any()}
        frozen_tensors = {
            n: v for n, v in self._model.tensors.items() if n in fully_masked or (frozen is not None and frozen(n))
        }
        moving = {name: value for name, value in self._model.parameters().items() if name not in frozen_tensors}
        if not moving:
            raise LoRAbbitError("nothing is left to train: every trainable tensor is frozen")
        steps, rows = self._batch_order(batches)
        with (
            _train_only(moving, frozen_tensors, self._model.model),
            self._skip_prefix(rows),
            seeded(derive_seed(self._seed, "dropout")),
        ):
            self._train_mode()
            return self._train_loop(moving, masks, (steps, iter(rows)), on_progress, gradient_term)

    @contextmanager
    def _skip_prefix(self, rows: Sequence[IntArray]) -> Iterator[None]:
        """Skip the frozen blocks with cached activations, if caching pays."""
        moving = [value for value in self._model.parameters().values() if value.requires_grad]
        self._prefix = self._find_prefix(moving, sum(map(len, rows)))
        if self._prefix is None:
            yield
            return
        with autocast_context(self._limits, self._device):
            self._prefix.prepare(rows)
        with self._prefix.skip_blocks():
            yield

    def _batch_order(self, batches: Sequence[Sequence[int]] | None) -> tuple[int, list[IntArray]]:
        """Return how many steps there are, and the rows of each."""
        local = self.local
        if batches is not None:
            cut = [rows_of(self.examples, batch) for batch in batches if len(batch)]
            if not cut:
                raise LoRAbbitError("nothing is left to train on: the method named no example")
            steps = steps_over(local, len(cut))
            return steps, list(repeated(cut, steps))
        steps = steps_of(local, len(self.examples))
        return steps, list(cut_batches(self.examples.lengths, local.batch_size, steps, seed=self._seed))

    def _train_mode(self) -> None:
        """Enable dropout, and batch statistics only if they are trained: a frozen BatchNorm must not change."""
        self._model.model.train()
        traveling = {id(value) for value in self._model.tensors.values()}
        for module in self._model.model.modules():
            statistics = getattr(module, "running_mean", None)
            if isinstance(statistics, torch.Tensor) and id(statistics) not in traveling:
                module.eval()

    def _train_loop(
        self,
        moving: dict[str, nn.Parameter],
        masks: dict[str, torch.Tensor],
        order: tuple[int, Iterator[IntArray]],
        on_progress: OnProgress,
        gradient_term: GradientTerm | None,
    ) -> TrainingResult:
        """Run the training loop; only the loss leaves the device, when progress is reported."""
        local, masters = self.local, fp32_master_params(moving)
        steps, rows = order
        frozen_entries = FrozenEntries(masters, masks)
        parameters = list(masters.values())
        start = {name: value.detach().clone() for name, value in masters.items()} if gradient_term else {}
        optimizer = make_optimizer(local, parameters)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        next_report = time.monotonic() + PROGRESS_SECONDS
        for step, positions in enumerate(rows):
            rate = local.learning_rate * lr_multiplier(local, self._schedule.share(step, steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = self._compute_gradients(positions, moving, step)
            copy_gradients(moving, masters)
            self._scaler.unscale_(optimizer)
            if gradient_term is not None:
                _add_gradient(masters, start, gradient_term)
            frozen_entries.clear_gradients()
            if local.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, local.max_grad_norm)
            self._scaler.step(optimizer)
            self._scaler.update()
            optimizer.zero_grad(set_to_none=True)
            frozen_entries.restore_values()
            copy_values(masters, moving)
            total += loss.detach()
            if time.monotonic() >= next_report:
                on_progress((step + 1) / steps, self._mean_loss(total, step + 1))
                next_report = time.monotonic() + PROGRESS_SECONDS
        mean = self._mean_loss(total, steps)
        on_progress(1.0, mean)
        return TrainingResult(mean, steps, 0 if self._prefix is None else self._prefix.saved)

    def _compute_gradients(self, positions: IntArray, moving: Mapping[str, nn.Parameter], step: int) -> torch.Tensor:  # noqa: ARG002
        """Compute the gradient of one batch, possibly in micro-batches, and return its loss."""
        batch, max_rows = self._batch(positions), self._limits.max_batch
        if max_rows is None or len(positions) <= max_rows:
            return self._backward(batch)
        total = torch.zeros((), device=self._device)
        for place, micro_batch, share in split_micro_batches(self.examples.features, batch, max_rows):
            if self._prefix is not None:
                self._prefix.select_rows(place)
            total += self._backward(micro_batch, share)
        return total

    def _backward(self, batch: Batch, share: float = 1.0) -> torch.Tensor:
        """Run the backward pass of a share of the loss, and return that share."""
        with autocast_context(self._limits, self._device):
            loss = self._loss(batch)
        loss = loss if share == 1.0 else loss * share
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _batch(self, positions: IntArray) -> Batch:
        """Return the tensors of some rows on the model's device."""
        batch = self.examples.batch(positions)
        if self._prefix is not None:
            self._prefix.load_batch(positions)
        if self._device.type != "cpu":
            batch = {name: value.to(self._device, non_blocking=True) for name, value in batch.items()}
        return batch

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch."""
        loss: torch.Tensor = self._model.model(**batch).loss
        return loss

    def _mean_loss(self, total: torch.Tensor, steps: int) -> float:
        """Return the mean loss so far; raises LoRAbbitError if it is not finite."""
        mean = float(total) / steps
        if not math.isfinite(mean):
            raise LoRAbbitError(
                f"the training loss is {mean} within the first {steps} steps of round {self._schedule.round}: "
                "lower local.learning_rate, or set local.max_grad_norm"
            )
        return mean


@contextmanager
def _train_only(
    moving: dict[str, nn.Parameter], frozen_tensors: dict[str, torch.Tensor], model: nn.Module
) -> Iterator[None]:
    """Enable gradients for the trained parameters only; restore flags and frozen buffers afterwards."""
    parameters = [*moving.values(), *(value for value in frozen_tensors.values() if isinstance(value, nn.Parameter))]
    flags = [value.requires_grad for value in parameters]
    buffers = {name: value.clone() for name, value in frozen_tensors.items() if not isinstance(value, nn.Parameter)}
    try:
        for value in parameters:
            value.requires_grad = False
        for parameter in moving.values():
            parameter.requires_grad = True
        yield
    finally:
        model.eval()
        for value, flag in zip(parameters, flags, strict=True):
            value.requires_grad = flag
            value.grad = None
        with torch.no_grad():
            for name, saved in buffers.items():
                frozen_tensors[name].copy_(saved)


def _add_gradient(masters: dict[str, nn.Parameter], start: dict[str, torch.Tensor], term: GradientTerm) -> None:
    """Add a method's own term to every gradient."""
    with torch.no_grad():
        for name, value in masters.items():
            extra = term(name, value.detach(), start[name])
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            value.grad.add_(extra)

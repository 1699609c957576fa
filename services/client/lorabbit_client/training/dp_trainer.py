"""Training with example-level differential privacy: DP-SGD's gradient in front of the job's own optimizer.

Abadi et al., Deep Learning with Differential Privacy, 2016, arXiv 1607.00133. In each step every example is drawn by
itself with probability q = batch_size / n, from the operating system's random bytes, and

    g = 1/(q n) ( sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I) )

over all trained parameters. Momentum, Adam and weight decay use g only. `analysis.per_example_gradients` computes the
gradient of each example in one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.job.spec import PrivacySpec
from lorabbit.privacy.gaussian_mechanism import normal
from lorabbit.runtime.seeds import derive_seed
from lorabbit_client.analysis.per_example_gradients import ExampleGradients, separate_owners
from lorabbit_client.analysis.probe import evaluation_mode
from lorabbit_client.data.features import Batch
from lorabbit_client.data.table import IntArray
from lorabbit_client.training.batching import steps_of
from lorabbit_client.training.trainer import Trainer, split_micro_batches

MIN_NORM = 1e-12


class DpTrainer(Trainer):
    """See the module's docstring."""

    privacy: PrivacySpec
    _example_gradients: ExampleGradients | None = None

    def _train_mode(self) -> None:
        """Enable dropout, but no batch statistics: they mix examples, and no noise is added to them."""
        self._model.model.train()
        for module in self._model.model.modules():
            if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                module.eval()

    def _batch_order(self, batches: Sequence[Sequence[int]] | None) -> tuple[int, list[IntArray]]:
        """Draw each step's examples independently; a step may have none."""
        if batches is not None:
            raise LoRAbbitError("privacy: a method that names its batches does not sample them")
        if len(self.examples) != self.examples.num_examples:
            raise BadInput("privacy.level: some examples have several rows here; leave privacy out")
        rows = len(self.examples)
        steps, rate = steps_of(self.local, rows), min(1.0, self.local.batch_size / rows)
        return steps, [np.flatnonzero(draw < rate) for draw in self._uniform_samples(steps, rows)]

    def _uniform_samples(self, steps: int, rows: int) -> Iterator[Any]:
        """Uniform numbers in [0, 1), fresh for each step."""
        generator = np.random.default_rng(derive_seed(self._seed, "poisson")) if self.privacy.seeded else None
        for _ in range(steps):
            if generator is not None:
                yield generator.random(rows)
            else:
                yield (np.frombuffer(os.urandom(8 * rows), dtype="<u8") >> 11) * 2.0**-53

    def _compute_gradients(self, positions: IntArray, moving: Mapping[str, nn.Parameter], step: int) -> torch.Tensor:
        """Compute the noisy mean gradient; returns zero, since a loss would reveal information about the examples."""
        sums = {name: torch.zeros_like(value) for name, value in moving.items()}
        if len(positions):
            batch = {name: value.to(self._device) for name, value in self.examples.batch(positions).items()}
            for _, micro_batch, _ in split_micro_batches(
                self.examples.features, batch, self._limits.max_batch or len(positions)
            ):
                for gradients in self._gradients_of(moving, micro_batch).of(micro_batch):
                    _add_clipped(sums, gradients, self.privacy.clip)
        scale = min(self.local.batch_size, len(self.examples))
        for name, value in moving.items():
            seed = derive_seed(self._seed, "noise", step, name) if self.privacy.seeded else None
            noise = normal(tuple(value.shape), self.privacy.noise * self.privacy.clip, seed)
            value.grad = (sums[name] + torch.from_numpy(noise).to(value)) / scale
        return torch.zeros((), device=self._device)

    def _gradients_of(self, moving: Mapping[str, nn.Parameter], batch: Batch) -> ExampleGradients:
        """Return the per-example gradients; how they are computed is decided once per training."""
        if self._example_gradients is None:
            with evaluation_mode(self._model):
                owners = separate_owners(self._model.model, moving, self._forward, batch)
            self._example_gradients = ExampleGradients(self._forward, moving, owners)
        return self._example_gradients

    def _forward(self, batch: Batch) -> Any:  # noqa: ANN401 - a model's output
        return self._model.model(**batch)


def _add_clipped(sums: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor], clip: float) -> None:
    """Add the gradients of some examples, each clipped to a norm over all tensors.

    A gradient that is not finite adds nothing: a failed task would reveal information about the example.
    """
    squares = torch.stack([value.double().flatten(1).square().sum(1) for value in gradients.values()]).sum(0)
    finite = squares.isfinite()
    factors = torch.where(finite, (clip / squares.sqrt().clamp(min=MIN_NORM)).clamp(max=1.0), 0.0)
    for name, value in gradients.items():
        finite_values = torch.where(finite.reshape(-1, *(1 for _ in value.shape[1:])), value, 0.0)
        sums[name].add_(torch.tensordot(factors.to(value), finite_values, dims=1))

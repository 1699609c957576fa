"""Training of a client's models by a method's objective, under the rules of the one local loop.

Optimiser, schedule, clipping, float32 copies, order of batches and dropout are those of `Trainer`. A
model of which nothing moves stands in eval mode: neither dropout nor a statistic of it stirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lorabbit.jobspec import LocalSpec
from lorabbit.methods.session import Objective
from lorabbit.types import Tensors
from lorabbit_client.arrays import to_numpy, to_torch
from lorabbit_client.data import Examples
from lorabbit_client.features import Batch
from lorabbit_client.personal_forward import TorchForward
from lorabbit_client.personal_models import Split
from lorabbit_client.trainable import TrainableModel
from lorabbit_client.trainer import Clock, Trainer

OWN = "own"


class Ensemble(nn.Module):
    """A client's models by role and the tensors beside them; called, it answers as the client would."""

    def __init__(self, own: Split) -> None:
        """Begin with the own model alone."""
        super().__init__()
        self.splits: dict[str, Split] = {OWN: own}
        self.members = nn.ModuleDict({OWN: own.model})
        self.beside: dict[str, nn.Parameter] = {}
        self.still: frozenset[str] = frozenset()
        """Roles of the models that are frozen now."""
        self.answer: Objective | None = None
        """Probabilities to be scored by; None: the own model's."""

    def add(self, role: str, split: Split) -> None:
        """Take in another model."""
        self.splits[role] = split
        self.members[role] = split.model

    def look(self, batch: Batch) -> TorchForward:
        """Look at a batch on its device."""
        return TorchForward(batch, self.splits, self.beside, still=self.still)

    def forward(self, **batch: torch.Tensor) -> SequenceClassifierOutput:
        """Classify, by the own model or as the method says; the loss is the mean of -log p of the label."""
        seen = self.look(batch)
        if self.answer is None:
            logits = seen.logits()
        else:
            chances: torch.Tensor = self.answer(seen)
            logits = chances.clamp_min(torch.finfo(chances.dtype).tiny).log()
        return SequenceClassifierOutput(loss=seen.cross_entropy(logits), logits=logits)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name: parameters and kept buffers of models, and what is beside them."""
        found: dict[str, torch.Tensor] = dict(self.beside)
        for role, split in self.splits.items():
            found |= {f"{role}.{name}": value for name, value in state(split.model).items()}
        return found

    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.parameters()).device


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters (tied ones once) and the buffers that a checkpoint holds."""
    kept = model.state_dict(keep_vars=True)
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    return named | {name: value for name, value in model.named_buffers() if name in kept}


def read(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """Copy tensors whose names begin so, in the order of their names."""
    return {name: to_numpy(tensors[name]) for name in sorted(tensors) if name.startswith(prefix)}


def beside(array: Any, device: torch.device) -> nn.Parameter:  # noqa: ANN401 - a NumPy array
    """Make a tensor that stands beside the models; frozen until a training moves it."""
    return nn.Parameter(to_torch(array).to(device), requires_grad=False)


class PersonalTrainer(Trainer):
    """The local loop over a method's objective."""

    def __init__(  # noqa: PLR0913 - as Trainer, and the objective
        self,
        ensemble: Ensemble,
        objective: Objective,
        examples: Examples,
        local: LocalSpec,
        *,
        clock: Clock,
        seed: int,
        moving: frozenset[str],
    ) -> None:
        """Train the tensors named in `moving`; every other is frozen."""
        tensors = ensemble.tensors()
        model = TrainableModel(
            model=ensemble, tensors={name: tensors[name] for name in sorted(tensors)}, dtype=torch.float32,
            base_parameters=0, base_sha256="", rank=None, export={}, initial={},
        )  # fmt: skip
        super().__init__(model, examples, local, clock=clock, seed=seed)
        self._ensemble, self._objective = ensemble, objective
        self._moving = moving

    def _train_mode(self) -> None:
        """Switch dropout and statistics on in models that move, and in no other."""
        still = set()
        for role, split in self._ensemble.splits.items():
            moves = any(f"{role}.{name}" in self._moving for name in state(split.model))
            split.model.train(moves)
            if not moves:
                still.add(role)
        self._ensemble.still = frozenset(still)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Return the objective of one batch."""
        loss: torch.Tensor = self._objective(self._ensemble.look(batch))
        return loss

"""Training of a client's models with a method's objective.

Optimizer, schedule, clipping, float32 copies, batch order and dropout are those of `Trainer`. A model without trained
tensors is in eval mode: it has no dropout, and its batch statistics do not change. `TorchForward` is what an objective
reads of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from lorabbit.job.spec import LocalSpec
from lorabbit.training_session import Objective
from lorabbit.types import Tensors
from lorabbit_client.data.features import Batch
from lorabbit_client.dataset import Examples
from lorabbit_client.models.arrays import to_numpy, to_torch
from lorabbit_client.models.trainable import TrainableModel
from lorabbit_client.personal.models import ForwardView, SplitModel
from lorabbit_client.training.trainer import Trainer, TrainingSchedule


class TorchForward:
    """One batch on its way through a client's models; see `lorabbit.training_session.Forward`."""

    def __init__(
        self,
        batch: Batch,
        models: Mapping[str, SplitModel],
        extra_parameters: Mapping[str, torch.Tensor],
        *,
        frozen: frozenset[str],
    ) -> None:
        """Take a batch on its device, models by role, further parameters by name, and the roles of frozen models."""
        self._batch, self._models, self._extra_parameters, self._frozen = batch, models, extra_parameters, frozen
        self._views: dict[str, ForwardView] = {}
        self._values: dict[tuple[str, str], torch.Tensor] = {}

    @property
    def labels(self) -> torch.Tensor:
        """Class indices."""
        return self._batch["labels"]

    def features(self, model: str = "own") -> torch.Tensor:
        """Output of the trunk."""
        return self._part("features", model, lambda view: view.features())

    def logits(self, model: str = "own") -> torch.Tensor:
        """Logits of the head."""
        return self._part("logits", model, lambda view: view.logits())

    def representation(self, model: str = "own") -> torch.Tensor:
        """Input of the last layer."""
        return self._part("representation", model, lambda view: view.representation())

    def adapted(self, prefix: str, model: str = "own") -> torch.Tensor:
        """Logits with LoRA factors added in the slots; gradients pass through a frozen model."""
        key = (f"adapted {prefix}", model)
        if key not in self._values:
            slots = sorted(
                {
                    name.removeprefix(prefix).rpartition(".")[0]
                    for name in self._extra_parameters
                    if name.startswith(prefix)
                }
            )
            pairs = {
                s: (self._extra_parameters[f"{prefix}{s}.lora_A"], self._extra_parameters[f"{prefix}{s}.lora_B"])
                for s in slots
            }
            self._values[key] = self._models[model].adapted(self._batch, pairs)
        return self._values[key]

    def _part(self, what: str, model: str, compute: Callable[[ForwardView], torch.Tensor]) -> torch.Tensor:
        """Compute a part of a view once; a frozen model keeps no graph."""
        if model not in self._views:
            self._views[model] = self._models[model].view(self._batch)
        if (what, model) not in self._values:
            with torch.set_grad_enabled(torch.is_grad_enabled() and model not in self._frozen):
                self._values[what, model] = compute(self._views[model])
        return self._values[what, model]

    def tensor(self, name: str) -> torch.Tensor:
        """A further parameter by name."""
        return self._extra_parameters[name]

    def pad(self, features: torch.Tensor, width: int) -> torch.Tensor:
        """Append zeros to the last axis."""
        return functional.pad(features, (0, width - features.shape[-1]))

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(logits, self.labels if labels is None else labels)

    def kl(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Mean over the batch of KL(teacher || student), of logits divided by the temperature."""
        teacher_log_probs = functional.log_softmax(teacher.detach() / temperature, -1)
        student_log_probs = functional.log_softmax(student / temperature, -1)
        return functional.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)

    def mse(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Mean squared difference."""
        return functional.mse_loss(left, right)

    def softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities."""
        return functional.softmax(logits, -1)

    def distances(self, values: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Squared distances, (batch, classes)."""
        return (values[:, None, :] - points[None, :, :]).square().sum(-1)

    def of_label(self, table: torch.Tensor) -> torch.Tensor:
        """Lines of a table by label."""
        return table[self.labels]

    def constant(self, value: Any) -> torch.Tensor:  # noqa: ANN401 - an array or a tensor
        """Cut the graph, or bring an array to the device."""
        tensor = value.detach() if isinstance(value, torch.Tensor) else to_torch(value)
        return tensor.to(self.labels.device)


OWN = "own"


class Ensemble(nn.Module):
    """A client's models by role and further parameters; a call returns the client's predictions."""

    def __init__(self, own: SplitModel) -> None:
        """Start with the own model."""
        super().__init__()
        self.splits: dict[str, SplitModel] = {OWN: own}
        self.members = nn.ModuleDict({OWN: own.model})
        self.extra_parameters: dict[str, nn.Parameter] = {}
        self.frozen: frozenset[str] = frozenset()
        """Roles of the models that are frozen now."""
        self.predict: Objective | None = None
        """Probabilities to be scored by; None: the own model's."""

    def add(self, role: str, split: SplitModel) -> None:
        """Add a model."""
        self.splits[role] = split
        self.members[role] = split.model

    def forward_view(self, batch: Batch) -> TorchForward:
        """Return the view of a batch, which must be on the models' device."""
        return TorchForward(batch, self.splits, self.extra_parameters, frozen=self.frozen)

    def forward(self, **batch: torch.Tensor) -> SequenceClassifierOutput:
        """Classify, by the own model or as the method says; the loss is the mean of -log p of the label."""
        view = self.forward_view(batch)
        if self.predict is None:
            logits = view.logits()
        else:
            probabilities: torch.Tensor = self.predict(view)
            logits = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        return SequenceClassifierOutput(loss=view.cross_entropy(logits), logits=logits)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name: parameters and persistent buffers of the models, and further parameters."""
        found: dict[str, torch.Tensor] = dict(self.extra_parameters)
        for role, split in self.splits.items():
            found |= {f"{role}.{name}": value for name, value in state(split.model).items()}
        return found

    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.parameters()).device


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters (tied ones once) and the buffers that a checkpoint holds."""
    saved = model.state_dict(keep_vars=True)
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    return named | {name: value for name, value in model.named_buffers() if name in saved}


def read(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """Copy tensors whose names begin so, in the order of their names."""
    return {name: to_numpy(tensors[name]) for name in sorted(tensors) if name.startswith(prefix)}


def new_parameter(array: Any, device: torch.device) -> nn.Parameter:  # noqa: ANN401 - a NumPy array
    """Make a further parameter; it is frozen until a training selects it."""
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
        schedule: TrainingSchedule,
        seed: int,
        moving: frozenset[str],
    ) -> None:
        """Train the tensors named in `moving`; every other is frozen."""
        tensors = ensemble.tensors()
        model = TrainableModel(
            model=ensemble, tensors={name: tensors[name] for name in sorted(tensors)}, dtype=torch.float32,
            base_parameters=0, base_sha256="", rank=None, export={}, initial={},
        )  # fmt: skip
        super().__init__(model, examples, local, schedule=schedule, seed=seed)
        self._ensemble, self._objective = ensemble, objective
        self._moving = moving

    def _train_mode(self) -> None:
        """Set trained models to train mode, and all others to eval mode."""
        frozen = set()
        for role, split in self._ensemble.splits.items():
            is_trained = any(f"{role}.{name}" in self._moving for name in state(split.model))
            split.model.train(is_trained)
            if not is_trained:
                frozen.add(role)
        self._ensemble.frozen = frozenset(frozen)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Return the objective of one batch."""
        loss: torch.Tensor = self._objective(self._ensemble.forward_view(batch))
        return loss

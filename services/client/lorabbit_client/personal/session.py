"""TorchPersonalSession: one client's own model, which stays on this client, and the tensors that a method shares.

The modules belong to the process and serve one client at a time. The session loads the client's own tensors into them,
or initializes them from the job's seed and the client's index. After a training that changed them it stores a copy in
the private state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lorabbit.aggregation.partial_work import shortened
from lorabbit.errors import BadInput, LoRAbbitError, Refused
from lorabbit.job.spec import LocalSpec
from lorabbit.protocol.messages import Task
from lorabbit.runtime.seeds import derive_seed
from lorabbit.training_session import Forward, GradientTerm, Layer, LocalResult, Objective
from lorabbit.types import Array, ClientId, ClientProfile, Facts, Json, Tensors
from lorabbit_client.dataset import ClientData
from lorabbit_client.execution.interface import OnProgress
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models.arrays import to_torch
from lorabbit_client.personal.models import SplitModel
from lorabbit_client.personal.trainer import OWN, Ensemble, PersonalTrainer, new_parameter, read, state
from lorabbit_client.training.trainer import TrainingSchedule

PREFIX = f"{OWN}."


class ModelProvider(Protocol):
    """Provides the models of a session."""

    def own(self, index: int, *, fresh: bool) -> SplitModel:
        """The own model of a client by index; `fresh`: newly initialized, else with its present tensors."""

    def second(self, name: str, index: int) -> SplitModel:
        """A model that all clients initialize alike, for the data of the client at an index."""

    def widest(self, place: Layer) -> int:
        """Largest width over the job's own models."""


class TorchPersonalSession:
    """One client's models, data and private state, for the length of one task."""

    def __init__(
        self, task: Task, models: ModelProvider, data: ClientData, *, private: PrivateState, on_progress: OnProgress
    ) -> None:
        """Load the client's own model."""
        self.client = ClientProfile(ClientId(task.client), task.index)
        self.private: MutableMapping[str, Json] = private.values
        self.private_tensors: MutableMapping[str, Tensors] = private.tensors
        self.round = task.round
        self.seed = task.seed
        self.num_examples = data.train.num_examples
        self.local = shortened(task.spec.local, task.share)
        self.label_counts: Facts = dict(data.label_counts)
        self.classes = len(data.labels)
        self.steps = 0
        self._task, self._models, self._data, self._on_progress = task, models, data, on_progress
        stored = self.private_tensors.get(OWN)
        self.ensemble = Ensemble(models.own(task.index, fresh=stored is None))
        if stored is not None:
            self._restore_own_model(stored)

    def _restore_own_model(self, stored: Tensors) -> None:
        """Load the stored own tensors; raises BadInput if they belong to another model."""
        missing = {PREFIX + name for name in state(self.ensemble.splits[OWN].model)} - stored.keys()
        why = f"it lacks {min(missing)}" if missing else ""
        try:
            self.load(stored)
        except Refused as error:
            why = str(error)
        if why:
            raise BadInput(
                f"model.variants: the own model that {self.client.client} keeps for this job is another one ({why});"
                " give the job another name, or remove the client's private state"
            )

    # ---- models ----
    def width(self, place: Layer, model: str = OWN) -> int:
        """Width of one of this client's models there."""
        return self.ensemble.splits[model].widths[place]

    def widest(self, place: Layer) -> int:
        """Largest width there over the own models of the job."""
        return self._models.widest(place)

    def slots(self, count: int) -> Mapping[str, tuple[int, int]]:
        """(d_out, d_in) of the query and value layers in the own model's last `count` attention blocks, by slot."""
        layers = self.ensemble.splits[OWN].slots(count)
        return {slot: (layer.out_features, layer.in_features) for slot, layer in layers.items()}

    def add_model(self, role: str, name: str) -> None:
        """Build a second model by name, the same on every client; its tensors are "<role>.<name>"."""
        self.ensemble.add(role, self._models.second(name, self._task.index))

    def last_layer(self, model: str = OWN) -> Mapping[str, str]:
        """The tensors of a model's last layer by "weight" and "bias"."""
        path = f"{model}.{self.ensemble.splits[model].last}"
        present = self.ensemble.tensors()
        return {part: f"{path}.{part}" for part in ("weight", "bias") if f"{path}.{part}" in present}

    # ---- tensors ----
    def tensors(self, prefix: str = "") -> Tensors:
        """Copies of tensors whose names begin so."""
        return read(self.ensemble.tensors(), prefix)

    def load(self, tensors: Tensors) -> None:
        """Overwrite tensors of models by name, and add others; raises Refused before any change."""
        present, device = self.ensemble.tensors(), self.ensemble.device()
        for name, value in tensors.items():
            known = present.get(name)
            if known is not None and tuple(known.shape) != value.shape:
                raise Refused("shapes", f"{name} has shape {list(value.shape)}, expected {list(known.shape)}")
            role = name.partition(".")[0]
            if known is None and role in self.ensemble.splits and role != OWN:
                raise Refused("names", f"the model {role!r} has no tensor {name!r}")
        with torch.no_grad():
            for name, value in tensors.items():
                if name in present:
                    present[name].copy_(to_torch(value))
                else:
                    self.ensemble.extra_parameters[name] = new_parameter(value, device)

    # ---- training ----
    def train(
        self,
        objective: Objective,
        *,
        moving: Callable[[str], bool],
        local: LocalSpec | None = None,
        gradient_term: GradientTerm | None = None,
        stream: str = "",
    ) -> LocalResult:
        """Minimize the objective over the tensors in `moving`, with a fresh optimizer; store changed own tensors."""
        trained_names = frozenset(name for name in self.ensemble.tensors() if moving(name))
        if not len(self._data.train):
            return LocalResult({}, 0, float("nan"), 0)
        start = time.perf_counter()
        trainer = PersonalTrainer(
            self.ensemble,
            objective,
            self._data.train,
            local or self.local,
            schedule=TrainingSchedule(self._task.round, self._task.spec.rounds),
            seed=derive_seed(self.seed, "stream", stream) if stream else self.seed,
            moving=trained_names,
        )
        result = trainer.run(
            self._on_progress, gradient_term=gradient_term, frozen=lambda name: name not in trained_names
        )
        self.ensemble.frozen = frozenset(self.ensemble.splits)
        self.steps += result.steps
        if any(name.startswith(PREFIX) for name in trained_names):
            self.private_tensors[OWN] = self.tensors(PREFIX)
        facts: Facts = {"seconds": time.perf_counter() - start}
        return LocalResult({}, self.num_examples, result.loss, result.steps, facts)

    # ---- analysis ----
    def mean_by_class(self, values: Callable[[Forward], Any]) -> tuple[Array, Array]:
        """Means in float32 (classes, d), zero for a class without examples, and counts int64 (classes,)."""
        train, device = self._data.train, self.ensemble.device()
        sums: np.ndarray[Any, np.dtype[np.float64]] | None = None
        counts = np.zeros(self.classes, np.int64)
        self.ensemble.eval()
        with torch.inference_mode():
            for first in range(0, len(train), self.local.batch_size):
                positions = np.arange(first, min(first + self.local.batch_size, len(train)))
                batch = {name: value.to(device) for name, value in train.batch(positions).items()}
                found = values(self.ensemble.forward_view(batch)).double().cpu().numpy()
                sums = np.zeros((self.classes, found.shape[1])) if sums is None else sums
                labels = batch["labels"].cpu().numpy()
                np.add.at(sums, labels, found)
                counts += np.bincount(labels, minlength=self.classes)
        if sums is None:
            raise LoRAbbitError(f"{self.client.client} has no training examples to take a mean of")
        return (sums / np.maximum(counts, 1)[:, None]).astype(np.float32), counts

    def predict_with(self, probabilities: Callable[[Forward], Any]) -> None:
        """Score this client from now on by these probabilities."""
        self.ensemble.predict = probabilities


def freeze(model: nn.Module) -> nn.Module:
    """Set a model to eval mode, without gradients."""
    model.requires_grad_(requires_grad=False)
    return model.eval()

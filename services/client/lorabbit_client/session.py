"""TorchSession: what a method's client half sees of one client, in torch.

The model is shared by every client of the process, so a session starts by putting the job's initial
tensors back, and a method then loads what the server sent. Tensors cross as copies: nothing a method
holds changes behind its back.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import torch

from lorabbit.errors import Refused
from lorabbit.messages import Task
from lorabbit.methods.base import GradientTerm, LocalResult
from lorabbit.types import ClientId, ClientProfile, Facts, Json, Tensors
from lorabbit_client.arrays import dtype_name, to_numpy, to_torch
from lorabbit_client.data import ClientData
from lorabbit_client.execution import OnProgress
from lorabbit_client.trainable import TrainableModel
from lorabbit_client.trainer import Clock, Trainer


class TorchSession:
    """One client's model, data and private state, for the length of one task."""

    def __init__(
        self,
        task: Task,
        model: TrainableModel,
        data: ClientData,
        *,
        private: MutableMapping[str, Json],
        on_progress: OnProgress,
    ) -> None:
        """Start from the job's initial tensors."""
        self.client = ClientProfile(ClientId(task.client), task.index)
        self.private = private
        self.num_examples = data.train.num_examples
        self.label_counts: Facts = dict(data.label_counts)
        self.steps = 0
        self._task = task
        self._model = model
        self._data = data
        self._on_progress = on_progress
        model.reset()

    def tensors(self) -> Tensors:
        """Return the trainable tensors as they are now; a copy, in the job's dtype."""
        return read_tensors(self._model)

    def load(self, tensors: Tensors) -> None:
        """Overwrite trainable tensors by name; raises Refused for an unknown name, wrong shape or dtype."""
        write_tensors(self._model, tensors)

    def train(
        self, *, gradient_term: GradientTerm | None = None, frozen: Callable[[str], bool] | None = None
    ) -> LocalResult:
        """Tune on local data as the job's `local` says, from the tensors loaded, with a fresh optimiser."""
        spec = self._task.spec
        clock = Clock(self._task.round, spec.rounds)
        if not len(self._data.train):
            return LocalResult(self.tensors(), 0, float("nan"), 0)
        trainer = Trainer(self._model, self._data.train, spec.local, clock=clock, seed=self._task.seed)
        trained = trainer.run(self._on_progress, gradient_term=gradient_term, frozen=frozen)
        self.steps += trained.steps
        return LocalResult(self.tensors(), self.num_examples, trained.loss, trained.steps)


def read_tensors(model: TrainableModel) -> Tensors:
    """Copy a model's trainable tensors to NumPy, floating-point ones in the dtype of the wire."""
    return {
        name: to_numpy(value, model.dtype if value.is_floating_point() else None)
        for name, value in model.tensors.items()
    }


def write_tensors(model: TrainableModel, tensors: Tensors) -> None:
    """Copy arrays into a model's trainable tensors; raises Refused before anything is overwritten."""
    for name in tensors:
        if name not in model.tensors:
            raise Refused("names", f"the model has no trainable tensor {name!r}")
    with torch.no_grad():
        for name in tensors:
            _write(name, model.tensors[name], to_torch(tensors[name]), model.dtype)


def _write(name: str, own: torch.Tensor, given: torch.Tensor, dtype: torch.dtype) -> None:
    """Copy one tensor in place."""
    expected = dtype if own.is_floating_point() else own.dtype
    if given.shape != own.shape:
        raise Refused("shapes", f"{name} has shape {tuple(given.shape)}, expected {tuple(own.shape)}")
    if given.dtype != expected:
        raise Refused("dtypes", f"{name} is {dtype_name(given.dtype)}, expected {dtype_name(expected)}")
    own.copy_(given)

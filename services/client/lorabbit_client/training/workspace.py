"""The learning workspace: one base model and one dataset, shared by every client of a process.

Importing this imports torch. The model is built once per job from the job's seed. Clients load their adapters
into it, so a hundred simulated clients cost one model and a hundred adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Task
from lorabbit.tensors.arithmetic import count
from lorabbit.types import Json, Tensors
from lorabbit_client.capabilities import UNLIMITED, TrainingLimits
from lorabbit_client.dataset import ClientData, load_client, load_labels, load_test
from lorabbit_client.execution.interface import InitialAdapter, OnProgress
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models.loading import load_model, load_processor
from lorabbit_client.models.quantization import quantize
from lorabbit_client.models.source import resolve
from lorabbit_client.models.trainable import TrainableModel, make_trainable
from lorabbit_client.training.activation_cache import ActivationCache
from lorabbit_client.training.evaluation import evaluate
from lorabbit_client.training.flop_counter import FlopCounter
from lorabbit_client.training.session import TorchSession

CENTRAL = "central"
REPORTED = ("torch", "transformers", "peft", "numpy", "tokenizers")


def open_workspace(
    spec: JobSpec, *, threads: int, data_root: Path, device: str, limits: TrainingLimits
) -> LearningWorkspace:
    """Set torch up for this process and open a job's workspace; nothing is loaded yet."""
    torch.set_num_threads(threads)
    chosen = choose_device(device)
    limits.check(chosen.type)
    return LearningWorkspace(spec, data_root=data_root, device=chosen, limits=limits)


def choose_device(name: str) -> torch.device:
    """Return the device by name; ``auto`` is the first GPU where there is one. Raises BadInput for an absent one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"device: {name!r} is no device; use auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device: {name!r} is not here; torch sees {torch.cuda.device_count()} GPUs")
    return device


class LearningWorkspace:
    """One job's model and data in one process."""

    def __init__(
        self, spec: JobSpec, *, data_root: Path, device: torch.device, limits: TrainingLimits = UNLIMITED
    ) -> None:
        """Load nothing yet; model and data are loaded on first use."""
        self._limits = limits
        self._spec = spec
        self._data_root = data_root
        self._device = device
        self._activation_cache = ActivationCache()

    @cached_property
    def _source(self) -> Any:  # noqa: ANN401 - ModelSource; cached_property hides the type from mypy's plugin
        return resolve(self._spec.model.name)

    @cached_property
    def _processor(self) -> Any:  # noqa: ANN401 - a tokenizer or an image processor
        return load_processor(self._spec, self._source)

    @cached_property
    def _model(self) -> TrainableModel:
        labels = load_labels(self._spec, self._data_root)
        model = make_trainable(self._spec, load_model(self._spec, self._source, labels), self._device)
        if self._limits.quantisation != "none":
            quantize(model, self._limits.quantisation)
        return model

    @property
    def base_sha256(self) -> str:
        """Hash of the frozen base model."""
        return self._model.base_sha256

    def _data(self, index: int, population: int) -> ClientData:
        """Return a client's examples; the dataset behind them is shared."""
        return load_client(self._spec, index, population, processor=self._processor, data_root=self._data_root)

    def preload(self, population: int, indices: Iterable[int]) -> None:
        """Load the model and these clients' data."""
        for index in indices:
            self._data(index, population)
        _ = self._model

    def initialize(self, task: Task, tensors: Tensors) -> InitialAdapter:
        """Add the facts that only a client knows to the first adapter."""
        data, model = self._data(task.index, task.population), self._model
        facts: dict[str, Json] = {
            "base_parameters": model.base_parameters,
            "adapter_parameters": count(tensors),
            "rank": model.rank,
            "export": dict(model.export),
            "export_base": dict(model.export_base),
            "main_metric": data.task.main_metric,
            "versions": {name: version(name) for name in REPORTED},
            "label_counts": dict(data.label_counts),
            "labels": list(data.labels),
            "model": self._source.facts(),
        }
        return InitialAdapter(tensors, facts, data.train.num_examples)

    def session(self, task: Task, private: PrivateState, on_progress: OnProgress) -> TorchSession:
        """Open one client's session."""
        # Denormal numbers appear in converged gradients and cost a hundred times a normal one; per thread.
        torch.set_flush_denormal(True)
        data = self._data(task.index, task.population)
        return TorchSession(
            task,
            self._model,
            data,
            private=private,
            on_progress=on_progress,
            activation_cache=self._activation_cache,
            limits=self._limits,
        )

    def count_flops(self) -> FlopCounter:
        """Return a counter of floating-point operations."""
        return FlopCounter()

    def evaluate(self, task: Task, session: TorchSession, on_progress: OnProgress) -> Metrics:
        """Score a session's model on the client's test split, or on the whole test set."""
        if task.settings.get("on") == CENTRAL:
            examples = load_test(self._spec, processor=self._processor, data_root=self._data_root)
        else:
            examples = self._data(task.index, task.population).test
        return evaluate(session.prepared_model(), examples, self._spec.evaluation.batch_size, on_progress=on_progress)

"""Workspace of methods with personal models.

A process keeps one module per architecture, shared by all of its clients. Before a task, the client's own tensors are
loaded into it from the client's private state. A client without stored tensors initializes its model from the job's
seed and its index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog
import torch

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Task
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors.arithmetic import count
from lorabbit.training_session import Layer
from lorabbit.types import Json, Tensors
from lorabbit_client.capabilities import TrainingLimits
from lorabbit_client.dataset import ClientData, load_client, load_labels
from lorabbit_client.execution.interface import InitialAdapter, OnProgress
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models.loading import load_model, load_processor
from lorabbit_client.models.source import ModelSource, resolve
from lorabbit_client.models.trainable import TrainableModel
from lorabbit_client.personal.models import SplitModel, widths_of
from lorabbit_client.personal.session import TorchPersonalSession, freeze
from lorabbit_client.personal.trainer import state
from lorabbit_client.tasks.image_classification import ImageFormat
from lorabbit_client.training.evaluation import evaluate
from lorabbit_client.training.flop_counter import FlopCounter
from lorabbit_client.training.workspace import REPORTED, choose_device

log = structlog.get_logger()


def open_personal_workspace(
    spec: JobSpec, *, threads: int, data_root: Path, device: str, limits: TrainingLimits
) -> PersonalWorkspace:
    """Set torch up for this process and open a job's workspace; nothing is loaded yet.

    A method's own objective need not be a mean over rows, so its batches stay whole, and in float32.
    """
    if limits.are_restrictive:
        log.warning("limits-ignored", why="methods with own models learn whole batches, in float32")
    torch.set_num_threads(threads)
    return PersonalWorkspace(spec, data_root=data_root, device=choose_device(device))


class PersonalWorkspace:
    """One job's architectures and data in one process."""

    base_sha256: str | None = None

    def __init__(self, spec: JobSpec, *, data_root: Path, device: torch.device) -> None:
        """Load nothing yet; models and data are loaded on first use."""
        self._spec = spec
        self._data_root = data_root
        self._device = device
        self._own_models: dict[str, SplitModel] = {}
        self._shared_models: dict[str, tuple[SplitModel, dict[str, torch.Tensor]]] = {}
        self._sources: dict[str, ModelSource] = {}
        self._processors: dict[str, Any] = {}
        self._data: dict[tuple[int, int], ClientData] = {}
        self.widest = lru_cache(maxsize=None)(self._largest_width)

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """Names of the own models; client k has the one at k modulo their number."""
        return self._spec.model.variants or (self._spec.model.name,)

    def preload(self, population: int, indices: Iterable[int]) -> None:
        """Load these clients' data and their architectures, one after the other: clients of one share encoded data."""
        for index in sorted(indices, key=lambda index: (index % len(self.variants), index)):
            self.data(index, population)
            self.own(index, fresh=False)

    # ---- data ----
    def data(self, index: int, population: int) -> ClientData:
        """Return a client's examples, encoded for its own model."""
        key = (index, population)
        if key not in self._data:
            processor = self._processor(self._model_name(index))
            self._data[key] = load_client(self._spec, index, population, processor=processor, data_root=self._data_root)
        return self._data[key]

    @cached_property
    def _labels(self) -> Sequence[str]:
        return load_labels(self._spec, self._data_root)

    def _processor(self, name: str) -> Any:  # noqa: ANN401 - a tokenizer or an image processor
        if name not in self._processors:
            self._processors[name] = load_processor(self._spec_for(name), self._source(name))
        return self._processors[name]

    # ---- models ----
    def _model_name(self, index: int) -> str:
        return self.variants[index % len(self.variants)]

    def _source(self, name: str) -> ModelSource:
        if name not in self._sources:
            self._sources[name] = resolve(name)
        return self._sources[name]

    def _spec_for(self, name: str, *seeded: str | int) -> JobSpec:
        """Return the job with one model by name, initialized from a seed of its own."""
        seed = derive_seed(self._spec.seed, *seeded) if seeded else self._spec.seed
        model = self._spec.model.model_copy(update={"name": name})
        return self._spec.model_copy(update={"model": model, "seed": seed})

    def _load(self, name: str, *seeded: str | int) -> SplitModel:
        loaded = load_model(self._spec_for(name, *seeded), self._source(name), self._labels)
        return SplitModel(freeze(loaded.model.to(self._device)), name, len(self._labels))

    def own(self, index: int, *, fresh: bool) -> SplitModel:
        """The own architecture of a client; `fresh`: newly initialized from the client's seed."""
        name = self._model_name(index)
        if fresh or name not in self._own_models:
            self._own_models[name] = self._load(name, "own", index)
        return self._own_models[name]

    def second(self, name: str, index: int) -> SplitModel:
        """A model that all clients initialize alike; raises BadInput if its processor differs from the own model's."""
        if not _same_processor(self._processor(name), self._processor(self._model_name(index))):
            raise BadInput(
                f"method.shared_model: {name!r} reads its input otherwise than {self._model_name(index)!r}, the own "
                f"model of the client at index {index}; take one with the same tokenizer or image size"
            )
        if name not in self._shared_models:
            split = self._load(name, "second")
            first = {key: value.detach().clone() for key, value in state(split.model).items()}
            self._shared_models[name] = (split, first)
        split, first = self._shared_models[name]
        with torch.no_grad():
            for key, value in state(split.model).items():
                value.copy_(first[key])
        return split

    def _largest_width(self, place: Layer) -> int:
        """Largest width over the job's own models, from their configurations."""
        return max(widths_of(name, self._source(name))[place] for name in self.variants)

    # ---- tasks ----
    def initialize(self, task: Task, tensors: Tensors) -> InitialAdapter:
        """Add the facts that only a client knows to the first tensors."""
        data = self.data(task.index, task.population)
        own = self.own(task.index, fresh=False).model
        config: dict[str, Json] = {"method": self._spec.method.name, "models": list(self.variants)}
        facts: dict[str, Json] = {
            "base_parameters": 0,
            "own_parameters": sum(value.numel() for value in own.parameters()),
            "adapter_parameters": count(tensors),
            "rank": None,
            "export": {"format": "partial", "files": {"lorabbit_config.json": config}},
            "main_metric": data.task.main_metric,
            "versions": {name: version(name) for name in REPORTED},
            "label_counts": dict(data.label_counts),
            "labels": list(data.labels),
            "model": self._source(self._model_name(task.index)).facts(),
        }
        return InitialAdapter(tensors, facts, data.train.num_examples)

    def session(self, task: Task, private: PrivateState, on_progress: OnProgress) -> TorchPersonalSession:
        """Open one client's session."""
        torch.set_flush_denormal(True)  # per thread; denormal numbers cost a hundred times a normal one
        data = self.data(task.index, task.population)
        return TorchPersonalSession(task, self, data, private=private, on_progress=on_progress)

    def count_flops(self) -> FlopCounter:
        """Return a counter of floating-point operations."""
        return FlopCounter()

    def evaluate(self, task: Task, session: TorchPersonalSession, on_progress: OnProgress) -> Metrics:
        """Score a client's model on its own test split."""
        model = TrainableModel(
            model=session.ensemble, tensors={}, dtype=torch.float32, base_parameters=0, base_sha256="", rank=None,
            export={}, initial={},
        )  # fmt: skip
        examples = self.data(task.index, task.population).test
        return evaluate(model, examples, self._spec.evaluation.batch_size, on_progress=on_progress)


def _same_processor(left: Any, right: Any) -> bool:  # noqa: ANN401 - tokenizers or image processors
    """Tell whether two models can read one batch."""
    if hasattr(left, "get_vocab") and hasattr(right, "get_vocab"):
        return bool(left.get_vocab() == right.get_vocab())
    return ImageFormat.of(left) == ImageFormat.of(right)

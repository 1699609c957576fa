"""TorchSession: the session of a method's client half, with torch.

All clients of a process share one model, so a session first restores the job's initial tensors; the method then loads
those of the server. Tensors are passed as copies.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping, Sequence
from typing import Literal, Unpack

import numpy as np
import torch

from lorabbit.aggregation.partial_work import shortened
from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import LocalSpec
from lorabbit.protocol.messages import Task
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors.serialization import tensors_sha256
from lorabbit.training_session import Difficulty, Direction, LocalResult, Part, Sensitivity, TrainOptions
from lorabbit.types import Array, ClientId, ClientProfile, Facts, Json, Tensors
from lorabbit_client.capabilities import UNLIMITED, TrainingLimits
from lorabbit_client.dataset import ClientData
from lorabbit_client.execution.interface import OnProgress
from lorabbit_client.execution.private_state import PrivateState
from lorabbit_client.models.arrays import dtype_name, to_numpy, to_torch
from lorabbit_client.models.base_weights import REPLACED, BaseWeights
from lorabbit_client.models.lora import LoraLayers
from lorabbit_client.models.trainable import TrainableModel
from lorabbit_client.training.activation_cache import GROUP, ActivationCache, ExampleUsage, FrozenPrefix, find_prefix
from lorabbit_client.training.batching import rows_of
from lorabbit_client.training.privacy_budget import release_of, spend
from lorabbit_client.training.trainer import Trainer, TrainingSchedule

CURVATURE_ROWS = 16
"""Number of rows on which curvature is measured."""
IMPORTANCE_ROWS = 32
"""Number of rows on which importance is measured."""


class TorchSession:
    """One client's model, data and private state, for the length of one task."""

    def __init__(  # noqa: PLR0913
        self,
        task: Task,
        model: TrainableModel,
        data: ClientData,
        *,
        private: PrivateState,
        on_progress: OnProgress,
        activation_cache: ActivationCache | None = None,
        limits: TrainingLimits = UNLIMITED,
    ) -> None:
        """Start from the job's initial tensors."""
        self.client = ClientProfile(ClientId(task.client), task.index)
        self.private: MutableMapping[str, Json] = private.values
        self.private_tensors: MutableMapping[str, Tensors] = private.tensors
        self._ledger = private.ledger
        self.round = task.round
        self.seed = task.seed
        self.num_examples = data.train.num_examples
        self.local = shortened(task.spec.local, task.share)
        self.label_counts: Facts = dict(data.label_counts)
        self.steps = 0
        self._task = task
        self._adapter = model
        self._selected = model
        self._data = data
        self._on_progress = on_progress
        self._fraction = 0.0
        self._activation_cache = activation_cache
        self._limits = limits
        model.reset()

    # ---- tensors ----
    def select(self, part: Part) -> None:
        """Select the job's adapter (the default) or the whole model for later calls; the latter disables adapters."""
        whole = part == "whole"
        self._selected = self._adapter.whole() if whole else self._adapter
        self._adapter.enable(enabled=not whole)

    def tensors(self) -> Tensors:
        """Return the selected tensors as they are now; a copy, in the job's dtype."""
        return read_tensors(self.prepared_model())

    def load(self, tensors: Tensors) -> None:
        """Overwrite selected tensors by name; raises Refused for an unknown name, wrong shape or dtype."""
        if self._selected is not self._adapter:
            self._base.replace()
        write_tensors(self._selected, tensors)

    @property
    def scaling(self) -> float:
        """The s in y = W x + s B A x: the job's lora.alpha / lora.rank, the same at every rank."""
        return self._base.scaling

    def set_rank(self, rank: int) -> None:
        """Give every LoRA pair this rank, filled with zeros until `load`; the next task has the job's again."""
        self._lora.set_rank(rank)

    def base_weights(self) -> Tensors:
        """Return pristine weights under LoRA, float32, d_out x d_in, by module path as PEFT names its factors."""
        _ = self._lora
        return self._base.pristine_weights()

    def use_base(self, base: Tensors, sha256: str) -> None:
        """Make these tensors the base of this task; raises Refused where they have another hash or do not fit."""
        if not self._base.uses_base(sha256):
            if tensors_sha256(base) != sha256:
                raise Refused("base", "the base that came is not the one that the plan names")
            checked_tensors(self._adapter.whole(), base)
        self._base.use_base(base, sha256)

    def set_base_delta(self, factors: Tensors) -> None:
        """Make the base W = W_below + s B A for this task; it replaces an earlier shift."""
        if factors:
            _ = self._lora
        self._base.set_delta(factors)

    # ---- training ----
    def train(self, **options: Unpack[TrainOptions]) -> LocalResult:
        """Train on local data from the present tensors, with a fresh optimizer."""
        if self._selected is not self._adapter:
            self._base.replace()
        model = self.prepared_model()
        if not len(self._data.train):
            return LocalResult(self.tensors(), 0, float("nan"), 0)
        start = time.perf_counter()
        schedule = TrainingSchedule(self._task.round, self._task.spec.rounds)
        stream = options.get("stream")
        seed = derive_seed(self.seed, "stream", stream) if stream else self.seed
        trainer = self._trainer(model, options.get("local") or self.local, schedule, seed)
        result = trainer.run(
            self._report_step,
            gradient_term=options.get("gradient_term"),
            frozen=options.get("frozen"),
            mask=options.get("mask"),
            batches=options.get("batches"),
        )
        self.steps += result.steps
        facts: Facts = {"seconds": time.perf_counter() - start, "prefixes_kept": result.skipped}
        return LocalResult(self.tensors(), self.num_examples, result.loss, result.steps, facts)

    def _report_step(self, fraction: float, loss: float | None) -> None:
        """Report the progress of a training."""
        self._fraction = fraction
        self._on_progress(fraction, loss)

    def _report_analysis(self) -> None:
        """Report unchanged progress during an analysis; raises Cancelled if the task was cancelled."""
        self._on_progress(self._fraction, None)

    def _trainer(self, model: TrainableModel, local: LocalSpec, schedule: TrainingSchedule, seed: int) -> Trainer:
        """Make the trainer; with private examples, first add its release to the privacy ledger."""
        spec, data = self._task.spec.privacy, self._data.train
        if spec is None or spec.level != "example":
            return Trainer(
                model, data, local, schedule=schedule, seed=seed, find_prefix=self._find_prefix, limits=self._limits
            )
        from lorabbit_client.training.dp_trainer import DpTrainer  # noqa: PLC0415

        limits = self._limits.model_copy(update={"dtype": "float32"})
        trainer = DpTrainer(model, data, local, schedule=schedule, seed=seed, limits=limits)
        trainer.privacy = spec
        spend(release_of(spec, local, len(data)), spec, self._task.job, self._ledger, self._limits)
        return trainer

    def _find_prefix(self, moving: Sequence[torch.Tensor], rows: int) -> FrozenPrefix | None:
        """Return the frozen blocks whose activations can be cached; None for a trained base."""
        base = None if self._adapter.base is None else self._adapter.base.apply()
        if self._activation_cache is None or self._selected is not self._adapter or base == REPLACED:
            return None
        spec = self._task.spec
        usage = ExampleUsage(rows, spec.rounds, self._task.population)
        owner = (self._task.index, self._task.population)
        group = min(GROUP, self._limits.max_batch or GROUP)
        return find_prefix(
            self._adapter,
            self._data.train,
            moving,
            usage,
            cache=self._activation_cache,
            base=base,
            owner=owner,
            group=group,
        )

    # ---- analysis ----
    def labels(self) -> Array:
        """Return the class of each training example, int64 (num_examples,); zeros where examples have no class."""
        from lorabbit_client.analysis.difficulty import classes  # noqa: PLC0415 - only methods with a curriculum need it

        return classes(self._data.train)

    def difficulty(self, kind: Difficulty) -> Array:
        """How hard each training example is, float64 (num_examples,), at the present tensors."""
        from lorabbit_client.analysis.difficulty import difficulties  # noqa: PLC0415 - only methods with a curriculum need it

        return difficulties(self.prepared_model(), self._data.train, kind, on_chunk=self._report_analysis)

    def fisher(self, examples: Sequence[int]) -> Tensors:
        """Mean over these examples of the squared per-example gradient, float32, of every LoRA factor."""
        from lorabbit_client.analysis.fisher import mean_squares  # noqa: PLC0415

        positions = rows_of(self._data.train, examples).tolist()
        return mean_squares(self.prepared_model(), self._data.train, positions, on_chunk=self._report_analysis)

    def importance(self) -> dict[str, torch.Tensor]:
        """Return each number's share of Fisher information, in [0, 1], float32, of every selected tensor that moves."""
        from lorabbit_client.analysis.fisher import shares  # noqa: PLC0415

        positions = self._sample("importance", IMPORTANCE_ROWS)
        return shares(self.prepared_model(), self._data.train, positions, on_chunk=self._report_analysis)

    def _sample(self, purpose: str, rows: int) -> list[int]:
        """Draw some of the client's rows, the same in every run of this task."""
        chosen = np.random.default_rng(derive_seed(self.seed, purpose)).permutation(len(self._data.train))
        return sorted(int(position) for position in chosen[:rows])

    def sensitivity(
        self, *, noise: float, draws: int, probes: int, variant: Sensitivity, direction: Direction = "random"
    ) -> Array:
        """How much each block's output moves when the embeddings do, float64 (blocks,)."""
        from lorabbit_client.analysis.sensitivity import ProbeSettings, sensitivities  # noqa: PLC0415

        probe = ProbeSettings(noise, draws, probes, variant, self.seed, direction)
        return sensitivities(self.prepared_model(), self._data.train, probe, on_chunk=self._report_analysis)

    def lossless_share(self, rule: Literal["slq", "eigengap"]) -> float:
        """Share of curvature directions that must not be lost, in (0, 1], from this client's data."""
        from lorabbit_client.analysis.curvature import lossless_share  # noqa: PLC0415

        positions = self._sample("curvature", CURVATURE_ROWS)
        return lossless_share(self.prepared_model(), self._data.train, positions, rule=rule, seed=self.seed)

    # ---- for the workspace ----
    def prepared_model(self) -> TrainableModel:
        """Return the selected model on the base that this task asked for."""
        if self._adapter.base is not None:
            self._adapter.base.apply()
        return self._selected

    @property
    def _base(self) -> BaseWeights:
        if self._adapter.base is None:
            raise BadInput(f"model.name: {self._task.spec.model.name} has no base model")
        return self._adapter.base

    @property
    def _lora(self) -> LoraLayers:
        """The LoRA layers, which must all be linear."""
        spec = self._task.spec
        if self._adapter.lora is None:
            raise BadInput(
                f"model.trainable: {spec.method.name} works on LoRA, and this job trains {spec.model.trainable!r}; "
                "set model.trainable to 'lora'"
            )
        self._adapter.lora.check_linear(self._base.under_lora)
        return self._adapter.lora


def read_tensors(model: TrainableModel) -> Tensors:
    """Copy a model's trainable tensors to NumPy, floating-point ones in the dtype of the wire."""
    return {
        name: to_numpy(value, model.dtype if value.is_floating_point() else None)
        for name, value in model.tensors.items()
    }


def write_tensors(model: TrainableModel, tensors: Tensors) -> None:
    """Copy arrays into a model's trainable tensors; raises Refused before anything is overwritten."""
    given = checked_tensors(model, tensors)
    with torch.no_grad():
        for name, value in given.items():
            model.tensors[name].copy_(value)


def checked_tensors(model: TrainableModel, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return arrays as torch's, each of the name, shape and dtype of one of the model's; raises Refused."""
    for name in tensors:
        if name not in model.tensors:
            raise Refused("names", f"the model has no trainable tensor {name!r}")
    given = {name: to_torch(tensors[name]) for name in tensors}
    for name, value in given.items():
        _check(name, model.tensors[name], value, model.dtype)
    return given


def _check(name: str, own: torch.Tensor, given: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise Refused when a tensor does not fit."""
    expected = dtype if own.is_floating_point() else own.dtype
    if given.shape != own.shape:
        raise Refused("shapes", f"{name} has shape {tuple(given.shape)}, expected {tuple(own.shape)}")
    if given.dtype != expected:
        raise Refused("dtypes", f"{name} is {dtype_name(given.dtype)}, expected {dtype_name(expected)}")

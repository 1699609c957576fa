"""Forward over torch: what an objective may ask of one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from lorabbit_client.arrays import to_torch
from lorabbit_client.features import Batch
from lorabbit_client.personal_models import Split, View


class TorchForward:
    """One batch on its way through a client's models; see `lorabbit.methods.session.Forward`."""

    def __init__(
        self, batch: Batch, models: Mapping[str, Split], beside: Mapping[str, torch.Tensor], *, still: frozenset[str]
    ) -> None:
        """Take a batch on its device, the models by role, and the tensors beside them; `still` models are frozen."""
        self._batch, self._models, self._beside, self._still = batch, models, beside, still
        self._views: dict[str, View] = {}
        self._values: dict[tuple[str, str], torch.Tensor] = {}

    @property
    def labels(self) -> torch.Tensor:
        """Class indices."""
        return self._batch["labels"]

    def features(self, model: str = "own") -> torch.Tensor:
        """What a trunk sees."""
        return self._of("features", model, lambda view: view.features())

    def logits(self, model: str = "own") -> torch.Tensor:
        """What a head answers."""
        return self._of("logits", model, lambda view: view.logits())

    def representation(self, model: str = "own") -> torch.Tensor:
        """Input of the last layer."""
        return self._of("representation", model, lambda view: view.representation())

    def adapted(self, prefix: str, model: str = "own") -> torch.Tensor:
        """What a head answers with pairs of factors in the slots of its trunk; a frozen model lets gradients pass."""
        key = (f"adapted {prefix}", model)
        if key not in self._values:
            slots = sorted(
                {name.removeprefix(prefix).rpartition(".")[0] for name in self._beside if name.startswith(prefix)}
            )
            pairs = {s: (self._beside[f"{prefix}{s}.lora_A"], self._beside[f"{prefix}{s}.lora_B"]) for s in slots}
            self._values[key] = self._models[model].adapted(self._batch, pairs)
        return self._values[key]

    def _of(self, what: str, model: str, look: Callable[[View], torch.Tensor]) -> torch.Tensor:
        """Compute a part of a view once; a frozen model keeps no graph."""
        if model not in self._views:
            self._views[model] = self._models[model].view(self._batch)
        if (what, model) not in self._values:
            with torch.set_grad_enabled(torch.is_grad_enabled() and model not in self._still):
                self._values[what, model] = look(self._views[model])
        return self._values[what, model]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor beside the models."""
        return self._beside[name]

    def pad(self, features: torch.Tensor, width: int) -> torch.Tensor:
        """Append zeros to the last axis."""
        return functional.pad(features, (0, width - features.shape[-1]))

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(logits, self.labels if labels is None else labels)

    def kl(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Mean over the batch of KL(teacher || student), of logits divided by the temperature."""
        told = functional.log_softmax(teacher.detach() / temperature, -1)
        said = functional.log_softmax(student / temperature, -1)
        return functional.kl_div(said, told, reduction="batchmean", log_target=True)

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

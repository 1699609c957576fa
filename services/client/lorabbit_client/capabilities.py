"""Limits of a client's training, from its own settings; needs no torch.

A batch larger than `max_batch` is split into micro-batches, whose gradients add up to those of the whole batch. `dtype`
is what the model computes in; weights and optimizer state keep their own. Only frozen linear weights under LoRA are
quantized.
"""

from __future__ import annotations

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods import registry
from lorabbit.types import ClientCapabilities

LIMITS = ("max_batch", "dtype", "quantisation", "epsilon", "delta")


class TrainingLimits(ClientCapabilities):
    """Capabilities of one client, and the privacy that its owner demands."""

    epsilon: float | None = None
    """Most that all jobs together may cost one of this client's examples; None where its owner demands no privacy."""
    delta: float = 1e-5
    """At which `epsilon` is counted."""

    @property
    def are_restrictive(self) -> bool:
        """Whether any limit differs from its default."""
        return any(getattr(self, name) != type(self).model_fields[name].default for name in LIMITS)

    @property
    def tells_scores(self) -> bool:
        """Whether the server is told scores on data of this client, which no noise covers."""
        return self.epsilon is None

    def check(self, device: str) -> None:
        """Raise BadInput where a kind of device, such as ``cpu`` or ``cuda:0``, cannot train in this dtype."""
        if self.dtype == "float16" and not device.startswith("cuda"):
            raise BadInput(
                f"LORABBIT_DTYPE: float16 is for GPUs, and this client trains on {device}; use bfloat16 or float32"
            )

    def check_job(self, spec: JobSpec) -> None:
        """Raise BadInput where a job needs weights that this client keeps quantized, or lacks privacy it demands."""
        why = registry.build(spec).needs_whole_base() if self.quantisation != "none" else ""
        if why:
            raise BadInput(
                f"LORABBIT_QUANTISATION: {self.quantisation} keeps the base model in fewer bits, and {why}; "
                "set it to none for such jobs"
            )
        privacy = spec.privacy
        if self.epsilon is not None and (privacy is None or privacy.level != "example" or privacy.seeded):
            raise BadInput(
                "privacy: this client's owner demands noise from its own process (LORABBIT_PRIVACY_EPSILON); set "
                "privacy.level to 'example' and leave privacy.seeded out"
            )


UNLIMITED = TrainingLimits()

"""FFA-LoRA: freeze A, train and average B only, so that the average is exact.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv 2403.12313).

    (1)  A is drawn once and shared; clients train B (and the task head) on F_k
    (2)  B^{t+1} = sum_k (n_k / n) B_k, hence  s mean(B_k A) = s mean(B_k) A:  no aggregation error

A travels once to each client as a payload of its own: it never changes, so a client that holds it
reads nothing again, and uploads carry B and the head alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from lorabbit.aggregation import aggregator
from lorabbit.aggregation.aggregator import Aggregation
from lorabbit.aggregation.rules import RULES
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.averaging import Averaging


class FfaLora(Averaging):
    """Exact federated averaging of LoRA: one shared frozen A, averaged B."""

    name: ClassVar[str] = "ffa-lora"
    summary: ClassVar[str] = "LoRA with one shared frozen A: averaging B alone is exact and halves the upload"
    paper: ClassVar[str] = "Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024, arXiv 2403.12313"
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum", "buffered"})

    def check(self, job: JobSpec) -> None:
        """Only LoRA has factors to freeze."""
        if job.model.trainable != "lora":
            raise BadInput(
                f"method.name: ffa-lora freezes LoRA's A factors, but model.trainable is {job.model.trainable!r}; "
                "set model.trainable to 'lora'"
            )
        aggregator.refuse_choice(
            job.model_copy(update={"aggregation": "factors"}) if job.aggregation == "freeze-a" else job,
            "ffa-lora",
            "averages B under one frozen A",
        )

    @property
    def aggregation(self) -> Aggregation:
        """The job's numbers with the rule `freeze-a`."""
        return replace(aggregator.of(self.job), rule=RULES["freeze-a"])

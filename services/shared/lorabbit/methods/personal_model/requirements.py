"""What methods with a model of each client's own have in common.

A client's own model is trained whole and stays where it is; a method decides what small tensors travel
beside it. Names that begin with "own." never leave a client.
"""

from __future__ import annotations

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.job.spec import JobSpec, Task
from lorabbit.types import Tensors

OWN = "own."
CLASSIFICATION: tuple[Task, ...] = ("text-classification", "text-pair-classification", "image-classification")
SMALLEST_CNN = "cnn:5"


def is_own(name: str) -> bool:
    """Tell whether a tensor is one of the client's own."""
    return name.startswith(OWN)


def check_outgoing(tensors: Tensors) -> None:
    """Raise LoRAbbitError when a tensor of a client's own is among what would leave it."""
    found = min((name for name in tensors if is_own(name)), default=None)
    if found is not None:
        raise LoRAbbitError(f"internal: {found!r} belongs to this client alone and was about to leave it")


def check(job: JobSpec, method: str) -> None:
    """Raise BadInput for a job in which clients cannot have models of their own."""
    if job.model.task not in CLASSIFICATION:
        raise BadInput(
            f"model.task: {method} shares what a classifier of one label per example learned, and {job.model.task} has"
            f" none; use {', '.join(CLASSIFICATION)}"
        )
    if job.model.trainable not in {"full", "lora"}:
        raise BadInput(
            f"model.trainable: {method} trains each client's own model whole, not {job.model.trainable!r} of it;"
            " leave it out, or write 'full'"
        )
    if job.aggregation != "factors":
        raise BadInput(
            f"aggregation: {method} has a rule of its own, and {job.aggregation!r} is for LoRA updates; leave it out"
        )
    if job.model.lora.client_ranks is not None:
        raise BadInput(
            f"model.lora.client_ranks: {method} trains each client's own model whole and averages no LoRA factors, so"
            " no client has a rank; leave client_ranks out, and set model.variants for clients of unlike strength"
        )
    if job.evaluation.on != "clients":
        raise BadInput(f"evaluation.on: {method} has no global model to score; each client scores its own: 'clients'")
    if any(name.startswith("null:") for name in (job.model.name, *(job.model.variants or ()))):
        raise BadInput(f"model.name: the null model is not a classifier, which {method} needs; take a real one")


def shared_model(job: JobSpec, chosen: str | None) -> str:
    """Name of the small model beside the own ones: the chosen one, CNN-5 beside CNNs, or the first of the own."""
    if chosen is not None:
        return chosen
    first = (job.model.variants or (job.model.name,))[0]
    return SMALLEST_CNN if first.startswith("cnn:") else first

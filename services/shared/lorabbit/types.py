"""Values that cross module boundaries.

Everything here is frozen and free of I/O. Tensors are NumPy arrays (bfloat16 through
`ml_dtypes`), so that a server and an idle client never import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

ClientId = NewType("ClientId", str)
"""Identity of a data holder, for example ``client-3``; stable over restarts and moves."""

Array: TypeAlias = "NDArray[np.generic]"
Tensors: TypeAlias = Mapping[str, Array]
"""Named tensors; the names are the ones PEFT writes to `adapter_model.safetensors`."""

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Facts: TypeAlias = Mapping[str, Json]

Word = Annotated[str, Field(max_length=200)]
Count = Annotated[int, Field(ge=0, le=2**53)]
"""An integer that a peer sends: a float holds it exactly, and sums of many stay finite."""

TRAIN = "train"
"""The ordinary phase: tune the adapter on local data. A method may name phases of its own."""
INITIALIZE = "initialise"
"""One client builds the model and sends the first adapter: the server holds no base model."""
EVALUATE = "evaluate"
"""Score an adapter on the client's held-out data; nothing is trained, no tensor returns."""

ADAPTER = "adapter"
"""The payload role under which an adapter travels; a method may name further roles."""
BASE = "base"
"""The payload role of a whole model that the job made and its adapters stand on."""
SHIFT = "shift"
"""The payload role of factors that are added to the pristine base weights (`Session.set_base_delta`)."""


class ClientCapabilities(BaseModel):
    """What a client declares about itself when it registers."""

    model_config = ConfigDict(frozen=True)

    device: Word = "cpu"
    memory_bytes: Count = 0
    tags: Annotated[tuple[Word, ...], Field(max_length=100)] = ()
    pool: Word = ""
    """The group of like clients that it was started in; empty for a client on its own."""
    max_rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Largest LoRA rank that it can train; None: whatever a job asks."""
    max_batch: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Rows of which it computes gradients at once; larger batches are split into micro-batches."""
    dtype: Word = "float32"
    """Data type in which its models compute while they train: float32, bfloat16 or float16."""
    quantisation: Word = "none"
    """How it keeps the frozen linear weights under LoRA: none, int8 or int4."""
    version: Word = ""
    codings: Annotated[tuple[Word, ...], Field(max_length=100)] = ()
    """Encodings that it can write and read beside plain tensors: bf16, int8, int4, top-k, delta, zstd."""


DEFAULT_CAPABILITIES = ClientCapabilities()


@dataclass(frozen=True, slots=True)
class ClientProfile:
    """A client of a job, as a method's `plan` sees it."""

    client: ClientId
    index: int
    """0-based place in the job's population; also the client's data partition."""
    capabilities: ClientCapabilities = DEFAULT_CAPABILITIES


@dataclass(frozen=True, slots=True)
class Plan:
    """What the server asks of one client in one round.

    `payloads` maps a role to tensors. Payloads are content-addressed: give every client of a
    cohort the same object and it is encoded and published once; a client that already holds a
    payload reads nothing.
    """

    phase: str = TRAIN
    payloads: Mapping[str, Tensors] = field(default_factory=dict)
    settings: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """What one client returns from a local update."""

    client: ClientId
    index: int
    tensors: Tensors
    num_examples: int
    loss: float
    """Mean training loss over the local steps; NaN when nothing was trained."""
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerState:
    """A method's memory between rounds: tensors and plain data, saved by the codec as it is.

    What changes every round is in `tensors`. What seldom changes (a frozen factor, a base that the
    job made) is in `shared`, by the role under which plans send it: each group is a file of its own,
    written once, and clients that hold it read nothing.
    """

    tensors: Tensors
    facts: Facts = field(default_factory=dict)
    shared: Mapping[str, Tensors] = field(default_factory=dict)

    @property
    def report(self) -> Facts:
        """What the method tells of the round just folded, for the report: facts["report"]."""
        told = self.facts.get("report")
        return told if isinstance(told, dict) else {}

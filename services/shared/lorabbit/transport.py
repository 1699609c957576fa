"""Transport: how a job's tensors are written for the wire, in each direction.

A coding is what a job file asks for; `lorabbit.coding` is what it does. See docs/explanation/codecs.md.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Codec = Literal["fp32", "bf16", "int8", "int4", "top-k"]
PLAIN = "fp32"
TOP_K = "top-k"
BLOCKS = frozenset({"int8", "int4"})
"""Codecs in which a block of values shares a scale."""
KNOWN = ("bf16", "int8", "int4", "top-k", "delta", "zstd")
"""What a client of this version can write and read, beside tensors as they are."""


class _Part(BaseModel):
    """Base of the parts: frozen, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Coding(_Part):
    """How tensors are written for the wire."""

    codec: Codec = Field(default="fp32", description="fp32 sends tensors as they are; see docs/explanation/codecs.md")
    block: int = Field(default=64, ge=2, le=65536, description="int8, int4: values that share a scale")
    share: float = Field(default=0.05, gt=0, le=0.5, description="top-k: share of each tensor's values that is sent")
    delta: bool | None = Field(
        default=None,
        description="send the difference to what the other side holds; when absent, a lossy upload does",
    )
    feedback: bool | None = Field(
        default=None,
        description="uploads: add what one round left unsent to the next; when absent, top-k does",
    )
    zstd: bool = Field(default=False, description="compress each tensor where that makes it smaller; loses nothing")

    @property
    def is_lossy(self) -> bool:
        """Tell whether tensors arrive changed."""
        return self.codec != PLAIN

    @property
    def is_plain(self) -> bool:
        """Tell whether tensors travel as the files that they are."""
        return not (self.is_lossy or self.delta or self.zstd)

    @property
    def needs(self) -> frozenset[str]:
        """What both sides must know; see `KNOWN`."""
        wanted = {self.codec: self.is_lossy, "delta": bool(self.delta), "zstd": self.zstd}
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)

    @property
    def word(self) -> str:
        """What is on the wire, as logs and reports name it: for example ``int8+delta``."""
        more = [name for name in ("delta", "zstd") if getattr(self, name)]
        return "+".join([self.codec, *more])


class Transport(_Part):
    """How adapters and updates are written for the wire; a client that lacks a codec is served without."""

    up: Coding = Field(default=Coding(), description="updates, from a client to the server")
    down: Coding = Field(default=Coding(), description="the adapter, from the server to its clients")

    @property
    def uploads(self) -> Coding:
        """The coding of updates, with what is absent decided."""
        up = self.up
        delta = up.is_lossy if up.delta is None else up.delta
        feedback = up.codec == TOP_K if up.feedback is None else up.feedback
        return up.model_copy(update={"delta": delta, "feedback": feedback})

    @property
    def downloads(self) -> Coding:
        """The coding of adapters, with what is absent decided."""
        return self.down.model_copy(update={"delta": bool(self.down.delta), "feedback": False})

"""Wire: how many bytes tensors are as they travel, found out without sending them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from lorabbit import codec, coding
from lorabbit.transport import Transport
from lorabbit.types import ADAPTER, Plan, Tensors


@dataclass(frozen=True, slots=True)
class Wire:
    """Sizes of tensors as they travel; with zstd, more than which they never have."""

    transport: Transport
    scratch: Path
    keeps_up: bool
    """Whether every client holds what a difference is to."""

    def up(self, template: Tensors, plan: Plan) -> int:
        """Bytes of an update of a plan."""
        if self.transport.uploads.is_plain:
            return self._file(template)[1]
        return coding.most_bytes(self.transport.uploads, template, origin=_origin(plan.payloads.get(ADAPTER)))

    def down(self, plan: Plan, *, held: Container[str] = (), origin: Tensors | None = None) -> dict[str, int]:
        """Hash and size of every payload of a plan that a client does not hold."""
        found = {}
        for role, tensors in plan.payloads.items():
            sha256, size = self._file(tensors)
            if role == ADAPTER and not self.transport.downloads.is_plain:
                whole = 0 if origin is None or self.keeps_up else size
                size = max(whole, coding.most_bytes(self.transport.downloads, tensors, origin=_origin(origin)))
            if sha256 not in held:
                found[sha256] = size
        return found

    def _file(self, tensors: Tensors) -> tuple[str, int]:
        """Hash and size of the file that tensors travel as."""
        path = self.scratch / "payload.safetensors"
        sha256 = codec.write_tensors(path, tensors)
        return sha256, path.stat().st_size


def _origin(tensors: Tensors | None) -> coding.Origin | None:
    """What a difference is to; only the length of its name matters."""
    return None if tensors is None else coding.Origin("0" * 64, tensors)

"""The weights of the base model, which a task can replace or change by a low-rank delta.

All clients of a process share one base model, so changes are undone before the next task that needs another base. A
tensor is copied before its first change only, so a job that never changes its base keeps no copy. A replaced base and a
delta stay in place between tasks, since the next client of a round usually needs the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from lorabbit.errors import LoRAbbitError, Refused
from lorabbit.tensors import lora_math, serialization
from lorabbit.types import Tensors
from lorabbit_client.models.arrays import to_numpy, to_torch

REPLACED = "replaced"
"""Returned by `BaseWeights.apply` for a base that was overwritten or trained."""


class LoraWeight:
    """A weight under LoRA: its name in the base model, and its orientation."""

    def __init__(self, name: str, *, transposed: bool) -> None:
        """GPT-2's Conv1D keeps its weight d_in x d_out."""
        self.name = name
        self._transposed = transposed

    def oriented(self, value: torch.Tensor) -> torch.Tensor:
        """Turn a weight from the model's orientation to d_out x d_in, or back."""
        return value.t() if self._transposed else value


@dataclass(frozen=True, slots=True)
class BaseState:
    """State of a base, by the hashes of the tensors that were applied."""

    whole: str | None = None
    """Of a whole model in place of the pristine one."""
    delta: str | None = None
    """Of the factors that are added to it."""

    def __str__(self) -> str:
        """Return a key that is unique to this state."""
        return f"{self.whole or ''}+{self.delta or ''}"


PRISTINE = BaseState()


class BaseWeights:
    """The base model of a process by its own tensor names, with its changes."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        under_lora: Mapping[str, LoraWeight],
        *,
        own: Iterable[str] = (),
        scaling: float = 1.0,
    ) -> None:
        """Take live tensors by name, the weights under LoRA by module path, and the names that travel anyway.

        `own` tensors (a head, or everything) are put back by whoever trains them and are never copied here.
        """
        self.tensors = dict(tensors)
        self.scaling = scaling
        self.under_lora = dict(under_lora)
        self._own = frozenset(own)
        self._copies: dict[str, torch.Tensor] = {}
        self._changed: set[str] = set()
        self._current = self._requested = PRISTINE
        self._whole: Tensors = {}
        self._delta: Tensors = {}
        self._replaced = False

    def drop(self, names: Iterable[str]) -> None:
        """Remove tensors that the model no longer has."""
        for name in names:
            del self.tensors[name]

    # ---- between tasks ----
    def release(self) -> None:
        """End a task: the next one starts from the pristine base unless it requests the present state."""
        if self._replaced:
            self._restore()
        self._requested, self._replaced, self._whole, self._delta = PRISTINE, False, {}, {}

    def apply(self) -> str | None:
        """Apply the state that this task requested; returns its key, None if pristine."""
        if self._requested != self._current:
            self._restore()
            self._apply_requested()
        if self._replaced:
            return REPLACED
        return None if self._current == PRISTINE else str(self._current)

    # ---- a whole model ----
    def replace(self) -> None:
        """Prepare for a task that overwrites tensors of the base."""
        self._requested = PRISTINE
        self.apply()
        self._save_copies(name for name in self.tensors if name not in self._own)
        self._changed.update(self._copies)
        self._replaced = True

    def uses_base(self, sha256: str) -> bool:
        """Tell whether the model of this hash is in place already."""
        return not self._replaced and self._current.whole == sha256

    def use_base(self, whole: Tensors, sha256: str) -> None:
        """Request these tensors, with this hash, in place of the pristine ones; `own` ones are ignored."""
        if self._replaced:
            raise LoRAbbitError("internal: a base that was loaded whole cannot stand on another too")
        self._requested, self._whole = replace(self._requested, whole=sha256), whole

    # ---- a delta ----
    def pristine_weights(self) -> Tensors:
        """Return the weights under LoRA as they were loaded, float32, d_out x d_in, by module path."""
        return {
            path: to_numpy(weight.oriented(self._pristine(weight.name)), torch.float32)
            for path, weight in self.under_lora.items()
        }

    def set_delta(self, factors: Tensors) -> None:
        """Request W + s B A on top of the requested base; raises Refused for factors that do not fit a module."""
        if self._replaced:
            raise LoRAbbitError("internal: a base that was loaded whole cannot be shifted too")
        self._check(factors)
        sha256 = serialization.tensors_sha256(factors) if factors else None
        self._requested, self._delta = replace(self._requested, delta=sha256), factors

    def _check(self, factors: Tensors) -> None:
        paths = lora_math.modules(factors)
        named = {f"{path}.lora_{factor}.weight" for path in paths for factor in "AB"}
        for name in factors:
            if name not in named:
                raise Refused("names", f"{name!r} is no factor of a pair, so the base cannot be shifted by it")
        for path in paths:
            if path not in self.under_lora:
                raise Refused("names", f"{path!r} has no LoRA in this model, so it cannot be shifted")
            a, b = factors[f"{path}.lora_A.weight"], factors[f"{path}.lora_B.weight"]
            d_out, d_in = self.under_lora[path].oriented(self.tensors[self.under_lora[path].name]).shape
            if a.ndim != 2 or a.shape[1] != d_in or b.shape != (d_out, a.shape[0]):  # noqa: PLR2004 - a matrix
                raise Refused("shapes", f"{path} is {d_out} x {d_in}, which {b.shape} times {a.shape} does not fit")

    def _apply_requested(self) -> None:
        """Write the requested base and then the delta, computed in float32 and rounded once."""
        with torch.no_grad():
            if self._requested.whole is not None:
                for name in self._whole.keys() - self._own:
                    self._writable(name).copy_(to_torch(self._whole[name]))
            for path in lora_math.modules(self._delta) if self._requested.delta is not None else ():
                weight = self.under_lora[path]
                target = self._writable(weight.name)
                a, b = (
                    to_torch(self._delta[f"{path}.lora_{factor}.weight"]).float().to(target.device) for factor in "AB"
                )
                target.copy_(weight.oriented(weight.oriented(target).float() + self.scaling * (b @ a)))
        self._current = self._requested

    def _writable(self, name: str) -> torch.Tensor:
        """Return a tensor for writing, after copying its pristine values."""
        self._save_copies([name])
        self._changed.add(name)
        return self.tensors[name]

    # ---- copies ----
    def _pristine(self, name: str) -> torch.Tensor:
        return self._copies.get(name, self.tensors[name])

    def _save_copies(self, names: Iterable[str]) -> None:
        """Copy tensors before their first change."""
        for name in names:
            if name not in self._copies:
                self._copies[name] = self.tensors[name].detach().clone()

    def _restore(self) -> None:
        """Restore all changed tensors."""
        with torch.no_grad():
            for name in self._changed:
                self.tensors[name].copy_(self._copies[name])
        self._changed.clear()
        self._current = PRISTINE

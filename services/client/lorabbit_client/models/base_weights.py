"""The base model's own tensors: pristine copies, a whole model loaded over them, a low-rank shift on them.

Every client of a process uses one base model, so whatever a task does to it is undone before another
task sees it. A tensor is copied before it is changed for the first time, and only then: a job that never
touches its base keeps no second one. A base to stand on and a shift are left in place between tasks until
one comes that wants others, since the next client of a round wants the same.
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
"""What `BaseWeights.apply` says of a base that was loaded or trained whole."""


class LoraWeight:
    """A weight under LoRA: its name in the base model, and which way it lies."""

    def __init__(self, name: str, *, transposed: bool) -> None:
        """GPT-2's Conv1D keeps its weight d_in x d_out."""
        self.name = name
        self._transposed = transposed

    def oriented(self, value: torch.Tensor) -> torch.Tensor:
        """Turn a weight from the model's orientation to d_out x d_in, or back."""
        return value.t() if self._transposed else value


@dataclass(frozen=True, slots=True)
class BaseState:
    """What a base is, by the hashes of the tensors that made it so."""

    whole: str | None = None
    """Of a whole model in place of the pristine one."""
    shift: str | None = None
    """Of the factors that are added to it."""

    def __str__(self) -> str:
        """Tell it from every other one."""
        return f"{self.whole or ''}+{self.shift or ''}"


PRISTINE = BaseState()


class BaseWeights:
    """The base model of a process under its own names, and what is done to it."""

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
        self._installed = self._wanted = PRISTINE
        self._whole: Tensors = {}
        self._shift: Tensors = {}
        self._replaced = False

    def forget(self, names: Iterable[str]) -> None:
        """Let go of tensors that the model holds no more: no task may ask for them."""
        for name in names:
            del self.tensors[name]

    # ---- between tasks ----
    def release(self) -> None:
        """End a task: the next one starts from the pristine base, though what it stands on may stay until then."""
        if self._replaced:
            self._restore()
        self._wanted, self._replaced, self._whole, self._shift = PRISTINE, False, {}, {}

    def apply(self) -> str | None:
        """Make the base what this task asked for; returns what tells it from another one, None when pristine."""
        if self._wanted != self._installed:
            self._restore()
            self._install()
        if self._replaced:
            return REPLACED
        return None if self._installed == PRISTINE else str(self._installed)

    # ---- a whole model ----
    def replace(self) -> None:
        """Say that the task is about to overwrite tensors of the base."""
        self._wanted = PRISTINE
        self.apply()
        self._keep(name for name in self.tensors if name not in self._own)
        self._changed.update(self._copies)
        self._replaced = True

    def uses_base(self, sha256: str) -> bool:
        """Tell whether the model of this hash is in place already."""
        return not self._replaced and self._installed.whole == sha256

    def use_base(self, whole: Tensors, sha256: str) -> None:
        """Ask for these tensors, which have this hash, in place of the pristine ones; `own` ones are passed over."""
        if self._replaced:
            raise LoRAbbitError("internal: a base that was loaded whole cannot stand on another too")
        self._wanted, self._whole = replace(self._wanted, whole=sha256), whole

    # ---- a shift ----
    def pristine_weights(self) -> Tensors:
        """Return the weights under LoRA as they were loaded, float32, d_out x d_in, by module path."""
        return {
            path: to_numpy(weight.oriented(self._pristine(weight.name)), torch.float32)
            for path, weight in self.under_lora.items()
        }

    def set_delta(self, factors: Tensors) -> None:
        """Ask for W + s B A over what the task stands on; raises Refused for factors that do not fit a module."""
        if self._replaced:
            raise LoRAbbitError("internal: a base that was loaded whole cannot be shifted too")
        self._check(factors)
        sha256 = serialization.tensors_sha256(factors) if factors else None
        self._wanted, self._shift = replace(self._wanted, shift=sha256), factors

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

    def _install(self) -> None:
        """Write what the task stands on, and then the shifted weights, computed in float32 and rounded once."""
        with torch.no_grad():
            if self._wanted.whole is not None:
                for name in self._whole.keys() - self._own:
                    self._change(name).copy_(to_torch(self._whole[name]))
            for path in lora_math.modules(self._shift) if self._wanted.shift is not None else ():
                weight = self.under_lora[path]
                live = self._change(weight.name)
                a, b = (
                    to_torch(self._shift[f"{path}.lora_{factor}.weight"]).float().to(live.device) for factor in "AB"
                )
                live.copy_(weight.oriented(weight.oriented(live).float() + self.scaling * (b @ a)))
        self._installed = self._wanted

    def _change(self, name: str) -> torch.Tensor:
        """Return a tensor that is about to be overwritten, kept as it was."""
        self._keep([name])
        self._changed.add(name)
        return self.tensors[name]

    # ---- copies ----
    def _pristine(self, name: str) -> torch.Tensor:
        return self._copies.get(name, self.tensors[name])

    def _keep(self, names: Iterable[str]) -> None:
        """Copy tensors that were never changed until now."""
        for name in names:
            if name not in self._copies:
                self._copies[name] = self.tensors[name].detach().clone()

    def _restore(self) -> None:
        """Put everything back that was changed."""
        with torch.no_grad():
            for name in self._changed:
                self.tensors[name].copy_(self._copies[name])
        self._changed.clear()
        self._installed = PRISTINE

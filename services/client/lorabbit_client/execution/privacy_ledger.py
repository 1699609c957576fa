"""The privacy ledger: what a client has released of its examples, by job, for as long as its folder is there.

A release is a training whose result may leave the client. Each draws its own noise, so each counts, whichever task
it was for and however often that task was asked for: nothing that a server says takes a release back. A training that
ends without a result is none. The ledger is written before the result is: a crash between the two counts a release
that never was, and none is ever left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorabbit.errors import LoRAbbitError
from lorabbit.privacy.accountant import SampledGaussian
from lorabbit.runtime.atomic_files import replace_file
from lorabbit.types import Json


class PrivacyLedger:
    """Releases by job; kept in a file, or nowhere without one."""

    def __init__(self, path: Path | None = None, spent: Mapping[str, Iterable[SampledGaussian]] | None = None) -> None:
        """Take what earlier tasks have released."""
        self._path = path
        self._spent = {job: _together(kinds) for job, kinds in (spent or {}).items()}
        self._is_written = True
        self.told: dict[str, Json] = {}
        """What this task's result tells the server of it; empty where it released nothing."""

    @classmethod
    def read(cls, path: Path) -> PrivacyLedger:
        """Open a client's ledger, empty where there is no file; raises LoRAbbitError when that is damaged."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            spent = {
                str(job): [SampledGaussian(float(noise), float(rate), int(steps)) for noise, rate, steps in kinds]
                for job, kinds in kept.items()
            }
        except FileNotFoundError:
            return cls(path)
        except (ValueError, TypeError, AttributeError) as error:
            raise LoRAbbitError(
                f"the privacy ledger {path} is damaged ({error}): what was released is not known; restore the file, or "
                "remove it to count from nothing"
            ) from error
        return cls(path, spent)

    def of(self, job: str) -> tuple[SampledGaussian, ...]:
        """What one job has released."""
        return self._spent.get(job, ())

    @property
    def of_all(self) -> tuple[SampledGaussian, ...]:
        """What all jobs together have released."""
        return _together(kind for kinds in self._spent.values() for kind in kinds)

    def add(self, job: str, release: SampledGaussian) -> None:
        """Count a release; `write` makes it last."""
        self._spent[job] = _together((*self.of(job), release))
        self._is_written = False

    def write(self) -> None:
        """Keep what was added, durably; raises OSError."""
        if self._is_written or self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, json.dumps(self._spent, sort_keys=True).encode())
        self._is_written = True


def _together(kinds: Iterable[SampledGaussian]) -> tuple[SampledGaussian, ...]:
    """Add the steps of equal noise and rate, in one order."""
    steps: Counter[tuple[float, float]] = Counter()
    for kind in kinds:
        steps[kind.noise, kind.rate] += kind.steps
    return tuple(SampledGaussian(noise, rate, count) for (noise, rate), count in sorted(steps.items()))

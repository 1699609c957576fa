"""The privacy ledger: the releases of a client's examples by job, kept in the client's folder.

A release is a training whose result can leave the client. Each has noise of its own, so each counts, also if a task is
repeated, and no message of a server removes one. A training without a result is no release. The ledger is written
before the result: a crash between the two counts a release that did not happen, but none is ever missing.
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

    def __init__(
        self, path: Path | None = None, releases: Mapping[str, Iterable[SampledGaussian]] | None = None
    ) -> None:
        """Start with the releases of earlier tasks."""
        self._path = path
        self._releases = {job: _merge_steps(entries) for job, entries in (releases or {}).items()}
        self._is_written = True
        self.summary: dict[str, Json] = {}
        """Sent to the server with this task's result; empty if nothing was released."""

    @classmethod
    def read(cls, path: Path) -> PrivacyLedger:
        """Open a client's ledger, empty where there is no file; raises LoRAbbitError when that is damaged."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            releases = {
                str(job): [SampledGaussian(float(noise), float(rate), int(steps)) for noise, rate, steps in entries]
                for job, entries in kept.items()
            }
        except FileNotFoundError:
            return cls(path)
        except (ValueError, TypeError, AttributeError) as error:
            raise LoRAbbitError(
                f"the privacy ledger {path} is damaged ({error}): what was released is not known; restore the file, or "
                "remove it to count from nothing"
            ) from error
        return cls(path, releases)

    def of(self, job: str) -> tuple[SampledGaussian, ...]:
        """What one job has released."""
        return self._releases.get(job, ())

    @property
    def all_releases(self) -> tuple[SampledGaussian, ...]:
        """What all jobs together have released."""
        return _merge_steps(entry for entries in self._releases.values() for entry in entries)

    def add(self, job: str, release: SampledGaussian) -> None:
        """Add a release; `write` stores it."""
        self._releases[job] = _merge_steps((*self.of(job), release))
        self._is_written = False

    def write(self) -> None:
        """Write added releases durably; raises OSError."""
        if self._is_written or self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, json.dumps(self._releases, sort_keys=True).encode())
        self._is_written = True


def _merge_steps(entries: Iterable[SampledGaussian]) -> tuple[SampledGaussian, ...]:
    """Add the steps of equal noise and rate, in one order."""
    steps: Counter[tuple[float, float]] = Counter()
    for entry in entries:
        steps[entry.noise, entry.rate] += entry.steps
    return tuple(SampledGaussian(noise, rate, count) for (noise, rate), count in sorted(steps.items()))

"""Archive of updates: what `lorabbit replay` needs, kept where the job asks for it (`output.keep_updates`).

`updates/log.jsonl` has the events that say which updates made which version, `updates/` the tensors by sha256.
A file is copied behind the commit that counts it and before the step that folds it, so a restarted server finds
either the copy or the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from lorabbit.events import job_events as ev
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import EVALUATE
from lorabbit_server.artifacts.fenced_files import FencedFileWriter

FOLDER = "updates"
LOG = "log.jsonl"
_Work = Callable[[], None]


class UpdateArchive:
    """The archived updates of one run."""

    def __init__(self, folder: Path, payloads: PayloadStore, files: FencedFileWriter, *, wanted: bool) -> None:
        """Keep it below the run's folder; do nothing where it is not wanted."""
        self._folder, self._payloads, self._files, self._wanted = folder / FOLDER, payloads, files, wanted

    def on_events(self, events: Iterable[ev.AnyEvent]) -> list[_Work]:
        """Return the work that committed events cause."""
        return self._works(events, whole=False)

    def recover(self, events: Iterable[ev.AnyEvent]) -> list[_Work]:
        """Return the work that makes what a stopped server may have left out."""
        return self._works(events, whole=True)

    def _works(self, events: Iterable[ev.AnyEvent], *, whole: bool) -> list[_Work]:
        kept = [event for event in events if self._wanted and _matters(event)]
        if not kept:
            return []
        lines = "".join(event.model_dump_json() + "\n" for event in kept)
        hashes = [event.sha256 for event in kept if isinstance(event, ev.UpdateAccepted) and event.sha256]

        def work() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for sha256 in hashes:
                self._copy(sha256)
            if whole:
                self._files.write(self._folder / LOG, lines)
            else:
                self._files.append(self._folder / LOG, lines)

        return [work]

    def _copy(self, sha256: str) -> None:
        """Keep a copy of a payload, unless it is there."""
        source, path = self._payloads.path(sha256), PayloadStore(self._folder, durable=False).path(sha256)
        if not path.exists() and source.exists():
            self._files.copy(source, path)


def _matters(event: ev.AnyEvent) -> bool:
    """Tell whether an event says what a version is made of."""
    if isinstance(event, ev.UpdateAccepted):
        return event.phase != EVALUATE
    if isinstance(event, ev.UpdateRejected):
        return event.started is not None
    if isinstance(event, ev.ClientJoined):
        return event.index is not None
    return isinstance(event, ev.JobStarted | ev.AdapterInitialized | ev.RoundClosed)

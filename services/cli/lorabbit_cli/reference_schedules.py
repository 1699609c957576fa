"""Reference of schedules: which method and which aggregation bears which schedule, asked of the code that refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from lorabbit.aggregation import RULES
from lorabbit.errors import BadInput
from lorabbit.jobspec import Aggregation, JobSpec
from lorabbit.methods import METHODS, build
from lorabbit_cli.schema_text import table

ABOUT = (
    "Every method under every schedule: *yes*, or the number of the reason for which a job is refused before it starts "
    "([what the schedules are](../explanation/schedules.md)). Every *yes* is run by "
    "`pytest tests/integration/test_schedule_matrix.py`, every number is tested to be a refusal."
)
ABOUT_AGGREGATIONS = "The same for the aggregations, under `fedavg` over LoRA."
SCHEDULES: Mapping[str, Any] = {
    "sync": "sync",
    "quorum": {"kind": "quorum", "quorum": 0.5},
    "quorum, late kept": {"kind": "quorum", "quorum": 0.5, "late": "keep"},
    "buffered": {"kind": "buffered", "buffer": 2},
    "buffered, K = 1": {"kind": "buffered", "buffer": 1},
}
"""The columns, as a job file has them."""
YES = "yes"


def job_of(method: str, schedule: str, *, aggregation: str = "factors") -> JobSpec:
    """A small job of a method under the schedule of a column, as a job file would have it."""
    own = METHODS[method].personal
    return JobSpec.model_validate(
        {
            "name": "matrix",
            "model": {"name": "cnn:5" if own else "tiny:vit", "task": "image-classification"},
            "data": {"source": "digits"},
            "method": {"name": method},
            "schedule": SCHEDULES[schedule],
            "aggregation": aggregation,
        }
    )


def refusal(job: JobSpec) -> str:
    """Why a job is refused; empty where it is not."""
    try:
        build(job)
    except BadInput as error:
        return str(error)
    return ""


def schedules_page() -> str:
    """The tables, and under each the reasons."""
    methods = {name: [job_of(name, schedule) for schedule in SCHEDULES] for name in sorted(METHODS)}
    rules = {
        str(name): [job_of("fedavg", schedule, aggregation=str(name)) for schedule in SCHEDULES]
        for name in get_args(Aggregation)
    }
    reasons = {name: METHODS[name].because for name in methods}
    lines = [ABOUT, "", *_matrix("method", methods, reasons), "## Aggregations", "", ABOUT_AGGREGATIONS, ""]
    return "\n".join([*lines, *_matrix("aggregation", rules, {name: RULES[name].late for name in rules})])


def _matrix(what: str, jobs: Mapping[str, list[JobSpec]], reasons: Mapping[str, str]) -> list[str]:
    """One table: a row a name, a column a schedule, and the reasons by number; raises where a refusal says another."""
    numbers: dict[str, int] = {}
    rows = []
    for name, row in jobs.items():
        cells = [f"`{name}`"]
        for job in row:
            said = refusal(job)
            if said and reasons[name] not in said:
                raise ValueError(f"{name} is refused for another reason than its own: {said}")
            cells.append(str(numbers.setdefault(name, len(numbers) + 1)) if said else YES)
        rows.append(tuple(cells))
    listed = [f"{number}. `{name}`: {reasons[name]}." for name, number in numbers.items()]
    return [table((what, *SCHEDULES), rows), "", *listed, ""]

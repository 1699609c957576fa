"""Generate the pages of docs/reference from the code.

`python tools/reference_pages.py docs/reference` writes them; a test fails when one is stale. The
same code gives the same bytes: nothing here depends on the machine, the terminal or the clock.

The page of schedules asks the code that refuses a job which method and which aggregation work under which schedule.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from lorabbit import errors
from lorabbit.aggregation.rules import RULES
from lorabbit.config import settings
from lorabbit.errors import BadInput
from lorabbit.events import job_events
from lorabbit.events.report import report_schema
from lorabbit.job import schedules, spec
from lorabbit.job.glossary import CHOICES
from lorabbit.job.spec import Aggregation, JobSpec
from lorabbit.methods.registry import METHODS, build
from lorabbit.protocol import messages
from lorabbit_cli.__main__ import app
from lorabbit_cli.schema_text import IDENTIFIER, doc, field_rows, table
from lorabbit_client.tasks.registry import TASKS


def cli_page(exit_codes: dict[int, str]) -> str:
    """Describe every command with its arguments and options, and the exit codes."""
    root: Any = typer.main.get_command(app)
    context = root.make_context("lorabbit", [], resilient_parsing=True)
    commands = get_docs_for_click(obj=root, ctx=context, name="lorabbit").partition("\n")[2]
    codes = table(("code", "meaning"), [(str(code), meaning) for code, meaning in exit_codes.items()])
    return f"{commands.strip()}\n\n## Exit codes\n\n{codes}\n"


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


MADE = "<!-- Made from the code by `python tools/reference_pages.py docs/reference`; do not edit. -->"
ABOUT_MESSAGES = (
    "Every message is JSON of one of these models. Its AMQP `type` property is the heading below, with version "
    "{version}. An unknown key is refused. Tensors travel as chunks, which a `PayloadRef` names by content."
)
ABOUT_EVENTS = (
    "Every transition of a job appends one of these to its log. The live view and the report are folds of this log. "
    "Beside the fields below each has `kind`, its heading, and `at_ms`, the server's clock in milliseconds since 1970. "
    "`round` is 1-based; 0 is the initialization."
)
ABOUT_TASKS = (
    "What `model.task` can be, the metric that picks `best/` unless `evaluation.metric` names another, and for every "
    "role the fields that are tried for it, in this order. `data.fields` names others, for example "
    "`fields: {text: body}`."
)
ABOUT_JOB_FILE = (
    "YAML or TOML. Every key has a default that works, so an empty file is a job; an unknown key is an error. "
    "[job.schema.json](job.schema.json) is the same as a JSON schema, for editors."
)
ABOUT_SETTINGS = (
    "Settings of a process, from the environment. A secret may stand in a file: "
    "`LORABBIT_REDIS_URL_FILE=/run/secrets/redis` sets `LORABBIT_REDIS_URL` to that file's content where the variable "
    "itself is not set. What belongs to a run stands in its [job file](job-file.md), not here."
)
FIELDS = ("field", "type", "default", "meaning")


def pages() -> dict[str, str]:
    """Return file name -> content of every page of the reference."""
    return {
        "messages.md": _page("Messages", _messages()),
        "events.md": _page("Events", _events()),
        "job-file.md": _page("Job file", _job_file()),
        "tasks.md": _page("Tasks", _tasks()),
        "methods.md": _page("Methods", _methods()),
        "schedules.md": _page("Schedules and methods", schedules_page()),
        "settings.md": _page("Settings", _settings()),
        "cli.md": _page("Command line", cli_page(_exit_codes())),
        "report.schema.json": _json(report_schema()),
        "job.schema.json": _json(_job_schema()),
    }


def _page(title: str, body: str) -> str:
    return f"# {title}\n\n{MADE}\n\n{body.strip()}\n"


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _job_schema() -> dict[str, Any]:
    made = spec.JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "LoRAbbit job file"}


def _section(title: str, model: type[BaseModel], *, without: frozenset[str] = frozenset()) -> str:
    """One model: what it is, and its fields."""
    rows = [row for row in field_rows(model) if row[0] not in without]
    fields = table(FIELDS, [(f"`{name}`", kind, default, meaning) for name, kind, default, meaning in rows])
    return f"## {title}\n\n{doc(model)}\n\n{fields if rows else 'No fields.'}\n"


def _messages() -> str:
    lines = [
        ABOUT_MESSAGES.format(version=messages.VERSION),
        "",
    ]
    lines += [_section(f"`{model.type_name()}`", model) for model in (*messages.FROM_CLIENT, *messages.FROM_SERVER)]
    lines += [_section(f"Value `{model.__name__}`", model) for model in (messages.PayloadRef, messages.Metrics)]
    lines.append(f"An identifier matches `{IDENTIFIER}`.")
    return "\n".join(lines)


def _events() -> str:
    (union, *_) = get_args(job_events.AnyEvent)
    lines = [ABOUT_EVENTS, ""]
    for model in get_args(union):
        kind = model.model_fields["kind"].default
        lines.append(_section(f"`{kind}`", model, without=frozenset({"kind", "at_ms"})))
    return "\n".join(lines)


def _job_file() -> str:
    lines = [
        ABOUT_JOB_FILE,
        "",
        *_job_part(spec.JobSpec, "", "The job"),
        *_job_part(schedules.Quorum, "schedule.", "`schedule` of kind quorum"),
        *_job_part(schedules.Buffered, "schedule.", "`schedule` of kind buffered"),
        "A method's hyper-parameters are further keys under `method`: see [Methods](methods.md).",
    ]
    return "\n".join(lines)


def _job_part(model: type[BaseModel], prefix: str, title: str) -> list[str]:
    """The scalar keys of one part, then every part inside it."""
    inner = {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    rows = [(f"`{prefix}{row[0]}`", *row[1:]) for row in field_rows(model) if row[0] not in inner]
    lines = [f"## {title}", "", doc(model), "", table(("key", *FIELDS[1:]), rows), ""]
    for name, part in inner.items():
        lines += _job_part(part, f"{prefix}{name}.", f"`{prefix}{name}`")
    for name, field in model.model_fields.items():
        for part in get_args(field.annotation):
            if type(None) in get_args(field.annotation) and isinstance(part, type) and issubclass(part, BaseModel):
                lines += _job_part(part, f"{prefix}{name}.", f"`{prefix}{name}`, where it is given")
    return lines


def _tasks() -> str:
    lines = [ABOUT_TASKS, ""]
    for name, task in TASKS.items():
        rows = [(f"`{role}`", ", ".join(f"`{field}`" for field in fields)) for role, fields in task.roles.items()]
        lines += [f"## `{name}`", "", f"Main metric: {task.main_metric}.", "", table(("role", "fields"), rows), ""]
    return "\n".join(lines)


def _methods() -> str:
    lines = ["`lorabbit methods` prints the same list.", ""]
    for name in sorted(METHODS):
        method = METHODS[name]
        lines += [f"## `{name}`", "", f"{method.summary[0].upper()}{method.summary[1:]}.", "", f"{method.paper}.", ""]
        rows = [(f"`method.{key}`", kind, default, meaning) for key, kind, default, meaning in field_rows(method)]
        lines += [table(("key", *FIELDS[1:]), rows) if rows else "No hyper-parameters of its own.", ""]
        lines += [f"[Formulas, departures, when to use it](../methods/{name}.md)", ""]
    for key, words in CHOICES.items():
        described = [(f"`{word}`", meaning) for word, meaning in words.items()]
        lines += [f"## `{key}`", "", table(("word", "what it is"), described), ""]
    return "\n".join(lines)


def _settings() -> str:
    lines = [
        ABOUT_SETTINGS,
        "",
    ]
    parts = (
        ("`lorabbit server`", settings.ServerSettings),
        ("`lorabbit client`", settings.ClientSettings),
        ("The operator's commands", settings.OperatorSettings),
    )
    for title, model in parts:
        rows = [
            (f"`LORABBIT_{name.upper()}`", kind, default, meaning) for name, kind, default, meaning in field_rows(model)
        ]
        lines += [f"## {title}", "", table(("variable", *FIELDS[1:]), rows), ""]
    return "\n".join(lines)


def _exit_codes() -> dict[int, str]:
    """Return exit code -> meaning."""
    return {
        0: "done",
        errors.RunFailed.exit_code: "the run failed, or was cancelled",
        errors.BadInput.exit_code: "bad input: a job file, a data file, an option, a model name",
        errors.Retryable.exit_code: "a service cannot be reached: the broker, the store, or the server",
        errors.NotAllowed.exit_code: "not allowed: a token, a password, or a client that was revoked",
        130: "interrupted (Ctrl-C)",
        143: "a client that ends by itself (`LORABBIT_IDLE_SECONDS`) was told to leave before: start it again",
    }


def write(folder: Path) -> None:
    """Write every page into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference"))

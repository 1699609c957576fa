"""Report pages: a run's `report.json` as Markdown, as one self-contained HTML page, and for TensorBoard.

The JSON is the contract and the only input; the pages can be made again at any time, on any
machine, and show nothing that is not in it (but the job file that lies beside it).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from pydantic import ValidationError

from lorabbit.errors import BadInput
from lorabbit.events.report import Report, Round
from lorabbit.job.spec import JobSpec
from lorabbit_cli.formatting import bytes_text, duration_text, fact_text, score_text, sparkline
from lorabbit_cli.local.export import read_job
from lorabbit_cli.report import summary

MOST_CLIENTS_TRACKED = 50
"""TensorBoard gets curves of so many clients, the first ones."""


def read_report(folder: Path) -> Report:
    """Read `report.json` of a run folder; raises BadInput when it is missing or something else."""
    path = folder / "report.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{folder} is not a run folder: it has no report.json") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{path} is not a report of this version: {where}: {first['msg']}") from error


def write_pages(folder: Path) -> None:
    """Write report.md, report.html and tensorboard/ beside a run's report.json; raises BadInput without one."""
    report, job = read_report(folder), _job(folder)
    (folder / "report.md").write_text(markdown(report, job), encoding="utf-8")
    (folder / "report.html").write_text(html(report, job), encoding="utf-8")
    write_tensorboard(report, folder / "tensorboard")


@dataclass(frozen=True, slots=True)
class JobFile:
    """The job file beside a report, as it stands, and read where it can be."""

    text: str = ""
    spec: JobSpec | None = None


def _job(folder: Path) -> JobFile:
    path = folder / "job.yaml"
    if not path.is_file():
        return JobFile()
    try:
        spec = read_job(folder)
    except BadInput:
        spec = None
    return JobFile(path.read_text(encoding="utf-8"), spec)


def markdown(report: Report, job: JobFile = JobFile()) -> str:
    """Render a report as Markdown."""
    return environment().get_template("report.md.j2").render(_context(report, job))


def html(report: Report, job: JobFile = JobFile()) -> str:
    """Render a report as one HTML page that needs nothing else."""
    # matplotlib costs a second to import: only who draws pays it.
    from lorabbit_cli.report.plots import figures  # noqa: PLC0415

    context = _context(report, job) | {"figures": figures(report)}
    return environment().get_template("report.html.j2").render(context)


def write_tensorboard(report: Report, folder: Path) -> None:
    """Write a report's curves as TensorBoard events, in place of older ones."""
    from tensorboardX import SummaryWriter  # noqa: PLC0415 - as above

    shutil.rmtree(folder, ignore_errors=True)
    writer = SummaryWriter(str(folder))
    followed = set(report.clients[:MOST_CLIENTS_TRACKED])
    for row in report.rounds:
        for tag, value in _scalars(row, followed).items():
            writer.add_scalar(tag, value, row.round)
    writer.close()


def _scalars(row: Round, followed: set[str]) -> dict[str, float]:
    """Tag -> value of one round."""
    values: dict[str, float] = {f"test/{name}": value for name, value in row.metrics.items()}
    values |= {"bytes/up": row.bytes_up, "bytes/down": row.bytes_down, "seconds/round": row.seconds}
    if row.train_loss is not None:
        values["train/loss"] = row.train_loss
    for client in row.per_client:
        if client.client not in followed:
            continue
        values |= {f"{client.client}/{name}": value for name, value in client.metrics.items()}
        if client.loss is not None:
            values[f"{client.client}/train_loss"] = client.loss
    return values


def environment(*packages: str) -> Environment:
    """Return the template environment of the named packages and this one, with the filters that write numbers."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "lorabbit_cli")]),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"bytes": bytes_text, "duration": duration_text, "score": score_text, "fact": fact_text}
    return made


def _context(report: Report, job: JobFile) -> dict[str, object]:
    """What both templates see."""
    known = summary.summarize(report)
    names: list[str] = []
    for row in report.rounds:
        names += [name for name in row.metrics if name not in names]
    names.sort(key=lambda name: (name != known.main_metric, name))
    return {
        "report": report,
        "job": job,
        "facts": known,
        "method": str(report.method.get("name", "")),
        "settings": {name: value for name, value in report.method.items() if name != "name"},
        "metric_names": names,
        "sparkline": sparkline([row.metrics[names[0]] for row in report.rounds if names and names[0] in row.metrics]),
    }

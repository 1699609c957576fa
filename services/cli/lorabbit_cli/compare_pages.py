"""Pages of a comparison: one folder with JSON, Markdown, CSV, one HTML page, and PNG plots.

`comparison.json` is the contract; everything else is made from the same value and can be made again.
"""

from __future__ import annotations

from pathlib import Path

from lorabbit.jobfile import dump
from lorabbit_cli.compare_plots import figures, pictures
from lorabbit_cli.compare_results import Comparison
from lorabbit_cli.compare_sweep import Sweep
from lorabbit_cli.compare_tables import case_title, runs_csv, summary_csv, tables
from lorabbit_cli.report_pages import environment

PLOTS = "plots"


def write(comparison: Comparison, sweep: Sweep, folder: Path, command: str) -> None:
    """Write everything into `folder`; `command` is what makes it again."""
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    (folder / "jobs").mkdir(exist_ok=True)
    for old in [*(folder / PLOTS).glob("*.png"), *(folder / "jobs").glob("*.yaml")]:
        old.unlink()
    drawn: dict[str, dict[str, str]] = {}
    for case in comparison.cases:
        drawn[case.name] = {}
        for name, png in pictures(case).items():
            file = f"{case.name}-{name.replace(' ', '-')}.png"
            (folder / PLOTS / file).write_bytes(png)
            drawn[case.name][f"{case.metric} against {name}".capitalize()] = f"{PLOTS}/{file}"
    for planned in sweep.planned:
        if planned.seed == sweep.seeds[0]:
            (folder / "jobs" / f"{planned.case}-{planned.label}.yaml").write_text(dump(planned.spec), encoding="utf-8")
    texts = {
        "comparison.json": comparison.model_dump_json(indent=2) + "\n",
        "summary.csv": summary_csv(comparison),
        "runs.csv": runs_csv(comparison.runs),
        "report.md": markdown(comparison, drawn, command),
        "report.html": html(comparison, command),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def markdown(comparison: Comparison, drawn: dict[str, dict[str, str]], command: str) -> str:
    """Render a comparison as Markdown; `drawn` is case -> title -> picture file."""
    context = {"comparison": comparison, "cases": _cases(comparison), "drawn": drawn, "command": command}
    return environment().get_template("compare.md.j2").render(context)


def html(comparison: Comparison, command: str) -> str:
    """Render a comparison as one HTML page that needs nothing else."""
    drawn = {case.name: figures(case, f"c{number}f") for number, case in enumerate(comparison.cases)}
    context = {"comparison": comparison, "cases": _cases(comparison), "drawn": drawn, "command": command}
    return environment().get_template("compare.html.j2").render(context)


def _cases(comparison: Comparison) -> list[dict[str, object]]:
    """What both templates see of each case."""
    return [
        {"name": case.name, "title": case_title(case), "tables": tables(comparison, case)} for case in comparison.cases
    ]

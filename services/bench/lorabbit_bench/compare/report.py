"""Tables: a comparison as rows of text for people, and as rows of numbers for programs.

Pages of a comparison: one folder with JSON, Markdown, CSV, one HTML page, and PNG plots.

`comparison.json` is the contract; everything else is made from the same value and can be made again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabbit.job_loader import dump
from lorabbit_bench.compare.metrics import RunMetrics
from lorabbit_bench.compare.plots import figures, pictures
from lorabbit_bench.compare.results import SPREADS, CaseResult, Comparison, Difference, RunRow, TimeToTarget
from lorabbit_bench.compare.statistics import Interval, Spread
from lorabbit_bench.compare.sweep import ONLY_CASE, Sweep
from lorabbit_cli.formatting import bytes_text, duration_text, number_text, score_text
from lorabbit_cli.report.pages import environment

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A titled table; the first column is text, the others are figures."""

    title: str
    about: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(comparison: Comparison, case: CaseResult) -> list[ReportTable]:
    """Every table of one case that has something to say."""
    made = [_scores(comparison, case), _cost(comparison, case)]
    if case.target is not None:
        made.append(_target(comparison, case))
    facts = _facts(case)
    return [*made, facts] if facts.rows else made


def _scores(comparison: Comparison, case: CaseResult) -> ReportTable:
    metric, reference = case.metric, comparison.reference
    headings = (
        "run",
        "method",
        "seeds",
        f"final {metric}",
        "best",
        "mean over clients",
        f"{comparison.score} - {reference}",
    )
    rows = []
    for row in case.rows:
        seeds = f"{len(row.seeds)}" + (f" ({len(row.failed)} missing)" if row.failed else "")
        scores = (score_spread(row.final), score_spread(row.best), score_spread(row.client_mean))
        paired = "reference" if row.label == reference else difference_text(row.difference)
        rows.append((row.label, row.method, seeds, *scores, paired))
    better = "lower is better" if case.lower_is_better else "higher is better"
    about = (
        f"Mean +- sample standard deviation over the seeds; {better}. The last column is the paired difference with "
        "its 95 % interval: t over the seeds, or (clients) a bootstrap over seeds and clients of the clients' "
        "unweighted differences. The best score is picked on the test data and therefore flatters."
    )
    return ReportTable("Scores", about, headings, tuple(rows))


def _cost(comparison: Comparison, case: CaseResult) -> ReportTable:
    modelled = comparison.link is not None
    whole = comparison.reference
    headings: tuple[str, ...] = ("run", "trainable", "sent", "up", "down", f"up / {whole}", f"payload / {whole}")
    headings += ("client compute", "operations", "time")
    headings += (*(("modelled time",) if modelled else ()), "peak memory")
    rows = []
    for row in case.rows:
        trainable = NOTHING if row.trainable is None else f"{row.trainable:,}"
        cells = [row.label, trainable, of(row.parameters_up, number_text)]
        cells += [of(row.bytes_up, bytes_text), of(row.bytes_down, bytes_text)]
        cells += [share_text(row.upload_share), share_text(row.payload_share)]
        cells += [of(row.client_seconds, duration_text), of(row.flops, number_text), of(row.seconds, duration_text)]
        cells += [of(row.modelled_seconds, duration_text)] if modelled else []
        rows.append((*cells, of(row.peak_gpu_bytes or row.peak_memory_bytes, bytes_text)))
    about = (
        "Whole runs, means over the seeds. Bytes are payload over all clients, preparation included; those down hold "
        "what is read for scoring, those up do not; sent are the numbers in the tensors that clients sent. "
        "Client compute is the training of all clients together; operations are the floating-point ones of its "
        "products of matrices (a multiply-add is two), forward and backward; memory is that of the largest "
        "process (of the GPU where there is one)."
    )
    return ReportTable("Cost", about, headings, tuple(rows))


def _target(comparison: Comparison, case: CaseResult) -> ReportTable:
    reference, modelled = comparison.reference, comparison.link is not None
    headings: tuple[str, ...] = ("run", "reached", "rounds", "payload", f"payload / {reference}", "client compute")
    headings += ("operations", "time")
    headings += (*(("modelled time",) if modelled else ()), f"time / {reference}")
    rows = []
    for row in case.rows:
        found = row.to_target or TimeToTarget(seeds=0, of=len(row.seeds))
        rounds = of(found.rounds, lambda number: f"{number:.1f}")
        cells = [row.label, f"{found.seeds}/{found.of}", rounds, of(found.bytes, bytes_text)]
        cells += [share_text(found.bytes_share), of(found.client_seconds, duration_text), of(found.flops, number_text)]
        cells += [of(found.seconds, duration_text), *([of(found.modelled_seconds, duration_text)] if modelled else [])]
        rows.append((*cells, share_text(found.seconds_share)))
    how = ""
    if comparison.target is not None and comparison.target.share is not None:
        whose = "the worst run" if comparison.target.of == "worst" else reference
        how = f" ({comparison.target.share:.0%} of the plateau of {whose}, the mean of its last three scores)"
    about = (
        f"Up to the first scored round with {case.metric} {score_text(case.target)}{how}; means over the seeds that "
        "reached it."
    )
    return ReportTable("To the target", about, headings, tuple(rows))


def _facts(case: CaseResult) -> ReportTable:
    names = list(dict.fromkeys(name for row in case.rows for name in row.facts))
    rows = tuple(
        (row.label, *(of(row.facts.get(name), lambda value: f"{value:.4g}") for name in names))
        for row in case.rows
        if row.facts
    )
    return ReportTable("Told by the methods", "Of the last round, means over the seeds.", ("run", *names), rows)


def of(values: Spread | None, text: Callable[[float], str]) -> str:
    """Write a mean; a dash for nothing."""
    return NOTHING if values is None else text(values.mean)


def score_spread(values: Spread | None) -> str:
    """Write a score with its deviation, where it has one."""
    if values is None:
        return NOTHING
    return score_text(values.mean) + (f" +- {score_text(values.sd)}" if values.sd is not None else "")


def share_text(share: float | None) -> str:
    """Write a share of the reference: 6.4 %, 0.012 %."""
    if share is None:
        return NOTHING
    percent = 100 * share
    return f"{percent:.1f} %" if percent >= 1 else f"{percent:.2g} %"


def difference_text(difference: Difference | None) -> str:
    """Write a paired difference with the intervals that there are."""
    if difference is None:
        return NOTHING
    parts = [interval_text(difference.over_seeds)] if difference.over_seeds else []
    parts += [f"clients {interval_text(difference.over_clients)}"] if difference.over_clients else []
    return "; ".join([f"{difference.mean:+.4f}", *parts])


def interval_text(interval: Interval) -> str:
    """Write an interval's ends, with a star where they are on one side of zero."""
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]" + ("*" if interval.excludes_zero else "")


def case_title(case: CaseResult) -> str:
    """Heading of a case; empty for the only one."""
    return "" if case.name == ONLY_CASE else case.name


REACHED = ("rounds", "bytes", "seconds", "client_seconds", "flops", "modelled_seconds")
RUN = (
    "case", "label", "seed", "key", "metric", "final", "best", "best_round", "client_mean", "plateau", "rounds",
    "trainable", "base_parameters", "parameters_up", "bytes_up", "bytes_down", "overhead", "client_seconds", "flops",
    "seconds", "modelled_seconds", "peak_memory_bytes", "peak_gpu_bytes",
)  # fmt: skip


def summary_csv(comparison: Comparison) -> str:
    """One line for each case and run: means and deviations, differences, and what the target took."""
    columns = [f"{name}_{part}" for name in SPREADS for part in ("mean", "sd")]
    reached = [f"target_{name}" for name in REACHED]
    ends = [f"{over}_{end}" for over in ("over_seeds", "over_clients") for end in ("low", "high")]
    head = [
        "case",
        "run",
        "method",
        "metric",
        "seeds",
        "failed",
        "trainable",
        *columns,
        "upload_share",
        "payload_share",
    ]
    head += ["difference", *ends, "target", "target_seeds", *reached, "target_bytes_share", "target_seconds_share"]
    return _csv(head, [_summary_line(case, row) for case in comparison.cases for row in case.rows])


def _summary_line(case: CaseResult, row: RunRow) -> list[object]:
    line: list[object] = [case.name, row.label, row.method, case.metric, len(row.seeds), len(row.failed), row.trainable]
    for name in SPREADS:
        values: Spread | None = getattr(row, name)
        line += [values.mean if values else None, values.sd if values else None]
    line += [row.upload_share, row.payload_share, row.difference.mean if row.difference else None]
    for over in ("over_seeds", "over_clients"):
        interval: Interval | None = getattr(row.difference, over, None)
        line += [interval.low if interval else None, interval.high if interval else None]
    found = row.to_target
    line += [case.target, found.seeds if found else None]
    for name in REACHED:
        values = getattr(found, name, None)
        line.append(values.mean if values else None)
    return [*line, found.bytes_share if found else None, found.seconds_share if found else None]


def runs_csv(runs: Sequence[RunMetrics]) -> str:
    """One line for each run and seed."""
    return _csv(list(RUN), [[getattr(m, name) for name in RUN] for m in runs])


def _csv(head: list[str], lines: list[list[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return out.getvalue()


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
    return environment("lorabbit_bench").get_template("compare.md.j2").render(context)


def html(comparison: Comparison, command: str) -> str:
    """Render a comparison as one HTML page that needs nothing else."""
    drawn = {case.name: figures(case, f"c{number}f") for number, case in enumerate(comparison.cases)}
    context = {"comparison": comparison, "cases": _cases(comparison), "drawn": drawn, "command": command}
    return environment("lorabbit_bench").get_template("compare.html.j2").render(context)


def _cases(comparison: Comparison) -> list[dict[str, object]]:
    """What both templates see of each case."""
    return [
        {"name": case.name, "title": case_title(case), "tables": tables(comparison, case)} for case in comparison.cases
    ]

"""The live view and the summary, on a terminal and elsewhere."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from doubles_events import START_MS, name, one_round, opening, sample_log, sample_report, sample_spec
from rich.console import Console

from lorabbit.events import job_events as ev
from lorabbit.types import TRAIN
from lorabbit_cli.formatting import bytes_text, duration_text, score_text, sparkline
from lorabbit_cli.live_view.state import JobProgress
from lorabbit_cli.live_view.view import LiveView, render
from lorabbit_cli.report.summary import print_summary


def console(*, terminal: bool, height: int = 40) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=110, height=height, color_system=None, legacy_windows=False
    )


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def frame(progress: JobProgress, *, height: int = 40) -> str:
    out = console(terminal=True, height=height)
    out.print(render(progress, now_ms=START_MS + 3000, size=out.size))
    return text_of(out)


def test_without_a_terminal_a_run_is_a_line_a_round():
    out = console(terminal=False)

    with LiveView(sample_spec(), console=out) as view:
        for event in sample_log():
            view.feed(event)

    lines = text_of(out).splitlines()
    assert [line.split(" ", 1)[1].split(",")[0] for line in lines if " round " in line] == [
        "round 1/3",
        "round 2/3",
        "round 3/3",
    ]
    assert lines[-1].endswith("job done")


def test_on_a_terminal_a_frame_shows_rounds_clients_and_totals():
    progress = JobProgress(sample_spec())
    for event in [*opening(), *one_round(1), *one_round(2)[:5]]:
        progress.apply(event)

    shown = frame(progress)

    assert "fedavg of lora on sentence-transformers/all-MiniLM-L6-v2" in shown
    assert "round 2/3" in shown
    assert "client-3" in shown
    assert "waiting" in shown
    assert "training" in shown
    assert "up 3.0 kB" in shown
    assert "accuracy" in shown


def test_the_last_frame_stays_on_the_terminal():
    out = console(terminal=True)

    view = LiveView(sample_spec(), console=out, now_ms=lambda: START_MS)
    view.start()
    for event in sample_log():
        view.feed(event)
    view.stop()
    view.stop()

    assert "round 3/3" in text_of(out)


@pytest.mark.parametrize("height", [24, 40, 100])
def test_a_big_population_is_summarized_and_fits_the_window(height: int):
    progress = JobProgress(sample_spec(clients=1000))
    for event in [*opening(clients=1000), *one_round(1, clients=1000)[:1]]:
        progress.apply(event)
    for k in (5, 700):
        progress.apply(ev.TaskSent(at_ms=START_MS, round=1, client=name(k), phase=TRAIN, attempt=1))
    progress.apply(ev.ClientLost(at_ms=START_MS, client=name(999)))

    shown = frame(progress, height=height)

    assert "1,000 clients: 997 idle" in shown
    assert "1 lost" in shown
    assert len(shown.splitlines()) <= height
    assert "client-1000" in shown
    assert "client-701" in shown


def test_feeding_thousands_of_events_is_cheap():
    view = LiveView(sample_spec(clients=10), console=console(terminal=True))
    view.start()
    progressed = ev.TaskProgressed(at_ms=START_MS, round=1, client=name(0), phase=TRAIN, fraction=0.5, loss=1.0)

    before = time.thread_time()
    for _ in range(10_000):
        view.feed(progressed)
    spent = time.thread_time() - before
    view.stop()

    assert spent < 0.5


def test_the_summary_says_what_came_of_the_run_and_what_to_do_next(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    out = console(terminal=False)

    print_summary(sample_report(), tmp_path, console=out)

    said = text_of(out)
    assert "status: done" in said
    assert "run: 3 rounds with 3 clients in 6.0 s" in said
    assert "payload: 9.0 kB up, 9.0 kB down" in said
    assert "refused: 1 not-finite" in said
    assert f"next: lorabbit export {tmp_path} --out sample-adapter" in said


def test_the_summary_of_a_run_that_failed_early_offers_no_adapter(tmp_path: Path):
    report = sample_report(rounds=0).model_copy(update={"status": "failed", "reason": "every client is gone"})
    out = console(terminal=True)

    print_summary(report, tmp_path, console=out)

    said = text_of(out)
    assert "failed: every client is gone" in said
    assert "export" not in said


def test_units_read_well():
    assert [bytes_text(n) for n in (0, 999, 1000, 1500, 99_960, 10**6, 2 * 10**9)] == [
        "0 B", "999 B", "1.0 kB", "1.5 kB", "100 kB", "1.0 MB", "2.0 GB",
    ]  # fmt: skip
    assert [duration_text(s) for s in (0.42, 7.3, 65, 7384)] == ["0.42 s", "7.3 s", "1:05 min", "2:03:04 h"]
    assert [score_text(v) for v in (None, float("nan"), 0.5, 1234.56)] == ["-", "-", "0.5000", "1,234.6"]


def test_a_sparkline_rises_with_its_values_and_is_flat_for_equal_ones():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert len(set(sparkline([3.0, 3.0, 3.0]))) == 1
    assert sparkline([]) == ""

"""Markdown, HTML and TensorBoard of a report."""

from __future__ import annotations

import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doubles_events import loss, pooled_accuracy, sample_log, sample_report, sample_spec
from tensorboardX.proto.event_pb2 import Event

from lorabbit.errors import BadInput
from lorabbit.events.report import Report, begin, fold
from lorabbit_cli.report.pages import JobFile, html, markdown, write_pages
from lorabbit_cli.report.summary import summary_rows

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Strict(HTMLParser):
    """Fails on a tag that is not closed in order, and keeps ids and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.ids += [str(named["id"])] if "id" in named else []
        self.addresses += [str(named[key]) for key in ("href", "src", "xlink:href") if key in named]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def run_folder(folder: Path, report: Report) -> Path:
    (folder / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
    return folder


def parsed(page: str) -> Strict:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_needs_nothing_from_outside(tmp_path: Path):
    write_pages(run_folder(tmp_path, sample_report()))

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parser = parsed(page)

    assert parser.tags.count("svg") == 7
    assert len(parser.ids) == len(set(parser.ids))
    assert all(address.startswith("#") for address in parser.addresses)
    assert set(re.findall(r"https?://[^\"' ]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert {a.removeprefix("#") for a in parser.addresses} <= set(parser.ids)


def test_the_figures_take_their_colors_from_the_page():
    page = html(sample_report())

    assert "currentColor" in page
    assert "var(--c2)" in page
    assert "#010203" not in page
    assert "#0a0b" not in page


def test_the_pages_say_what_was_trained_where_the_job_is_at_hand(tmp_path: Path):
    run_folder(tmp_path, sample_report())
    (tmp_path / "job.yaml").write_text("name: sample\nmodel: {trainable: bitfit}\n", encoding="utf-8")

    write_pages(tmp_path)

    assert "of bitfit on sentence-transformers/all-MiniLM-L6-v2" in (tmp_path / "report.html").read_text(
        encoding="utf-8"
    )
    assert "trained: bitfit" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_job_file_that_cannot_be_read_does_not_keep_the_pages_back(tmp_path: Path):
    run_folder(tmp_path, sample_report())
    (tmp_path / "job.yaml").write_text("rouds: [", encoding="utf-8")

    write_pages(tmp_path)

    assert "rouds: [" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_both_pages_show_the_figures_of_the_report():
    report = sample_report()
    final = f"{pooled_accuracy(3, 3):.4f}"

    for page in (html(report), markdown(report)):
        assert final in page
        assert "1 not-finite" in page or "1 refused (not-finite)" in page
        assert "client-3" in page
        assert report.adapter.sha256 in page


def test_names_from_the_job_are_escaped():
    report = sample_report().model_copy(update={"reason": "<script>alert(1)</script>"})

    page = html(report, JobFile("a: <b>"))

    assert "<script>" not in page
    assert "a: &lt;b&gt;" in page


def test_the_same_report_gives_the_same_page():
    assert html(sample_report()) == html(sample_report())


@pytest.mark.parametrize(
    "report", [sample_report(rounds=0), sample_report(clients=30, rounds=2), sample_report(rounds=1)]
)
def test_a_report_of_any_size_makes_a_page(report: Report):
    parsed(html(report))

    assert report.job in markdown(report)


def test_a_run_without_scores_or_labels_makes_a_page():
    report = sample_report()
    for row in report.rounds:
        row.metrics = {}
        row.train_loss = None
        for part in row.per_client:
            part.metrics, part.loss = {}, None
    bare = report.model_copy(update={"label_counts": {}, "main_metric": None, "final": {}, "best": {}})

    parser = parsed(html(Report.model_validate(bare.model_dump(warnings=False))))

    assert parser.tags.count("svg") == 2


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Read TensorBoard's records: length, checksum, event, checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, at = path.read_bytes(), 0
    found: dict[tuple[str, int], float] = {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def test_tensorboard_holds_every_curve_once_however_often_it_is_written(tmp_path: Path):
    write_pages(run_folder(tmp_path, sample_report()))
    write_pages(tmp_path)

    found = scalars(tmp_path / "tensorboard")

    assert found["test/accuracy", 2] == pytest.approx(pooled_accuracy(2, 3))
    assert found["bytes/up", 3] == 3000
    assert found["client-2/train_loss", 1] == pytest.approx(loss(1, 1))
    assert len([1 for tag, _ in found if tag == "test/accuracy"]) == 3


def test_a_folder_without_a_report_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(BadInput, match=r"is not a run folder: it has no report\.json"):
        write_pages(tmp_path)


def test_a_report_of_another_shape_is_refused_by_path(tmp_path: Path):
    (tmp_path / "report.json").write_text('{"job": "x", "rounds": 3}', encoding="utf-8")

    with pytest.raises(BadInput, match=r"is not a report of this version: rounds: "):
        write_pages(tmp_path)


def test_a_report_folded_from_a_log_makes_the_pages():
    report = fold(begin("sample", sample_spec()), sample_log())

    page = html(report)

    assert f"{pooled_accuracy(3, 3):.4f}" in page
    assert "9.0 kB" in page


def test_facts_of_rounds_base_models_and_the_preparation_have_a_place_of_their_own():
    report = sample_report()
    report.preparation = report.rounds[0].model_copy(update={"round": 0})
    report.bytes_by_role = {"adapter": 500, "base": 2_000_000}
    for row in report.rounds:
        row.facts = {"rank": 4, "aggregation_error": 0.00012, "rule": "svd"}

    text, page = markdown(report), html(report)

    assert "| base_sync | 2.0 MB of the payload down are base models |" in text
    assert "| payload down by role | adapter 500 B, base 2.0 MB |" in text
    assert "| rank | aggregation_error |" in text
    assert "| 4 | 0.00012 |" in text
    assert "rule" not in text
    assert "<span>base_sync</span>" in page
    assert "<span>preparation</span>" in page
    assert parsed(page)


def test_the_pages_and_the_summary_say_what_privacy_cost_whom_and_who_was_set_aside(tmp_path: Path):
    report = sample_report()
    first, second = report.clients[:2]
    spent = {"level": "client", "delta": 1e-5, "epsilon": {first: 1.25, second: 2.5}, "spent": [second]}
    report.rounds[-1].facts["privacy"] = spent
    report.guarded = {first: {"left_out": 2}}
    report.set_aside = {second: f"{second} was revoked"}

    pages = (markdown(report), html(report))
    summary = dict(summary_rows(report, tmp_path))

    for page in pages:
        assert "epsilon 1.25; left out in 2 rounds" in page
        assert f"epsilon 2.5, spent; set aside: {second} was revoked" in page
    sentence = f"epsilon is 2.5 at most ({second}), at delta 1e-05; 1 of 2 have spent their budget"
    assert summary["privacy"] == sentence
    assert summary["set aside"] == f"{second} was revoked"
    table = [line for line in pages[0].splitlines() if line.startswith(("| client |", f"| {first} |"))]
    assert [line.count("|") for line in table] == [10, 10]
    parsed(pages[1])


def test_a_report_without_anything_to_note_has_no_column_for_it():
    assert "notes" not in markdown(sample_report())

"""A comparison of made-up runs: what the tables say, by numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from lorabbit.job.spec import JobSpec
from lorabbit_bench.compare import report
from lorabbit_bench.compare.metrics import RunMetrics, ScoredRound
from lorabbit_bench.compare.report import difference_text, share_text, tables
from lorabbit_bench.compare.results import Comparison, RunRow, compare
from lorabbit_bench.compare.sweep import NetworkLink, RunSpec, ScoreTarget, Sweep

SEEDS = (0, 1, 2)


def run(
    label: str, seed: int, scores: list[float], *, size: int = 100, clients: dict[str, float] | None = None
) -> RunMetrics:
    """A run whose every round costs `size` bytes up, half of it down, 2 seconds and 4 modelled ones."""
    curve = [
        ScoredRound(
            round=n, score=score, bytes_up=size * n, bytes_down=size * n // 2, seconds=2.0 * n, client_seconds=1.0 * n,
            modelled_seconds=4.0 * n,
        )
        for n, score in enumerate(scores, start=1)
    ]  # fmt: skip
    n = len(scores)
    return RunMetrics(
        case="all", label=label, seed=seed, key="k", job=label, metric="accuracy", lower_is_better=False,
        final=scores[-1], best=max(scores), best_round=1, client_scores=clients or {}, rounds=n, trainable=7,
        base_parameters=70, bytes_up=size * n, bytes_down=size * n // 2, overhead=0, bytes_by_role={},
        client_seconds=1.0 * n, seconds=2.0 * n, modelled_seconds=4.0 * n, peak_memory_bytes=None, peak_gpu_bytes=None,
        facts={"rank": 4.0}, curve=curve,
    )  # fmt: skip


def sweep(target: ScoreTarget | None = None) -> Sweep:
    planned = tuple(RunSpec("all", label, seed, JobSpec()) for label in ("full", "lora") for seed in SEEDS)
    link = NetworkLink(up_mbit=1, down_mbit=1)
    return Sweep("toy", "", ("all",), ("full", "lora"), SEEDS, "full", "final", target, link, None, planned)


FULL = [run("full", seed, [0.5, 0.8 + seed / 100], size=1000) for seed in SEEDS]
LORA = [run("lora", seed, [0.6, 0.7, 0.8, 0.81 + seed / 50]) for seed in SEEDS]


def compared(target: ScoreTarget | None = None, failed: dict[str, str] | None = None) -> Comparison:
    names = set(failed or {})
    runs = [m for m in (*FULL, *LORA) if f"all/{m.label}/{m.seed}" not in names]
    return compare(sweep(target), runs, failed or {}, {"lorabbit": "0"})


def row(comparison: Comparison, label: str) -> RunRow:
    return next(row for row in comparison.cases[0].rows if row.label == label)


def test_scores_have_mean_and_deviation_over_seeds() -> None:
    final = row(compared(), "full").final

    assert final is not None
    assert (final.mean, final.sd) == (pytest.approx(0.81), pytest.approx(0.01))


def test_differences_are_paired_by_seed() -> None:
    # 0.01, 0.02, 0.03: mean 0.02, sd 0.01, half width 4.302653 x 0.01 / sqrt(3) = 0.0248414.
    found = row(compared(), "lora").difference

    assert found is not None
    assert (found.pairs, found.mean) == (3, pytest.approx(0.02))
    assert found.over_seeds is not None
    assert (found.over_seeds.low, found.over_seeds.high) == (pytest.approx(-0.00484138), pytest.approx(0.04484138))


def test_only_seeds_that_both_have_are_paired() -> None:
    found = row(compared(failed={"all/full/0": "it broke"}), "lora").difference

    assert found is not None
    assert (found.pairs, found.mean) == (2, pytest.approx(0.025))


def test_the_reference_has_no_difference() -> None:
    assert row(compared(), "full").difference is None


def test_clients_are_paired_within_their_seed() -> None:
    names = [f"c{i}" for i in range(6)]
    full = [run("full", 0, [0.5], clients=dict.fromkeys(names, 0.5))]
    lora = [run("lora", 0, [0.7], clients=dict.fromkeys(names, 0.7) | {"another": 0.0})]

    found = row(compare(sweep(), [*full, *lora], {}, {}), "lora").difference

    assert found is not None
    assert found.over_seeds is None
    assert found.over_clients is not None
    assert (found.over_clients.low, found.over_clients.high, found.over_clients.n) == pytest.approx((0.2, 0.2, 6))


def test_payload_is_a_share_of_the_references() -> None:
    # 2 rounds of 1500 bytes, 1000 of them up, against 4 rounds of 100 bytes up and none down.
    silent = [m.model_copy(update={"bytes_down": 0}) for m in LORA]

    found = row(compare(sweep(), [*FULL, *silent], {}, {}), "lora")

    assert found.payload_share == pytest.approx(400 / 3000)
    assert found.upload_share == pytest.approx(0.2)


def test_a_stated_target_is_read_off_every_seed() -> None:
    comparison = compared(ScoreTarget(value=0.8))

    full, lora = row(comparison, "full").to_target, row(comparison, "lora").to_target
    assert full is not None
    assert lora is not None
    assert (full.seeds, lora.seeds) == (3, 3)
    assert full.rounds is not None
    assert lora.rounds is not None
    assert (full.rounds.mean, lora.rounds.mean) == (2.0, 3.0)
    assert lora.bytes_share == pytest.approx(450 / 3000)
    assert lora.seconds_share == pytest.approx(12 / 8)


def test_a_target_that_some_seeds_miss_has_no_shares() -> None:
    found = row(compared(ScoreTarget(value=0.82)), "full").to_target

    assert found is not None
    assert (found.seeds, found.of, found.bytes_share) == (1, 3, None)


def test_a_shared_target_is_below_the_worst_plateau() -> None:
    # Plateaus: full mean(0.5, 0.81) = 0.655; lora mean(0.7, 0.8, 0.83) = 0.7767.
    assert compared(ScoreTarget(share=0.9)).cases[0].target == pytest.approx(0.9 * 0.655)


def test_a_target_can_be_a_share_of_the_references_plateau() -> None:
    # lora is made the worse one: its plateau would be 0.3.
    worse = [run("lora", seed, [0.3]) for seed in SEEDS]

    found = compare(sweep(ScoreTarget(share=0.9, of="reference")), [*FULL, *worse], {}, {}).cases[0].target

    assert found == pytest.approx(0.9 * 0.655)


def test_a_missing_run_is_named_with_its_reason() -> None:
    comparison = compared(failed={"all/lora/1": "it broke"})

    assert comparison.notes == ["all/lora/1 is missing: it broke"]
    assert row(comparison, "lora").failed == {1: "it broke"}
    assert row(comparison, "lora").seeds == [0, 2]


def test_a_run_that_failed_with_every_seed_leaves_a_row_of_dashes() -> None:
    comparison = compared(ScoreTarget(value=0.8), {f"all/lora/{seed}": "it broke" for seed in SEEDS})

    scores, cost, target, *_ = tables(comparison, comparison.cases[0])

    assert scores.rows[1] == ("lora", "fedavg", "0 (3 missing)", "-", "-", "-", "-")
    assert set(cost.rows[1][1:]) == {"-"}
    assert target.rows[1][:3] == ("lora", "0/0", "-")


def test_runs_of_different_code_are_remarked_on() -> None:
    other = LORA[0].model_copy(update={"sources": "other"})

    assert "not all runs" in compare(sweep(), [*FULL, other], {}, {}).notes[0].lower()


def test_a_difference_is_written_with_its_intervals() -> None:
    assert difference_text(row(compared(), "lora").difference) == "+0.0200; [-0.0048, +0.0448]"


@pytest.mark.parametrize(("share", "text"), [(None, "-"), (1.0, "100.0 %"), (0.0638, "6.4 %"), (0.00012, "0.012 %")])
def test_shares_are_written_as_percent(share: float | None, text: str) -> None:
    assert share_text(share) == text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    report.write(compared(ScoreTarget(value=0.8)), sweep(), tmp_path / "made", "lorabbit compare toy.yaml")
    return tmp_path / "made"


def test_the_json_is_the_comparison(folder: Path) -> None:
    assert Comparison.model_validate(json.loads((folder / "comparison.json").read_text())) == compared(
        ScoreTarget(value=0.8)
    )


def test_the_csv_has_a_line_for_each_run(folder: Path) -> None:
    lines = list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))

    assert [(line["run"], float(line["final_mean"])) for line in lines] == [
        ("full", pytest.approx(0.81)), ("lora", pytest.approx(0.83))
    ]  # fmt: skip
    assert float(lines[1]["target_bytes_share"]) == pytest.approx(0.15)
    assert len(list(csv.DictReader(io.StringIO((folder / "runs.csv").read_text())))) == 6


def test_the_pages_show_every_table(folder: Path) -> None:
    markdown, html = (folder / "report.md").read_text(), (folder / "report.html").read_text()

    comparison = compared(ScoreTarget(value=0.8))
    for table in tables(comparison, comparison.cases[0]):
        assert f"### {table.title}" in markdown
        assert f"<h2>{table.title}</h2>" in html
        for cells in table.rows:
            assert f"| {' | '.join(cells)} |" in markdown


def test_every_picture_that_the_markdown_shows_is_a_png(folder: Path) -> None:
    shown = [
        line.partition("](")[2].rstrip(")")
        for line in (folder / "report.md").read_text().splitlines()
        if line.startswith("![")
    ]

    assert len(shown) == 4
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in shown)


def test_the_page_needs_nothing_else(folder: Path) -> None:
    html = (folder / "report.html").read_text()

    assert html.count("<svg") == 4
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "src=" not in html


def test_the_same_comparison_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    report.write(compared(ScoreTarget(value=0.8)), sweep(), tmp_path / "again", "lorabbit compare toy.yaml")

    for name in ("comparison.json", "report.html", "report.md", "summary.csv", "plots/all-bytes.png"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

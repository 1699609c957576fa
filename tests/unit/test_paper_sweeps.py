"""The sweeps of benchmarks/papers: every job that they make is valid, and each compares what its paper compares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cases import for_each

from lorabbit.methods.registry import build
from lorabbit_bench.compare.sweep import Sweep, read
from lorabbit_client.dataset import describe

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "benchmarks" / "papers"
SWEEPS = sorted(PAPERS.glob("*.yaml"))
SMALL = [path for path in SWEEPS if not path.stem.endswith("_full")]
PAIRED = [path for path in SMALL if not path.stem.endswith(("_ablations", "_seeds", "_rates"))]
"""Small sweeps with a full one, which has their ablations, and more seeds and rates, too."""
METHODS = {
    "sa_fedlora": {"fedavg", "sa-fedlora"},
    "pfedlora": {"standalone", "lg-fedavg", "fml", "fedkd", "fd", "fedproto", "pfedlora"},
    "federa": {"fedavg", "federa"},
    "federa_seeds": {"fedavg", "federa"},
    "fibecfed": {"fedavg", "slora", "adalora", "fibecfed"},
    "fibecfed_ablations": {"fedavg", "fibecfed"},
    "fibecfed_rates": {"fedavg", "slora", "adalora", "fibecfed"},
    "sa_fedlora_ablations": {"sa-fedlora"},
}
TRAINABLE = {
    "sa_fedlora": {"lora", "full"},
    "pfedlora": {"full"},
    "federa": {"lora", "full", "adapter", "bitfit"},
    "federa_seeds": {"lora", "adapter", "bitfit"},
    "fibecfed": {"lora", "full", "adapter", "bitfit", "prompt", "prefix"},
    "fibecfed_ablations": {"lora"},
    "fibecfed_rates": {"lora", "adapter", "bitfit", "prompt", "prefix"},
    "sa_fedlora_ablations": {"lora"},
}
CASES = {
    "sa_fedlora": {"trec", "cifar10"},
    "pfedlora": {"cifar10", "digits"},
    "federa": {"20newsgroups-0.1", "20newsgroups-1", "20newsgroups-10", "semeval-1", "wnut17", "squad"},
    "federa_seeds": {"20newsgroups-1", "wnut17"},
    "fibecfed": {"trec", "mpqa"},
    "fibecfed_ablations": {"trec"},
    "fibecfed_rates": {"mpqa"},
    "sa_fedlora_ablations": {"trec", "cifar10"},
}


def sweep(path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setenv("LORABBIT_DATA", "/data")
    return read([str(path)])


@for_each(path=SWEEPS)
def test_every_job_of_a_sweep_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch):
    made = sweep(path, monkeypatch)

    assert len(made.planned) == len(made.cases) * len(made.labels) * len(made.seeds)
    assert made.target is not None


@for_each(path=SWEEPS)
def test_a_sweep_opens_with_the_command_that_runs_it(path: Path):
    opening = path.read_text(encoding="utf-8").split("\n\n")[0]

    assert f"lorabbit compare benchmarks/papers/{path.name}" in opening


def test_every_paper_has_a_small_and_a_full_sweep():
    assert {path.stem for path in SWEEPS if path not in SMALL} == {f"{path.stem}_full" for path in PAIRED}


@for_each(path=SMALL)
def test_a_small_sweep_compares_the_papers_baselines_on_its_data(path: Path, monkeypatch: pytest.MonkeyPatch):
    made = sweep(path, monkeypatch)
    jobs = [planned.spec for planned in made.planned]

    assert {job.method.name for job in jobs} == METHODS[path.stem]
    assert {job.model.trainable for job in jobs} == TRAINABLE[path.stem]
    assert set(made.cases) == CASES[path.stem]


@for_each(name=["fibecfed_ablations", "fibecfed_full"])
def test_the_curriculum_by_word_rarity_is_its_papers(name: str, monkeypatch: pytest.MonkeyPatch):
    made = sweep(PAPERS / f"{name}.yaml", monkeypatch)
    settings = [planned.spec.method.settings for planned in made.planned if planned.label == "curriculum-rarity"]

    assert settings
    assert all((s["difficulty"], s["pacing"], s["gal_ratio"]) == ("rarity", "sqrt", 1.0) for s in settings)


@for_each(name=["sa_fedlora_ablations", "sa_fedlora_full"])
def test_the_constant_rank_sends_as_much_as_the_falling_one(name: str, monkeypatch: pytest.MonkeyPatch):
    made = sweep(PAPERS / f"{name}.yaml", monkeypatch)

    def sent(label: str) -> list[int]:
        schedules = [build(p.spec).ranks_by_round for p in made.planned if p.label == label]
        return [sum(s.rank(t) for t in range(s.start, s.rounds)) for s in schedules]

    assert sent("mean-rank") == pytest.approx(sent("sa-fedlora"), rel=0.05)


@for_each(path=PAIRED)
def test_a_full_sweep_has_what_the_small_one_compares(path: Path, monkeypatch: pytest.MonkeyPatch):
    small = sweep(path, monkeypatch)
    full = sweep(path.with_stem(f"{path.stem}_full"), monkeypatch)

    assert {p.spec.method.name for p in small.planned} <= {p.spec.method.name for p in full.planned}
    assert {p.spec.model.trainable for p in small.planned} <= {p.spec.model.trainable for p in full.planned}


@pytest.mark.data
@for_each(path=SMALL)
def test_every_client_of_a_small_sweep_has_examples_to_learn_from_and_be_scored_on(path: Path):
    if not os.environ.get("LORABBIT_DATA"):
        pytest.skip("LORABBIT_DATA names no folder")
    made = read([str(path)])

    for case in made.cases:
        job = next(planned.spec for planned in made.planned if planned.case == case)
        shares = describe(job, job.clients).clients
        assert min(share.train for share in shares) >= 16
        assert sum(share.test > 0 for share in shares) >= 0.9 * job.clients

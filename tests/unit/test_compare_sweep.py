"""Sweep files: what they mean, and one sentence for whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorabbit.errors import BadInput
from lorabbit_bench.compare.sweep import merged, read
from lorabbit_cli.__main__ import app

ROOT = Path(__file__).parents[2]
TOY = """
name: toy
base:
  model: {name: "null:10KB"}
  rounds: 2
  method: {name: fedprox, mu: 0.1}
runs:
  one: {}
  two: {model: {name: "null:20KB"}, method: {name: fedavg}}
seeds: [3, 4]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sweep.yaml"


def write(file: Path, text: str) -> str:
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_every_run_is_planned_with_every_seed(file: Path) -> None:
    sweep = read([write(file, TOY)])

    assert [planned.name for planned in sweep.planned] == ["all/one/3", "all/one/4", "all/two/3", "all/two/4"]
    assert [planned.spec.seed for planned in sweep.planned] == [3, 4, 3, 4]
    assert sweep.reference == "one"


def test_a_run_changes_what_it_names_and_keeps_the_rest(file: Path) -> None:
    two = read([write(file, TOY)]).planned[2].spec

    assert (two.model.name, two.rounds) == ("null:20KB", 2)


def test_every_run_is_repeated_for_every_case(file: Path) -> None:
    cases = "cases:\n  short: {rounds: 1}\n  long: {rounds: 9}\n"

    sweep = read([write(file, TOY + cases)])

    assert [p.name for p in sweep.planned if p.seed == 3] == ["short/one/3", "short/two/3", "long/one/3", "long/two/3"]
    assert {p.case: p.spec.rounds for p in sweep.planned} == {"short": 1, "long": 9}


def test_maps_are_merged_and_lists_replaced() -> None:
    base = {"model": {"name": "a", "lora": {"rank": 8, "targets": ["q", "v"]}}, "rounds": 1}

    found = merged(base, {"model": {"lora": {"targets": ["k"]}}})

    assert found == {"model": {"name": "a", "lora": {"rank": 8, "targets": ["k"]}}, "rounds": 1}


def test_another_method_does_not_inherit_settings() -> None:
    base = {"method": {"name": "fedprox", "mu": 0.1}}

    assert merged(base, {"method": {"name": "fedavg"}}) == {"method": {"name": "fedavg"}}
    assert merged(base, {"method": {"mu": 1.0}}) == {"method": {"name": "fedprox", "mu": 1.0}}


def test_a_base_may_be_a_job_file_beside_the_sweep_file(file: Path) -> None:
    (file.parent / "job.yaml").write_text("rounds: 7\nmodel: {name: 'null:10KB'}\n", encoding="utf-8")

    sweep = read([write(file, "name: x\nbase: job.yaml\nruns: {a: {}}\n")])

    assert sweep.planned[0].spec.rounds == 7


def test_the_environment_is_put_into_texts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABBIT_TEST_ROOT", "/somewhere")

    sweep = read([write(file, "name: x\nbase: {data: {source: '${LORABBIT_TEST_ROOT}/trec'}}\nruns: {a: {}}\n")])

    assert sweep.planned[0].spec.data.source == "/somewhere/trec"


def test_overrides_and_seeds_hold_for_every_run(file: Path) -> None:
    sweep = read([write(file, TOY)], ["rounds=5"], [8])

    assert [(p.spec.rounds, p.spec.seed) for p in sweep.planned] == [(5, 8), (5, 8)]


def test_job_files_are_runs_under_their_names(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "name: one\nseed: 4\nmodel: {name: 'null:10KB'}\n")
    two = write(tmp_path / "two.yaml", "name: two\nseed: 4\nmodel: {name: 'null:20KB'}\n")

    sweep = read([one, two])

    assert [p.name for p in sweep.planned] == ["all/one/4", "all/two/4"]
    assert sweep.name == "one-two"


BROKEN = {
    "an unset variable": (
        "name: x\nbase: {data: {source: '${LORABBIT_UNSET_VARIABLE}/a'}}\nruns: {a: {}}\n",
        "base.data.source: the environment has no variable LORABBIT_UNSET_VARIABLE",
    ),
    "an unknown key": ("name: x\nrun: 1\nruns: {a: {}}\n", "run: unknown key; did you mean 'runs'?"),
    "no run": ("name: x\nruns: {}\n", "runs: "),
    "a wrong key in a run": (
        "name: x\nruns: {a: {local: {learning_rat: 1}}}\n", "runs.a: local.learning_rat: unknown key"
    ),
    "an unknown method": ("name: x\nruns: {a: {method: {name: fedavgg}}}\n", "runs.a"),
    "a reference that is no run": ("name: x\nreference: b\nruns: {a: {}}\n", "reference: there is no run 'b'"),
    "a seed twice": ("name: x\nseeds: [1, 1]\nruns: {a: {}}\n", "seeds: a seed is given twice"),
    "no seeds": ("name: x\nseeds: []\nruns: {a: {}}\n", "seeds: "),
    "two targets": ("name: x\ntarget: {value: 1, share: 0.5}\nruns: {a: {}}\n", "target: give either value or share"),
    "other data": (
        "name: x\nruns: {a: {}, b: {data: {test_share: 0.3}}}\n", "data.test_share differs between 'a' and 'b'"
    ),
    "another population": ("name: x\nruns: {a: {}, b: {clients: 7}}\n", "clients differs between 'a' and 'b'"),
    "a base that is not there": ("name: x\nbase: gone.yaml\nruns: {a: {}}\n", "there is no job file"),
    "no YAML": ("name: [\n", "is no valid YAML"),
    "a list of runs": ("name: x\nruns: [a]\n", "runs: expected keys and values"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_sweep_file_is_one_line_and_exit_code_2(file: Path, case: str) -> None:
    text, expected = BROKEN[case]

    result = CliRunner().invoke(app, ["compare", write(file, text), "--out", str(file.parent / "out")])

    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (file.parent / "out").exists()


def test_job_files_on_different_data_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "name: one\n")
    two = write(tmp_path / "two.yaml", "name: two\ndata: {partition: {kind: dirichlet}}\n")

    with pytest.raises(BadInput, match=r"data\.partition differs between 'one' and 'two'"):
        read([one, two])


def test_job_files_of_one_name_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "name: same\n")

    with pytest.raises(BadInput, match="two job files have the name 'same'"):
        read([one, one])


def test_job_files_with_different_seeds_need_to_be_told(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "name: one\nseed: 1\n")
    two = write(tmp_path / "two.yaml", "name: two\nseed: 2\n")

    with pytest.raises(BadInput, match="say which with --seeds"):
        read([one, two])


def test_a_sweep_file_stands_alone(file: Path) -> None:
    with pytest.raises(BadInput, match="is a sweep file; give it alone"):
        read([write(file, TOY), str(file)])


@pytest.mark.parametrize("seeds", ["a", "1,,2", "-1", "1.5"])
def test_seeds_that_are_none_are_refused(file: Path, seeds: str) -> None:
    result = CliRunner().invoke(app, ["compare", write(file, TOY), f"--seeds={seeds}"])

    assert result.exit_code == 2
    assert "--seeds" in result.stderr


def test_the_examples_that_the_guide_compares_share_their_data() -> None:
    command = (ROOT / "docs" / "how-to" / "compare.md").read_text(encoding="utf-8").split("```sh\n")[1].splitlines()[0]
    files = [str(ROOT / word) for word in command.split() if word.startswith("examples/")]

    assert len(read(files, seeds=[0]).labels) == 2

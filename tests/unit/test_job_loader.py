from pathlib import Path

import pytest
import yaml
from broken_jobs import BROKEN
from hypothesis import given
from hypothesis import strategies as st

from lorabbit import job_loader
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit_cli.job_template import template


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_one_sentence_with_the_place_and_what_was_expected(case: str) -> None:
    text, expected = BROKEN[case]

    with pytest.raises(BadInput) as caught:
        job_loader.parse(text)

    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_the_default_job() -> None:
    assert job_loader.parse("") == JobSpec()
    assert job_loader.parse("# nothing\n") == JobSpec()


def test_numbers_and_words_mean_what_yaml_1_2_says() -> None:
    spec = job_loader.parse("local: {learning_rate: 1e-3}\nevaluation:\n  on: central\nseed: 010\ncohort: 1")

    assert spec.local.learning_rate == 0.001
    assert spec.evaluation.on == "central"
    assert spec.seed == 10
    assert spec.cohort_size == 1


def test_a_whole_number_is_good_enough_for_a_number() -> None:
    assert job_loader.parse("model: {lora: {alpha: 4}}").model.lora.alpha == 4.0


def test_toml_says_the_same_as_yaml() -> None:
    text = 'rounds = 3\n[model]\nname = "tiny:bert"\n[model.lora]\ntargets = ["query", "value"]\n'

    spec = job_loader.parse(text, name="job.toml")

    assert spec == job_loader.parse("rounds: 3\nmodel: {name: 'tiny:bert', lora: {targets: [query, value]}}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds = \n", "job.toml is no valid TOML: Invalid value (at line 1, column 10)"),
        ("rounds = 1\nrounds = 2\n", "Cannot overwrite a value (a key is given twice) (at line 2"),
        ("name = 2020-01-01", "2020-01-01 is a date or time; put it in quotes to make it text"),
        ("rounds = 'x'", "job.toml: rounds: expected a whole number, not 'x'"),
    ],
)
def test_broken_toml_is_one_sentence_too(text: str, expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        job_loader.parse(text, name="job.toml")

    assert expected in str(caught.value)


def test_overrides_and_seed_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("rounds: 3\nseed: 1\n", encoding="utf-8")

    spec = job_loader.load(
        file, ["rounds=7", "model.lora.targets=[q, v]", "method.name=fedprox", "method.mu=0.5"], seed=9
    )

    assert (spec.rounds, spec.seed, spec.model.lora.targets) == (7, 9, ("q", "v"))
    assert spec.method.settings == {"mu": 0.5}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("local.lr=1", "--set local.lr=1: local.lr: unknown key; did you mean 'learning_rate'?"),
        ("rounds=many", "--set rounds=many: rounds: expected a whole number, not 'many'"),
        ("rounds", "--set rounds: write PATH=VALUE"),
        ("rounds.x=1", "--set rounds.x=1: rounds is 3, which has no keys below it"),
        ("=1", "--set =1: write PATH=VALUE"),
        ("model=tiny:bert", "--set model=tiny:bert: model: expected keys and values"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_written(tmp_path: Path, override: str, expected: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("rounds: 3\n", encoding="utf-8")

    with pytest.raises(BadInput) as caught:
        job_loader.load(file, [override])

    assert expected in str(caught.value)


def test_a_missing_file_is_named_with_its_neighbor(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("", encoding="utf-8")

    with pytest.raises(BadInput, match=r"there is no job file .*quickstar\.yaml; did you mean .*quickstart\.yaml\?"):
        job_loader.load(tmp_path / "quickstar.yaml")


def test_a_folder_and_bytes_are_no_job_files(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00r")

    with pytest.raises(BadInput, match="is a folder"):
        job_loader.load(tmp_path)
    with pytest.raises(BadInput, match="is no text in UTF-8"):
        job_loader.load(tmp_path / "job.yaml")


NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)


@given(
    name=NAMES,
    source=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30),
    rate=st.floats(min_value=1e-12, max_value=1e6),
    cohort=st.one_of(st.integers(1, 4), st.floats(0.01, 1.0)),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_dumped_job_reads_as_the_same_job(name: str, source: str, rate: float, cohort: float, seed: int) -> None:
    spec = JobSpec.model_validate({
        "name": name, "data": {"source": source}, "local": {"learning_rate": rate}, "cohort": cohort, "seed": seed,
    })  # fmt: skip

    text = job_loader.dump(spec, head="resolved\nby a test")

    assert job_loader.parse(text) == spec
    assert text.startswith("# resolved\n# by a test\n")


def test_the_template_is_the_default_job() -> None:
    text = template("job.yaml")

    assert job_loader.parse(text) == JobSpec()
    assert all(f"{name}:" in text for name in JobSpec.model_fields)


@pytest.mark.parametrize(
    "text", ["on", "yes", "1e3", "08", "010", "12:30", "null", "~", "", "true", "0x1f", "2020-01-01"]
)
def test_readers_of_either_yaml_take_a_dumped_text_for_text(text: str) -> None:
    spec = JobSpec.model_validate({"data": {"fields": {"text": text}}})

    dumped = job_loader.dump(spec)

    assert job_loader.parse(dumped) == spec
    assert yaml.safe_load(dumped) == spec.model_dump(mode="json")

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken_jobs import BROKEN
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from services import free_port
from typer.testing import CliRunner, Result

from lorabbit import __version__, job_loader
from lorabbit.job.glossary import CHOICES
from lorabbit.job.spec import JobSpec, ModelSpec
from lorabbit.methods.registry import METHODS
from lorabbit_cli.__main__ import app
from lorabbit_cli.doctor import Finding, exit_code

COMMANDS = {
    "run", "compare", "submit", "jobs", "status", "watch", "cancel", "report", "export", "methods", "init", "validate",
    "doctor", "server", "client", "version", "stress",
}  # fmt: skip


def lorabbit(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def nowhere() -> str:
    """A URL at which nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("command", ["validate", "run", "submit"])
@pytest.mark.parametrize("case", list(BROKEN)[::4])
def test_a_broken_job_file_is_one_line_and_exit_code_2(tmp_path: Path, command: str, case: str) -> None:
    text, expected = BROKEN[case]
    file = tmp_path / "job.yaml"
    file.write_text(text, encoding="utf-8")

    result = lorabbit(command, str(file))

    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert expected.removeprefix("job.yaml") in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_names_every_command_and_every_exit_code() -> None:
    result = lorabbit("--help")

    assert result.exit_code == 0
    assert all(f"\n  {command} " in result.stdout for command in COMMANDS)
    assert "0 done, 1 the run failed or was cancelled, 2 bad input" in result.stdout.replace("\n  ", " ")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_help_of_a_command_has_an_example_with_options_that_it_knows(command: str) -> None:
    text = " ".join(lorabbit(command, "--help").stdout.split())

    example = text.partition("Example: ")[2].partition(" Options: ")[0].partition(" Arguments: ")[0]
    assert f"lorabbit {command}" in example
    assert all(f" {word} " in text.partition("Options:")[2] for word in example.split() if word.startswith("--"))


@pytest.mark.parametrize(
    "arguments", [["run"], ["nonsense"], ["run", "x.yaml", "--nonsense"], ["jobs", "--format", "x"]]
)
def test_a_command_written_wrongly_exits_with_2(arguments: list[str]) -> None:
    assert lorabbit(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [["jobs"], ["status", "a"], ["watch", "a"], ["cancel", "a"], ["report", "a"], ["export", "a", "--out", "x"]],
)
def test_a_server_that_is_not_there_is_exit_code_3_and_what_to_do(nowhere: str, arguments: list[str]) -> None:
    result = lorabbit(*arguments, "--server", nowhere)

    assert result.exit_code == 3
    assert f"error: the server at {nowhere} cannot be reached" in result.stderr
    assert "lorabbit server" in result.stderr


def test_a_setting_that_cannot_be_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABBIT_HTTP_PORT", "many")

    result = lorabbit("server")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: environment variable LORABBIT_HTTP_PORT: ")


def test_version_and_methods_are_printed_for_people_and_programs() -> None:
    listed, text = json.loads(lorabbit("methods", "--format", "json").stdout), lorabbit("methods").stdout

    assert lorabbit("version").stdout.strip() == __version__
    assert json.loads(lorabbit("version", "--format", "json").stdout) == {"lorabbit": __version__}
    assert [method["name"] for method in listed["methods"]] == list(METHODS)
    assert all(f"\n{name} " in text for name in METHODS)
    assert all(f"\n{word} " in text for words in CHOICES.values() for word in words)
    assert "  method.schedule (cubic, geometric, linear, cosine, constant, explicit, reverse; default " in text


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("model.trainable", ModelSpec.model_fields["trainable"]),
        ("aggregation", JobSpec.model_fields["aggregation"]),
        ("method.difficulty", METHODS["fibecfed"].model_fields["difficulty"]),
    ],
)
def test_every_word_of_a_choice_has_a_line(key: str, field: FieldInfo) -> None:
    schema = TypeAdapter(field.annotation).json_schema()
    allowed = [word for part in (schema, *schema.get("anyOf", ())) for word in part.get("enum", [part.get("const")])]

    assert set(CHOICES[key]) == set(allowed) - {None}


def test_init_writes_a_job_file_once(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"

    first, second = lorabbit("init", str(file)), lorabbit("init", str(file))

    assert (first.exit_code, second.exit_code) == (0, 2)
    assert job_loader.load(file) == JobSpec()
    assert f"error: {file} exists already" in second.stderr


def test_validate_says_what_would_run_and_move(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: {name: 'null:1MB'}\nrounds: 4\nclients: 20\ncohort: 0.5\n", encoding="utf-8")

    text = lorabbit("validate", str(file))
    found = json.loads(lorabbit("validate", str(file), "--set", "rounds=7", "--format", "json").stdout)

    assert text.exit_code == 0
    assert text.stderr == ""
    assert "4 rounds, 10 of 20 clients in each" in text.stdout
    assert found["rounds"] == 7
    assert found["trainable_parameters"] == 250_000
    assert found["payload"]["up"] == found["payload"]["down"] > 1_000_000
    assert found["round_bytes_up"] == 10 * found["payload"]["up"]
    assert (
        found["round_bytes_down"] == 20 * found["payload"]["down"]
    )  # every client scores; training reads nothing more


def test_doctor_tells_services_from_everything_else() -> None:
    broken, poor = Finding("disk", "fail", ""), Finding("docker", "warn", "")

    assert exit_code([poor]) == 0
    assert exit_code([broken, poor]) == 1
    assert exit_code([broken, Finding("store", "fail", "")]) == 3


@pytest.mark.parametrize("arguments", [["--help"], ["version"]])
def test_the_command_line_starts_without_what_only_its_commands_need(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['lorabbit', *{arguments!r}]\n"
        "from lorabbit_cli.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'httpx', 'fastapi', 'redis', 'matplotlib', 'pika'}\n"
        "print('loaded:', sorted(heavy & sys.modules.keys()))\n"
    )

    done = subprocess.run(  # noqa: S603 - this very Python
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env={**os.environ}, timeout=60
    )

    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_command_without_the_package_that_it_needs_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lorabbit_bench.compare.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)

    result = lorabbit("compare", "examples/quickstart.yaml", "--no-run")

    assert result.exit_code == 1
    assert result.stderr == "error: this command needs the package scipy: pip install 'lorabbit[all]'\n"


def test_other_packages_add_commands_through_entry_points() -> None:
    from importlib.metadata import entry_points  # noqa: PLC0415 - what the command line does at its start

    names = {entry.name for entry in entry_points(group="lorabbit.commands")}

    assert names == {"compare", "stress"}
    assert all(lorabbit(name, "--help").exit_code == 0 for name in names)

"""The documentation: made pages are current, links lead somewhere, everything registered has its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cases import for_each
from doubles_events import sample_report
from jsonschema import Draft202012Validator
from reference_pages import pages
from typer.main import get_command

from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import METHODS
from lorabbit_cli.__main__ import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*DOCS.rglob("*.md"), ROOT / "README.md"))


def test_the_reference_says_what_the_code_says():
    stale = [name for name, text in pages().items() if (DOCS / "reference" / name).read_text(encoding="utf-8") != text]

    assert not stale, f"run `make docs`: {', '.join(stale)}"


def test_nothing_stands_in_the_reference_that_is_not_made():
    assert {path.name for path in (DOCS / "reference").iterdir()} == set(pages())


@for_each(page=PAGES)
def test_every_link_leads_somewhere(page: str):
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]

    broken = [link for link in links if link and "://" not in link and not (path.parent / link).exists()]

    assert not broken


def shown(page: str) -> list[tuple[str, list[str]]]:
    """Every `lorabbit` command of a page's consoles, with the options that it is given."""
    found = []
    for kind, text in re.findall(r"```(console|sh)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        for line in text.replace("\\\n", " ").splitlines():
            if kind == "sh" or line.startswith("$ "):
                for command, rest in re.findall(r"(?:^|[\s(])lorabbit ([a-z]+)([^|&#]*)", line.removeprefix("$ ")):
                    found.append((command, re.findall(r"(?<=\s)--[a-z-]+", rest)))
    return found


@for_each(page=[page for page in PAGES if "reference/" not in page and shown(page)])
def test_every_command_that_a_page_shows_is_there_with_its_options(page: str):
    commands = get_command(app).commands  # type: ignore[attr-defined]

    wrong = [
        (command, option)
        for command, options in shown(page)
        for option in [None, *options]
        if command not in commands
        or option not in {None, "--help", *(name for each in commands[command].params for name in each.opts)}
    ]

    assert wrong == []


@for_each(method=sorted(METHODS))
def test_every_method_has_its_page(method: str):
    text = (DOCS / "methods" / f"{method}.md").read_text(encoding="utf-8")

    assert "## Formulas" in text
    assert "## Departures" in text
    arxiv = re.findall(r"arXiv (\d{4}\.\d{5})", METHODS[method].paper)
    assert all(number in text for number in arxiv)


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")

    missing = [page for page in PAGES if page.startswith("docs/") and page != "docs/README.md"]

    assert not [page for page in missing if f"({page.removeprefix('docs/')})" not in index]


def test_a_report_satisfies_its_published_schema():
    schema = json.loads((DOCS / "reference" / "report.schema.json").read_text(encoding="utf-8"))
    validator = Draft202012Validator(schema)

    validator.validate(json.loads(sample_report().model_dump_json()))
    assert not validator.is_valid({"rounds": "many"})


def test_a_job_satisfies_its_published_schema():
    schema = json.loads((DOCS / "reference" / "job.schema.json").read_text(encoding="utf-8"))
    validator = Draft202012Validator(schema)

    validator.validate(json.loads(JobSpec().model_dump_json()))
    assert not validator.is_valid({"rouds": 3})

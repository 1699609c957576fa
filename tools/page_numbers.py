"""Say where each number on a page of README and docs comes from, or name those that come from nowhere.

    python tools/page_numbers.py            # lists the numbers without a source
    python tools/page_numbers.py --write    # enters them in docs/numbers.toml under "unknown", to be sorted by hand

There are three kinds of numbers. Figures are rendered from stored results (figures.py). Digits within a name, such as
`sha256`, need that name to occur in the repository's own files. docs/numbers.toml lists all others for each page by
their source: a file of the repository, in which the number must occur, or one of the kinds in `KINDS`.
Pages of docs/reference are generated as a whole and are not listed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

from figures import FIGURE, ROOT

INVENTORY = ROOT / "docs/numbers.toml"
KINDS = {
    "text": "part of the text itself: a count, a step, an exponent, a formula",
    "example": "a value of an example, or what a command printed once",
    "paper": "from the paper or book that the page cites there",
    "standard": "a version, port, code or limit of another program or standard",
}
UNKNOWN = "unknown"
NAME = re.compile(r"[A-Za-z_][\w.-]*\d[\w.]*|\d+[A-Za-z_][\w-]*\w")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
LINK = re.compile(r"\]\([^)\s]+\)|https?://\S+|#[\w-]+")


def listed_pages() -> list[Path]:
    """Return README.md and every page of docs that people write."""
    docs = ROOT / "docs"
    written = [path for path in sorted(docs.rglob("*.md")) if not path.is_relative_to(docs / "reference")]
    return [ROOT / "README.md", *written]


def words(text: str) -> set[str]:
    """Return the names with digits in a page, outside figures and links."""
    return {name for name in NAME.findall(_bare(text)) if not NUMBER.fullmatch(name)}


def numbers(text: str) -> Counter[str]:
    """Count the numbers in a page, outside figures, links and names."""
    return Counter(NUMBER.findall(NAME.sub(" ", _bare(text))))


def _bare(text: str) -> str:
    """Return a page without its figures and the targets of its links."""
    return LINK.sub(" ", FIGURE.sub(" ", text))


@cache
def inventory() -> dict[str, dict[str, list[str]]]:
    """Return page -> source -> numbers."""
    return tomllib.loads(INVENTORY.read_text(encoding="utf-8"))


@cache
def repository() -> str:
    """Return the text of all tracked files but the pages themselves, as the source of names."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=False, text=True).stdout.splitlines()  # noqa: S603
    pages = {str(page.relative_to(ROOT)) for page in listed_pages()}
    kept = [ROOT / name for name in listed if name not in pages and not name.endswith((".png", ".svg", "numbers.toml"))]
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in kept if path.is_file())


@cache
def numbers_of(source: str) -> frozenset[str]:
    """Return the numbers in a file of the repository."""
    return frozenset(NUMBER.findall((ROOT / source).read_text(encoding="utf-8")))


def problems(page: str, text: str) -> list[str]:
    """Return what is wrong with the numbers of a page, which may be another text than the file's."""
    listed = inventory().get(page, {})
    found = numbers(text)
    declared = Counter(number for values in listed.values() for number in values)
    wrong = [f"{number} has no source in docs/numbers.toml" for number in sorted((found - declared).elements())]
    wrong += [f"{number} is in docs/numbers.toml but not on the page" for number in sorted((declared - found).elements())]
    wrong += [f"{name} does not occur in the repository" for name in sorted(words(text)) if name not in repository()]
    for source, values in listed.items():
        if source in KINDS:
            continue
        if not (ROOT / source).is_file():
            wrong.append(f"the source {source} is neither a file nor one of {', '.join(KINDS)}")
        else:
            wrong += [f"{number} does not occur in {source}" for number in values if number not in numbers_of(source)]
    return wrong


def write() -> None:
    """Enter numbers without a source under `unknown`, and drop those that are no longer on their page."""
    lines = ["# Sources of the numbers on each page; see tools/page_numbers.py.", ""]
    for path in listed_pages():
        page, found = str(path.relative_to(ROOT)), numbers(path.read_text(encoding="utf-8"))
        kept: dict[str, list[str]] = {}
        for source, values in inventory().get(page, {}).items():
            kept[source] = [number for number in values if found[number] > 0 and not found.subtract([number])]
        kept[UNKNOWN] = kept.get(UNKNOWN, []) + sorted(found.elements())
        lines += [f'["{page}"]', *(f'"{source}" = {values!r}'.replace("'", '"') for source, values in kept.items() if values), ""]
    INVENTORY.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """List what is wrong, or enter it."""
    if "--write" in sys.argv:
        write()
        inventory.cache_clear()
    wrong = [
        f"{page}: {problem}"
        for page, text in ((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in listed_pages())
        for problem in problems(page, text)
    ]
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""Make the small data sets of the examples from the docstrings of Python's standard library.

Run it from anywhere: `python examples/data/make.py`. The rows that are committed here were made by
Python 3.11; another version gives slightly other rows. Texts are the Python authors' (PSF licence).
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import builtins
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorabbit_client.data.stdlib_docs import Doc, load_docs

FOLDER = Path(__file__).parent
SEED = 0
WORD = re.compile(r"\w+|[^\w\s]")
CONSTANTS = {"None", "True", "False", "NotImplemented", "Ellipsis"}


def main() -> None:
    """Write every data set."""
    docs = [doc for doc in load_docs() if doc.text.isascii() and len(doc.text) < 240]  # noqa: PLR2004 - short ones
    random.Random(SEED).shuffle(docs)  # noqa: S311 - reproducible, not secret
    write("code-names.jsonl", tagged(docs), most=600)
    write("belongs-to.jsonl", pairs(docs), most=800)
    write("what-does-it-do.jsonl", questions(docs), most=400)
    write("summaries.jsonl", summaries(docs), most=600)


def write(name: str, rows: Iterable[dict[str, Any]], *, most: int) -> None:
    """Write the first rows as JSON lines."""
    lines = [json.dumps(row) + "\n" for row, _ in zip(rows, range(most), strict=False)]
    (FOLDER / name).write_text("".join(lines), encoding="utf-8")


def tagged(docs: list[Doc]) -> Iterator[dict[str, Any]]:
    """Token classification: the names of built-in exceptions, types, functions and constants in a sentence."""
    for doc in docs:
        tokens = WORD.findall(doc.text)
        tags = [tag(token) for token in tokens]
        if set(tags) != {"O"}:
            yield {"tokens": tokens, "tags": tags, "module": doc.module}


def tag(token: str) -> str:
    """Return the tag of one word."""
    value = getattr(builtins, token, None)
    if token in CONSTANTS:
        return "B-CONSTANT"
    if isinstance(value, type):
        return "B-EXCEPTION" if issubclass(value, BaseException) else "B-TYPE"
    return "O"


def pairs(docs: list[Doc]) -> Iterator[dict[str, Any]]:
    """Text pairs: does this sentence describe this name? Every second one is another module's."""
    for place, doc in enumerate(docs):
        other = docs[(place * 7 + 1) % len(docs)]
        belongs = place % 2 == 0 or other.module == doc.module
        yield {
            "text_a": doc.name.replace(".", " ").replace("_", " ").strip(),
            "text_b": doc.text if belongs else other.text,
            "label": "yes" if belongs else "no",
            "module": doc.module,
        }


def questions(docs: list[Doc]) -> Iterator[dict[str, Any]]:
    """Question answering: three names with their sentences, and the question what one of them does."""
    for place in range(0, len(docs) - 2, 3):
        three = docs[place : place + 3]
        asked = three[place // 3 % 3]
        context = " ".join(f"{doc.name}: {doc.text}" for doc in three)
        start = context.index(f"{asked.name}: {asked.text}") + len(asked.name) + 2
        yield {
            "question": f"What does {asked.name} do?",
            "context": context,
            "answers": {"text": [asked.text], "answer_start": [start]},
            "module": asked.module,
        }


def summaries(docs: list[Doc]) -> Iterator[dict[str, Any]]:
    """Instruction tuning: a name as the prompt, its docstring as the completion."""
    for doc in docs:
        yield {"prompt": f"Describe {doc.name}.", "completion": doc.text, "module": doc.module}


if __name__ == "__main__":
    main()

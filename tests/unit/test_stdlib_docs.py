"""The built-in dataset: counts, order, cache, and what it says where sources are missing."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from lorabbit.errors import BadInput
from lorabbit_client.data import stdlib_docs
from lorabbit_client.data.stdlib_docs import AREA_OF, AREAS, Doc, area_of, load_docs


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def docs(cache: Path) -> list[Doc]:
    """Read from the library's sources; the cache is filled afterwards."""
    return load_docs(cache=cache)


def test_the_library_gives_thousands_of_examples_in_ten_classes(docs: list[Doc]):
    assert 6000 < len(docs) < 9500
    assert set(Counter(doc.label for doc in docs)) == set(AREAS)
    assert len(AREAS) == 10


def test_the_largest_class_is_about_a_fifth(docs: list[Doc]):
    largest = Counter(doc.label for doc in docs).most_common(1)[0][1]

    assert 0.14 < largest / len(docs) < 0.26


def test_no_text_occurs_twice_and_none_is_shorter_than_three_words(docs: list[Doc]):
    texts = [doc.text for doc in docs]

    assert len(set(texts)) == len(texts)
    assert min(len(text.split()) for text in texts) == 3


def test_a_known_docstring_is_there_with_its_area(docs: list[Doc]):
    by_name = {doc.name: doc for doc in docs}

    found = by_name["bisect.insort_right"]

    assert found.text == "Insert item x in list a, and keep it sorted assuming a is sorted."
    assert (found.label, found.module) == ("data types", "bisect")


def test_every_public_module_of_this_python_has_an_area_or_gives_nothing():
    unplaced = {
        name
        for name in sys.stdlib_module_names
        if not name.startswith("_") and area_of(name) is None and name not in {"antigravity", "this", "test"}
    }
    written_in_c = {name for name in unplaced if name in sys.builtin_module_names or name in _COMPILED}

    assert unplaced == written_in_c


_COMPILED = {
    "audioop", "binascii", "cmath", "errno", "fcntl", "gc", "grp", "marshal", "math", "mmap", "msilib", "msvcrt", "nis",
    "nt", "ossaudiodev", "posix", "pwd", "pyexpat", "readline", "resource", "select", "spwd", "sys", "syslog",
    "termios", "time", "unicodedata", "winreg", "winsound", "zlib", "idlelib", "pydoc_data",
}  # fmt: skip


def test_the_longest_prefix_decides():
    assert area_of("importlib.metadata._text") == "packaging"
    assert area_of("importlib.abc") == "language services"
    assert area_of("no_such_module") is None
    assert set(AREA_OF.values()) == set(AREAS)


def test_the_cache_gives_the_same_examples(docs: list[Doc], cache: Path):
    from_cache = load_docs(cache=cache)

    assert from_cache == docs
    assert len(list(cache.iterdir())) == 1


def test_a_torn_cache_file_is_read_anew(docs: list[Doc], cache: Path):
    (kept,) = cache.iterdir()
    kept.write_text(kept.read_text()[:1000])

    assert load_docs(cache=cache) == docs


def test_an_installation_without_sources_is_named(tmp_path: Path):
    (tmp_path / "os.py").write_text('"""Only this one module is here."""\n')

    with pytest.raises(BadInput, match=r"found only 1 docstrings under .* without its library's sources"):
        load_docs(tmp_path, tmp_path / "cache")


def test_only_the_first_paragraph_of_modules_classes_and_functions_counts(tmp_path: Path):
    (tmp_path / "queue.py").write_text(
        '"""A module of queues\nover two lines.\n\nMore."""\n'
        'class Queue:\n    """A class of queues."""\n'
        '    if True:\n        def get(self):\n            """Take one item out."""\n'
        'def again():\n    """A class of queues."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")

    docs = stdlib_docs.collect(tmp_path, sorted(tmp_path.iterdir()))

    assert [(doc.name, doc.text) for doc in docs] == [
        ("queue", "A module of queues over two lines."),
        ("queue.Queue", "A class of queues."),
        ("queue.Queue.get", "Take one item out."),
    ]

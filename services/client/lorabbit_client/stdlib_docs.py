"""The built-in dataset `stdlib-docs`: what Python's own standard library says about itself.

One example a docstring's first paragraph, its label the area of the library (`stdlib_areas`) of
its module: real text that every machine with Python has, about 8,000 examples in ten classes.
Sources are parsed, never imported, in the order of their names, and a paragraph that occurs twice
counts once, so a Python version always gives the same rows. Fails with one sentence where an
installation came without the library's sources.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lorabbit.errors import BadInput
from lorabbit_client.stdlib_areas import AREA_OF, area_of

SKIPPED = frozenset({"__pycache__", "site-packages", "dist-packages", "lib-dynload", "test", "tests", "idle_test"})
FEWEST = 1000
"""Fewer examples than this mean that the sources are not installed."""
SHORTEST_WORDS = 3
"""Shorter paragraphs say nothing about their module."""


@dataclass(frozen=True, slots=True)
class Doc:
    """One example."""

    text: str
    label: str
    module: str
    """Top-level module: the group of the natural partition."""
    name: str
    """Dotted name of what is documented."""


def load_docs(root: Path | None = None, cache: Path | None = None) -> list[Doc]:
    """Return the examples of the library at `root` (this Python's), from a cache of the same files when there is one.

    A cache that cannot be read or written is passed over. Raises BadInput where sources are missing.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = list(_sources(root))
    kept = (cache or default_cache()) / f"stdlib-docs-{platform.python_version()}-{_fingerprint(root, files)}.json"
    docs = _read_cache(kept)
    if docs is None:
        docs = collect(root, files)
        _write_cache(kept, docs)
    if len(docs) < FEWEST:
        raise BadInput(
            f"data.source: stdlib-docs found only {len(docs)} docstrings under {root}, because this Python came"
            " without its library's sources; install a complete Python or name a file of your own"
        )
    return docs


def default_cache() -> Path:
    """Return the folder of the user's caches."""
    try:
        return Path.home() / ".cache" / "lorabbit"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "lorabbit"


def collect(root: Path, files: list[Path]) -> list[Doc]:
    """Parse files and return their docs; the first of equal paragraphs stays."""
    found: dict[str, Doc] = {}
    for path in files:
        module = _module_name(path.relative_to(root))
        area = area_of(module)
        tree = _parse(path) if area else None
        if area is None or tree is None:
            continue
        for name, docstring in _docstrings(tree, module):
            text = " ".join(docstring.split("\n\n", 1)[0].split())
            if len(text.split()) >= SHORTEST_WORDS:
                found.setdefault(text, Doc(text, area, module.split(".")[0], name))
    return list(found.values())


def _sources(root: Path) -> Iterator[Path]:
    """Yield the library's source files in the order of their names."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("config-"))
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _parse(path: Path) -> ast.Module | None:
    """Parse one file; None for what is not Python of this version (lib2to3 keeps some)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library are not the user's concern
        try:
            return ast.parse(path.read_bytes(), filename=str(path))
        except (OSError, SyntaxError, ValueError):
            return None


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module and everything defined in it, outermost first."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child, name)


def _fingerprint(root: Path, files: list[Path]) -> str:
    """Hash what the examples depend on: the files by name and size, the table, this module."""
    digest = hashlib.sha256(json.dumps(sorted(AREA_OF.items())).encode())
    digest.update(Path(__file__).read_bytes())
    for path in files:
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _read_cache(path: Path) -> list[Doc] | None:
    try:
        return [Doc(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None


def _write_cache(path: Path, docs: list[Doc]) -> None:
    """Write beside, then rename: a reader never sees half a file, whoever else writes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump([asdict(doc) for doc in docs], file)
        Path(file.name).replace(path)
    except OSError:
        return

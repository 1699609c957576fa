"""The built-in dataset `stdlib-docs`: what Python's own standard library says about itself.

One example a docstring's first paragraph, its label the area of the library of
its module: real text that every machine with Python has, about 8,000 examples in ten classes.
Sources are parsed, never imported, in the order of their names, and a paragraph that occurs twice
counts once, so a Python version always gives the same rows. Fails with one sentence where an
installation came without the library's sources.

Which area of the library a standard-library module belongs to.

The table follows the chapters of Python's library reference, folded into ten areas. The longest
dotted prefix wins, so one module of a package may stand elsewhere than the package. It holds the
modules of every Python since 3.11, also those that later versions dropped; a module that is not
here (machine-made tables, Easter eggs, shims) gives no examples.
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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from uuid import uuid4

from lorabbit.errors import BadInput
from lorabbit.runtime.atomic_files import replacing

_MODULES = {
    "concurrency": """
        _threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal subprocess
        threading
    """,
    "data types": """
        _collections_abc _py_abc _pydatetime _strptime _weakrefset abc array bisect calendar collections copy copyreg
        dataclasses datetime enum functools graphlib heapq itertools operator pprint reprlib types typing uuid weakref
        zoneinfo
    """,
    "files and OS": """
        _compression _pyio bz2 compression crypt ctypes dbm filecmp fileinput fnmatch genericpath getpass glob gzip
        hashlib hmac io linecache lzma ntpath nturl2path os pathlib pickle pipes platform posixpath pty secrets shelve
        shutil sqlite3 stat tarfile tempfile tty zipfile
    """,
    "language services": """
        __future__ _ast_unparse _bootsubprocess _compat_pickle _opcode_metadata _pylong ast annotationlib atexit code
        codeop compileall contextlib dis imp importlib inspect keyword lib2to3 modulefinder opcode pickletools
        py_compile pyclbr runpy symtable tabnanny token tokenize zipimport
    """,
    "networking": """
        asynchat asyncore cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl
        telnetlib urllib webbrowser wsgiref xmlrpc
    """,
    "numbers": """
        _pydecimal colorsys decimal fractions numbers random statistics
    """,
    "packaging": """
        _aix_support _android_support _apple_support _distutils_system_mod _ios_support _osx_support distutils
        ensurepip importlib.metadata importlib.resources pkgutil site sysconfig venv zipapp
    """,
    "testing and debugging": """
        bdb cProfile cgitb doctest faulthandler logging pdb profile profiling pstats pydoc timeit trace traceback
        tracemalloc unittest warnings
    """,
    "text and formats": """
        _markupbase aifc base64 chunk codecs configparser csv difflib email encodings gettext html imghdr json locale
        mailbox mailcap mimetypes netrc plistlib quopri re shlex sndhdr sre_compile sre_constants sre_parse string
        stringprep struct sunau textwrap tomllib uu wave xdrlib xml
    """,
    "user interfaces": """
        _colorize _pyrepl _sitebuiltins argparse cmd curses getopt idlelib optparse rlcompleter tkinter turtle
        turtledemo
    """,
}

AREAS: tuple[str, ...] = tuple(_MODULES)
"""The ten areas in label order."""

AREA_OF: Mapping[str, str] = MappingProxyType(
    {prefix: area for area, prefixes in _MODULES.items() for prefix in prefixes.split()}
)
"""Module or dotted prefix to area."""


def area_of(module: str) -> str | None:
    """Return the area of a dotted module name by its longest known prefix."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        area = AREA_OF.get(".".join(parts[:length]))
        if area is not None:
            return area
    return None


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
    """Write the cache; a cache that cannot be written is left out."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, suffix=f".{uuid4().hex}.tmp", durable=False) as temporary:
            temporary.write_text(json.dumps([asdict(doc) for doc in docs]), encoding="utf-8")
    except OSError:
        return

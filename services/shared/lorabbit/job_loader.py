"""Job files: YAML or TOML, with overrides, to a validated JobSpec.

YAML is read as YAML 1.2 means it: `1e-3` is a number, `on` and `yes` are words, a key given twice is
an error. Validation is strict: a number in quotes is text, and text is no number. Whatever is wrong is
one sentence that names the file and line (or the option), the exact path, what was expected and the
nearest valid name.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.job.validation import explain, first_path, shown
from lorabbit.methods.registry import METHODS, build

MAX_BYTES = 2**20
STDIN = "-"
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's idea of numbers and booleans, which refuses keys given twice."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` or a reader of YAML 1.1 would take for something else than text."""


_CORE_SCHEMA = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
)
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _CORE_SCHEMA:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Read decimal digits: YAML 1.1 takes a leading 0 for octal."""
    return int(loader.construct_scalar(node))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    """Read what Python reads; YAML spells infinity and NaN with a dot."""
    return float(loader.construct_scalar(node).replace(".inf", "inf").replace(".nan", "nan"))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    """Read keys and values, each key once and as text."""
    seen: set[str] = set()
    for key, _ in node.value:
        if key.tag == _TAG + "merge":
            continue
        if key.tag != _TAG + "str":
            raise BadInput(f"line {key.start_mark.line + 1}: {key.value!r} is no key; a key is text (put it in quotes)")
        if key.value in seen:
            raise BadInput(f"line {key.start_mark.line + 1}: the key {key.value!r} is given twice")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)
_Loader.add_constructor(_TAG + "map", _construct_mapping)


@dataclass(slots=True)
class _Source:
    """A job as written, and where each part of it was written."""

    name: str
    content: dict[str, Any]
    root: yaml.Node | None = None
    overrides: dict[tuple[str, ...], str] = field(default_factory=dict)

    def place(self, path: Sequence[int | str]) -> str:
        """Name where a path was written: an option, or the file and the line of its last part that exists."""
        texts = tuple(str(part) for part in path)
        for option, written in self.overrides.items():
            if texts[: len(option)] == option or option[: len(texts)] == texts:
                return f"--set {written}"
        line = _line(self.root, texts)
        return f"{self.name}:{line}" if line else self.name


def load(path: Path | str, overrides: Sequence[str] = (), *, seed: int | None = None) -> JobSpec:
    """Read a job file; `-` is standard input, `overrides` are ``a.b=c``. Raises BadInput."""
    source = _parse(str(path), _read(path))
    for override in overrides:
        _override(source, override)
    if seed is not None:
        _override(source, f"seed={seed}")
    return _validate(source)


def parse(text: str, *, name: str = "job.yaml") -> JobSpec:
    """Read a job from text, YAML or (by the name's ending) TOML. Raises BadInput."""
    return _validate(_parse(name, text))


def read_content(path: Path | str) -> dict[str, Any]:
    """Read a YAML or TOML file's keys and values, unchecked: a sweep file, or a job to be changed. Raises BadInput."""
    return _parse(str(path), _read(path)).content


def of_content(content: dict[str, Any], *, name: str, overrides: Sequence[str] = ()) -> JobSpec:
    """Make a job of keys and values; `name` says in errors where they are from. Raises BadInput."""
    source = _Source(name, deepcopy(content))
    for override in overrides:
        _override(source, override)
    return _validate(source)


def dump(spec: JobSpec, *, head: str = "") -> str:
    """Write a job as YAML, every key with its value; `head` is put before it as comments."""
    comments = "".join(f"# {line}\n" for line in head.splitlines())
    content = spec.model_dump(mode="json")
    return comments + yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(path: Path | str) -> str:
    """Text of a job file."""
    if str(path) == STDIN:
        return sys.stdin.read()
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path} has {path.stat().st_size:,} bytes; a job file has at most {MAX_BYTES:,}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"there is no job file {path}{_near_file(path)}") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder; name the job file in it") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8 (byte {error.start}); a job file is YAML or TOML") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _near_file(path: Path) -> str:
    """Name the file that was probably meant."""
    folder = path.parent
    names = [each.name for each in folder.iterdir() if each.is_file()] if folder.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _parse(name: str, text: str) -> _Source:
    """Read text as the language that the name's ending says, YAML unless it is .toml."""
    if name.lower().endswith(".toml"):
        try:
            return _Source(name, tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            said = str(error).replace("overwrite a value", "overwrite a value (a key is given twice)")
            raise BadInput(f"{name} is no valid TOML: {said}") from None
    try:
        root = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        raise BadInput(f"{name}{_position(error.problem_mark)} is no valid YAML: {_problem(error)}") from None
    except yaml.reader.ReaderError as error:
        raise BadInput(
            f"{name} is no valid YAML: character {error.position} ({error.character!r}) is not allowed"
        ) from None
    except (BadInput, ValueError, RecursionError) as error:
        raise BadInput(f"{name}: {error}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise BadInput(f"{name}: a job file holds keys and values, such as 'rounds: 5', not {_kind_of(content)}")
    return _Source(name, content, root)


def _position(mark: yaml.Mark | None) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""


def _problem(error: yaml.MarkedYAMLError) -> str:
    """Say what PyYAML says, with a word about tabs, which it does not find."""
    problem = " ".join(part for part in (error.context, error.problem) if part) or "it cannot be read"
    return problem.replace("character '\\t' that cannot start any token", "a tab, where YAML allows only spaces")


def _kind_of(value: object) -> str:
    return "a list" if isinstance(value, list) else shown(value)


def _override(source: _Source, override: str) -> None:
    """Put one ``a.b=c`` in its place; validation finds out whether that place exists."""
    written, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in written.split("."))
    if not equals or not all(keys):
        raise BadInput(f"--set {override}: write PATH=VALUE, for example --set local.learning_rate=0.001")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, BadInput, ValueError):
        value = text
    here = source.content
    for depth, key in enumerate(keys[:-1], start=1):
        below = here.setdefault(key, {})
        if below is None:
            below = here[key] = {}
        if not isinstance(below, dict):
            raise BadInput(f"--set {override}: {'.'.join(keys[:depth])} is {below!r}, which has no keys below it")
        here = below
    here[keys[-1]] = value
    source.overrides[keys] = override


def _validate(source: _Source) -> JobSpec:
    """Turn what was written into a JobSpec, its method included."""
    text = _as_json(source)
    try:
        spec = JobSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise BadInput(f"{source.place(first_path(error))}: {explain(error, JobSpec)}") from None
    try:
        if spec.method.name in METHODS:
            METHODS[spec.method.name].model_validate_json(json.dumps(spec.method.settings), strict=True)
        build(spec)
    except ValidationError as error:
        where = source.place(("method", *first_path(error)))
        raise BadInput(f"{where}: {explain(error, METHODS[spec.method.name], prefix='method.')}") from None
    except BadInput as error:
        raise BadInput(f"{source.place(('method', 'name'))}: {error}") from None
    return spec


def _as_json(source: _Source) -> str:
    """Write a job's content as JSON, which has no dates and no loops."""

    def refuse(value: object) -> object:
        raise BadInput(f"{source.name}: {value!s} is a date or time; put it in quotes to make it text")

    try:
        return json.dumps(source.content, default=refuse)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{source.name}: a part of it contains itself") from error


def _line(root: yaml.Node | None, path: tuple[str, ...]) -> int | None:
    """The 1-based line of the last part of a path that the file has."""
    line, node = None, root
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    return line

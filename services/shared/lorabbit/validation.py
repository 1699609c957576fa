"""Turn a pydantic failure into one clear sentence: the path, what was expected, the nearest name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel], *, prefix: str = "") -> str:
    """Describe the first failure of a validation; `prefix` goes before the path."""
    first = error.errors(include_url=False)[0]
    path = prefix + ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return _unknown(path, first["loc"], model) + more
    return f"{path or 'job file'}: {_expected(first)}{more}"


def _unknown(path: str, loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """Name the keys that do exist where an unknown one was written."""
    known = _fields_at(model, loc[:-1])
    near = get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{path}: unknown key{hint} (known: {', '.join(sorted(known))})"


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the model found by walking `path` from `model`."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def _expected(first: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    """Say what was expected and what stood there."""
    message = str(first["msg"])
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    context = first.get("ctx") or {}
    if first["type"] == "literal_error":
        near = get_close_matches(
            str(first["input"]), str(context.get("expected", "")).replace("'", "").split(", "), n=1
        )
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"expected {context.get('expected')}, not {first['input']!r}{hint}"
    if first["type"] == "missing":
        return "is required"
    return f"{message[0].lower()}{message[1:]}, not {first['input']!r}"

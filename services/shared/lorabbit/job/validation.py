"""Turn a pydantic failure into one clear sentence: the path, what was expected, the nearest name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def first_path(error: ValidationError) -> tuple[int | str, ...]:
    """Path of the failure that `explain` describes."""
    loc: tuple[int | str, ...] = _first(error)["loc"]
    return loc


def explain(error: ValidationError, model: type[BaseModel], *, prefix: str = "") -> str:
    """Describe the first failure of a validation; `prefix` goes before the path."""
    first = _first(error)
    loc = _without_union_members(first["loc"], model)
    path = prefix + ".".join(str(part) for part in loc)
    same = [e for e in error.errors(include_url=False) if _without_union_members(e["loc"], model) == loc]
    others = len({_without_union_members(e["loc"], model) for e in error.errors(include_url=False)}) - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        return _unknown(path, loc, model, prefix=prefix, known=known) + more
    return f"{path}: {_expected(same)}{more}" if path else f"{_expected(same)}{more}"


def _first(error: ValidationError) -> Any:  # noqa: ANN401 - pydantic's ErrorDetails
    """An unknown key is the likelier cause of what else is wrong."""
    errors = error.errors(include_url=False)
    return next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])


def _unknown(
    path: str, loc: tuple[int | str, ...], model: type[BaseModel], *, prefix: str, known: Sequence[str]
) -> str:
    """Name the keys that do exist where an unknown one was written, or the place where it belongs."""
    elsewhere = [prefix + other for other in _paths(model) if other.split(".")[-1] == loc[-1]]
    near = get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    near += [name for name in known if "".join(word[0] for word in name.split("_")) == loc[-1]]
    meant = elsewhere[0] if elsewhere else near[0] if near else ""
    hint = f"; did you mean {meant!r}?" if meant else ""
    return f"{path}: unknown key{hint} (known: {', '.join(sorted(known)) or 'none'})"


def _models_of(annotation: object) -> list[type[BaseModel]]:
    """The models that a field may hold, also where it may hold something else."""
    choices = get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)
    bare = [get_args(choice)[0] if get_origin(choice) is Annotated else choice for choice in choices]
    return [choice for choice in bare if isinstance(choice, type) and issubclass(choice, BaseModel)]


def _below(annotation: object, rest: Sequence[int | str]) -> tuple[type[BaseModel] | None, int]:
    """The model that a field holds, and the parts of the rest of a path that only say which one (its kind)."""
    models = _models_of(annotation)
    for model in models if len(models) > 1 else ():
        if rest and model.model_fields["kind"].default == rest[0]:
            return model, 1
    return (models[0] if models else None), 0


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Field names of the model found by walking `path` from `model`."""
    while path:
        field = model.model_fields.get(str(path[0]))
        below, used = _below(field.annotation, path[1:]) if field else (None, 0)
        if below is None:
            return []
        model, path = below, path[1 + used :]
    return list(model.model_fields)


def _paths(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every path of a model, outermost first."""
    below = []
    for name, field in model.model_fields.items():
        yield above + name
        below += [(inner, f"{above}{name}.") for inner in _models_of(field.annotation)]
    for inner, path in below:
        yield from _paths(inner, path)


def _without_union_members(loc: Sequence[int | str], model: type[BaseModel]) -> tuple[int | str, ...]:
    """Drop what pydantic adds behind a field that holds a union: ('cohort', 'int'), ('schedule', 'quorum')."""
    here: type[BaseModel] | None = model
    kept: list[int | str] = []
    while loc:
        part, loc = loc[0], loc[1:]
        kept.append(part)
        field = here.model_fields.get(str(part)) if here is not None else None
        if field is None:
            return (*kept, *loc)
        here, used = _below(field.annotation, loc)
        loc = loc[used:]
        if here is None and get_origin(field.annotation) in {Union, UnionType}:
            return (*kept, *(each for each in loc if isinstance(each, int)))
    return tuple(kept)


def _expected(failures: list[Any]) -> str:
    """Say what was expected and what stood there; several failures are a union's members."""
    first = failures[0]
    kinds = list(dict.fromkeys(_EXPECTED[f["type"]] for f in failures if f["type"] in _EXPECTED))
    said = shown(first["input"])
    message = str(first["msg"])
    if kinds:
        return f"expected {' or '.join(kinds)}, not {said}"
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    if first["type"] == "literal_error":
        return _expected_word(first, said)
    return _out_of_bounds(first, said) or f"{message[0].lower()}{message[1:]}, not {said}"


def _expected_word(failure: Any, said: str) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    """Name the words that are allowed, and the one that was probably meant."""
    allowed = str(failure["ctx"]["expected"])
    words = allowed.replace("'", "").replace(" or ", ", ").split(", ")
    near = get_close_matches(str(failure["input"]), words, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"expected {allowed}, not {said}{hint}"


def _out_of_bounds(failure: Any, said: str) -> str | None:  # noqa: ANN401 - pydantic's ErrorDetails
    """Say which bound a value breaks; None for a failure of another kind."""
    kind, context = failure["type"], failure.get("ctx") or {}
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"must be {words} {context[key]}, not {said}"
    if kind == "string_pattern_mismatch":
        return f"{said} does not have the form {context['pattern']}"
    if kind == "too_short":
        return f"expected at least {context['min_length']} entries, not {said}"
    return "is required" if kind == "missing" else None


def shown(value: object) -> str:
    """What stood there, short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str | int | float) else f"{type(value).__name__} {value!r}"
    text = text.replace("dict {", "{").replace("list [", "[")
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 - one line

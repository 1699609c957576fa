"""Schema text: a pydantic model as rows of a Markdown table.

Types and limits come from the model's own JSON schema, meanings from the fields' descriptions or from
the docstrings that stand under them, so that the reference can say nothing that the code does not.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel, TypeAdapter

from lorabbit.protocol.messages import Identifier, Sha256

Schema: TypeAlias = Mapping[str, Any]
LIMITS = (
    ("minimum", ">= {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "<= {}"),
    ("exclusiveMaximum", "< {}"),
    ("maxLength", "at most {} characters"),
)
SPECIAL = {2**63: "2^63", 2**40: "2^40", 128 * 2**20: "128 MiB"}


IDENTIFIER = str(TypeAdapter(Identifier).json_schema()["pattern"])
NAMED = {IDENTIFIER: "identifier", str(TypeAdapter(Sha256).json_schema()["pattern"]): "sha256 in hex"}
"""Pattern -> how the reference calls it."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; bars, and angle brackets outside code, are escaped."""
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Make a text fit for a table's cell."""
    parts = re.split(r"(`+[^`]*`+)", text.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def type_text(schema: Schema, definitions: Schema) -> str:
    """Say what a value must be: its type and its limits."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rsplit("/", 1)[1]
        found: Schema = definitions[name]
        return name if found.get("type") == "object" else type_text(found, definitions)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(type_text(choice, definitions) for choice in schema[key]))
    return _plain(schema, definitions)


def _plain(schema: Schema, definitions: Schema) -> str:
    """Say one type with its limits."""
    kind = str(schema.get("type", "any JSON"))
    if kind == "array":
        kind = f"list of {type_text(schema.get('items', {}), definitions)}"
    elif kind == "object":
        inner = schema.get("additionalProperties")
        kind = f"map of {type_text(inner, definitions)}" if isinstance(inner, dict) and inner else "map"
    limits = [text.format(_number(schema[key])) for key, text in LIMITS if key in schema]
    pattern = schema.get("pattern")
    if pattern in NAMED:
        kind = NAMED[pattern]
    elif pattern:
        limits.append(f"matching `{pattern}`")
    return ", ".join([kind, *limits])


def _number(value: float) -> str:
    return SPECIAL.get(int(value), f"{value:g}" if isinstance(value, float) else str(value))


def default_text(schema: Schema, *, required: bool) -> str:
    """Say a field's default, or that it has none."""
    if required:
        return "required"
    if "default" not in schema:
        return "`{}`" if schema.get("type") == "object" else "the host's name"
    value = schema["default"]
    return "not set" if value is None else f"`{json.dumps(value)}`"


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return field -> meaning: its description, or the docstring under it, also of base classes."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel and owner.__module__.startswith("lorabbit"):
            found |= _attribute_docstrings(owner)
    found |= {name: field.description for name, field in model.model_fields.items() if field.description}
    return found


def _attribute_docstrings(owner: type) -> dict[str, str]:
    """Read the strings that stand right under a class's annotated names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(tree, ast.ClassDef)  # noqa: S101 - the source of a class is a class
    found: dict[str, str] = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            value = following.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[node.target.id] = " ".join(inspect.cleandoc(value.value).split())
    return found


def field_rows(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Return (name, type, default, meaning) of every field, in the order of the code."""
    schema: Schema = model.model_json_schema()
    definitions: Schema = schema.get("$defs", {})
    meaning = meanings(model)
    rows = []
    for name, field in schema.get("properties", {}).items():
        required = name in schema.get("required", [])
        kind = type_text(field, definitions)
        # "not set" in the next column says the same.
        kind = kind if required else kind.removesuffix(" or null")
        rows.append((name, kind, default_text(field, required=required), meaning.get(name, "")))
    return rows


def doc(model: type[BaseModel]) -> str:
    """Return a class's docstring, paragraphs kept."""
    return inspect.cleandoc(model.__doc__ or "")

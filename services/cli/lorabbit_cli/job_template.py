"""The job file that `lorabbit init` writes: every key with its default and meaning, taken from the models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import METHODS

HEAD = """\
# A LoRAbbit job. Run it with:
#
#   lorabbit run {file}
#
# Every key is shown with its default; what you delete keeps it. A key in a comment is off unless given.
"""
SECTIONS = {
    "model": "The base model and which of its parameters are trained.",
    "lora": "Shape of the LoRA factors.",
    "data": "Where examples come from and how they are split.",
    "partition": "How an experiment splits one dataset over its clients.",
    "local": "What one client does in one round; give epochs or steps, not both.",
    "evaluation": "When and where the aggregated adapter is scored.",
    "output": "What is kept of a run.",
}


def template(file: str) -> str:
    """Return the text of a commented job file."""
    return HEAD.format(file=file) + "\n" + "\n".join(_section(JobSpec, 0)) + "\n"


def _section(model: type[BaseModel], depth: int) -> Iterator[str]:
    """Lines of one model's keys, plain ones before the sections below them."""
    indent = "  " * depth
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if name == "method":
            yield from _method(str(default.name))
        elif isinstance(default, BaseModel):
            yield f"{indent}# {SECTIONS[name]}" if name in SECTIONS else f"{indent}# {name}"
            yield f"{indent}{name}:"
            yield from _section(type(default), depth + 1)
        else:
            meaning = "; ".join(part for part in (field.description, _choices(field.annotation)) if part)
            text = "" if default is None else f" {_inline(default)}"
            yield f"{indent}{'# ' if default is None else ''}{name}:{text}{'  # ' + meaning if meaning else ''}"


def _method(default: str) -> Iterator[str]:
    """The method, and the settings of the others in comments."""
    yield "# The federated method; `lorabbit methods` lists them. Its settings stand beside its name."
    yield "method:"
    yield f"  name: {default}  # one of {', '.join(METHODS)}"
    for method in METHODS.values():
        for name, field in method.model_fields.items():
            yield f"  # {name}: {_inline(field.default)}  # {method.name}: {field.description}"


def _choices(annotation: Any) -> str:  # noqa: ANN401 - a type form
    """The words that are allowed, where there are only so many."""
    return (
        f"one of {', '.join(str(word) for word in get_args(annotation))}" if get_origin(annotation) is Literal else ""
    )


def _inline(value: object) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return text.removesuffix("...\n").strip()

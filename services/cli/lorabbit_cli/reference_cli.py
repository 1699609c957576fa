"""Reference of the command line, walked from the commands themselves."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from lorabbit_cli.schema_text import table


def cli_page(exit_codes: dict[int, str]) -> str:
    """Describe every command with its arguments and options, and the exit codes."""
    from lorabbit_cli.__main__ import app  # noqa: PLC0415 - the entry point imports what it needs of this package

    root: Any = typer.main.get_command(app)
    codes = table(("code", "meaning"), [(str(code), meaning) for code, meaning in exit_codes.items()])
    context = root.make_context("lorabbit", [], resilient_parsing=True)
    names = [name for name in root.list_commands(context) if not root.get_command(context, name).hidden]
    lines = [_help(root), "", "## Exit codes", "", codes, ""]
    for name in names:
        lines += _command(root.get_command(context, name), f"lorabbit {name}")
    return "\n".join(lines)


def _command(command: Any, path: str) -> list[str]:  # noqa: ANN401 - typer does not export its command class
    """One command: what it does, how it is called, what it takes."""
    context = command.make_context(path, [], resilient_parsing=True)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines = [f"## `{path}`", "", _help(command), "", "```console", f"$ {usage}", "```", ""]
    for kind, title in (("argument", "argument"), ("option", "option")):
        records = [
            record
            for param in command.get_params(context)
            if param.param_type_name == kind and "--help" not in param.opts
            if (record := param.get_help_record(context)) is not None
        ]
        if records:
            lines += [table((title, "meaning"), [(f"`{name}`", " ".join(text.split())) for name, text in records]), ""]
    return lines


def _help(command: Any) -> str:  # noqa: ANN401 - as above
    """A command's help as one flowing text, paragraphs kept."""
    return inspect.cleandoc(command.help or "")

"""`docs/cli.md`, written from the command line itself: `python -m prhs_cli.manual docs/cli.md`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer

_HEAD = """# The command line

<!-- Written by `make docs` from the program itself, and checked by a test: edit prhs_cli/ instead. -->
"""


def render() -> str:
    """The whole manual as Markdown."""
    from prhs_cli.app import app

    root: Any = typer.main.get_command(app)
    parts = [_HEAD, _command(root, "prhs", "Everywhere")]
    parts += [_command(command, f"prhs {name}", f"`prhs {name}`") for name, command in root.commands.items()]
    return "\n".join(parts)


def _command(command: Any, path: str, title: str) -> str:
    context = typer.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines = [f"## {title}", "", f"`{usage}`", "", _text(command.help), ""]
    records = [parameter.get_help_record(context) for parameter in command.params]
    lines += [f"- `{_name(record[0])}`: {_text(record[1])}" for record in records if record]
    if command.epilog:
        lines += ["", "```text", *_examples(command.epilog), "```"]
    return "\n".join(lines) + "\n"


def _name(name: str) -> str:
    """Without the Python type that Typer shows behind an argument that has a name for its value."""
    return re.sub(r" <(str|path)>$", "", _text(name))


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def _examples(epilog: str) -> list[str]:
    """Click marks paragraphs that keep their line breaks with a backspace character."""
    return [line for line in epilog.replace("\b", "").splitlines() if line.strip()]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")

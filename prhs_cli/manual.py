"""`docs/cli.md`, written from the command line itself: `python -m prhs_cli.manual docs/cli.md`."""

from __future__ import annotations

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
    parts = [_HEAD, _command(root, "prhs")]
    parts += [_command(command, f"prhs {name}") for name, command in root.commands.items()]
    return "\n".join(parts)


def _command(command: Any, path: str) -> str:
    lines = [f"## `{path}`" if path != "prhs" else "## Everywhere", "", _text(command.help), ""]
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    for parameter in shown:
        lines.append(f"- {_names(parameter)}: {_text(parameter.help)}{_default(parameter)}")
    if command.epilog:
        lines += ["", "```text", *_examples(command.epilog), "```"]
    return "\n".join(lines) + "\n"


def _names(parameter: Any) -> str:
    """`--prompts N`, `MODEL`; a flag has no value to name."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    names = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    return names if getattr(parameter, "is_flag", False) else f"{names} {_value(parameter)}"


def _value(parameter: Any) -> str:
    choices = getattr(parameter.type, "choices", None)
    if choices:
        return "`" + "|".join(str(getattr(choice, "value", choice)) for choice in choices) + "`"
    return f"`{parameter.metavar or parameter.type.name.upper()}`"


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required:
        return " (required)"
    if default is None or default is False or callable(default) or not parameter.show_default:
        return ""
    return f" (default: `{getattr(default, 'value', default)}`)"


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def _examples(epilog: str) -> list[str]:
    """Click marks paragraphs that keep their line breaks with a backspace character."""
    return [line for line in epilog.replace("\b", "").splitlines() if line.strip()]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")

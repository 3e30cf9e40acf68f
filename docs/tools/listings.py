"""Pages that list what is elsewhere in the repository: the examples, and the command line with all its options."""

import ast
from html import escape
from pathlib import Path
from typing import Any

import typer

from squeezevit.cli.app import app


def examples(folder: Path) -> str:
    """Every example whole, under its name."""
    parts = ["# Examples\n\nThe tests run each of them."]
    for file in sorted(folder.glob("*.py")):
        code = file.read_text()
        said = ast.get_docstring(ast.parse(code)) or ""
        parts.append(f"## {file.name}\n\n{said.splitlines()[0]}\n\n```python\n{code.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """Every command with every option, as the command line itself explains them."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line\n\nThis is what `-h` says. What stands before a command:", options(group.params)]
    for name, command in sorted(group.commands.items()):
        parts += [f"## squeezevit {name}", " ".join((command.help or "").split()), options(command.params)]
    return "\n\n".join(parts) + "\n"


def options(parameters: list[Any]) -> str:
    shown = [parameter for parameter in parameters if not getattr(parameter, "hidden", False)]
    rows = "".join(row(parameter) for parameter in shown)
    return f"<table><thead><tr><th>option</th><th>what it does</th><th>default</th></tr></thead><tbody>{rows}</tbody></table>"


def row(parameter: Any) -> str:
    """One option: its spellings, its help, and its default where it has one."""
    flag = parameter.param_type_name == "option"
    spelled = ", ".join(f"<code>{escape(name)}</code>" for name in (*parameter.opts, *parameter.secondary_opts))
    name = spelled if flag else f"<code>{escape(parameter.name.upper())}</code>"
    default = parameter.default
    said = "required" if parameter.required else "" if default in (None, False, ()) or callable(default) else escape(str(default))
    return f"<tr><td>{name}</td><td>{escape(getattr(parameter, 'help', None) or '')}</td><td>{said}</td></tr>"

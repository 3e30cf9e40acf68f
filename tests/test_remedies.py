"""What messages tell people to do exists: every name, option, recipe and extra in the texts of the library."""

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import typer

import squeezevit as sv

pytest.importorskip("timm")
from squeezevit.cli import app
from squeezevit.train.config import Config

ROOT = Path(sv.__file__).parent
PROJECT = Path(__file__).parents[1]
COMMAND = typer.main.get_command(app.app)
PARAMETERS = [p for holder in (COMMAND, *COMMAND.commands.values()) for p in holder.params]
OPTIONS = {flag for parameter in PARAMETERS for flag in (*parameter.opts, *parameter.secondary_opts)}
OTHERS = {
    "--no-deps",
    "--force-reinstall",
    "--check",
    "--help",
    "--nproc-per-node",
    "--directory",
    "--silent",
}  # of pip, sha256sum, torchrun, http.server, npm; of every command
STYLED = ("report/charts.py", "report/html.py", "compare/page.py", "report/neighbours.py")  # which write style sheets
ROOMS = ("export", "families")
NO_NAMES = (".methods", ".reducer")  # the group of entry points, and a key of a file's metadata


def texts() -> Iterator[tuple[str, str]]:
    """Where a text stands, and the text; what is filled in reads as {}."""
    for path in sorted({*ROOT.rglob("*.py")} - {ROOT / name for name in STYLED}):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                yield f"{path.name}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{path.name}:{node.lineno}", node.value


TEXTS = list(texts())


def found(pattern: str) -> list[tuple[str, str]]:
    hits = [(where, hit) for where, text in TEXTS for hit in re.findall(pattern, text)]
    assert hits, f"nothing matches {pattern}; the question is not asked"
    return hits


def test_every_name_of_the_library_is_there():
    """`sv.reduce_`, `sv.ETPS(...)`, `squeezevit.reducers.catalog.method`."""
    for where, path in found(r"\b(?:sv|squeezevit)((?:\.[A-Za-z_]+)+)"):
        names, holder = path.strip(".").split("."), sv
        if names[-1] in ("py", "json"):
            continue
        if names[0] in ROOMS and len(names) > 1:  # a module, where a function has its name
            holder = import_module(f"squeezevit.{names.pop(0)}")
        for name in names:
            if not hasattr(holder, name):
                try:
                    import_module(".".join([holder.__name__, name]))
                except ImportError:
                    assert path in NO_NAMES, f"{where}: squeezevit{path} does not exist"
                    break
            holder = getattr(holder, name)


def test_every_option_is_one_of_a_command():
    assert [(where, flag) for where, flag in found(r"(?:^|[ `(])(--[a-z][a-z-]+)(?!:)\b") if flag not in OPTIONS | OTHERS] == []


def test_every_extra_can_be_installed():
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for where, listed in found(r"squeezevit\[([a-z_,]+)\]"):
        assert {*listed.split(",")} <= {*extras}, f"{where}: {listed}"


def test_every_recipe_that_is_named_is_shipped():
    shipped = {file.stem for file in ROOT.rglob("*.yaml")}
    assert {name for _, name in found(r"--recipe ([a-z][a-z0-9-]+)")} <= shipped


def test_every_field_that_is_named_is_in_the_configuration():
    """`--set model.new_head=true`."""
    for where, path in found(r"--set ([a-z_.]+)="):
        section = Config()
        for name in path.split("."):
            assert hasattr(section, name), f"{where}: {path}"
            section = getattr(section, name)


def test_every_file_that_is_named_is_there():
    for where, file in found(r"\b(?:examples|benchmarks|docs)/[a-z_./]+\.(?:py|md)"):
        assert (PROJECT / file).is_file(), f"{where}: {file}"

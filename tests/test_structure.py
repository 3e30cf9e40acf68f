"""The house: which rooms import which, read off the imports of the whole package."""

import ast
from pathlib import Path

import squeezevit

ROOT = Path(squeezevit.__file__).parent
ROOMS = (
    "core",
    "families",
    "reducers",
    "budget",
    "bench",
    "data",
    "report",
    "train",
    "bundle",
    "export",
    "embed",
    "scale",
    "page",
    "vlm",
    "compare",
    "cli",
)  # of which each is a folder
ALONE = ("errors", "sums", "checkpoint", "extend")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name within it."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, everything: dict[str, Path], at_the_door: bool) -> set[str]:
    """Modules of the package that a file imports; at_the_door: those alone that run when it is imported."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body if at_the_door else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "squeezevit":
            base = node.module.removeprefix("squeezevit").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in everything else base)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "squeezevit"]
            found |= {name.removeprefix("squeezevit").lstrip(".") for name in names}
    return found


def arrows(at_the_door: bool = False) -> dict[str, set[str]]:
    everything = modules()
    return {name: imports(path, everything, at_the_door) - {name} for name, path in everything.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_core_imports_nothing_above_it():
    for module, targets in arrows().items():
        if room(module) == "core":
            assert {room(target) for target in targets} <= {"core", "errors"}, f"{module} imports {targets}"


def test_no_circle_of_modules():
    graph, done, path = arrows(), set(), []

    def visit(module: str) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done or module not in graph:
            return
        path.append(module)
        for target in sorted(graph[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in graph:
        if module not in ("", "__main__"):
            visit(module)


def test_no_circle_of_rooms():
    """Each room imports only rooms below it, so that they can be put in an order."""
    graph: dict[str, set[str]] = {}
    for module, targets in arrows().items():
        if module not in ("", "__main__"):
            graph.setdefault(room(module), set()).update(room(t) for t in targets if t and room(t) != room(module))
    while graph:
        ground = {name for name, targets in graph.items() if not targets & set(graph)}
        assert ground, f"these rooms import each other in a circle: {graph}"
        graph = {name: targets for name, targets in graph.items() if name not in ground}


def test_every_module_has_a_room():
    for module in modules():
        assert room(module) in (*ROOMS, *ALONE, "", "__main__"), f"{module} lies outside of the rooms"


def test_only_the_command_line_writes_to_a_terminal():
    for module, path in modules().items():
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert "print" not in names or room(module) == "cli", f"{module} prints"
        assert "Console" not in path.read_text() or room(module) == "cli", f"{module} has a console"

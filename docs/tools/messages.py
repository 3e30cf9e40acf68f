"""Every message that the library raises, collected from its source."""

import ast
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "src" / "squeezevit"
KINDS = ("ConfigError", "UnsupportedError", "CheckpointError", "DataError", "TrainingError", "MissingExtraError", "OutOfReach")
GAP = "\N{HORIZONTAL ELLIPSIS}"  # stands for what is filled in


class Message(NamedTuple):
    kind: str
    module: str
    text: str  # with GAP where something is filled in


def collect() -> Iterator[Message]:
    """The messages of all errors of the library's own family, in the order of the source."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        values = {target.id: node.value for node in tree.body if isinstance(node, ast.Assign) for target in names(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and called(node) in KINDS:
                text = re.sub(rf"{GAP}(\s*{GAP})+", GAP, template(node.args[0], values))
                if len(text.replace(GAP, "").split()) > 2:
                    yield Message(
                        called(node).replace("OutOfReach", "ConfigError"),
                        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."),
                        text,
                    )


def names(node: ast.Assign) -> list[ast.Name]:
    return [target for target in node.targets if isinstance(target, ast.Name)]


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).rsplit(".", 1)[-1]


def template(node: ast.AST, values: dict[str, ast.expr]) -> str:
    """A text as it stands in the source.

    >>> template(ast.parse("f'keep={k!r} is ' + 'no ratio'", mode="eval").body, {})
    'keep=… is no ratio'
    """
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, values) for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left, values) + template(node.right, values)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    if isinstance(node, ast.Name) and isinstance(values.get(node.id), ast.Constant | ast.JoinedStr):
        return template(values[node.id], {})
    return GAP


def page() -> str:
    """The messages by module, each with the kind of error that carries it."""
    found = list(collect())
    parts = [
        "# All messages",
        f"Every message of the library's own errors, {len(found)} of them, as its source has them; {GAP} stands for what is filled "
        "in: your value, a name, a count. Each says what to do. [Troubleshooting](troubleshooting.md) says more about some.",
    ]
    for module in dict.fromkeys(message.module for message in found):
        own = [message for message in found if message.module == module]
        rows = "".join(f'<tr><td>{escape(text)}</td><td class="kind">{kind}</td></tr>' for kind, _, text in own)
        heads = "<thead><tr><th>message</th><th>error</th></tr></thead>"
        parts += [f"## {module}", f'<table class="messages">{heads}<tbody>{rows}</tbody></table>']
    return "\n\n".join(parts) + "\n"

"""The library's docstrings as Markdown: prose with `name: meaning`, shapes, `>>>` examples, and comments behind fields."""

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import griffe

BLOCKS = re.compile(r"\n\s*\n")
SENTENCE = re.compile(r"(?<=\.)\n(?=\s*[A-Z`])")  # one that begins its line ends the list before it
FIELD = re.compile(r"^\s+(?:self\.)?(?P<name>[a-z]\w*)\s*:.*?\s{2}# (?P<comment>.+)$")


class Prose(griffe.Extension):
    """Rewrites every docstring as it is loaded, and gives fields the comments that stand behind them."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        for name, comment in comments(cls.source.splitlines()):
            field = cls.members.get(name)
            if isinstance(field, griffe.Attribute) and field.docstring is None:
                field.docstring = griffe.Docstring(comment, parent=field)
        if any(str(base) == "NamedTuple" for base in cls.bases):
            cls.set_member("__init__", constructor(cls))

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, set(names(obj)))


def constructor(cls: griffe.Class) -> griffe.Function:
    """What makes a named tuple: its fields in their order, which nobody wrote as a signature."""
    fields = [field for field in cls.members.values() if isinstance(field, griffe.Attribute) and field.annotation is not None]
    kind = griffe.ParameterKind.positional_or_keyword
    parameters = [griffe.Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value) for f in fields]
    return griffe.Function("__init__", parameters=griffe.Parameters(griffe.Parameter("self", kind=kind), *parameters), parent=cls)


def comments(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Fields and the comments on their lines.

    >>> comments(["    mass: Tensor | None = None  # [B, T], patches", "    n = 3  # no field"])
    [('mass', '[B, T], patches')]
    """
    return [(found["name"], found["comment"]) for line in lines if (found := FIELD.match(line))]


def names(obj: griffe.Object) -> Iterable[str]:
    """What a docstring may explain by `name: meaning`: parameters, and for a class its fields and its parents'."""
    if isinstance(obj, griffe.Function):
        yield from (parameter.name.lstrip("*") for parameter in obj.parameters)
    elif isinstance(obj, griffe.Class):
        init = obj.members.get("__init__")
        if isinstance(init, griffe.Function):
            yield from (parameter.name for parameter in init.parameters)
        yield from (name for name, member in obj.members.items() if isinstance(member, griffe.Attribute))
        yield from ("keep", "at", "score", "macs", "latency")


def as_markdown(text: str, known: set[str]) -> str:
    """Paragraphs, with a list where they explain names and a block of code where they show some.

    >>> as_markdown("Keep some. keep: a ratio. at: blocks;\\nascending.", {"keep", "at"}).splitlines()
    ['Keep some.', '', '- **`keep`**: a ratio.', '- **`at`**: blocks; ascending.']
    >>> as_markdown(chr(62) * 3 + " f(1)\\n2", set()).splitlines()
    ['```pycon', '>>> f(1)', '2', '```']
    """
    return "\n\n".join(block_as_markdown(block, known) for block in BLOCKS.split(text.strip("\n")))


def block_as_markdown(block: str, known: set[str]) -> str:
    if block.lstrip().startswith(">>>"):
        code = re.sub(r"\s*# doctest: .*$", "", textwrap.dedent(block), flags=re.M)
        return f"```pycon\n{code}\n```"
    if all(line.startswith("    ") for line in block.splitlines()):
        return block
    parts = [told(chunk, "|".join(sorted(map(re.escape, known), key=len, reverse=True))) for chunk in SENTENCE.split(block)]
    return "\n\n".join(part for part in parts if part)


def told(chunk: str, names: str) -> str:
    """Sentences, then a list of the names that they explain."""
    words = re.sub(r"<(?=[a-zA-Z/])", "&lt;", " ".join(chunk.split()))
    if not names:
        return words
    before, *found = re.split(rf"(?:^|(?<=[.;:] ))({names})((?:, (?:{names}))*): ", words)
    items = [f"- **`{first}{others}`**: {text.strip()}" for first, others, text in zip(*[iter(found)] * 3, strict=True)]
    return "\n\n".join(part for part in (before.strip(), "\n".join(items)) if part)

"""The drawings of docs/how-it-works.md, computed by the same rules as the library and drawn as SVG.

python docs/tools/mechanism.py        # docs/how/stages.svg, stage.svg, weights.svg, blocks.svg, mass.svg

Colours are CSS variables: a viewer's dark or light mode decides, and on the site its page.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

HOW = Path(__file__).parents[1] / "how"
WIDTH = 520
STYLE = """
svg.how { --ink: #1c2127; --muted: #5c6570; --line: #b9c2cc; --paper: #ffffff; --keep: #cf3f12; --prune: #68707b; --cool: #0a5fb4;
  font: 14px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg.how { --ink: #e8ebee; --muted: #a6afba; --line: #55606b; --paper: #1e2129;
    --keep: #ff8552; --prune: #a6afba; --cool: #62adff; }
}
svg.how text { fill: var(--ink); } svg.how .muted { fill: var(--muted); } svg.how .title { font-weight: 600; font-size: 15px; }
svg.how .line { stroke: var(--line); fill: none; } svg.how .arrow { stroke: var(--ink); stroke-width: 1.6; fill: none; }
svg.how .keep { fill: var(--keep); } svg.how .prune { fill: var(--prune); } svg.how .cool { fill: var(--cool); }
svg.how .on { fill: var(--paper); font-weight: 600; }
svg.how .box { fill: none; stroke: var(--ink); stroke-width: 1.4; }
svg.how .stage { fill: none; stroke: var(--keep); stroke-width: 2.4; }
"""
HEAD = '<defs><marker id="{id}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
TIP = '<path d="M0 0.6 7.4 4 0 7.4z" style="fill: context-stroke"/></marker></defs>'

Colour = tuple[float, float, float]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    look = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{look}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str = "", style: str = "", round_: float = 3) -> str:
    look = (f' class="{kind}"' if kind else "") + (f' style="{style}"' if style else "")
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{round_:g}"{look}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    return f'<path class="arrow" d="M{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f}" marker-end="url(#{name}-tip)"/>'


def drawing(name: str, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole file; its title is what a screen reader says."""
    label = f'role="img" aria-labelledby="{name}-title"'
    head = f'<svg class="how" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {label}>'
    tip = HEAD.format(id=f"{name}-tip") + TIP
    return "\n".join(
        [head, f'<title id="{name}-title">{escape(title)}</title>', f"<style>{STYLE}</style>", tip, *parts, "</svg>\n"]
    )


def counts(n: int, keep: float, at: Sequence[int], depth: int) -> list[int]:
    """Patch tokens that go into the MLP of each block: K_j = ceil(keep * K_{j-1})."""
    found = []
    for block in range(depth):
        n = math.ceil(keep * n) if block in at else n
        found.append(n)
    return found


def stages() -> str:
    """Twelve blocks, as high as they have tokens."""
    at, tokens = (3, 6, 9), counts(196, 0.5, (3, 6, 9), 12)
    wide, high, floor = 36, 150, 196
    parts = []
    for block, n in enumerate(tokens):
        x, h = 22 + 40 * block, high * n / 196
        parts.append(rect(x, floor - h, wide, h, "keep" if block in at else "cool", "" if block in at else "opacity: 0.75"))
        parts.append(text(x + wide / 2, floor + 18, str(block), "muted", "middle"))
        if block in (0, *at):
            parts.append(text(x + wide / 2, floor - h - 8, str(n), "title", "middle"))
    parts += [text(22, floor + 40, "block", "muted"), text(72, 38, "patch tokens", "muted")]
    parts += [text(500, floor + 40, "stages at blocks 3, 6 and 9, keep = 0.5", "muted", "end")]
    said = "Twelve blocks; after the stages at blocks 3, 6 and 9 half of the patch tokens are left: 196, 98, 49, 25"
    return drawing("stages", 250, said, parts)


# one stage on a picture of sixteen patches

SKY, ROOF, WALL, GRASS, TREE = (96, 165, 230), (196, 70, 50), (236, 205, 140), (110, 165, 80), (45, 105, 60)
PICTURE: list[Colour] = [
    SKY, (104, 170, 232), (120, 180, 235), (110, 174, 230),
    (90, 160, 228), ROOF, (206, 84, 60), (130, 186, 238),
    TREE, WALL, (228, 192, 128), (126, 184, 236),
    (100, 155, 72), GRASS, (120, 172, 88), (104, 160, 78),
]  # fmt: skip
SCORES = [0.30, 0.12, 0.10, 0.15, 0.18, 0.90, 0.85, 0.28, 0.62, 0.95, 0.75, 0.20, 0.14, 0.25, 0.45, 0.16]


def cosine(a: Colour, b: Colour) -> float:
    """Of two colours, seen from grey."""
    u, v = ([value - 140 for value in colour] for colour in (a, b))
    return sum(p * q for p, q in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)


def split(keep: float) -> tuple[list[int], list[int]]:
    kept = sorted(sorted(range(16), key=lambda i: -SCORES[i])[: math.ceil(16 * keep)])
    return kept, [i for i in range(16) if i not in kept]


def hosts(kept: list[int], pruned: list[int]) -> dict[int, int]:
    return {i: max(kept, key=lambda j: cosine(PICTURE[i], PICTURE[j])) for i in pruned}


def fused(host: int, pruned: list[int]) -> Colour:
    """The mean by e for the host and exp(cosine) for each pruned token: eq. 4 of Wei et al. 2023."""
    weights = [math.e, *(math.exp(cosine(PICTURE[i], PICTURE[host])) for i in pruned)]
    mixed = [sum(w * PICTURE[i][c] for w, i in zip(weights, [host, *pruned], strict=True)) / sum(weights) for c in range(3)]
    return mixed[0], mixed[1], mixed[2]


def fill(colour: Colour, opacity: float = 1) -> str:
    return f"fill: rgb({', '.join(f'{value:.0f}' for value in colour)}); opacity: {opacity:g}"


def stage() -> str:
    """Four steps, two by two."""
    side, step = 38, 43
    kept, pruned = split(0.5)
    host = hosts(kept, pruned)

    def corner(panel: int, i: int) -> tuple[float, float]:
        return 36 + 264 * (panel % 2) + step * (i % 4), 48 + 272 * (panel // 2) + step * (i // 4)

    def heart(i: int) -> tuple[float, float]:
        x, y = corner(2, i)
        return x + side / 2, y + side / 2

    parts = []
    for panel, (title, words) in enumerate(
        (("1  Score", "how much does each matter?"), ("2  Split", "the highest half is reserved"),
         ("3  Match", "each pruned token finds one host"), ("4  Fuse", "8 tokens, each of what it hosts"))
    ):  # fmt: skip
        x, y = corner(panel, 0)
        parts += [text(x, y - 14, title, "title"), text(x, y + 4 * step + 18, words, "muted")]
    for i, colour in enumerate(PICTURE):
        for panel in (0, 1, 2):
            x, y = corner(panel, i)
            parts.append(rect(x, y, side, side, style=fill(colour, 0.3 if panel and i in pruned else 1)))
            if panel and i in kept:
                parts.append(rect(x, y, side, side, "stage"))
        x, y = corner(0, i)
        parts.append(rect(x + 4, y + side - 9, (side - 8), 5, style="fill: #ffffff; opacity: 0.55", round_=1))
        parts.append(rect(x + 4, y + side - 9, (side - 8) * SCORES[i], 5, style="fill: #1c2127", round_=1))
        x, y = corner(3, i)
        j = host.get(i, i)
        parts.append(
            rect(
                x,
                y,
                step,
                step,
                style=fill(fused(j, [k for k in pruned if host[k] == j])) + "; shape-rendering: crispEdges",
                round_=0,
            )
        )
    parts += [boundary(corner, host, step)]
    for i in pruned:
        (x1, y1), (x2, y2) = heart(i), heart(host[i])
        far = math.hypot(x2 - x1, y2 - y1)
        parts.append(arrow(x1, y1, x2 - 12 * (x2 - x1) / far, y2 - 12 * (y2 - y1) / far, "stage"))
    said = (
        "Sixteen patches of a house: scored, split into reserved and pruned, each pruned one matched to its host and fused into it"
    )
    return drawing("stage", 560, said, parts)


def boundary(corner: object, host: dict[int, int], step: float) -> str:
    """Thin lines between neighbours of different groups, in the fourth panel."""
    assert callable(corner)
    lines = []
    for i in range(16):
        x, y = corner(3, i)
        if i % 4 < 3 and host.get(i, i) != host.get(i + 1, i + 1):
            lines.append(f"M{x + step:g} {y:g}v{step:g}")
        if i < 12 and host.get(i, i) != host.get(i + 4, i + 4):
            lines.append(f"M{x:g} {y + step:g}h{step:g}")
    return f'<path d="{"".join(lines)}" style="stroke: var(--paper); stroke-width: 2.5; fill: none"/>'


def weights() -> str:
    """How much of a host is left after two pruned tokens."""
    cosines = (0.9, 0.5)
    raw = [math.e, *map(math.exp, cosines)]
    shares = [value / sum(raw) for value in raw]
    names = ("the host itself", "a pruned token, cosine 0.9", "a pruned token, cosine 0.5")
    parts, x = [], 20.0
    for share, name, kind, level in zip(shares, names, ("keep", "cool", "prune"), (0, 1, 2), strict=True):
        wide = 480 * share
        parts += [rect(x, 20, wide - 2, 44, kind), text(x + wide / 2, 48, f"{100 * share:.0f} %", "on", "middle")]
        parts += [rect(20, 84 + 24 * level, 12, 12, kind), text(40, 95 + 24 * level, name)]
        x += wide
    formulas = ("e / sum", "exp(0.9) / sum", "exp(0.5) / sum")
    parts += [text(500, 95 + 24 * level, formula, "muted", "end") for level, formula in enumerate(formulas)]
    said = "The weights of a host and two pruned tokens in the fused token: " + ", ".join(
        f"{100 * share:.0f} %" for share in shares
    )
    return drawing("weights", 160, said, parts)


def blocks() -> str:
    """Where a stage stands: between the halves of a block, or before it."""
    parts = []
    for row, (title, order) in enumerate((("eTPS, EViT, TopK", "ASM"), ("dTPS, DynamicViT", "SAM"))):
        y, x = 44 + 120 * row, 46.0
        parts += [text(20, y - 14, title, "title"), arrow(20, y + 26, x - 2, y + 26, "blocks")]
        for kind in order:
            words = {"A": ("attention", "+ residual"), "M": ("MLP", "+ residual"), "S": ("stage", "N to K")}[kind]
            parts += [rect(x, y, 110, 52, "stage" if kind == "S" else "box", round_=26 if kind == "S" else 5)]
            parts += [text(x + 55, y + 23, words[0], "title", "middle"), text(x + 55, y + 41, words[1], "muted", "middle")]
            parts += [arrow(x + 112, y + 26, x + 148, y + 26, "blocks")]
            x += 150
    said = "eTPS, EViT and TopK put their stage between the attention and the MLP of a block; dTPS and DynamicViT before the block"
    return drawing("blocks", 230, said, parts)


def mass() -> str:
    """One token that stands for twenty: what later attention gives it, without and with log(mass)."""
    one, group = math.exp(2.0), math.exp(1.0)
    cases = (
        ("20 tokens, each with logit 1", 20 * group),
        ("one fused token", group),
        ("one fused token, + log(20)", group * math.exp(math.log(20))),
    )
    parts = []
    for row, (name, weight) in enumerate(cases):
        share, y = weight / (weight + one), 38 + 66 * row
        wide = 480 * share
        parts += [
            text(20, y - 8, name),
            rect(20, y, wide - 1, 28, "keep"),
            rect(20 + wide + 1, y, 479 - wide, 28, "prune", "opacity: 0.55"),
        ]
        parts += [text(20 + wide / 2, y + 19, f"{100 * share:.0f} %", "on", "middle")]
    parts += [text(20, 230, "share of a query's attention, beside one other token with logit 2", "muted")]
    said = (
        "Twenty equal tokens get 88 % of a query's attention, one fused token 27 %, and 88 % again with log(20) added to its logit"
    )
    return drawing("mass", 245, said, parts)


if __name__ == "__main__":
    HOW.mkdir(exist_ok=True)
    for draw in (stages, stage, weights, blocks, mass):
        (HOW / f"{draw.__name__}.svg").write_text(draw())

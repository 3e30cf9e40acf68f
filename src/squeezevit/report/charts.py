"""The report's three charts as inline SVG, drawn with matplotlib and coloured by CSS variables.

Every colour in the SVG is `var(--name, #hex)`: the page's light or dark theme decides, and the hexadecimal value holds
where there is no page. A method has one colour, one marker and one dash pattern in every chart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from squeezevit.errors import MissingExtraError
from squeezevit.reducers.catalog import Look, methods
from squeezevit.report.rows import Row

INK, MUTED, GRID, PAPER = "#1c2127", "#5c6570", "#dfe3e8", "#fefefe"
THEME = {"ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER}


class Style(NamedTuple):
    """How one method is drawn: the name of its colour's CSS variable, and its look."""

    name: str
    look: Look


_SPARE = (
    Look("#7a1f1f", "#e39a9a", "d", (3, 2)),
    Look("#b0234f", "#ff86a8", "<", (7, 2, 3, 2)),
    Look("#56720b", "#a9c94e", ">", (4, 4)),
    Look("#7b4a2d", "#d69f7f", "h", (2, 1)),
)
_SHAPES = {  # matplotlib's markers, 12 x 12
    "o": '<circle cx="6" cy="6" r="4.2"/>',
    "s": '<rect x="2.2" y="2.2" width="7.6" height="7.6"/>',
    "P": '<path d="M4.4 1.6h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z"/>',
    "^": '<path d="M6 1.6 10.6 10H1.4z"/>',
    "v": '<path d="M6 10.4 10.6 2H1.4z"/>',
    "D": '<path d="M6 1.2 10.8 6 6 10.8 1.2 6z"/>',
    "d": '<path d="M6 1 9.4 6 6 11 2.6 6z"/>',
    "X": '<path d="M2 3.6 3.6 2 6 4.4 8.4 2 10 3.6 7.6 6 10 8.4 8.4 10 6 7.6 3.6 10 2 8.4 4.4 6z"/>',
    "*": '<path d="M6 .8 7.4 4.3l3.8.2-2.9 2.4 1 3.7L6 8.6l-3.3 2 1-3.7L.8 4.5l3.8-.2z"/>',
    "p": '<path d="M6 1.2 10.8 4.8 9 10.4H3L1.2 4.8z"/>',
    "<": '<path d="M1.6 6 10 1.4v9.2z"/>',
    ">": '<path d="M10.4 6 2 1.4v9.2z"/>',
    "h": '<path d="M6 1 10.4 3.5v5L6 11 1.6 8.5v-5z"/>',
}


def looks(names: Sequence[str]) -> dict[str, Look]:
    """How each of these methods is drawn: as the catalogue says, or in one of four spare looks where it does not."""
    known = methods()
    own = {name: known[name].look for name in names if name in known}
    spare = [name for name in names if own.get(name) is None]
    return {name: own.get(name) or _SPARE[spare.index(name) % len(_SPARE)] for name in names}


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style for each method, in order of first appearance."""
    drawn = looks(list(dict.fromkeys(row["method"] for row in rows)))
    return {name: Style(_variable(name, look), look) for name, look in drawn.items()}


def css_variables(dark: bool) -> str:
    """All methods' colours as CSS declarations, `--m-etps: #cf3f12;` and so on."""
    known = [(name, entry.look) for name, entry in methods().items() if entry.look is not None]
    every = [*known, *(("", look) for look in _SPARE)]
    return " ".join(f"--m-{_variable(name, look)}: {look.dark if dark else look.light};" for name, look in every)


def _variable(name: str, look: Look) -> str:
    """The name of a colour's variable: the method's in letters that CSS takes, a spare look's own."""
    return f"spare-{_SPARE.index(look)}" if look in _SPARE else re.sub(r"[^a-z0-9]+", "-", name)


def accuracy_chart(results: Mapping[str, Any]) -> str:
    """Accuracy in percent against MACs, bars of one standard error; the dense model is a line with its own band."""
    dense = results["dense"]
    level, spread = 100 * dense["accuracy"], 100 * (dense["accuracy_se"] or 0)

    def reference(axes: Any, crowded: bool) -> None:
        axes.axhspan(level - spread, level + spread, color=GRID, alpha=0.45, linewidth=0)
        _level(axes, level, f"dense {level:.1f} %", left=crowded)

    return _chart(
        results,
        name="accuracy",
        title="Accuracy of the probe against MACs",
        unit="accuracy, %",
        value=lambda row: _percent(row["accuracy"]),
        error=lambda row: _percent(row["accuracy_se"]),
        reference=reference,
        sideways=0.85,
    )


def cosine_chart(results: Mapping[str, Any]) -> str:
    """Mean cosine similarity to the dense model's features against MACs, bars of one standard error."""
    return _chart(
        results,
        name="fidelity",
        title="Cosine similarity to the dense features against MACs",
        unit="mean cosine to dense",
        value=lambda row: row["cosine"],
        error=lambda row: row["cosine_se"],
        reference=lambda axes, crowded: _level(axes, 1.0, "dense 1", left=crowded),
    )


def speed_chart(results: Mapping[str, Any]) -> str:
    """Speed-up over the dense model against MACs; the dotted curve is a model whose time follows its MACs."""

    def reference(axes: Any, crowded: bool) -> None:
        _level(axes, 1.0, "dense 1\N{MULTIPLICATION SIGN}", left=True)
        low, high = max(axes.get_xlim()[0], 1), 100
        shares = [low + step * (high - low) / 60 for step in range(61)]
        axes.plot(shares, [100 / share for share in shares], color=MUTED, linewidth=1.2, dashes=(1, 2.2), zorder=1)
        at = high - (high - low) * 0.17
        axes.annotate(
            "1 / MACs",
            (at, 100 / at),
            xytext=(3, 5),
            textcoords="offset points",
            color=MUTED,
            fontsize=11,
            gid="halo-ideal",
        )

    return _chart(
        results,
        name="speed",
        title="Speed-up over the dense model against MACs",
        unit="speed-up, \N{MULTIPLICATION SIGN}",
        value=lambda row: row["speedup"],
        error=lambda row: None,
        reference=reference,
    )


def time_chart(results: Mapping[str, Any], measure: str, batch: int) -> str:
    """What is kept against the measured time of an image at a batch size; measure: "accuracy" or "cosine" of the rows.

    `results` are those of `squeezevit.compare`.
    """
    name, scale = f"{measure}-{batch}", 100 if measure == "accuracy" else 1
    look = styles(results["rows"])
    matplotlib, figure_class = _matplotlib()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "svg.fonttype": "none", "svg.hashsalt": name}):
        height = max(4.5, 0.3 * len(look) + 1.5)
        figure = figure_class(figsize=(6.0, height), dpi=72)
        axes = figure.add_axes((0.115, 0.63 / height, 0.855, 1 - 0.97 / height))
        _quiet(axes, "accuracy, %" if measure == "accuracy" else "mean cosine to dense")
        axes.set_xlabel(f"ms an image, batch {batch}", fontsize=11, color=MUTED)
        ends = []
        for method, style in look.items():
            own = sorted(
                (row for row in results["rows"] if row["method"] == method), key=lambda row: row["times"][str(batch)]["ms"]
            )
            x, y = [row["times"][str(batch)]["ms"] for row in own], [scale * row[measure] for row in own]
            _line(axes, x, y, [scale * row[f"{measure}_se"] for row in own], style.look, "none")
            ends.append((y[-1], x[-1], own[-1]["label"], style))
        _room(axes, results, lambda row: scale * row[measure])
        axes.axvline(results["dense"]["times"][str(batch)]["ms"], color=MUTED, linewidth=1, dashes=(1, 2.2), zorder=1)
        _level(axes, scale * results["dense"][measure], "dense", left=True)
        _label_ends(axes, ends, 0.28 / height)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    colours = {matplotlib.colors.to_hex(style.look.light): f"m-{style.name}" for style in look.values()}
    return _inline(buffer.getvalue(), name, f"{measure.capitalize()} against time at batch {batch}", colours)


def marker_svg(style: Style) -> str:
    """The method's marker, 12 x 12, for use beside its name."""
    fill = f"var(--m-{style.name})" if style.look.strong else "none"
    return (
        f'<svg class="mark" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true" '
        f'style="fill: {fill}; stroke: var(--m-{style.name})">{_SHAPES.get(style.look.marker, _SHAPES["o"])}</svg>'
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _level(axes: Any, y: float, words: str, left: bool = False) -> None:
    axes.axhline(y, color=INK, linewidth=1.2, zorder=2)
    axes.annotate(
        words, (0 if left else 1, y), xycoords=("axes fraction", "data"), xytext=(2 if left else -2, 4),
        textcoords="offset points", ha="left" if left else "right", color=INK, fontsize=11.5, gid="halo-dense",
    )  # fmt: skip


def _chart(
    results: Mapping[str, Any],
    *,
    name: str,
    title: str,
    unit: str,
    value: Callable[[Row], float | None],
    error: Callable[[Row], float | None],
    reference: Callable[[Any, bool], None],
    sideways: float = 0.0,
) -> str:
    """One chart as an `<svg>` element, or the empty string where no row has a value.

    Methods meet at equal MACs; `sideways` moves each by so many points of MACs from the one before, so that no long
    error bar hides another. Rivals are drawn unfilled and above the TPS variants, so that nothing covers them.
    """
    rows = [row for row in results["rows"] if value(row) is not None]
    if not rows:
        return ""
    matplotlib, figure_class = _matplotlib()
    look = styles(results["rows"])
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure = figure_class(figsize=(6.0, 4.5), dpi=72)
        axes = figure.add_axes((0.115, 0.14, 0.855, 0.785))
        _frame(axes, results, rows, unit)
        ends = []
        drawn = [method for method in look if any(row["method"] == method for row in rows)]
        for index, method in enumerate(drawn):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["macs_share"])
            shift = sideways * (index - (len(drawn) - 1) / 2)
            x = [100 * row["macs_share"] + shift for row in own]
            y = [value(row) for row in own]
            _line(axes, x, y, [error(row) or 0 for row in own], look[method].look, PAPER if sideways else "none")
            ends.append((y[-1], x[-1], own[-1]["label"], look[method]))
        _room(axes, results, value)
        reference(axes, _crowded(axes, ends, 0.25 + 0.018 * max(len(end[2]) for end in ends)))  # the names, and its own beside them
        _label_ends(axes, ends)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    colours = {matplotlib.colors.to_hex(style.look.light): f"m-{style.name}" for style in look.values()}
    return _inline(buffer.getvalue(), name, title, colours)


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = 'the charts of the report need matplotlib: pip install "squeezevit[cli]"'
        raise MissingExtraError(message) from error
    return matplotlib, Figure


def _frame(axes: Any, results: Mapping[str, Any], rows: Sequence[Row], unit: str) -> None:
    """Quiet axes: horizontal grid lines, ticks at the budgets, the unit above the axis instead of a turned label."""
    shares = [100 * row["macs_share"] for row in rows]
    low, high = min(shares), max([*shares, 100.0])
    axes.set_xlim(low - 0.08 * (high - low) - 2, high + 2)
    ticks = [100.0]
    for tick in sorted({100 * (row["target"] or row["macs_share"]) for row in rows}, reverse=True):
        if all(abs(tick - other) > 8 for other in ticks):
            ticks.append(tick)
    dense = results["dense"]["macs"] / 1e9
    axes.set_xticks(ticks, [f"{tick:.0f} %\n{dense * tick / 100:.2f} G" for tick in ticks])
    _quiet(axes, unit)
    axes.annotate(
        "MACs", (0, 0), xycoords="axes fraction", xytext=(-8, -18), textcoords="offset points",
        ha="right", va="center", color=MUTED, fontsize=11,
    )  # fmt: skip


def _quiet(axes: Any, unit: str) -> None:
    """Horizontal grid lines alone, and the unit above the axis."""
    axes.set_title(unit, loc="left", x=-0.13, fontsize=12, color=MUTED, pad=9)
    axes.tick_params(length=0, labelsize=11.5, labelcolor=MUTED, pad=6)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _room(axes: Any, results: Mapping[str, Any], value: Callable[[Row], float | None]) -> None:
    """Limits that hold every point, its bar and the dense value; references drawn later do not move them."""
    low, high = axes.get_ylim()
    dense = value(results["dense"])
    if dense is not None:
        low, high = min(low, dense), max(high, dense)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _line(axes: Any, x: list[float], y: list[Any], error: list[float], look: Look, hollow: str) -> None:
    strong = look.strong
    if any(error):
        axes.errorbar(
            x, y, yerr=error, fmt="none", ecolor=look.light, elinewidth=1.6 if strong else 1.0, capsize=2.5,
            zorder=3,
        )  # fmt: skip
    (line,) = axes.plot(
        x, y, color=look.light, linewidth=2.4 if strong else 1.3, marker=look.marker,
        markersize=7.5 if strong else 6.5, markerfacecolor=look.light if strong else hollow,
        markeredgecolor=PAPER if strong else look.light, markeredgewidth=0.8 if strong else 1.3,
        zorder=4 if strong else 5,
    )  # fmt: skip
    if look.dashes:
        line.set_dashes(look.dashes)


def _crowded(axes: Any, ends: list[tuple[Any, float, str, Style]], wanted: float) -> bool:
    """Less than this share of the chart's width is left to the right of the last point."""
    left, far = axes.get_xlim()
    return max(end[1] for end in ends) + wanted * (far - left) > far


def _label_ends(axes: Any, ends: list[tuple[Any, float, str, Style]], apart: float = 0.062) -> None:
    """Each line's name to the right of its last point, moved up or down until no two names overlap.

    apart: the least distance of two names, as a share of the chart's height.
    """
    low, high = axes.get_ylim()
    step = (high - low) * apart
    order = sorted(ends, key=lambda end: end[0])
    places = [float(end[0]) for end in order]
    for _ in range(200):
        for i in range(len(places) - 1):
            lack = step - (places[i + 1] - places[i])
            if lack > 1e-9:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
        places = [min(max(place, low + step / 2), high - step / 2) for place in places]
    right = max(end[1] for end in ends)
    left, far = axes.get_xlim()
    names = min(0.06 + 0.017 * max(len(end[2]) for end in ends), 0.5)  # what they take of the chart's width
    if _crowded(axes, ends, names):
        far = right + names / (1 - names) * (right - left)
        axes.set_xlim(left, far)
    column = right + 0.055 * (far - left)
    for place, (y, x, label, style) in zip(places, order, strict=True):
        axes.plot([x + 0.012 * (far - left), column - 0.008 * (far - left)], [y, place], color=style.look.light, linewidth=0.7)
        axes.annotate(
            label, (column, place), va="center_baseline", color=style.look.light, fontsize=11.5,
            fontweight="bold" if style.look.strong else "normal", annotation_clip=False, zorder=7,
            gid=f"halo-{style.name}",
        )  # fmt: skip


def _inline(svg: str, name: str, title: str, colours: Mapping[str, str]) -> str:
    """matplotlib's file as an element of a page: no prolog or namespaces, ids of its own, colours from the theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg.split(">", 1)[0]) + ">" + svg.split(">", 1)[1]
    svg = svg.replace('id="halo-', 'class="halo" id="halo-')
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"(font(?:-family)?: [^;\"]*?)'?DejaVu Sans'?[^;\"]*", r"\1var(--sans, sans-serif)", svg)
    variables = {colour: key for key, colour in THEME.items()} | dict(colours)
    for colour, variable in variables.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    head = f'<svg role="img" aria-labelledby="{name}-title"'
    return svg.replace("<svg", head, 1).replace(">", f'><title id="{name}-title">{escape(title)}</title>', 1)

"""Dot plots as HTML: text keeps its size on a phone, colours are the page's, and the numbers stand in the table below."""

import math
import re
from collections.abc import Sequence
from html import escape

Point = tuple[str, str, float]  # label, series, value


def dots(points: Sequence[Point], unit: str, line: float | None = None) -> str:
    """A row for each label, a dot for each point, a colour and a shape for each series; `line`: a value to compare with."""
    if not points:
        return ""
    labels = list(dict.fromkeys(label for label, _, _ in points))
    series = list(dict.fromkeys(name for _, name, _ in points))
    values = [value for _, _, value in points] + ([] if line is None else [line])
    ticks = nice(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    grid = "".join(f'<i style="left:{at(tick)}"></i>' for tick in ticks)
    mark = "" if line is None else f'<i class="line" style="left:{at(line)}"></i>'
    rows = []
    for label in labels:
        own = [(name, value) for other, name, value in points if other == label]
        drawn = "".join(
            f'<b class="dot-{series.index(name) % 6}" style="left:{at(value)}" title="{escape(f"{name} {value:.4g}".strip())}"></b>'
            for name, value in own
        )
        rows.append(f'<span class="label">{escape(label)}</span><span class="track">{grid}{mark}{drawn}</span>')
    axis = "".join(f'<em style="left:{at(tick)}">{tick:g}</em>' for tick in ticks)
    keys = "".join(f'<li><b class="dot-{i % 6}"></b>{escape(name)}</li>' for i, name in enumerate(series) if name)
    legend = f"<ul>{keys}</ul>" if keys else ""
    said = escape(f"{unit}: {len(labels)} rows from {min(values):.3g} to {max(values):.3g}; the table below has the numbers")
    return (
        f'<figure class="dots"><figcaption>{escape(unit)}{legend}</figcaption><div class="plot" role="img" aria-label="{said}">'
        f'{"".join(rows)}<span class="label"></span><span class="axis">{axis}</span></div></figure>'
    )


def nice(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from below the lowest to above the highest.

    >>> nice(0.98, 1.62)
    [0.8, 1.0, 1.2, 1.4, 1.6, 1.8]
    """
    rough = (high - low or abs(high) or 1) / wanted
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.9999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


_PRESETS = (  # by their settings; the first is what "training-free" was until 2026-11-30
    ("quarters", "mass", "training-free (by mass)"),
    ("quarters", "length", "training-free"),
    (r"quarters\+last", "length", "training-free + cls"),
)


def short(reducer: str) -> str:
    """Of a reducer's repr, what is not a default.

    >>> short("ETPS(keep=0.7, at=None, score='auto', mass=False)"), short("Identity()")
    ('ETPS(keep=0.7)', 'Identity()')
    """
    texts = "score='auto'|train='masked'|match='tokens'|fuse='cosine'"
    defaults = f"{texts}|at=None|mass=False|detach=False|normalize=False|bias=True|seed=0"
    common = rf"(?:, )?(?:{defaults})(?=[,)])"
    cleaned = re.sub(common, "", reducer)
    for at, fuse, name in _PRESETS:
        cleaned = re.sub(rf"^Squeeze\(keep=(\(.*?\)), at='{at}', score='mrmr', fuse='{fuse}'\)$", rf"{name} \1", cleaned)
    return re.sub(r"\d\.\d{4,}", lambda found: f"{float(found[0]):.2g}", cleaned)

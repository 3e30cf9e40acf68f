"""The demo's report: one HTML file that loads nothing, runs no script, and draws its conclusions from the numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from squeezevit.report.charts import accuracy_chart, cosine_chart, css_variables, marker_svg, speed_chart, styles
from squeezevit.report.findings import (
    NONE,
    PRESET,
    TIMES,
    budget_words,
    by_budget,
    closest,
    coarse,
    few_left,
    findings,
    headline,
    listed,
    most_accurate,
    plus_minus,
    signed,
)
from squeezevit.report.overlay import Panel
from squeezevit.report.rows import Row, current

Picture = Image.Image | Sequence[Panel]

TITLE = "What fewer tokens save, and what they cost"
PICTURE_BYTES = 2_600_000  # for all pictures together, before base64 adds a third


def write_report(results: Mapping[str, Any], figures: Mapping[str, Picture], path: Path) -> None:
    """Write `results` (the demo's `results.json`) and its token overlays to `path` as one self-contained page.

    `figures`: caption -> a picture, or the `Panel`s of `overlay.panels`, which the page lays out to fit its width.
    A row whose timing or cosine is None is shown without it. Raises `MissingExtraError` without matplotlib.
    """
    path = Path(path)
    results = {**results, "dense": current(results["dense"]), "rows": [current(row) for row in results["rows"]]}
    body = [
        _header(results),
        section("What came out", _findings(results), wide=True),
        section("Operating points", _table(results), wide=True),
        section("Accuracy, fidelity and speed", _charts(results), wide=True),
        section("What happens to the tokens", _overlays(figures), wide=True) if figures else "",
        section("How it was measured", _protocol(results)),
        section("Licence of the photographs", _licence()),
    ]
    title = f"{TITLE}: {results['model']['name']}"
    path.write_text(document(title, "".join(body)), encoding="utf-8")


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A page that loads nothing, in the colours and letters of all pages; what is given is HTML, CSS and JavaScript."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_css()}{style}</style>
</head>
<body>
<main>
{body}</main>{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def picture_uri(image: Image.Image, most_bytes: int) -> tuple[str, tuple[int, int]]:
    """The picture as a JPEG data URI of at most `most_bytes` bytes before encoding, and the size it came down to."""
    image = image.convert("RGB")
    while True:
        for quality in (88, 80, 70):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, subsampling=0)
            if buffer.tell() <= most_bytes or max(image.size) <= 64:
                return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)


def _header(results: Mapping[str, Any]) -> str:
    settings, model = results["settings"], results["model"]
    rows = results["rows"]
    budgets = listed(f"{100 * target:.0f} %" for target in by_budget(rows))
    methods = listed(dict.fromkeys(row["label"] for row in rows))
    size = settings["image_size"]
    text = (
        f"The vision transformer {model['name']} ({model['parameters'] / 1e6:.1f} million parameters, pretrained, not "
        f"trained further) read electroluminescence photographs of solar cells at {size} {TIMES} {size} pixels. A "
        "linear probe (logistic regression on standardised class-token features) was fitted to tell defective cells "
        "(defect probability over 0.5) from sound ones, on the unreduced model's features of "
        f"{settings['n_train']:,} photographs. That same probe then scored {settings['n_test']:,} others (split by "
        f"seed {settings['seed']}), whose features came from the model with fewer and fewer tokens: {methods}, each at "
        f"about {budgets} of the unreduced model's MACs. The unreduced model is called dense."
    )
    quick = (
        '<p class="note"><strong>A quick run.</strong> Few photographs and few timing rounds: it shows that everything '
        "works. Methods are compared by how near their features stay to the unreduced model's, which few photographs can tell; "
        "for accuracies, run the demo without <code>--quick</code>.</p>"
        if settings.get("quick")
        else ""
    )
    return (
        f'<header><p class="over">SqueezeViT demo · {escape(_date(results["created"]))}</p>'
        f'<h1>{TITLE}</h1><p class="lead">{words(headline(results))}</p>{quick}<p>{words(text)}</p>{_preset(rows)}</header>\n'
    )


def _preset(rows: Sequence[Row]) -> str:
    """What the preset is, where it was run."""
    row = next((row for row in rows if row["method"] == PRESET), None)
    if row is None:
        return ""
    text = (
        f"{row['label']} is this library's preset for models that are not trained further, in {len(row['tokens']) - 1} stages. "
        "A token's score is low where it is like a token that gets more attention, so that what is pruned has a twin; each pruned "
        "token is fused into the kept token most like it, by the number of patches that both stand for, at their mean length. How "
        "many are kept at each stage follows from the budget. All of this was chosen by measuring, on other photographs than these."
    )
    return f"<p>{words(text)}</p>"


def section(heading: str, inner: str, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{escape(heading)}</h2>\n{inner}</section>\n"


def _findings(results: Mapping[str, Any]) -> str:
    dense = results["dense"]
    speed = "" if dense["images_per_second"] is None else f", {dense['images_per_second']:.1f} images/s"
    start = (
        f"The dense model: {plus_minus(dense['accuracy'], dense['accuracy_se'], 100)} % accuracy, "
        f"{dense['macs'] / 1e9:.2f} GMACs an image{speed}."
    )
    entries = "".join(
        f"<div><h3>{words(head)}</h3><ul>{''.join(f'<li>{words(sentence)}</li>' for sentence in sentences)}</ul></div>"
        for head, sentences in findings(results)
    )
    rule = (
        "± is one standard error. Values are called tied where they differ by at most one standard error of the "
        "difference, which is a low bar: two methods that are equally good would be further apart than that about one "
        "time in three. Between two methods that error is the root sum of squares of their paired errors against dense."
    )
    why = few_left(results)
    explained = f"<p>{words(why)}</p>" if why else ""
    return f'<p>{words(start)}</p><div class="findings">{entries}</div>{explained}<p class="fine">{words(rule)}</p>'


def _table(results: Mapping[str, Any]) -> str:
    look = styles(results["rows"])
    heads = [
        ("Method", ""),
        ("GMACs", ""),
        ("% of dense", ""),
        ("Images/s", ""),
        ("Speed-up", ""),
        *(_judged(rough := coarse(results), [("Accuracy, %", ""), ("Against dense, points", "")], [("Cosine to dense", "")])),
        ("Patch tokens after each stage", "left"),
    ]
    head = "".join(f'<th scope="col"{f" class={side}" if side else ""}>{escape(text)}</th>' for text, side in heads)
    parts = [f"<thead><tr>{head}</tr></thead>"]
    parts.append(f"<tbody>{_line(results['dense'], '', False, False, rough)}</tbody>")
    missed = False
    for target, rows in by_budget(results["rows"]).items():
        leading = closest(rows) if rough else most_accurate(rows)
        lines = []
        for row in rows:
            off = abs(row["macs_share"] - target) > 0.01
            missed |= off
            leads = any(row is other for other in leading)
            lines.append(_line(row, marker_svg(look[row["method"]]), leads, off, rough))
        group = f'<th scope="rowgroup" colspan="{len(heads)}"><span>{budget_words(target)}</span></th>'
        parts.append(f'<tbody><tr class="group">{group}</tr>{"".join(lines)}</tbody>')
    notes = (
        f"Bold: the highest {'cosine' if rough else 'accuracy'} at that budget, and all that tie with it. "
        "Images/s: median over the timing rounds. "
        "Speed-up: median of each round's ratio to the dense model in the same round; below it, the best. "
        "Against dense: paired difference over the same photographs."
    )
    if missed:
        notes += " †: misses its budget by more than one point of the dense MACs."
    table = f"<table>{''.join(parts)}</table>"
    return f'{scrolled(table, "Operating points")}<p class="fine">{escape(notes)}</p>'


def _judged(rough: bool, accuracy: list[Any], fidelity: list[Any]) -> list[Any]:
    """What tells methods apart, first."""
    return [*fidelity, *accuracy] if rough else [*accuracy, *fidelity]


def _line(row: Row, mark: str, leads: bool, off: bool, rough: bool) -> str:
    best = row.get("speedup_best")
    difference = signed(row["paired_difference"], row["paired_difference_se"]) if row["target"] != 1.0 else NONE
    accuracy = plus_minus(row["accuracy"], row["accuracy_se"], 100)
    cosine = NONE if row["cosine"] is None or row["target"] == 1.0 else plus_minus(row["cosine"], row["cosine_se"], 1, 3)
    cells = [
        _cell(f"{row['macs'] / 1e9:.2f}"),
        _cell(f"{100 * row['macs_share']:.1f}{'†' if off else ''}"),
        _cell(NONE if row["images_per_second"] is None else f"{row['images_per_second']:.1f}"),
        _cell(
            NONE if row["speedup"] is None else f"{row['speedup']:.2f}{TIMES}",
            "" if best is None or row["target"] == 1.0 else f"best {best:.2f}{TIMES}",
        ),
        *_judged(rough, [_bold(accuracy, leads and not rough), _cell(difference)], [_bold(cosine, leads and rough)]),
        f'<td class="left tokens">{escape(" ".join(str(count) for count in row["tokens"]) or NONE)}</td>',
    ]
    name = f'<th scope="row">{mark}{escape(row["label"])}<code>{escape(row["reducer"])}</code></th>'
    return f"<tr>{name}{''.join(cells)}</tr>"


def _cell(text: str, small: str = "") -> str:
    return f"<td>{escape(text)}{f'<small>{escape(small)}</small>' if small else ''}</td>"


def _bold(text: str, leads: bool) -> str:
    return f"<td>{f'<strong>{escape(text)}</strong>' if leads else escape(text)}</td>"


def _charts(results: Mapping[str, Any]) -> str:
    captions = [
        (
            accuracy_chart,
            "Accuracy of the dense model's probe on the reduced features, with one standard error; grey: the dense "
            "model's. Methods of one budget are drawn side by side to keep their bars apart; the table has their MACs.",
        ),
        (cosine_chart, "Mean cosine similarity between the reduced and the dense model's class-token features."),
        (
            speed_chart,
            "Median speed-up over the dense model on this machine. Dotted: where a model would be whose time followed its MACs.",
        ),
    ]
    if coarse(results):
        captions[:2] = captions[1::-1]
    out = []
    for draw, caption in captions:
        svg = draw(results) or '<p class="missing">This run holds no values for this chart.</p>'
        out.append(f'<figure class="chart">{svg}<figcaption>{escape(caption)}</figcaption></figure>')
    return f'<div class="charts">{"".join(out)}</div>'


def _overlays(figures: Mapping[str, Picture]) -> str:
    count = sum(1 if isinstance(picture, Image.Image) else len(picture) for picture in figures.values())
    share = PICTURE_BYTES // max(1, count)
    intro = (
        "A region is the patches that are one token, in their mean colour; regions apart may be one token. Dark, hatched patches "
        "were dropped: no token stands for them. Side by side, methods are seen after their last stage, at the same budget; the "
        "cosine is that of this photograph's features with the unreduced model's."
    )
    out = [f"<p>{escape(intro)}</p>"]
    for name, picture in figures.items():
        if isinstance(picture, Image.Image):
            inner = scrolled(_img(picture, name, share), name, "scroll sheet")
        else:
            cards = (
                f"<figure>{_img(panel.image, f'{name}, {panel.caption}', share)}"
                f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
                for panel in picture
            )
            inner = f'<div class="panels">{"".join(cards)}</div>'
        out.append(f'<figure class="overlay"><figcaption>{escape(name)}</figcaption>{inner}</figure>')
    return "".join(out)


def scrolled(inner: str, name: str, classes: str = "scroll") -> str:
    return f'<div class="{classes}" role="region" aria-label="{escape(name)}" tabindex="0">{inner}</div>'


def _img(image: Image.Image, alt: str, most_bytes: int) -> str:
    uri, (width, height) = picture_uri(image, most_bytes)
    return f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}">'


def _protocol(results: Mapping[str, Any]) -> str:
    machine, settings, model = results["machine"], results["settings"], results["model"]
    timing = (
        f"Speed: batches of {settings['batch_size']} in inference mode, after a warm-up; the dense model and every "
        f"method took turns, round by round, for {settings['rounds']} rounds, so that a slow moment of the machine "
        "falls on all. MACs are multiply-adds for one image, the reducer's own included; papers print them as GFLOPs."
    )
    named = {"image_size", "n_train", "n_test", "seed", "batch_size", "rounds", "quick"}
    rest = {key: value for key, value in settings.items() if key not in named}
    cores, threads = _count(machine["cores"], "core"), _count(machine["threads"], "thread")
    train, test = f"{settings['n_train']:,}", f"{settings['n_test']:,}"
    facts = {
        "Command": results["command"],
        "Date": _date(results["created"]),
        "Run time": f"{results['seconds']:.0f} s in all",
        "Machine": f"{machine['cpu']}, {cores}; {machine['device']}, {threads}",
        "Versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "Model": f"{model['name']}, {model['parameters']:,} parameters",
        "Weights": f"{model['weights']}, SHA-256 {model['sha256']}",
        "Split": f"{train} photographs to fit the probe, {test} to test, seed {settings['seed']}",
        **{key.replace("_", " ").capitalize(): str(value) for key, value in rest.items()},
    }
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{f'<code>{escape(value)}</code>' if key == 'Command' else escape(value)}</dd>"
        for key, value in facts.items()
    )
    return f'<p>{escape(timing)}</p><dl class="facts">{items}</dl>'


def _licence() -> str:
    text = (
        "The photographs are of the ELPV dataset (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021), licensed "
        "CC BY-NC-SA 4.0: credit, no commercial use, same licence for what is made from them. This page was made on "
        "your machine and contains some of them, changed by the overlays; if you pass it on, those terms go with it."
    )
    return f"<p>{escape(text)}</p>"


def words(text: str) -> str:
    """Escaped, with numbers kept on one line with their sign, unit and error."""
    for loose in (" %", " ± ", " + ", f" {TIMES} "):
        text = text.replace(loose, loose.replace(" ", "\N{NO-BREAK SPACE}"))
    return escape(text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _date(created: str) -> str:
    return created.replace("T", " ")[:16]


def _css() -> str:
    light = "--paper: #fefefe; --ink: #1c2127; --muted: #5c6570; --grid: #dfe3e8; " + css_variables(dark=False)
    dark = "--paper: #14171b; --ink: #e8ebef; --muted: #a3acb7; --grid: #30363e; " + css_variables(dark=True)
    rules = resources.files("squeezevit.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ {light} }} }}\n{rules}"
    )

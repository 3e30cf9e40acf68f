"""A page of photographs beside those that are nearest to them."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from squeezevit.report.html import document, picture_uri

SIDE, BYTES = 280, 30_000  # of a picture on the page: pixels of the longer side, bytes at most
Look = Callable[[str], Image.Image | str]  # a name -> the photograph, or why it cannot be shown
_STYLE = (
    ".near { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 10.5rem), 1fr)); gap: 1.4rem 1rem; }\n"
    ".near img { display: block; width: 100%; height: 10.5rem; object-fit: contain; object-position: left bottom; }\n"
    ".near .missing { display: block; height: 10.5rem; }\n.near figcaption { overflow-wrap: anywhere; margin-top: 0.35rem; }\n"
    ".near strong { color: var(--ink); font-variant-numeric: tabular-nums; }\n.asked { max-width: 17rem; }"
)


def write_neighbours(
    title: str, about: str, answers: Sequence[tuple[str, Sequence[tuple[str, float]]]], show: Look, look: Look, path: Path
) -> None:
    """Write one self-contained page: for each photograph asked about, its neighbours (name, cosine) with their pictures.

    show: gets the picture of what is asked about, look: that of a neighbour.
    """
    body = [f'<header><p class="over">SqueezeViT search</p><h1>{escape(title)}</h1><p>{escape(about)}</p></header>']
    for asked, hits in answers:
        cards = "".join(_card(name, look, f"<strong>{similarity:.3f}</strong> ") for name, similarity in hits)
        body.append(
            f'<section class=wide><h2>Nearest to this photograph</h2><div class="asked">{_card(asked, show, "")}</div>'
            f'<div class="near">{cards}</div></section>'
        )
    path.write_text(document(title, "".join(body), _STYLE), encoding="utf-8")


def _card(name: str, look: Look, before: str) -> str:
    shown = look(name)
    if isinstance(shown, str):
        inner = f'<span class="missing">{escape(shown)}</span>'
    else:
        shown.thumbnail((SIDE, SIDE))
        uri, (width, height) = picture_uri(shown, BYTES)
        inner = f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(name, quote=True)}">'
    return f"<figure>{inner}<figcaption>{before}{escape(name)}</figcaption></figure>"

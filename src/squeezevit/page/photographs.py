"""The photographs that visitors may choose: their own files, or four of scikit-image's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from squeezevit.data.folder import read_image
from squeezevit.errors import MissingExtraError

LONGEST = 896  # pixels of the longer side
_SHIPPED = {  # of scikit-image: what is on it, and whom it is from
    "chelsea": ("A cat", "Stéfan van der Walt, CC0"),
    "coffee": ("A cup of coffee", "Rachel Michetti, CC0"),
    "astronaut": ("An astronaut", "NASA, public domain"),
    "rocket": ("A rocket", "SpaceX, CC0"),
}


def write_photographs(folder: Path, chosen: Sequence[Path] | None) -> tuple[list[dict[str, str]], list[Any]]:
    """Write JPEG files into a folder; what the manifest says of them, and the PIL images.

    Raises DataError for a file that cannot be read, and MissingExtraError where scikit-image is needed and missing.
    """
    folder.mkdir()
    given = _shipped() if chosen is None else [(file.stem, file.stem, "", read_image(file)) for file in chosen]
    told, pictures = [], []
    for number, (name, title, credit, picture) in enumerate(given, 1):
        picture.thumbnail((LONGEST, LONGEST))
        file = f"{number}-{''.join(c if c.isalnum() and c.isascii() else '-' for c in name)[:40]}.jpg"
        picture.save(folder / file, quality=90)
        told.append({"file": file, "title": title, "credit": credit})
        pictures.append(picture)
    return told, pictures


def _shipped() -> list[tuple[str, str, str, Any]]:
    from PIL import Image

    try:
        from skimage import data
    except ImportError as error:
        raise MissingExtraError(
            "the page's photographs are scikit-image's: run `pip install \"squeezevit[page]\"`, or give --photographs FOLDER"
        ) from error
    return [(name, *about, Image.fromarray(getattr(data, name)())) for name, about in _SHIPPED.items()]

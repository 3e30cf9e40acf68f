"""SHA-256 of a folder's files, beside them in SHA256SUMS, which `sha256sum --check` reads too."""

import hashlib
from pathlib import Path

from squeezevit.errors import CheckpointError

NAME = "SHA256SUMS"
REMEDY = "put the whole folder back from a copy of it, or begin a new run in another folder"


def write(folder: Path) -> None:
    """Sum up all files of a folder."""
    files = sorted(folder.iterdir())
    (folder / NAME).write_text("".join(f"{_digest(file)}  {file.name}\n" for file in files), encoding="utf-8")


def check(file: Path) -> None:
    """Raise CheckpointError where a file is not what the sums beside it say; one that they do not list passes."""
    expected = listed(file.parent).get(file.name)
    if expected is not None and expected != _digest(file):
        raise CheckpointError(
            f"{file} is not what was written: {NAME} beside it has another sum. A disk or a copy spoilt it, or it comes from "
            f"another checkpoint; {REMEDY}"
        )


def check_folder(folder: Path, exact: bool = True) -> bool:
    """`check` all files of a folder, none of them missing or, where `exact`, new; False where it was written without sums.

    Files that others leave there, as a file manager does, are new; where they are in nobody's way, do not be exact.
    """
    if not (folder / NAME).is_file():
        return False
    names, found = {*listed(folder)}, {file.name for file in folder.iterdir()} - {NAME}
    if missing := names - found:
        raise CheckpointError(
            f"{folder} does not hold what was written: {', '.join(sorted(missing))} of {NAME} is not there; {REMEDY}"
        )
    if exact and (new := found - names):
        raise CheckpointError(
            f"{folder} holds more than was written: {NAME} does not list {', '.join(sorted(new))}; take out what does not "
            f"belong there, or {REMEDY}"
        )
    for name in sorted(names):
        check(folder / name)
    return True


def of(file: Path) -> str:
    """The sum of a file: the one beside it, which `check` holds it to, or its own where none is listed."""
    return listed(file.parent).get(file.name) or _digest(file)


def listed(folder: Path) -> dict[str, str]:
    """The sum of each file by its name, as SHA256SUMS has them; empty where there is none."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CheckpointError(f"{folder / NAME} cannot be read ({error.strerror}); make it readable") from error
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); make it readable") from error

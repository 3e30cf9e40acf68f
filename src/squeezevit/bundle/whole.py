"""A folder that appears whole or not at all, and takes the place of an older one of its kind alone."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from squeezevit.errors import ConfigError


def write_whole(folder: Path, fill: Callable[[Path], None], mark: str, what: str) -> None:
    """A folder with what `fill` writes into an empty one.

    mark: the file by which an older one of its kind is known, which is replaced; what: the kind, for messages. Raises ConfigError
    where it cannot be written, or where anything else is in its place.
    """
    folder = folder.resolve()  # of a link, what it stands for is replaced
    require_free(folder, mark, what)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose a folder of your own") from error
    try:
        fill(new)
        new.chmod(0o755)  # mkdtemp's is the owner's alone
        _take_place(new, folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} could not be written ({error.strerror or error}); make room there, or choose another"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def require_free(folder: Path, mark: str, what: str) -> None:
    """Raises ConfigError where something else than an older folder of the kind is in its place, or its place cannot be taken."""
    if folder.is_dir() and (os.path.ismount(folder) or folder.resolve() == Path.cwd()):
        where = "a mounted file system" if os.path.ismount(folder) else "the folder that you are in"
        raise ConfigError(f"{folder} is {where}, in whose place no {what} can be put; name a folder in it, as {folder / 'new'}")
    if folder.exists() and not (folder / mark).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and is no {what}; choose another folder, or take that one away first")


def _take_place(new: Path, folder: Path) -> None:
    """Rename a whole folder to its name; one that was there stays until then, and comes back where that fails."""
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_name(f"{new.name}.old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:  # an interruption, too
        if not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)

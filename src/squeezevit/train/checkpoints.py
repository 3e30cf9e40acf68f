"""Checkpoints that are always whole: a folder is written beside the old one, brought to the disk, and only then takes its place.

One process at a time writes them, a sum of every file lies with them, and both are looked after here.
"""

import errno
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from squeezevit import sums
from squeezevit.data.folder import reader_died
from squeezevit.errors import CheckpointError, ConfigError, TrainingError

try:
    import fcntl
except ImportError:  # Windows: there folders are not locked
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
_READABLE = (1, FORMAT)  # 1: without sums and names of classes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a full disk
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
logger = logging.getLogger(__name__)


def hold(out: Path) -> IO[str] | None:
    """Take a run's folder for this process, until the returned file is closed or the process ends, however it does.

    Its reading processes, which outlive a kill by some seconds, do not hold it. None where the file system knows no locks.
    Raises ConfigError where another process has it.
    """
    file = (out / ".lock").open("a+", encoding="utf-8")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"out={out} is in use by {holder or 'another process'}; wait until it is done or end it, or choose another folder"
            ) from error
        logger.warning("%s cannot be locked (%s): see to it that only one run writes there", out, error.strerror)
        return None
    with suppress(OSError):  # a full disk: who holds it is only for the message
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace `folder` by what `fill` writes into an empty one. Whatever happens on the way, `find_folder` finds a whole one.

    Raises TrainingError where it cannot be written, as on a full disk or where another process writes it; the old folder is
    then as it was.
    """
    new, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _replace(folder, new, old, fill)
    except Exception as error:  # OSError, and what safetensors and torch.save make of one
        if isinstance(error, TrainingError) or reader_died(error):  # the latter noticed here by chance
            raise
        raise failure(folder, error, find_folder(folder)) from error


def _replace(folder: Path, new: Path, old: Path, fill: Callable[[Path], None]) -> None:
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        fill(new)
        sums.write(new)
        for path in (*new.iterdir(), new):
            _sync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    except Exception:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def find_folder(folder: Path) -> Path | None:
    """The folder, or the one it was replacing when its writer was killed; None where there is neither."""
    return next((path for path in (folder, _beside(folder, "old")) if path.is_dir()), None)


def tidy(folder: Path) -> None:
    """Take away what a killed writer left beside a whole folder."""
    if folder.is_dir():
        for path in (_beside(folder, "new"), _beside(folder, "old")):
            shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint whose files are all as they were written; raises CheckpointError where they are not."""
    summed = sums.check_folder(folder)
    state = load_state(folder / "state.pt")
    if state["format"] > 1 and not summed:
        raise CheckpointError(f"{folder} lacks {sums.NAME}, so that nobody can say whether its files are whole; {sums.REMEDY}")
    return state


def write_file(path: Path, text: str) -> None:
    """Replace a small text file as a whole."""
    new = _beside(path, "new")
    new.write_text(text, encoding="utf-8")
    _sync(new)
    new.replace(path)


def save_state(state: dict[str, Any], path: Path) -> None:
    torch.save({"format": FORMAT, **state}, path)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; pickled code is never run. Raises CheckpointError where it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in any way it likes
        raise CheckpointError(f"{path} cannot be read as training state ({type(error).__name__}); start a new run") from error
    if not isinstance(state, dict) or state.get("format") not in _READABLE:
        raise CheckpointError(f"{path} is no training state of this version of SqueezeViT; resume with the version that wrote it")
    return state


def failure(path: Path, error: BaseException, kept: Path | None) -> TrainingError:
    """What to tell of something that could not be written, with a remedy for what was in the way."""
    free = _free(path)
    code = next(filter(None, map(_code, _chain(error))), None)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if code in FULL or (code is None and free < 2**20):
        remedy = f"make room ({free // 10**6} MB are free)"
    elif code in _FORBIDDEN:
        remedy = "make the folder writable"
    else:
        remedy = "see to it that the folder stays where it is and can be written (rights, quota, connection)"
    last = f"the last good one, {kept}, is untouched" if kept else "there is none before it"
    return TrainingError(f"{path} could not be written ({reason}); {last}: {remedy}, then --resume")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> int | None:
    """The system's number of an error, which the writer of safetensors gives as text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)|code: (\d+)", str(error))
    return int(found[1] or found[2]) if found else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else writes a checkpoint beside `folder` meanwhile. Raises TrainingError where somebody does."""
    descriptor = os.open(folder.parent, os.O_RDONLY) if fcntl is not None else None
    try:
        if descriptor is not None:
            _lock(descriptor, folder)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(
            f"{folder} is being written by another process; let one run have the folder, and give the other one of its own"
        ) from error
    except OSError:  # a file system without locks on folders, as NFS; `hold` has said so or has it
        return


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _free(path: Path) -> int:
    """Bytes left on the disk."""
    return shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders and files opened for reading cannot be synced there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

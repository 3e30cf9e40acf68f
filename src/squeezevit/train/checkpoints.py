"""Checkpoints that are always whole: a folder is written beside the old one, brought to the disk, and only then takes its place."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from squeezevit.errors import CheckpointError, TrainingError

FORMAT = 1


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace `folder` by what `fill` writes into an empty one. Whatever happens on the way, `find_folder` finds a whole one.

    Raises TrainingError where it cannot be written, as on a full disk; the old folder is then as it was.
    """
    new, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        fill(new)
        for path in (*new.iterdir(), new):
            _sync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    except Exception as error:  # OSError, and what safetensors and torch.save make of one
        shutil.rmtree(new, ignore_errors=True)
        kept, reason = find_folder(folder), (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"the checkpoint {folder} could not be written ({reason}; {_free_megabytes(folder)} MB are free); "
            f"{f'the last good one, {kept}, is untouched' if kept else 'there is none before it'}: make room, then --resume"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def find_folder(folder: Path) -> Path | None:
    """The folder, or the one it was replacing when its writer was killed; None where there is neither."""
    return next((path for path in (folder, _beside(folder, "old")) if path.is_dir()), None)


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
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training state of this version of SqueezeViT; resume with the version that wrote it")
    return state


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _free_megabytes(folder: Path) -> int:
    return shutil.disk_usage(next(p for p in folder.absolute().parents if p.exists())).free // 10**6


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders and files opened for reading cannot be synced there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Reading and writing weights: timm's files, our own, and the authors' TPS and DynamicViT key names."""

import pickle
import re
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from squeezevit.attach import reduce_
from squeezevit.errors import CheckpointError, MissingExtraError
from squeezevit.families import convert, load_families
from squeezevit.reducer import Reducer

Model = TypeVar("Model", bound=nn.Module)
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where training scripts put the weights
_RENAMED = (
    (re.compile(r"^(module\.|_orig_mod\.)+"), ""),  # DistributedDataParallel, torch.compile
    (re.compile(r"^score_predictor\.(\d+)\."), r"token_reducer.\1."),  # TPS, DynamicViT
    (re.compile(r"^(blocks\.\d+)\.gamma_([12])$"), r"\1.ls\2.gamma"),  # their layer-scale blocks
)
_SHOWN = 8  # keys of each kind an error lists


def load_checkpoint_(model: Model, source: str | PathLike[str] | Mapping[str, Any], name: str = "the given state dict") -> Model:
    """Load weights in place, from a file or a state dict, and return the model.

    Takes timm's files, files of `save_checkpoint` (safetensors), training checkpoints that nest their weights (EMA weights are
    preferred), and the authors' key names `score_predictor.{j}.*` for the learned heads; a position embedding for another grid
    is resampled by the host library. Pickled code is never run (`weights_only=True`). Raises CheckpointError where the file
    cannot be read, or, listing them, where keys are missing, unexpected or mis-shaped; the model is then as before.
    name: what errors call a state dict; a file they call by its path.

    >>> m = torch.nn.Linear(2, 1); load_checkpoint_(m, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}).weight.tolist()
    [[1.0, 1.0]]
    """
    name = name if isinstance(source, Mapping) else fspath(source)
    entries = _named(source, name) if isinstance(source, Mapping) else read_checkpoint(source)
    load_families()
    try:
        entries = convert(model, entries)
    except CheckpointError as error:
        _require_fit(model, entries, name)  # says which keys do not fit, where that is why
        raise CheckpointError(f"{name}: {error}") from error
    _require_fit(model, entries, name)
    model.load_state_dict(entries)
    return model


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The weights of a file under our key names, on the CPU. Raises CheckpointError where it cannot be read or holds none."""
    return _named(_read(Path(path)), fspath(path))


def has_heads(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights of `read_checkpoint` bring learned score heads."""
    return any(key.startswith("token_reducer.") for key in weights)


def reduce_with_weights_(model: Model, reducer: Reducer, weights: Mapping[str, Tensor] | None, name: str) -> Model:
    """`reduce_`, and `load_checkpoint_` on the side of it on which the keys fit: behind it where the weights bring heads."""
    with_heads = weights is not None and has_heads(weights)
    if weights is not None and not with_heads:
        load_checkpoint_(model, weights, name)
    reduce_(model, reducer)
    if weights is not None and with_heads:
        load_checkpoint_(model, weights, name)
    return model


def save_checkpoint(model: nn.Module, path: str | PathLike[str], weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's weights, learned heads included, as safetensors, with its reducer's text in the metadata.

    weights: what to write in place of its own state dict, as where those are shared out over several processes.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise _no_safetensors(fspath(path)) from error
    state = vars(model).get("squeezevit_state")
    metadata = {"format": "pt", "squeezevit.reducer": "" if state is None else repr(state.reducer)}
    weights = model.state_dict() if weights is None else weights
    save_file({k: v.detach().contiguous().clone() for k, v in weights.items()}, path, metadata)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give the path of a .safetensors, .pth, .pt or .bin checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not loaded: it is no torch file, or holds pickled Python objects, which could run any code. If you trust "
            "where it comes from, load it yourself and pass its state dict: load_checkpoint_(model, state_dict)"
        ) from error
    except Exception as error:  # a file that is no checkpoint makes the unpickler fail in any way it likes
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint ({_first_line(error)}); it may be cut short") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict; save model.state_dict() instead")
    return content


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise _no_safetensors(str(path)) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({_first_line(error)}); it may be cut short") from error


def _no_safetensors(path: str) -> MissingExtraError:
    return MissingExtraError(f'{path} needs the package safetensors: pip install "squeezevit[timm]"')


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _weights(content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not weights:
        found = ", ".join(map(repr, list(content)[:_SHOWN])) or "nothing"
        raise CheckpointError(f"{name} holds no weights (found {found}); expected tensors by name, or under one of {_NESTED}")
    return weights


def _named(content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    return {_rename(key): value for key, value in _weights(content, name).items()}


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return key


def _require_fit(model: nn.Module, entries: Mapping[str, Tensor], name: str) -> None:
    own = model.state_dict()
    shapes = [
        f"{k} {list(v.shape)} here, {list(own[k].shape)} in the model"
        for k, v in entries.items()
        if k in own and v.shape != own[k].shape
    ]
    problems = {
        "missing": [k for k in own if k not in entries],
        "unexpected": [k for k in entries if k not in own],
        "mis-shaped": shapes,
    }
    if not any(problems.values()):
        return
    listed = "; ".join(f"{len(keys)} {kind}: {_shorten(keys)}" for kind, keys in problems.items() if keys)
    raise CheckpointError(f"{name} does not fit this {type(model).__name__}: {listed}. {_remedy(problems)}")


def _shorten(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _remedy(problems: Mapping[str, list[str]]) -> str:
    if any(k.startswith("token_reducer.") for k in problems["unexpected"]):
        return "It has learned heads: call sv.reduce_ with DTPS or DynamicViT and as many stages before loading"
    if problems["missing"] and all(k.startswith("token_reducer.") for k in problems["missing"]):
        return "It has no learned heads: load it first, then call sv.reduce_"
    return "Build the model that the checkpoint was saved from (same name, number of classes and image size)"

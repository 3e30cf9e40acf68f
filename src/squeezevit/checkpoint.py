"""Reading and writing weights: timm's files, our own, the authors' TPS and DynamicViT key names, and Hugging Face folders."""

import json
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from squeezevit import sums
from squeezevit.core.attach import reduce_, reduce_as_needed_
from squeezevit.core.cut import convert, load_families, require_model
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import unwrapped
from squeezevit.errors import CheckpointError, ConfigError, MissingExtraError
from squeezevit.reducers.catalog import from_dict

Model = TypeVar("Model", bound=nn.Module)
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where training scripts put the weights
_RENAMED = (
    (re.compile(r"^(module\.|_orig_mod\.)+"), ""),  # DistributedDataParallel, torch.compile
    (re.compile(r"^score_predictor\.(\d+)\."), r"token_reducer.\1."),  # TPS, DynamicViT
)
_LAYER_SCALE = re.compile(r"^(blocks\.\d+)\.gamma_([12])$")  # as TPS's authors name it, and some of timm's own models
_KIND = "of another kind of number"
_SHOWN = 8  # keys of each kind an error lists
_HEADS = "token_reducer."  # where a reduced model has its learned heads
_INDEX = "model.safetensors.index.json"  # of a Hugging Face model in several files
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")  # a Hugging Face file is to be found


def load_checkpoint_(model: Model, source: str | PathLike[str] | Mapping[str, Any], name: str = "the given state dict") -> Model:
    """Load weights in place, from a file or a state dict, and return the model.

    Takes timm's files, files of `save_checkpoint` (safetensors), training checkpoints that nest their weights (EMA weights are
    preferred), and the authors' key names `score_predictor.{j}.*` for the learned heads; a position embedding for another grid
    is resampled by the model's library. Pickled code is never run (`weights_only=True`). Raises CheckpointError where the file
    cannot be read, or, listing them, where entries are missing, unexpected, mis-shaped, or numbers of another kind than the model's
    (floats of another precision are taken). After an error the model is as before.
    name: what errors call a state dict; a file they call by its path.

    >>> m = torch.nn.Linear(2, 1); load_checkpoint_(m, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}).weight.tolist()
    [[1.0, 1.0]]
    """
    require_model(model)
    if not isinstance(source, str | PathLike | Mapping):
        raise CheckpointError(f"a {type(source).__name__} is no checkpoint; give the path of a file, or a state dict")
    name = name if isinstance(source, Mapping) else fspath(source)
    entries = _named(source, name) if isinstance(source, Mapping) else read_checkpoint(source)
    load_families()
    whole, model = model, cast(Model, unwrapped(model))
    if any(p.is_meta for p in model.parameters()):
        raise CheckpointError(
            f"this {type(model).__name__} is on the meta device, which holds no numbers; build it on a device first"
        )
    own = model.state_dict()
    entries = {key if key in own else _LAYER_SCALE.sub(r"\1.ls\2.gamma", key): value for key, value in entries.items()}
    try:
        entries = convert(model, entries)
    except Exception as error:
        _require_fit(model, entries, name)  # says which keys do not fit, where that is why
        raise CheckpointError(f"{name}: {error}") from error
    _require_fit(model, entries, name)
    _load_whole(model, entries, name)
    return whole


def _load_whole(model: nn.Module, entries: Mapping[str, Tensor], name: str) -> None:
    """Load all entries or none: some fail only when they are copied, as those of a dtype that torch cannot convert."""
    before = {key: value.detach().clone() for key, value in model.state_dict().items()}
    try:
        model.load_state_dict(entries)
    except Exception as error:
        model.load_state_dict(before)
        raise CheckpointError(
            f"{name} cannot be loaded into this {type(model).__name__}, which is as before: {_clip(str(error), 1000)}; save its "
            "weights as plain tensors of the model's dtypes"
        ) from error


def read_checkpoint(path: str | PathLike[str], checked: bool = False) -> dict[str, Tensor]:
    """The weights of a file under our key names, on the CPU.

    checked: its sum was held against SHA256SUMS just before. Raises CheckpointError where it cannot be read, holds no weights, or
    is not what SHA256SUMS beside it says, as training leaves one.
    """
    return _named(_read(Path(path), checked), fspath(path))


def has_heads(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights of `read_checkpoint` bring learned score heads."""
    return any(key.startswith(_HEADS) for key in weights)


def reduce_with_weights_(model: Model, reducer: Reducer, weights: Mapping[str, Tensor] | None, name: str) -> Model:
    """`reduce_`, and `load_checkpoint_` on the side of it on which the keys fit: after it where the weights bring heads."""
    with_heads = weights is not None and has_heads(weights)
    if weights is not None and not with_heads:
        load_checkpoint_(model, weights, name)
    reduce_as_needed_(model, reducer)
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
    _settle_header(Path(path))


def _settle_header(file: Path) -> None:
    """Put the metadata in order, which safetensors leaves to chance: the same weights are then the same bytes."""
    with file.open("r+b") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else it was written otherwise than here, and stays as it is
            content.seek(8)
            content.write(text.ljust(size))


def _read(path: Path, checked: bool) -> Mapping[str, Any]:
    if not _is_file(path):
        raise CheckpointError(f"{path} is not a file; give the path of a .safetensors, .pth, .pt or .bin checkpoint")
    if not checked:
        sums.check(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not loaded: it is no torch file, or holds pickled Python objects, which could run any code. If you trust "
            "where it comes from, load it yourself and pass its state dict: sv.load_checkpoint_(model, state_dict)"
        ) from error
    except Exception as error:  # a file that is no checkpoint makes the unpickler fail in any way it likes
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint ({_first_line(error)}); it may be cut short") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict; save model.state_dict() instead")
    return content


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for the system, a folder that may not be looked into
        return False


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise _no_safetensors(str(path)) from error
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and others for dtypes that torch has not
        raise CheckpointError(f"{path} cannot be read as safetensors ({_first_line(error)}); it may be cut short") from error


def _no_safetensors(path: str) -> MissingExtraError:
    return MissingExtraError(f'{path} needs the package safetensors: pip install "squeezevit[timm]"')


def _first_line(error: BaseException) -> str:
    return _clip((str(error).splitlines() or [type(error).__name__])[0], 500)


def _clip(text: str, most: int = 120) -> str:
    """Text from a file as an error may quote it: printable, and not longer than a screen has room for."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def _weights(content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not weights:
        found = ", ".join(_clip(repr(key)) for key in list(content)[:_SHOWN]) or "nothing"
        raise CheckpointError(f"{name} holds no weights (found {found}); expected tensors by name, or under one of {_NESTED}")
    return weights


def _named(content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    weights = _weights(content, name)
    named = {_rename(key): value for key, value in weights.items()}
    if len(named) < len(weights):
        twice = [key for key, times in Counter(map(_rename, weights)).items() if times > 1]
        raise CheckpointError(f"{name} has more than one entry for {_shorten(twice)}; leave one for each")
    odd = [f"{key} ({_oddity(value)})" for key, value in named.items() if _oddity(value)]
    if odd:
        raise CheckpointError(f"{name} has entries that are no plain numbers: {_shorten(odd)}; save dense tensors with values")
    return named


def _oddity(value: Tensor) -> str:
    """What keeps a tensor from being copied number by number; nothing for a plain one."""
    if nn.parameter.is_lazy(value) or value.is_meta:
        return "without values"
    if value.is_nested or value.is_quantized:
        return "nested" if value.is_nested else "quantised"
    return "" if value.layout is torch.strided else "sparse" if "sparse" in str(value.layout) else str(value.layout)


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return key


def _require_fit(model: nn.Module, entries: Mapping[str, Tensor], name: str) -> None:
    if problems := _misfits(model, entries):
        raise CheckpointError(f"{name} does not fit this {type(model).__name__}: {_listed(problems)}. {_remedy(problems)}")


def _misfits(model: nn.Module, entries: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps entries from being a model's, by kind; nothing where they are."""
    own = model.state_dict()
    shapes = [
        f"{k} {list(v.shape)} here, {list(own[k].shape)} in the model"
        for k, v in entries.items()
        if k in own and v.shape != own[k].shape
    ]
    kinds = [
        f"{k} {_dtype(v)} here, {_dtype(own[k])} in the model"
        for k, v in entries.items()
        if k in own and _numbers(v.dtype) != _numbers(own[k].dtype)
    ]
    problems = {
        "missing": [k for k in own if k not in entries],
        "unexpected": [k for k in entries if k not in own],
        "mis-shaped": shapes,
        _KIND: kinds,
    }
    return {kind: keys for kind, keys in problems.items() if keys}


def _listed(problems: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(keys)} {kind}: {_shorten(keys)}" for kind, keys in problems.items())


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _numbers(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    """Kinds of numbers that become one another only by losing something: floating, complex, boolean, and none of them."""
    return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool


def _shorten(keys: list[str]) -> str:
    return ", ".join(map(_clip, keys[:_SHOWN])) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _remedy(problems: Mapping[str, list[str]]) -> str:
    missing, unexpected = problems.get("missing", []), problems.get("unexpected", [])
    if any(k.startswith(_HEADS) for k in unexpected):
        return "It has learned heads: call sv.reduce_ with DTPS or DynamicViT and as many stages before loading"
    if missing and all(k.startswith(_HEADS) for k in missing):
        return "It has no learned heads: load it first, then call sv.reduce_"
    if set(problems) == {_KIND}:
        return "Save its weights as floating-point numbers; integers of a quantised file need their scales"
    return "Build the model that the checkpoint was saved from (same name, number of classes and image size)"


def from_pretrained(model_class: Any, name: str | Path, **kwargs: Any) -> Any:
    """What `model_class.from_pretrained(name, **kwargs)` gives, reduced as the model was that `save_pretrained` wrote.

    model_class: a model class of transformers, or one of its Auto classes; name: a folder or a hub's name; kwargs: the class's, so
    that `output_loading_info=True` gives the model and a dictionary. The reducer stands in config.json, learned score heads among
    the weights. Raises ConfigError where no reducer is stored or it is none of this version, and CheckpointError where the folder
    is malformed or the score heads are missing or of another shape.

    >>> model = from_pretrained(AutoModelForImageClassification, "my-reduced-vit")  # doctest: +SKIP
    """
    loaded = _load_unreduced(model_class, name, kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    values = getattr(model.config, "squeezevit", None)
    if values is None:
        raise ConfigError(
            f"config.json of {name} holds no reducer; load the model by {model_class.__name__}.from_pretrained and give it one by "
            "sv.reduce_"
        )
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"config.json of {name} says squeezevit = {_clip(repr(values))}, which is no reducer; save the reduced model again"
        )
    grid = bool(getattr(model.config, "squeezevit_grid", False))
    del model.config.squeezevit
    if grid:
        del model.config.squeezevit_grid
    reducer = from_dict(values)
    reduce_(model, reducer, grid=grid)
    if reducer.learned:
        _load_heads(model.token_reducer, name, {k: v for k, v in kwargs.items() if k in _WHERE})
    if isinstance(loaded, tuple):
        _without_heads_(loaded[1])
    return loaded


def _load_unreduced(model_class: Any, name: str | Path, kwargs: dict[str, Any]) -> Any:
    index = Path(name, kwargs.get("subfolder") or "", _INDEX)
    if index.is_file():
        _named_by_index(index, name)  # before transformers reads what it names
    try:
        return model_class.from_pretrained(name, **kwargs)
    except Exception as error:
        if isinstance(error, json.JSONDecodeError | KeyError) or type(error).__name__ == "SafetensorError":
            raise CheckpointError(f"{name} is malformed ({_first_line(error)}); save the reduced model again") from error
        raise


def _without_heads_(info: dict[str, Any]) -> None:
    """Take learned heads, which were loaded after the class was done, from what it calls unexpected."""
    unexpected = info.get("unexpected_keys")
    if unexpected:
        info["unexpected_keys"] = type(unexpected)(key for key in unexpected if not key.startswith(_HEADS))


def _load_heads(heads: nn.Module, name: str | Path, where: dict[str, Any]) -> None:
    found = {}
    for path in _files_of_heads(name, where):
        weights = _read_safetensors(Path(path))
        found.update({k.removeprefix(_HEADS): v for k, v in weights.items() if k.startswith(_HEADS)})
    if problems := _misfits(heads, found):
        raise CheckpointError(
            f"{name} lacks the score heads that its reducer needs: {_listed(problems)}; save the reduced model again"
        )
    _load_whole(heads, found, str(name))


def _files_of_heads(name: str | Path, where: dict[str, Any]) -> list[str]:
    """Paths of the files that may hold learned heads: the one file there is, else those that the index names."""
    try:
        from transformers.utils import cached_file
    except ImportError as error:
        raise MissingExtraError(f"{name} needs {error.name}: pip install transformers safetensors") from error
    index = cached_file(name, _INDEX, _raise_exceptions_for_missing_entries=False, **where)
    named = [] if index is None else _named_by_index(Path(index), name)
    whole = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False, **where)
    if whole is not None:  # transformers, too, then passes over the index
        return [whole]
    found = {file: cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where) for file in named}
    absent = [file for file, path in found.items() if path is None]
    if absent or not found:
        raise CheckpointError(
            f"{name} lacks the score heads that its reducer needs: there is no {_shorten(absent) or 'model.safetensors'}; save the "
            "reduced model again"
        )
    return [path for path in found.values() if path is not None]


def _named_by_index(path: Path, name: str | Path) -> list[str]:
    """File names that an index gives for learned heads. Raises CheckpointError where it is none, or leaves its folder."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = [file for file in files.values() if not re.fullmatch(r"[^/\\\0]+\.safetensors", file)]
    except Exception as error:  # not UTF-8, no JSON, nested too deep, or of another form
        raise CheckpointError(
            f"{path.name} of {name} cannot be read as an index of weights ({type(error).__name__}: {_first_line(error)}); save the "
            "reduced model again"
        ) from error
    if outside:
        raise CheckpointError(
            f"{path.name} of {name} names files that are none of its own folder: {_shorten(outside)}; save the reduced model again"
        )
    return sorted({file for key, file in files.items() if key.startswith(_HEADS)})

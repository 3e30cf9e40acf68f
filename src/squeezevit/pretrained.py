"""Hugging Face folders of reduced models: what `save_pretrained` wrote, reduced again."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from squeezevit.attach import reduce_
from squeezevit.errors import CheckpointError, ConfigError, MissingExtraError
from squeezevit.predictor import ScoreHeads
from squeezevit.reducers import from_dict

_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_PREFIX = "token_reducer."


def from_pretrained(model_class: Any, name: str | Path, **kwargs: Any) -> Any:
    """What `model_class.from_pretrained(name, **kwargs)` gives, reduced as the model was that `save_pretrained` wrote.

    model_class: a model class of transformers, or one of its Auto classes; name: a folder or a hub's name; kwargs: the class's.
    The reducer stands in config.json, learned score heads among the weights. Raises ConfigError where no reducer is stored, and
    CheckpointError where the score heads are missing.

    >>> model = from_pretrained(AutoModelForImageClassification, "my-reduced-vit")  # doctest: +SKIP
    """
    model = model_class.from_pretrained(name, **kwargs)
    values = getattr(model.config, "squeezevit", None)
    if values is None:
        raise ConfigError(
            f"config.json of {name} holds no reducer; load the model by {model_class.__name__}.from_pretrained and give it one by "
            "sv.reduce_"
        )
    del model.config.squeezevit
    reducer = from_dict(values)
    reduce_(model, reducer)
    if reducer.learned:
        _load_heads(model.token_reducer, name, {k: v for k, v in kwargs.items() if k in _WHERE})
    return model


def _load_heads(heads: nn.Module, name: str | Path, where: dict[str, Any]) -> None:
    try:
        from safetensors import safe_open
        from transformers.utils import cached_file
    except ImportError as error:
        raise MissingExtraError(f"{name} needs {error.name}: pip install transformers safetensors") from error
    assert isinstance(heads, ScoreHeads)
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **where)
    files = {"model.safetensors"}
    if index is not None:
        files = {f for k, f in json.loads(Path(index).read_text())["weight_map"].items() if k.startswith(_PREFIX)}
    found = {}
    for file in files:
        with safe_open(cached_file(name, file, **where), framework="pt") as tensors:
            found.update({k.removeprefix(_PREFIX): tensors.get_tensor(k) for k in tensors.keys() if k.startswith(_PREFIX)})  # noqa: SIM118
    if set(found) != set(heads.state_dict()):
        raise CheckpointError(f"{name} lacks the score heads that its reducer needs; save the reduced model again")
    heads.load_state_dict(found)

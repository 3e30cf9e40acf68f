"""A model by name, on a device by name, with errors that help."""

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn

from squeezevit.errors import ConfigError, MissingExtraError

_LONGEST = 100  # characters of a name that are looked at


def create_model(name: str, pretrained: bool, options: Mapping[str, Any], given_as: str = "--model") -> nn.Module:
    """A model of timm by its name, as `timm.create_model(name, pretrained, **options)` makes it.

    given_as: the option that gave the name, for messages. Raises ConfigError for a name that timm does not have, before any hub
    is asked, and where timm cannot build the model or fetch its weights; MissingExtraError without timm.

    >>> create_model("vit_tiny_patch16_224", False, {"depth": 2, "num_classes": 0})  # doctest: +SKIP
    """
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(f'{given_as}={name} is built by timm: run `pip install "squeezevit[timm]"`') from error
    _require_known(timm, name, pretrained, given_as)
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a constructor or the hub stumbles over
        first = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "give a file as checkpoint instead, or " if pretrained else ""
        what = f"{name} with its weights" if pretrained else name
        raise ConfigError(
            f"timm cannot build {what}, with {options or 'its defaults'} ({first}); {remedy}choose other values"
        ) from error


def to_device(model: nn.Module, device: str) -> nn.Module:
    """The model on a device. Raises ConfigError, before the model is touched, where the device cannot compute."""
    try:
        (torch.ones(2, device=torch.device(device)) + 1).sum().item()
    except Exception as error:  # what a back end that is not there raises is its own choice
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--device {device} cannot be used ({first}); choose cpu, or cuda on a machine that has it") from error
    return model.to(device)


def near_names(name: str, known: list[str], most: int = 4) -> list[str]:
    """The names most like this one: by letters in their order, or by words in any order; of its own family, where there is one.

    >>> near_names("google/siglip-base-patch16-224", ["vit_base_patch16_siglip_224", "resnet50"])
    ['vit_base_patch16_siglip_224']
    """
    wanted = name[:_LONGEST].rpartition("/")[2].lower().replace("-", "_").split(".")[0]
    family = [k for k in known if k.startswith(f"{wanted.split('_')[0]}_")]
    likeness = {k: _likeness(wanted, k) for k in family or known}
    return sorted((k for k in likeness if likeness[k] > 0.4), key=lambda k: -likeness[k])[:most]


def _likeness(a: str, b: str) -> float:
    words, others = set(a.split("_")), set(b.split("_"))
    return max(SequenceMatcher(None, b, a).ratio(), 2 * len(words & others) / (len(words) + len(others)))


def _require_known(timm: Any, name: str, pretrained: bool, given_as: str) -> None:
    architecture, _, tag = name.partition(".")
    shown = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
    if not timm.is_model(architecture):
        near = ", ".join(near_names(name, timm.list_models())) or "none"
        elsewhere = (
            f". {given_as} takes names of timm's models, no paths and no names of another hub; "
            f"{f'a model of transformers is {given_as} hf:{shown}' if given_as == '--model' else 'train one of timm'}"
        )
        raise ConfigError(
            f"{given_as}={shown!r} is no model of timm {timm.__version__}; near it: {near}{elsewhere if '/' in name else ''}"
        )
    tags = timm.list_pretrained(f"{architecture}.*") if pretrained else []
    if pretrained and tag and name not in tags:
        raise ConfigError(f"{given_as}={shown!r}: timm has no such weights; choose from {', '.join(tags[:8]) or 'none'}")

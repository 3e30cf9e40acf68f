"""What stands behind a model's features: how many classes it puts out, and the model without what makes them."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from squeezevit.data.folder import printable
from squeezevit.errors import ConfigError

_HEADS = ("head", "head_dist", "classifier", "cls_classifier", "distillation_classifier", "heads")  # what the libraries call one


def classes_in(model: Any) -> int:
    """Of a classifier's outputs; 0 of a model that puts out features."""
    config = getattr(model, "config", None)
    if config is not None and (hasattr(model, "classifier") or "ImageClassification" in type(model).__name__):
        return int(getattr(config, "num_labels", 0))
    return int(getattr(model, "num_classes", 0) or 0)


def without_classifier_(model: Any) -> None:
    """Put identities in place of the linear layers that make classes of features. Raises ConfigError where it has others."""
    if hasattr(model, "timm_model"):  # as transformers holds timm's models
        model.timm_model.reset_classifier(0)
        return
    found = [name for name in _HEADS if isinstance(getattr(model, name, None), nn.Linear | nn.Sequential)]
    if not found and classes_in(model):
        raise ConfigError(
            f"the classifier of this {type(model).__name__} is none that can be left out; build the model without one "
            "(num_classes=0)"
        )
    for name in found:
        setattr(model, name, nn.Identity())


def is_name(text: str) -> bool:
    """Whether a class can be called so in a file with a name a line.

    >>> is_name("cat, big"), is_name(""), is_name("two\\nlines")
    (True, False, False)
    """
    return bool(text.strip()) and printable(text) == text


def name_classes_(model: Any, names: Sequence[str]) -> None:
    """Let `class_names` know them, for as long as the model has the classifier that it has now."""
    for head in (getattr(model, name, None) for name in _HEADS):
        if isinstance(head, nn.Module):
            head.squeezevit_classes = tuple(names)  # type: ignore[assignment]


def class_names(model: Any) -> tuple[str, ...] | None:
    """What `name_classes_`, or a config of transformers, calls the classes; None where nobody says, or but LABEL_0, LABEL_1.

    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> class_names(ViTForImageClassification(ViTConfig(num_hidden_layers=1, id2label={0: "cat", 1: "dog"})))
    ('cat', 'dog')
    """
    for head in (getattr(model, name, None) for name in _HEADS):
        told = getattr(head, "squeezevit_classes", None)
        if told is not None and len(told) == classes_in(model):
            return cast(tuple[str, ...], told)
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or len(names) != classes_in(model):
        return None
    by_number = {int(number): str(name) for number, name in names.items()}  # from a file numbers come as text
    told = tuple(by_number.get(i, "") for i in range(len(names)))
    plain = told == tuple(f"LABEL_{i}" for i in range(len(told)))
    return None if plain or len({*told}) < len(told) or not all(map(is_name, told)) else told

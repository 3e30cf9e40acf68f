"""A run that starts from a bundle: what the bundle says, as values of a configuration."""

from collections.abc import Mapping
from dataclasses import fields, replace
from os import PathLike
from typing import Any, cast

from squeezevit.bundle import CLASSES, WEIGHTS, bundle_in, read_card
from squeezevit.bundle.hosts import other_than_usual
from squeezevit.core.reducer import Staged
from squeezevit.errors import ConfigError
from squeezevit.reducers.catalog import from_dict, label_of, methods

_BROUGHT = ("model.name", "model.pretrained", "model.checkpoint", "model.image_size", "model.options")


def from_bundle(folder: str | PathLike[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name for `load_config`: the bundle's model, weights and size, and its reducer unless a method is given.

    given: what else is asked for, by dotted name, None where it is not. Classes are numbered as the bundle's, unless a new head is
    wanted or they are given; photographs are turned as the bundle's. Raises what `read_card` raises, and ConfigError for what
    contradicts the bundle, for models of other libraries than timm, and for a reducer that a configuration cannot say.
    """
    path = bundle_in(folder)
    card = read_card(path)
    if card.engine != "torch":
        raise ConfigError(f"--from {path} holds a model exported to {card.engine}, which cannot be trained; give its source")
    if card.host.get("library") != "timm":
        raise ConfigError(
            f"--from {path} holds a model of {card.host.get('library')}, and train builds timm's; reduce it by sv.reduce_ and "
            "train it by its library's own loop, as examples/train_hf.py does"
        )
    if wrong := [name for name in _BROUGHT if given.get(name)]:
        raise ConfigError(f"--from {path} brings the model, its weights and its size; leave {', '.join(wrong)} out")
    height, width = card.preprocessing.crop
    if height != width:
        raise ConfigError(f"--from {path} is for images of {height} x {width} pixels, and train makes square ones; give another")
    options = {key: value for key, value in card.host["options"].items() if key not in ("num_classes", "img_size")}
    if other := other_than_usual(card.host["name"], card.preprocessing):
        options["pretrained_cfg_overlay"] = other
    values = {"model.name": card.host["name"], "model.checkpoint": str(path / WEIGHTS), "model.image_size": height}
    values |= {"model.options": options, "model.pretrained": False, "data.upright": card.preprocessing.upright}
    if card.classes is not None and not given.get("model.new_head"):
        values["data.classes"] = str(path / CLASSES)
    return values if given.get("reducer.method") or card.reducer is None else values | _reducer(card.reducer, str(path))


def _reducer(told: dict[str, Any], path: str) -> dict[str, Any]:
    """The row of the catalogue that has the reducer's options, its ratios and its stages, and what else is not the row's."""
    reducer = from_dict(told)
    row = next((row for row in methods().values() if row.label == label_of(reducer)), None)
    at = getattr(reducer, "at", None)
    if row is None or not isinstance(reducer, Staged) or (isinstance(at, str) and at != row.options.get("at")):
        raise ConfigError(
            f"--from {path} brings the reducer {reducer}, which no --method and --keep say; give both, as you want it"
        )
    stages = {} if at is None or isinstance(at, str) else {"reducer.at": at}
    usual = replace(cast(Staged, row.template()), keep=reducer.keep, at=at)
    others = {f.name: getattr(reducer, f.name) for f in fields(reducer) if getattr(reducer, f.name) != getattr(usual, f.name)}
    return {"reducer.method": row.name, "reducer.keep": reducer.keep, **stages, **({"reducer.options": others} if others else {})}

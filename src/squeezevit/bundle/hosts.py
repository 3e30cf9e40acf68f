"""How each library builds a model and prepares photographs for it, as plain values, and the model again from those."""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from squeezevit.core.cut import description_of
from squeezevit.data.folder import data_config
from squeezevit.data.models import create_model
from squeezevit.data.pixels import INTERPOLATIONS, Preprocessing
from squeezevit.errors import ConfigError, MissingExtraError, UnsupportedError

Values = dict[str, Any]
_TOLD = ("num_classes", "global_pool", "img_size", "dynamic_img_size", "dynamic_img_pad")  # by a model of timm
REMEDIES = {  # what to do where a model cannot be told from its attributes
    "timm": "give options= what timm.create_model was called with beside the name, as {'class_token': False}; merge adapters first",
    "transformers": "its config must describe it: undo what was changed after it was built, and merge adapters first",
    "torchvision": "undo what was changed after it was built, and merge adapters first",
    "open_clip": "give options={'name': ...}, the name that open_clip.create_model was called with",
}
_NEEDED = (
    "give preprocessing=, as transformers' image processor, torchvision's weights.transforms(), or "
    "{'resize': 256, 'crop': (224, 224), 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}"
)


def record(model: nn.Module, options: Mapping[str, Any] | None) -> Values:
    """The library of a model, and all that builds it there. Raises UnsupportedError for a library that is not known here."""
    library = type(model).__module__.split(".")[0]
    if library not in _RECORDS:
        raise UnsupportedError(
            f"a {type(model).__module__}.{type(model).__name__} cannot be saved as a bundle, which holds models of "
            f"{', '.join(_RECORDS)}; save its state dict, and reduce it by the same line when it is loaded"
        )
    given = dict(options or {})
    try:
        return {"library": library, **json.loads(json.dumps(_RECORDS[library](model, given)))}
    except TypeError as error:
        raise ConfigError(f"options={given!r} do not go into a file ({error}); give numbers, texts and lists") from error


def options_of(host: Mapping[str, Any]) -> Values | None:
    """What `record` was given beside what a model tells itself."""
    if "options" not in host:
        return None
    return {"name": host["name"], **{key: value for key, value in host["options"].items() if key not in _TOLD}}


def prepare_(model: Any, how: Preprocessing) -> None:
    """Let timm's own functions prepare photographs for a model of timm as its bundle says."""
    if isinstance(cfg := getattr(model, "pretrained_cfg", None), dict):
        cfg.update(data_options(how))


def data_options(how: Preprocessing) -> Values:
    """As timm says it; the resizing only where timm can."""
    found: Values = {"mean": how.mean, "std": how.std, "interpolation": how.interpolation}
    resized = how.resize if isinstance(how.resize, tuple) else (how.resize, how.resize)
    (height, width), share = how.crop, how.crop[0] / (resized[0] + 0.5)
    square = isinstance(how.resize, int) and height == width
    if resized == how.crop:
        return found | {"crop_pct": 1.0, "crop_mode": "center" if square else "squash"}
    if (math.floor(height / share), math.floor(width / share)) == resized and (square or isinstance(how.resize, tuple)):
        return found | {"crop_pct": share, "crop_mode": "center" if square else "squash"}
    return found


def other_than_usual(name: str, how: Preprocessing) -> Values:
    """What timm.create_model has to be told, as pretrained_cfg_overlay, for a model to have photographs so; {} where nothing."""
    from timm.data.config import resolve_data_config
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    usual = resolve_data_config(pretrained_cfg={} if known is None else known.to_dict()) | {"input_size": (3, *how.crop)}
    try:
        same = _of_data_config(usual) == replace(how, upright=True)
    except ConfigError:
        same = False
    return {} if same else {k: list(v) if isinstance(v, tuple) else v for k, v in data_options(how).items()}


def build(host: Mapping[str, Any]) -> nn.Module:
    """A model as `record` told it, with weights of its library's initialisation."""
    values = dict(host)
    library = values.pop("library", None)
    if library not in _BUILDERS:
        raise ConfigError(f"models of {library!r} are not known to this version; it builds those of {', '.join(_BUILDERS)}")
    try:
        return _BUILDERS[library](**values).eval()
    except ImportError as error:
        raise MissingExtraError(f'the model is one of {library}: run `pip install "squeezevit[{library}]"` ({error})') from error


def _of_timm(model: Any, given: Values) -> Values:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = given.pop("name", None) or cfg.get("architecture")
    if not name:
        raise ConfigError(
            f"timm does not say how this {type(model).__name__} was built; give options={{'name': 'vit_base_patch16_224'}}"
        )
    told: Values = {"num_classes": model.num_classes, "global_pool": getattr(model, "global_pool", None)}
    patches = getattr(model, "patch_embed", None)
    told["img_size"] = getattr(patches, "img_size", None)
    told["dynamic_img_size"] = getattr(model, "dynamic_img_size", None) or None
    told["dynamic_img_pad"] = getattr(patches, "dynamic_img_pad", None) or None
    return {"name": name, "options": {**{k: v for k, v in told.items() if v is not None}, **given}}


def _timm(name: str, options: Values) -> nn.Module:
    return create_model(name, False, {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}, "the bundle's model")


def _of_transformers(model: Any, given: Values) -> Values:
    _no_options(given, "transformers")
    config = {k: v for k, v in json.loads(model.config.to_json_string(use_diff=False)).items() if k != "squeezevit"}
    told = {"name": type(model).__name__, "config": config, "attention": model.config._attn_implementation}
    without = "add_pooling_layer" in inspect.signature(type(model)).parameters and getattr(model, "pooler", model) is None
    return {**told, "pooler": False} if without else told


def _transformers(name: str, config: Values, attention: str | None, pooler: bool = True) -> nn.Module:
    import transformers

    made = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    made._attn_implementation = attention
    model: nn.Module = getattr(transformers, name)(made, **({} if pooler else {"add_pooling_layer": False}))
    return model


def _of_torchvision(model: Any, given: Values) -> Values:
    _no_options(given, "torchvision")
    names = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "representation_size")
    layers = model.encoder.layers
    return {**{n: getattr(model, n) for n in names}, "num_layers": len(layers), "num_heads": layers[0].num_heads}


def _torchvision(**values: Any) -> nn.Module:
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(**values)
    return model


def _of_open_clip(model: Any, given: Values) -> Values:
    name = given.pop("name", None)
    if name is None:
        raise ConfigError(f"open_clip does not say how this {type(model).__name__} was built; {REMEDIES['open_clip']}")
    return {"name": name, "options": given}


def _open_clip(name: str, options: Values) -> nn.Module:
    import open_clip

    model: nn.Module = open_clip.create_model(name, pretrained=None, **options)
    return model


def _no_options(given: Values, library: str) -> None:
    if given:
        raise ConfigError(f"options={given!r}: models of {library} tell themselves how they are built; leave options out")


_RECORDS: dict[str, Callable[[Any, Values], Values]] = {
    "timm": _of_timm, "transformers": _of_transformers, "torchvision": _of_torchvision, "open_clip": _of_open_clip
}  # fmt: skip
_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "timm": _timm, "transformers": _transformers, "torchvision": _torchvision, "open_clip": _open_clip
}  # fmt: skip


def height_and_width(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (
        (image_size, image_size) if isinstance(image_size, int) else None if image_size is None else (image_size[0], image_size[1])
    )


def preprocessing(model: nn.Module, given: Any, image_size: int | tuple[int, int] | None) -> Preprocessing:
    """How photographs are made ready for a model; see `squeezevit.bundle.save`. Raises ConfigError where nobody says."""
    about = description_of(model)
    size = height_and_width(image_size) or about.image_size
    found = _read(model, given, (int(size[0]), int(size[1])))
    if image_size is not None and found.crop != size:
        raise ConfigError(f"image_size={image_size!r}, and preprocessing cuts out {found.crop}; give one of them, or the same size")
    return found


def _read(model: nn.Module, given: Any, size: tuple[int, int]) -> Preprocessing:
    if isinstance(given, Preprocessing):
        return given
    if isinstance(given, Mapping):
        return Preprocessing.from_dict(given)
    if hasattr(given, "image_mean"):
        return _of_processor(given)
    if hasattr(given, "crop_size") and hasattr(given, "resize_size"):
        (resize,), (crop,) = given.resize_size, given.crop_size
        return Preprocessing(resize, (crop, crop), given.interpolation.value, tuple(given.mean), tuple(given.std))
    if given is not None:
        raise ConfigError(f"preprocessing={given!r} is not known; {_NEEDED}")
    library = type(model).__module__.split(".")[0]
    if library == "timm":
        return _of_data_config(data_config(model, size))
    cfg = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
    if library == "open_clip" and cfg is not None and cfg["resize_mode"] == "shortest" and size[0] == size[1]:
        return Preprocessing(size[0], size, cfg["interpolation"], tuple(cfg["mean"]), tuple(cfg["std"]))
    raise ConfigError(f"{library} does not say how photographs are made ready for this {type(model).__name__}; {_NEEDED}")


def _of_data_config(config: Values) -> Preprocessing:
    size = config["input_size"][1:]
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in size)
    if config["crop_mode"] not in ("center", "squash") or (config["crop_mode"] == "center" and scaled[0] != scaled[1]):
        raise ConfigError(f"timm's crop_mode {config['crop_mode']!r} at {size[0]} x {size[1]} pixels is not known here; {_NEEDED}")
    resize = scaled[0] if config["crop_mode"] == "center" else (scaled[0], scaled[1])
    return Preprocessing(resize, (size[0], size[1]), config["interpolation"], tuple(config["mean"]), tuple(config["std"]))


def _of_processor(processor: Any) -> Preprocessing:
    """transformers' image processor, where it only resizes, cuts the middle out, and scales."""
    size, scale = dict(processor.size), getattr(processor, "rescale_factor", 1 / 255)
    if abs(scale - 1 / 255) > 1e-9 or not processor.do_resize or not processor.do_normalize:
        raise ConfigError(f"{type(processor).__name__} does not resize to one size and scale from 0 to 1; {_NEEDED}")
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else size
    resize = size["shortest_edge"] if size.get("shortest_edge") else (size["height"], size["width"])
    if not crop.get("height"):
        raise ConfigError(f"{type(processor).__name__} with size {size} does not say what size comes out; {_NEEDED}")
    name = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}[int(processor.resample)]
    assert name in INTERPOLATIONS
    return Preprocessing(resize, (crop["height"], crop["width"]), name, tuple(processor.image_mean), tuple(processor.image_std))

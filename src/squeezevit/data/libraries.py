"""Models of other libraries than timm by name, as `hf:NAME`, `torchvision:NAME` and `open_clip:NAME/PRETRAINED`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from squeezevit.data.classifier import without_classifier_
from squeezevit.errors import ConfigError, MissingExtraError


class Found(NamedTuple):
    """A model, and what its library says of how photographs are made ready for it and of its classes; None: the model tells."""

    model: nn.Module
    preparing: Any
    classes: tuple[str, ...] | None = None


def prefix_of(name: str) -> str | None:
    """The library that a name begins with, as in "hf:facebook/dinov2-small"; None for a name of timm's."""
    library, colon, _ = name.partition(":")
    return library if colon and library in _BUILDERS else None


def vision_language(name: str, pretrained: bool) -> tuple[nn.Module, Any]:
    """A vision-language model of transformers and its processor, by the hub's name or a folder's, as "hf:NAME".

    Raises ConfigError where it is none, or cannot be fetched; MissingExtraError without transformers.
    """
    found = _built(name, lambda own: _language(own, pretrained))
    found[0].eval()
    return found


def create(name: str, pretrained: bool, options: Mapping[str, Any]) -> Found:
    """A model by its library and name, in evaluation mode. options: num_classes, img_size, where the library takes them.

    Raises ConfigError where the library does not have it, cannot fetch it, or takes no such option; MissingExtraError without it.

    >>> create("torchvision:vit_b_16", False, {}).preparing.crop_size  # doctest: +SKIP
    [224]
    """
    found = _built(name, lambda own: _BUILDERS[name.partition(":")[0]](own, pretrained, dict(options)))
    found.model.eval()
    return found


def _built(name: str, build: Callable[[str], Any]) -> Any:
    """What a library builds of a name without its prefix, or why it does not."""
    library, _, own = name.partition(":")
    try:
        return build(own)
    except ConfigError:
        raise
    except ImportError as error:
        extra = {"hf": "transformers"}.get(library, library)
        raise MissingExtraError(f'--model {name} is built by {extra}: run `pip install "{_PACKAGES[library]}"`') from error
    except Exception as error:  # whatever a library or its hub stumbles over
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ConfigError(f"--model {name} cannot be built ({first}); check the name, the options, and the network") from error


def _language(name: str, pretrained: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    if pretrained:
        return AutoModelForImageTextToText.from_pretrained(name), processor
    return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name)), processor


def _hugging_face(name: str, pretrained: bool, options: dict[str, Any]) -> Found:
    """With weights by the hub or from a folder; without, as its config says."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers import AutoModelForImageClassification as Classifier

    if options:
        raise ConfigError(f"--model hf:{name} takes its size and classes from its config; leave {_options(options)} out")
    processor = AutoImageProcessor.from_pretrained(name)
    config = AutoConfig.from_pretrained(name)
    classifies = any("ForImageClassification" in one for one in config.architectures or ["ForImageClassification"])
    kind = Classifier if classifies else AutoModel
    if not pretrained:
        return Found(kind.from_config(config), processor)
    model, told = kind.from_pretrained(name, output_loading_info=True)
    if told["missing_keys"] and not classifies:  # a pooler that nobody trained: its library's classifier reads tokens without it
        config.num_labels = 0
        model, told = Classifier.from_pretrained(name, config=config, output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        raise ConfigError(
            f"--model hf:{name}: its weights lack {', '.join(missing[:3])}, which would be random; save it with all of them"
        )
    return Found(model, processor)


def _torchvision(name: str, pretrained: bool, options: dict[str, Any]) -> Found:
    from torchvision.models import get_model, get_model_weights

    if "img_size" in options:
        options["image_size"] = options.pop("img_size")
    weights: Any = get_model_weights(name)["DEFAULT"]
    bare = options.get("num_classes") == 0
    if bare:
        del options["num_classes"]
    model = get_model(name, weights=weights if pretrained else None, **options)
    if bare:
        without_classifier_(model)
    own = weights.transforms()
    size, names = options.get("image_size"), tuple(weights.meta["categories"])
    named = names if pretrained and not bare and len({*names}) == len(names) == model.num_classes else None
    return Found(model, own if size is None else {**_told(own), "resize": size, "crop": (size, size)}, named)


def _told(transforms: Any) -> dict[str, Any]:
    """torchvision's preset but for its sizes."""
    return {"interpolation": transforms.interpolation.value, "mean": tuple(transforms.mean), "std": tuple(transforms.std)}


def _open_clip(name: str, pretrained: bool, options: dict[str, Any]) -> Found:
    import open_clip

    if options:
        raise ConfigError(f"--model open_clip:{name} takes its size from its config; leave {_options(options)} out")
    architecture, slash, weights = name.partition("/")
    if pretrained and not slash:
        raise ConfigError(f"--model open_clip:{name}: name the weights, too, as open_clip:ViT-B-32/laion2b_s34b_b79k")
    return Found(open_clip.create_model(architecture, pretrained=weights if pretrained else None), None)


def _options(options: Mapping[str, Any]) -> str:
    names = {"num_classes": "--num-classes", "img_size": "--image-size"}
    return ", ".join(names.get(name, name) for name in options)


_BUILDERS: dict[str, Callable[[str, bool, dict[str, Any]], Found]] = {
    "hf": _hugging_face, "torchvision": _torchvision, "open_clip": _open_clip
}  # fmt: skip
_PACKAGES = {"hf": "squeezevit[transformers]", "torchvision": "torchvision", "open_clip": "squeezevit[open-clip]"}

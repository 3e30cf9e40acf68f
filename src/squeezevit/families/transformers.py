"""Vision towers of Hugging Face transformers 5: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and their kin, alone or inside a model."""

import inspect
import sys
from collections.abc import Hashable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from squeezevit.core.block import Mixin
from squeezevit.core.cut import (
    Description,
    arguments,
    as_python,
    attention,
    attn_half,
    base_class,
    describe,
    fingerprint,
    knows,
    mlp_half,
    projections,
)
from squeezevit.core.evidence import Attention, is_plain, output, recorded
from squeezevit.core.supported import TOWERS, refusal
from squeezevit.errors import UnsupportedError
from squeezevit.families.tokens import Averaging, Tower, WeightedPooling, own_methods
from squeezevit.reducers import to_dict


class _Layout(NamedTuple):
    """Names of a layer's children, in the order in which they run."""

    norm1: str
    attn: str
    norm2: str
    after_attn: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()


_VIT = _Layout("layernorm_before", "attention", "layernorm_after", ("dropout",), ("dropout",))
_DINO = _Layout("norm1", "attention", "norm2", ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
_CLIP = _Layout("layer_norm1", "self_attn", "layer_norm2")
_LAYERS = {  # by package of transformers.models
    "vit": ("ViTLayer", _VIT),
    "deit": ("DeiTLayer", _VIT),
    "vit_mae": ("ViTMAELayer", _VIT),
    "vit_msn": ("ViTMSNLayer", _VIT),
    "ijepa": ("IJepaLayer", _VIT),
    "dinov2": ("Dinov2Layer", _DINO),
    "dinov2_with_registers": ("Dinov2WithRegistersLayer", _DINO),
    "dinov3_vit": ("DINOv3ViTLayer", _DINO),
    "clip": ("CLIPEncoderLayer", _CLIP),
    "siglip": ("SiglipEncoderLayer", _CLIP),
    "siglip2": ("Siglip2EncoderLayer", _CLIP),
}
_AVERAGING = (
    "Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification", "CLIPForImageClassification",
    "SiglipForImageClassification", "Siglip2ForImageClassification", "IJepaForImageClassification",
)  # fmt: skip


def load() -> None:
    """Register the layers of every architecture that is imported by now."""
    for package, (name, layout) in _LAYERS.items():
        module = sys.modules.get(f"transformers.models.{package}.modeling_{package}")
        layer = getattr(module, name, None)
        if layer is not None and layer not in attn_half.registry:
            _register(layer, layout)


def _register(layer: type, layout: _Layout) -> None:
    norm1, attn, norm2, after_attn, after_mlp = layout

    @attn_half.register(layer)
    def _(block: Any, x: Tensor, bias: Tensor | None = None, **rotary: Any) -> Tensor:
        if bias is not None:
            _require_additive(getattr(block, attn))
        y = getattr(block, attn)(getattr(block, norm1)(x), attention_mask=bias, **rotary)[0]
        return _through(block, after_attn, y) + x

    @mlp_half.register(layer)
    def _(block: Any, x: Tensor) -> Tensor:
        return _through(block, after_mlp, block.mlp(getattr(block, norm2)(x))) + x

    @attention.register(layer)
    def _(block: Any, x: Tensor, **rotary: Any) -> Attention:
        return _attention(getattr(block, attn), output(getattr(block, norm1), x), **rotary)

    @projections.register(layer)
    def _(block: Any) -> tuple[nn.Module, ...]:
        return getattr(block, norm1), getattr(block, attn).q_proj, getattr(block, attn).k_proj

    @arguments.register(layer)
    def _(block: Any, patches: Tensor) -> dict[str, Any]:
        given: dict[str, Any] = {"attention_mask": None}
        if _rotates(block):
            angles = patches[:, :1].expand(-1, getattr(block, attn).head_dim).cumsum(dim=1)
            given["position_embeddings"] = (angles.cos(), angles.sin())
        return given

    plain_fingerprint = fingerprint.dispatch(object)

    @fingerprint.register(layer)
    def _(block: Any) -> Hashable:
        """Which attention function runs, too, as some ignore masks."""
        return plain_fingerprint(block), getattr(getattr(block, attn).config, "_attn_implementation", None)


def _require_additive(attn: Any) -> None:
    name = str(getattr(attn.config, "_attn_implementation", None))
    if name.startswith(("flex", "flash", "paged")):
        raise UnsupportedError(
            f"attention runs by {name!r}, which takes no additive bias; call model.set_attn_implementation('sdpa') first"
        )


def _rotates(block: nn.Module) -> bool:
    return hasattr(sys.modules[base_class(block).__module__], "apply_rotary_pos_emb")


def _through(block: Any, names: tuple[str, ...], y: Tensor) -> Tensor:
    for name in names:
        y = getattr(block, name)(y)
    return y


def _attention(attn: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None) -> Attention:
    def project(linear: nn.Module, x: Tensor) -> Tensor:
        y = output(linear, x)
        d = attn.head_dim
        y = y.reshape(y.shape[0], y.shape[1], int(y.shape[2]) // d, d).transpose(1, 2)
        if position_embeddings is None or y.shape[2] == 1:  # a class token alone, which has no place
            return y
        return sys.modules[base_class(attn).__module__].apply_rotary_pos_emb(y, y, *position_embeddings)[0]

    scale = attn.scaling if hasattr(attn, "scaling") else attn.scale
    plain = position_embeddings is None and is_plain(attn.k_proj) and recorded(attn.k_proj) is None
    return Attention(
        x, attn.config.num_attention_heads, lambda n: project(attn.q_proj, x[:, :n]) * scale, lambda: project(attn.k_proj, x),
        attn.k_proj.weight if plain else None, attn.k_proj.bias if plain else None,
    )  # fmt: skip


class Saving(Mixin):
    """A model whose `save_pretrained` writes its reducer into config.json, for `squeezevit.from_pretrained`."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self.config.squeezevit = to_dict(self.squeezevit_state.reducer)
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            del self.config.squeezevit


class CLIPTower(Tower):
    """Its library norms the class token alone."""

    def normed(self, tokens: Tensor) -> Tensor:
        return self.post_layernorm(tokens)


@describe.register
def _(model: PreTrainedModel) -> Description:
    if reason := next(filter(None, map(refusal, model.modules())), None):
        raise UnsupportedError(f"{type(model).__name__} cannot be reduced ({reason})")
    towers: dict[str, Any] = {path: m for path, m in model.named_modules() if _name(m, TOWERS)}
    if len(towers) != 1:
        several = f"give one of them to sv.reduce_, as {' or '.join(map(as_python, filter(None, towers)))}"
        raise UnsupportedError(
            f"{type(model).__name__} has {len(towers)} vision towers that SqueezeViT knows ({', '.join(TOWERS)}); "
            f"{several if towers else 'for one of your own register squeezevit.extend.describe'}"
        )
    (tower,) = towers.values()
    averages = _name(model, _AVERAGING) is not None
    head = getattr(getattr(tower, "head", None), "attention", None)
    config = tower.config
    mixins: list[tuple[nn.Module, type]] = [(model, Saving)]
    mixins += [(model, Averaging)] if averages else []
    mixins += [(tower, CLIPTower if _name(tower, ("CLIPVisionModel",)) else Tower)]
    mixins += [(head, WeightedPooling)] if head is not None else []
    size = getattr(config, "image_size", None) or config.patch_size * round(config.num_patches**0.5)
    return Description(
        blocks=tuple(m for m in tower.modules() if knows(base_class(m))),
        prefix=TOWERS[_name(tower, TOWERS)] + getattr(config, "num_register_tokens", 0),  # type: ignore[index]
        class_token=TOWERS[_name(tower, TOWERS)] > 0,  # type: ignore[index]
        dim=config.hidden_size,
        channels=config.num_channels,
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        mixins=tuple(mixins),
        grids=True,
        pooled=averages or head is not None,
        tower=None if model.main_input_name == "pixel_values" else tower,
        inputs=partial(_patches, config.patch_size) if _name(tower, ("Siglip2VisionModel",)) else None,
        options=partial(_resized, model if model.main_input_name == "pixel_values" else tower, size),
        refuse_mass=own_methods(model, ("forward",), "transformers.") if averages else "",
    )


def _resized(runs: nn.Module, size: int | tuple[int, int], images: Tensor) -> dict[str, Any]:
    """What asks a model to interpolate its positions, for images of another size than its own, where it must be asked."""
    own = (size, size) if isinstance(size, int) else tuple(size)
    embeddings = getattr(getattr(runs, "vision_model", runs), "embeddings", runs)
    takers = [inspect.signature(m.forward).parameters for m in (runs, embeddings)]
    asked = any("interpolate_pos_encoding" in parameters for parameters in takers)
    return {"interpolate_pos_encoding": True} if asked and tuple(images.shape[-2:]) != own else {}


def _patches(side: int, images: Tensor) -> tuple[Tensor | None, ...]:
    """What SigLIP 2 takes: pixels of each patch [B, N, side * side * channels], no mask, and the grid's shape in patches [B, 2]."""
    pixels = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
    B, rows, columns = pixels.shape[:3]
    shape = torch.tensor([[rows, columns]], device=None if images.is_meta else images.device)  # the model reads its values
    return pixels.reshape(B, rows * columns, -1), None, shape.expand(B, -1)


def _name(model: nn.Module, names: Iterable[str]) -> str | None:
    """The name of the model's class, or of one it derives from, among the given ones."""
    own = [c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.")]
    return next((name for name in own if name in names), None)

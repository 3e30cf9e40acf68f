"""Vision towers of Hugging Face transformers 5: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and their kin, alone or inside a model."""

import inspect
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from squeezevit.core import ops
from squeezevit.core.block import Mixin, State
from squeezevit.core.capture import compiling
from squeezevit.core.cut import (
    ANY_PAIRS,
    Description,
    TakesNoMask,
    arguments,
    as_python,
    attention,
    attn_half,
    base_class,
    describe,
    description_of,
    fingerprint,
    knows,
    mlp_half,
    pairs,
    projections,
    trial_patches,
)
from squeezevit.core.evidence import Attention, compute, is_plain, output, recorded
from squeezevit.core.supported import ANY_COUNT, BACKBONES, TOWERS, refusal
from squeezevit.errors import ConfigError, UnsupportedError
from squeezevit.families.tokens import Averaging, PoolingMean, Tower, WeightedPooling, Without, own_methods
from squeezevit.reducers import to_dict


class _Layout(NamedTuple):
    """Names of a layer's children and scaling parameters, in the order in which they run."""

    norm1: str
    attn: str
    norm2: str
    after_attn: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()
    mlp: str = "mlp"
    masked: bool = True  # whether attention takes a mask
    residual_first: bool = False  # in the sums, whose first operand decides how the result lies in memory, hence its last bits


_VIT = _Layout("layernorm_before", "attention", "layernorm_after", ("dropout",), ("dropout",))
_DINO = _Layout("norm1", "attention", "norm2", ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
_CLIP = _Layout("layer_norm1", "self_attn", "layer_norm2", residual_first=True)
_PIXIO = _VIT._replace(after_attn=("dropout", "drop_path"), after_mlp=("dropout", "drop_path"))
_AIMV2 = _Layout("rms_norm1", "attention", "rms_norm2", mlp="ffn", residual_first=True)
_INTERNVL = _VIT._replace(after_attn=("lambda_1",), after_mlp=("dropout", "lambda_2"))
_BEIT = _VIT._replace(after_attn=("dropout", "lambda_1", "drop_path"), after_mlp=("dropout", "lambda_2", "drop_path"))
_FUSED = _Layout("layer_norm1", "self_attn", "layer_norm2", masked=False)  # queries, keys and values by one map
_LAYERS: dict[str, tuple[str, _Layout | None]] = {  # by package, or module, of transformers.models; None: as ViT was in version 4
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
    "aimv2": ("Aimv2EncoderLayer", _AIMV2),
    "altclip": ("AltCLIPEncoderLayer", _CLIP),
    "beit": ("BeitLayer", _BEIT),
    "audio_spectrogram_transformer": ("ASTLayer", _VIT),
    "blip": ("BlipEncoderLayer", _FUSED),
    "blip_2": ("Blip2EncoderLayer", _FUSED),
    "chinese_clip": ("ChineseCLIPVisionLayer", _CLIP),
    "clipseg": ("CLIPSegEncoderLayer", _CLIP),
    "git": ("GitVisionEncoderLayer", _CLIP),
    "data2vec.modeling_data2vec_vision": ("Data2VecVisionLayer", None),
    "dpt": ("DPTViTLayer", None),
    "idefics2": ("Idefics2EncoderLayer", _CLIP),
    "idefics3": ("Idefics3EncoderLayer", _CLIP),
    "instructblip": ("InstructBlipEncoderLayer", _FUSED),
    "instructblipvideo": ("InstructBlipVideoEncoderLayer", _FUSED),
    "internvl": ("InternVLVisionLayer", _INTERNVL),
    "janus": ("JanusVisionEncoderLayer", _CLIP),
    "kosmos2": ("Kosmos2VisionEncoderLayer", _CLIP),
    "metaclip_2": ("MetaClip2EncoderLayer", _CLIP),
    "owlvit": ("OwlViTEncoderLayer", _CLIP),
    "owlv2": ("Owlv2EncoderLayer", _CLIP),
    "pixio": ("PixioLayer", _PIXIO),
    "sapiens2": ("Sapiens2Layer", _DINO),
    "smolvlm": ("SmolVLMEncoderLayer", _CLIP),
    "tipsv2": ("Tipsv2VisionLayer", _DINO),
    "videomae": ("VideoMAELayer", None),
    "vivit": ("VivitLayer", _VIT),
}
_AVERAGING = (
    "Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification", "CLIPForImageClassification",
    "SiglipForImageClassification", "Siglip2ForImageClassification", "IJepaForImageClassification",
    "MetaClip2ForImageClassification",
)  # fmt: skip


def load() -> None:
    """Register the layers of every architecture that is imported by now."""
    for package, (name, layout) in _LAYERS.items():
        path = package if "." in package else f"{package}.modeling_{package}"
        layer = getattr(sys.modules.get(f"transformers.models.{path}"), name, None)
        if layer is not None and layer not in attn_half.registry:
            _register(layer, layout) if layout is not None else _register_nested(layer)
            _RELATIVE.get(name, lambda layer: None)(layer)


def _register(layer: type, layout: _Layout) -> None:
    norm1, attn, norm2, after_attn, after_mlp, mlp = layout[:6]

    @attn_half.register(layer)
    def _(block: Any, x: Tensor, bias: Tensor | None = None, **rotary: Any) -> Tensor:
        if bias is not None and layout.masked:
            _require_additive(getattr(block, attn))
        elif bias is not None:
            raise TakesNoMask
        mask = {"attention_mask": bias} if layout.masked else {}
        y = getattr(block, attn)(getattr(block, norm1)(x), **mask, **rotary)[0]
        y = _through(block, after_attn, y)
        return x + y if layout.residual_first else y + x

    @mlp_half.register(layer)
    def _(block: Any, x: Tensor) -> Tensor:
        y = _through(block, after_mlp, getattr(block, mlp)(getattr(block, norm2)(x)))
        return x + y if layout.residual_first else y + x

    @attention.register(layer)
    def _(block: Any, x: Tensor, **rotary: Any) -> Attention:
        return _attention(getattr(block, attn), output(getattr(block, norm1), x), **rotary)

    @projections.register(layer)
    def _(block: Any) -> tuple[nn.Module, ...]:
        return getattr(block, norm1), *_linears(getattr(block, attn))

    @arguments.register(layer)
    def _(block: Any, patches: Tensor) -> dict[str, Any]:
        takes = inspect.signature(layer.forward).parameters  # type: ignore[attr-defined]
        given: dict[str, Any] = {"attention_mask": None} if "attention_mask" in takes else {}
        if _rotates(layer):
            angles = patches[:, :1].expand(-1, getattr(block, attn).head_dim).cumsum(dim=1)
            given["position_embeddings"] = (angles.cos(), angles.sin())
        return given

    plain_fingerprint = fingerprint.dispatch(object)

    @fingerprint.register(layer)
    def _(block: Any) -> Hashable:
        """Which attention function runs, too, as some ignore masks."""
        return plain_fingerprint(block), getattr(getattr(block, attn).config, "_attn_implementation", None)


def _register_nested(layer: type) -> None:
    """A layer whose attention holds another module with queries and keys, and whose output module adds the residual."""

    @attn_half.register(layer)
    def _(block: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            raise TakesNoMask
        return block.attention(block.layernorm_before(x)) + x

    @mlp_half.register(layer)
    def _(block: Any, x: Tensor) -> Tensor:
        return block.output(block.intermediate(block.layernorm_after(x)), x)

    @attention.register(layer)
    def _(block: Any, x: Tensor) -> Attention:
        return _attention(block.attention.attention, output(block.layernorm_before, x))

    @projections.register(layer)
    def _(block: Any) -> tuple[nn.Module, ...]:
        return block.layernorm_before, *_linears(block.attention.attention)


def _register_beit(layer: type) -> None:
    """A layer that adds its relative positions to the mask that its attention takes."""

    @pairs.register(layer)
    def _(
        block: Any,
        attention_mask: Tensor | None = None,  # shared by all layers, if any are
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> Tensor | None:
        relative = _relative(block.relative_position_bias, block.patch_size, interpolate_pos_encoding, resolution)
        return ops.summed(relative, attention_mask)

    @arguments.register(layer)
    def _(block: Any, patches: Tensor) -> dict[str, Any]:
        return {"attention_mask": ANY_PAIRS, "resolution": _resolution(block.relative_position_bias, block.patch_size)}

    @trial_patches.register(layer)
    def _(block: Any) -> int:
        return _area(block.relative_position_bias)


def _register_data2vec(layer: type) -> None:
    """A nested layer whose attention adds its relative positions by itself, and whose output module leaves the residual to it."""

    def own(block: Any) -> Any:
        return getattr(block.attention.attention, "relative_position_bias", None)

    @attn_half.register(layer)
    def _(block: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        inner = Without(block.attention.attention, has_relative_position_bias=False)
        y = Without(block.attention, attention=inner)(block.layernorm_before(x), relative_position_bias=bias)[0]
        return block.drop_path(y if block.lambda_1 is None else block.lambda_1 * y) + x

    @mlp_half.register(layer)
    def _(block: Any, x: Tensor) -> Tensor:
        y = block.output(block.intermediate(block.layernorm_after(x)))
        return block.drop_path(y if block.lambda_2 is None else block.lambda_2 * y) + x

    @pairs.register(layer)
    def _(
        block: Any,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> Tensor | None:
        side = block.attention.attention.config.patch_size
        return ops.summed(_relative(own(block), side, interpolate_pos_encoding, resolution), relative_position_bias)

    @arguments.register(layer)
    def _(block: Any, patches: Tensor) -> dict[str, Any]:
        size = _resolution(own(block), block.attention.attention.config.patch_size)
        return {"relative_position_bias": ANY_PAIRS, "resolution": size}

    @trial_patches.register(layer)
    def _(block: Any) -> int:
        return _area(own(block))


_RELATIVE = {"BeitLayer": _register_beit, "Data2VecVisionLayer": _register_data2vec}


def _relative(own: Any, patch: int, interpolate: bool, resolution: tuple[int, int] | None) -> Tensor | None:
    """The bias of a layer's own relative positions for pairs of all tokens, on images of this height and width in pixels."""
    if own is None or resolution is None:
        return None
    window = (resolution[0] // patch, resolution[1] // patch)
    return own(window, interpolate, dim_size=window[0] * window[1] + 1)


def _resolution(own: Any, patch: int) -> tuple[int, int]:
    """Height and width in pixels of the images that a layer's relative positions are laid out for, or of any."""
    rows, columns = (2, 3) if own is None else own.window_size
    return rows * patch, columns * patch


def _area(own: Any) -> int:
    return 6 if own is None else own.window_size[0] * own.window_size[1]


def _require_additive(attn: Any) -> None:
    name = str(getattr(attn.config, "_attn_implementation", None))
    if name.startswith(("flex", "flash", "paged")):
        raise UnsupportedError(
            f"attention runs by {name!r}, which takes no additive bias; call model.set_attn_implementation('sdpa') first"
        )


def _rotates(layer: type) -> bool:
    return "position_embeddings" in inspect.signature(layer.forward).parameters  # type: ignore[attr-defined]


def _through(block: Any, names: tuple[str, ...], y: Tensor) -> Tensor:
    for name in names:
        part = getattr(block, name)
        y = part(y) if isinstance(part, nn.Module) else part * y
    return y


def _linears(attn: Any) -> tuple[nn.Module, ...]:
    """What makes queries and keys: one map for both, and for values, or one each."""
    if hasattr(attn, "qkv"):
        return (attn.qkv,)
    return (attn.q_proj, attn.k_proj) if hasattr(attn, "q_proj") else (attn.query, attn.key)


def _attention(attn: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None) -> Attention:
    heads = attn.config.num_attention_heads
    d = attn.head_dim if hasattr(attn, "head_dim") else attn.attention_head_size
    scale = attn.scaling if hasattr(attn, "scaling") else getattr(attn, "scale", d**-0.5)
    linears, norms = _linears(attn), (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None))
    scales = [getattr(norm, "weight", None) for norm in norms]
    sizes = [None if s is None else s.numel() for s in scales]  # None: no norm

    def project(which: int, x: Tensor) -> Tensor:
        y = output(linears[0], x).chunk(3, dim=-1)[which] if len(linears) == 1 else output(linears[which], x)
        norm, size = norms[which], sizes[which]
        if size not in (None, d):  # over all heads together
            y = compute(cast(nn.Module, norm), y)
        y = y.reshape(y.shape[0], y.shape[1], int(y.shape[2]) // d, d).transpose(1, 2)
        if size == d:
            y = compute(cast(nn.Module, norm), y)
        if position_embeddings is not None and y.shape[2] > 1:  # a class token alone has no place
            y = sys.modules[base_class(attn).__module__].apply_rotary_pos_emb(y, y, *position_embeddings)[0]
        return y if y.shape[1] == heads else y.repeat_interleave(heads // y.shape[1], dim=1)

    key: Any = linears[-1]
    folds = position_embeddings is None and sizes[1] is None and is_plain(key) and recorded(key) is None
    folds = folds and key.weight.shape[0] == heads * d  # heads do not share their keys, and nothing else is in the map
    weight, bias = (key.weight, key.bias) if folds else (None, None)
    return Attention(x, heads, lambda n: project(0, x[:, :n]) * scale, lambda: project(1, x), weight, bias)


class Saving(Mixin):
    """A model whose `save_pretrained` writes its reducer into config.json, for `squeezevit.from_pretrained`."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        told = to_dict(self.squeezevit_state.reducer)
        if wrong := [name for name, value in told.items() if callable(value)]:
            raise ConfigError(
                f"{self.squeezevit_state.reducer} has a function as {', '.join(wrong)}, which config.json cannot hold; register a "
                "method of your own for it, or sv.restore_ the model before it is saved"
            )
        self.config.squeezevit = told
        if self.squeezevit_state.grid:
            self.config.squeezevit_grid = True
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            del self.config.squeezevit
            if self.squeezevit_state.grid:
                del self.config.squeezevit_grid


class HostedTower(Tower):
    """A tower that may be called by a model of its library that counts its tokens, or lays them out as an image."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.squeezevit_state
        if state.stages and not state.grid and not compiling():
            _refuse_callers_that_know_of_nothing(cast(PreTrainedModel, self), state)
        return super().forward(*args, **kwargs)


class RelativeTower(HostedTower):
    """A tower that adds what all its layers share to the mask that it may be called with."""

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.squeezevit_state.stages and (len(args) > 2 or kwargs.get("attention_mask") is not None):
            raise UnsupportedError(
                f"{type(self).__name__} was called with a mask (attention_mask), which does not fit reduced tokens; call it "
                "without, or sv.restore_ it first"
            )
        return super().forward(pixel_values, *args, **kwargs)


class CLIPTower(HostedTower):
    """Its library norms the class token alone."""

    def normed(self, tokens: Tensor) -> Tensor:
        return self.post_layernorm(tokens)


_TOWERS = {
    "CLIPVisionModel": CLIPTower,
    "MetaClip2VisionModel": CLIPTower,
    "BeitModel": RelativeTower,
    "BeitBackbone": RelativeTower,
}


def _refuse_callers_that_know_of_nothing(tower: PreTrainedModel, state: State) -> None:
    """Look for them among the functions that are running: a tower that was reduced alone knows of nobody around it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        runs = frame.f_locals.get("self") if frame.f_globals.get("__name__", "").startswith("transformers.models.") else None
        if isinstance(runs, PreTrainedModel):
            why = ""
            if counts := _needs_grid(runs, tower):
                why = (
                    f"{counts}; reduce it with grid=True, and every patch gets the token that it ended in: "
                    f"sv.reduce_(tower, {state.reducer}, grid=True)"
                )
            elif _name(runs, _AVERAGING) and vars(runs).get("squeezevit_state") is not state:
                why = f"takes the mean of its patch tokens, each as one; reduce that model: sv.reduce_(model, {state.reducer})"
            if why and any(part is tower for part in runs.modules()):
                raise UnsupportedError(
                    f"{type(tower).__name__} was reduced alone, and is called by {type(runs).__name__}, which {why}"
                )
        frame = frame.f_back


def _needs_grid(model: PreTrainedModel, tower: nn.Module) -> str:
    """Why a model is only right with the full grid, in words that follow its name; "" where it takes any number of tokens."""
    if _name(tower, BACKBONES):
        return "lays tokens out as images, which reduced tokens do not fill"
    several = isinstance(getattr(model.config, "vision_feature_layer", None), list | tuple)  # whose counts may differ
    if model is tower or (_name(model, ANY_COUNT) and not several):
        return ""
    return f"is not known to take fewer tokens than the full grid has from its {type(tower).__name__}"


@describe.register
def _(model: PreTrainedModel) -> Description:
    if reason := next(filter(None, map(refusal, model.modules())), None):
        raise UnsupportedError(f"{type(model).__name__} cannot be reduced ({reason})")
    names = (*TOWERS, *BACKBONES, *_WRAPPERS)
    towers: dict[str, Any] = {path: m for path, m in model.named_modules() if _name(m, names)}
    held = {part for m in towers.values() if _name(m, BACKBONES) for part in m.modules() if part is not m}  # a backbone's own
    towers = {path: m for path, m in towers.items() if m not in held}
    if len(towers) != 1:
        raise UnsupportedError(_not_one_tower(model, list(towers)))
    (tower,) = towers.values()
    runs = model if _takes_images(model, tower) else tower
    about = _of_wrapped(tower) if _name(tower, _WRAPPERS) else _of_tower(model, tower, runs)
    return replace(
        about,
        mixins=((model, Saving), *about.mixins),
        tower=None if runs is model else tower,
        needs_grid=about.needs_grid or _needs_grid(model, tower),
    )


def _takes_images(model: PreTrainedModel, tower: PreTrainedModel) -> bool:
    """Whether a model may be called with what its tower takes alone."""
    own, towers_own = (next(iter(inspect.signature(m.forward).parameters)) for m in (model, tower))
    return own == towers_own


def _not_one_tower(model: PreTrainedModel, paths: list[str]) -> str:
    known = f"vision towers that SqueezeViT knows ({', '.join(_NAMED)} and others; see `squeezevit families`)"
    name = type(model).__name__
    if not paths:
        return f"{name} has 0 {known}; for one of your own register squeezevit.extend.describe"
    one, *_ = several = [as_python(path) for path in paths if path]
    return (
        f"{name} has {len(paths)} {known}, and a reducer goes into one: sv.reduce_({one}, sv.ETPS(), grid=True), which is right "
        f"for every {name}; there {'are' if len(several) > 1 else 'is'} {', '.join(several)}"
    )


_NAMED = ("ViTModel", "Dinov2Model", "CLIPVisionModel", "SiglipVisionModel")
_WRAPPERS = {"TimmWrapperPreTrainedModel": "timm_model", "TimmBackbone": "_backbone"}


def _of_wrapped(wrapper: PreTrainedModel) -> Description:
    """What is known of the timm model in it."""
    return description_of(getattr(wrapper, _WRAPPERS[cast(str, _name(wrapper, _WRAPPERS))]))


def _of_tower(model: PreTrainedModel, tower: Any, runs: PreTrainedModel) -> Description:
    averages = _name(model, _AVERAGING) is not None
    head = getattr(getattr(tower, "head", None), "attention", None)
    config, encoder = tower.config, tower.get_submodule(BACKBONES.get(_name(tower, BACKBONES) or "", ""))
    mixins: list[tuple[nn.Module, type]] = [(model, Averaging)] if averages else []
    mixins += [(encoder, _TOWERS.get(_name(tower, _TOWERS) or "", HostedTower))]
    mixins += [(head, WeightedPooling)] if head is not None else []
    pooler = tower.pooler if getattr(getattr(tower, "pooler", None), "layernorm", None) is not None else None  # takes a mean
    mixins += [(pooler, PoolingMean)] if pooler is not None else []
    classes = getattr(config, "n_cls_tokens", TOWERS.get(_name(tower, TOWERS) or "", 1))
    size = _size(config)
    return Description(
        blocks=tuple(m for m in tower.modules() if knows(base_class(m))),
        prefix=classes + getattr(config, "num_register_tokens", 0),
        class_token=classes > 0,
        dim=config.hidden_size,
        channels=getattr(config, "num_channels", 1),  # a spectrogram has one
        image_size=size,
        mixins=tuple(mixins),
        grids=True,
        pooled=averages or head is not None or pooler is not None,
        inputs=_inputs(tower),
        options=partial(_resized, runs, size),
        refuse_mass=own_methods(model, ("forward",), "transformers.") if averages else _pools_by_itself(tower),
    )


def _pools_by_itself(tower: Any) -> str:
    """Why masses would not reach a tower's own attention pooling, if they would not."""
    head = getattr(tower, "head", None)
    if head is None or getattr(head, "attention", None) is not None:
        return ""
    return f"its {type(head).__name__} pools tokens as if each stood for one patch"


def _size(config: Any) -> tuple[int, int]:
    """Height and width of the images, or of the spectrograms, that a tower is set up for."""
    if hasattr(config, "num_mel_bins"):
        return config.max_length, config.num_mel_bins
    size = getattr(config, "image_size", None) or config.patch_size * round(config.num_patches**0.5)
    return (size, size) if isinstance(size, int) else tuple(size)


def _inputs(tower: Any) -> Callable[[Tensor], tuple[Tensor | None, ...]] | None:
    """From images [B, channels, H, W], what a tower takes where that is something else."""
    if _name(tower, ("Siglip2VisionModel",)):
        return partial(_patches, tower.config.patch_size)
    if _name(tower, ("ASTModel",)):
        return _spectrogram
    return partial(_still, tower.config.num_frames) if _name(tower, ("VivitModel", "VideoMAEModel")) else None


def _resized(runs: nn.Module, own: tuple[int, int], images: Tensor) -> dict[str, Any]:
    """What asks a model to interpolate its positions, for images of another size than its own, where it must be asked."""
    embeddings = getattr(getattr(runs, "vision_model", runs), "embeddings", runs)
    takers = [inspect.signature(m.forward).parameters for m in (runs, embeddings)]
    asked = any("interpolate_pos_encoding" in parameters for parameters in takers)
    return {"interpolate_pos_encoding": True} if asked and tuple(images.shape[-2:]) != own else {}


def _spectrogram(images: Tensor) -> tuple[Tensor]:
    """Of one channel: [B, 1, time, frequency] -> [B, time, frequency]."""
    return (images[:, 0],)


def _still(frames: int, images: Tensor) -> tuple[Tensor]:
    """A video that shows the same all the time: [B, channels, H, W] -> [B, frames, channels, H, W]."""
    return (images[:, None].expand(-1, frames, -1, -1, -1),)


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

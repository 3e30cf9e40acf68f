"""Tiny models of every kind that is supported, how a question talks to each, and the reducers asked about.

Nothing in them is degenerate: norms, LayerScale, class and register tokens have weights of their own, attention is neither uniform
nor one-hot, and float32 noise stays near 1e-6.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torchvision
import transformers
from open_clip.model import CLIP
from open_clip.transformer import VisionTransformer as OpenClipTower
from timm.layers import Attention, set_reentrant_ckpt, use_reentrant_ckpt
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Reducer, Staged
from squeezevit.reducers.catalog import method
from squeezevit.reducers.per_block import PerBlock

SIZE, PATCH, DIM, DEPTH, HEADS, CLASSES = 64, 8, 48, 4, 3, 10
PATCHES = (SIZE // PATCH) ** 2


class GatedAttention(Attention):
    """timm's own attention with its sigmoid gate switched on, which no entry of `Block` passes through."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, gated=True, **kwargs)


MODELS: dict[str, dict[str, Any]] = {  # timm's VisionTransformer
    "plain": {},
    "distilled": {"cls": VisionTransformerDistilled},
    "layer-scale": {"init_values": 1.0},
    "qk-norm": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1.0},
    "attention-pool": {"class_token": False, "global_pool": "map"},
    "average-pool": {"global_pool": "avg"},
    "gated": {"attn_layer": GatedAttention},
    "res-post-norm": {"class_token": False, "global_pool": "avg", "block_fn": ResPostBlock},
    "pre-norm": {"pre_norm": True, "act_layer": "quick_gelu"},
}
REDUCERS: dict[str, Reducer] = {
    "identity": sv.Identity(),
    "etps": sv.ETPS(keep=0.6),
    "etps-received": sv.ETPS(keep=0.6, score="received"),
    "etps-mass": sv.ETPS(keep=0.6, mass=True),
    "dtps": sv.DTPS(keep=0.6),
    "dtps-topk": sv.DTPS(keep=0.6, train="topk"),
    "evit": sv.EViT(keep=0.6),
    "evit-normalize": sv.EViT(keep=0.6, normalize=True),
    "dynamicvit": sv.DynamicViT(keep=0.6),
    "topk": sv.TopK(keep=0.6),
    "tome": sv.ToMe(r=9),
    "random": sv.Random(keep=0.6, seed=5),
    "preset": replace(method("training-free").template(), keep=0.8),
}
RIVALS: dict[str, Reducer] = {  # asked about in one kind of model, and by turns in another, where the ones above are in all
    "pitome": sv.PiToMe(keep=0.85),
    "tofu": sv.ToFu(r=9),
    "mctf": sv.MCTF(r=9),
    "diffrate": sv.DiffRate(keep=0.8),
    "atc": sv.ATC(keep=0.9),
    "zero-tprune": sv.ZeroTPrune(keep=0.6),
    "merge-error": sv.MergeError(r=9),
    "saint": sv.SAINT(keep=0.8),
    "shift": sv.ETPS(keep=0.6, score="shift"),
    "visionzip": sv.VisionZip(keep=0.6),
    "prumerge": sv.PruMerge(keep=0.6, neighbours=8),
}


@contextmanager
def timm_checkpointing(model: Any, reentrant: bool) -> Iterator[None]:
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(reentrant)
    model.set_grad_checkpointing()
    try:
        yield
    finally:
        set_reentrant_ckpt(before)


@contextmanager
def hugging_face_checkpointing(model: Any, reentrant: bool) -> Iterator[None]:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    yield


@contextmanager
def open_clip_checkpointing(model: Any, reentrant: bool) -> Iterator[None]:
    assert not reentrant, "open_clip has the other kind alone"
    model.set_grad_checkpointing()
    yield


@dataclass(frozen=True)
class Kind:
    """How a kind of model is built and called. What is not given is as in timm."""

    create: Callable[..., nn.Module]  # takes depth, and options of the host's own
    final: str = "norm"  # the module that puts out all final tokens, [B, P + N, C]
    call: Callable[..., Tensor] = nn.Module.__call__  # model, images -> output
    adapted: tuple[str, ...] = ("attn.qkv",)  # linear leaves of a block that take an adapter, those of the scores where they can
    sliced: tuple[str, ...] = ()  # linear leaves of a block whose weight the host reads without calling them
    checkpointing: Callable[[Any, bool], AbstractContextManager[None]] | None = timm_checkpointing
    reentrant: tuple[bool, ...] = (False, True)  # the kinds of checkpointing that the host offers
    resizing: Mapping[str, Any] | None = field(default_factory=lambda: {"dynamic_img_size": True})  # options to take any image size
    resized: Mapping[str, Any] = field(default_factory=dict)  # what must then be said in every call
    features: bool = True  # whether forward_features may be called
    rotary: bool = False  # or else told the places of its tokens
    biased: bool = False  # whether its attention has a learned bias, with whose gradient torch runs another kernel
    traceable: bool = True  # whether shapes and masks are no data, so that the host runs without values, compiles and exports
    packed: str = ""  # what torch's own attention, whose projections are rows of one parameter, is called in a block


def timm_vit(depth: int = DEPTH, cls: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": DIM, "num_heads": HEADS, "num_classes": CLASSES}
    return cls(**{**sizes, "depth": depth, **options})


def hugging_face(name: str, depth: int = DEPTH, **options: Any) -> nn.Module:
    """A model of the class `name` by a configuration of its own kind, or of a vision tower and a text tower."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    values = {
        "hidden_size": DIM,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * DIM,
        "patch_size": PATCH,
        "projection_dim": DIM,
        "num_labels": CLASSES,
        **options,
    }
    values |= {} if "num_patches" in values else {"image_size": SIZE}
    if "vision_config" in config_class.sub_configs:
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
        text |= {"bos_token_id": 7, "eos_token_id": 8}
        values = {"vision_config": values, "text_config": text, "num_labels": CLASSES, "projection_dim": DIM}
    return model_class(config_class(**values))


def torchvision_vit(depth: int = DEPTH) -> nn.Module:
    return torchvision.models.VisionTransformer(SIZE, PATCH, depth, HEADS, DIM, 4 * DIM, num_classes=CLASSES)


def open_clip_tower(depth: int = DEPTH, **options: Any) -> nn.Module:
    return OpenClipTower(SIZE, PATCH, DIM, depth, HEADS, 4.0, output_dim=DIM, **options)


def open_clip(depth: int = DEPTH) -> nn.Module:
    vision = {"layers": depth, "width": DIM, "head_width": DIM // HEADS, "patch_size": PATCH, "image_size": SIZE}
    return CLIP(DIM, vision, {"context_length": 5, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1})


def reading(output: str) -> Callable[..., Tensor]:
    """A call of a Hugging Face model, and one of the things that it returns."""
    return lambda model, x, **options: getattr(model(x, **options), output)


def image_features(model: Any, x: Tensor, **options: Any) -> Tensor:
    return model.get_image_features(x, **options).pooler_output


def encoded_image(model: Any, x: Tensor) -> Tensor:
    return model.encode_image(x)


def unmasked(model: Any, x: Tensor, **options: Any) -> Tensor:
    """The class token of a masked autoencoder's encoder that sees all patches, in their order."""
    n = x.shape[2] // PATCH * (x.shape[3] // PATCH)
    noise = torch.arange(n, device=x.device).expand(x.shape[0], -1)
    return model(x, noise=noise, **options).last_hidden_state[:, 0]


def patchified(model: Any, x: Tensor) -> Tensor:
    """SigLIP 2 takes patches, which of them are no padding, and the shape of their grid."""
    B, _, height, width = x.shape
    rows, columns = height // PATCH, width // PATCH
    patches = x.view(B, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([[rows, columns]] * B)
    return model(patches, pixel_attention_mask=torch.ones(B, rows * columns), spatial_shapes=shapes).pooler_output


EVA = partial(Kind, reentrant=(False,))  # it checkpoints with keyword arguments, which the other kind does not take
EVA_ROTARY = partial(EVA, rotary=True)
HUGGING_FACE = partial(
    Kind,
    adapted=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    checkpointing=hugging_face_checkpointing,
    resizing={},
    resized={"interpolate_pos_encoding": True},
    features=False,
)
HUGGING_FACE_CLIP = partial(HUGGING_FACE, adapted=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
OPEN_CLIP = partial(
    Kind,
    final="transformer",
    adapted=("mlp.c_proj",),
    checkpointing=open_clip_checkpointing,
    reentrant=(False,),
    resizing=None,
    features=False,
    packed="attn",
)
RELATIVE = partial(EVA_ROTARY, resizing=None, biased=True)
BEIT = {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 1.0}
DINOV3 = {"attn_type": "rope", "rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "init_values": 1.0}
DINOV3 |= {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_reg_tokens": 4, "no_embed_class": True}
MIXED = {"attn_type": "rope", "rope_type": "mixed", "rope_grid_indexing": "xy", "rope_temperature": 10.0, "qkv_fused": False}
MIXED |= {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "init_values": 1.0, "class_token": False, "global_pool": "map"}
EVA02 = {"swiglu_mlp": True, "mlp_ratio": 8 / 3, "scale_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}
PE = {
    "attn_type": "rope",
    "use_pre_transformer_norm": True,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (8, 8),
    "global_pool": "map",
}
PE |= {"rope_grid_offset": 1.0, "rope_grid_indexing": "xy"}
KINDS: dict[str, Kind] = {
    **{name: Kind(partial(timm_vit, **options)) for name, options in MODELS.items()},
    "eva02": EVA_ROTARY(partial(timm_vit, cls=Eva, **EVA02), adapted=("attn.proj", "mlp.fc2"), sliced=("attn.qkv",)),
    "dinov3": EVA_ROTARY(partial(timm_vit, cls=Eva, **DINOV3, global_pool="token")),
    "rope-mixed": EVA_ROTARY(partial(timm_vit, cls=Eva, **MIXED), adapted=("attn.q_proj", "attn.k_proj", "attn.v_proj")),
    "eva-post-norm": EVA(partial(timm_vit, cls=Eva, use_post_norm=True), adapted=("attn.proj", "mlp.fc2"), sliced=("attn.qkv",)),
    "pe": EVA_ROTARY(partial(timm_vit, cls=Eva, **PE)),
    "naflex": Kind(
        partial(timm_vit, cls=NaFlexVit, class_token=False, reg_tokens=2, global_pool="avg"),
        resizing={},
        features=False,
        reentrant=(False,),
    ),
    "naflex-map": Kind(
        partial(timm_vit, cls=NaFlexVit, class_token=False, global_pool="map", rope_type="axial", pos_embed="none"),
        resizing={},
        features=False,
        rotary=True,
        reentrant=(False,),
    ),
    "beit": RELATIVE(partial(timm_vit, cls=Beit, **BEIT), adapted=("attn.proj", "mlp.fc2"), sliced=("attn.qkv",)),
    "relative": RELATIVE(partial(timm_vit, cls=VisionTransformerRelPos, init_values=1.0, rel_pos_type="bias", shared_rel_pos=True)),
    "hf-vit": HUGGING_FACE(partial(hugging_face, "ViTForImageClassification"), "vit.layernorm", reading("logits")),
    "hf-deit": HUGGING_FACE(partial(hugging_face, "DeiTForImageClassificationWithTeacher"), "deit.layernorm", reading("logits")),
    "hf-dinov2": HUGGING_FACE(
        partial(hugging_face, "Dinov2ForImageClassification"), "dinov2.layernorm", reading("logits"), resized={}
    ),
    "hf-dinov2-registers": HUGGING_FACE(
        partial(hugging_face, "Dinov2WithRegistersModel", num_register_tokens=3), "layernorm", reading("pooler_output"), resized={}
    ),
    "hf-dinov3": HUGGING_FACE(
        partial(hugging_face, "DINOv3ViTModel", num_register_tokens=4, pos_embed_rescale=None),  # by chance in training
        "norm",
        reading("pooler_output"),
        resized={},
        rotary=True,
    ),
    "hf-clip-tower": HUGGING_FACE_CLIP(
        partial(hugging_face, "CLIPVisionModelWithProjection"), "vision_model.encoder.layers.3", reading("image_embeds")
    ),
    "hf-clip": HUGGING_FACE_CLIP(partial(hugging_face, "CLIPModel"), "vision_model.encoder.layers.3", image_features),
    "hf-siglip-tower": HUGGING_FACE_CLIP(partial(hugging_face, "SiglipVisionModel"), "post_layernorm", reading("pooler_output")),
    "hf-siglip": HUGGING_FACE_CLIP(
        partial(hugging_face, "SiglipForImageClassification"), "vision_model.post_layernorm", reading("logits")
    ),
    "hf-siglip2": HUGGING_FACE_CLIP(
        partial(hugging_face, "Siglip2VisionModel", num_patches=PATCHES), "post_layernorm", patchified, resized={}, traceable=False
    ),
    "hf-mae": HUGGING_FACE(partial(hugging_face, "ViTMAEModel", mask_ratio=0.0), "layernorm", unmasked),
    "hf-ijepa": HUGGING_FACE(partial(hugging_face, "IJepaForImageClassification"), "ijepa.layernorm", reading("logits")),
    "hf-beit": HUGGING_FACE(
        partial(hugging_face, "BeitForImageClassification", use_relative_position_bias=True, drop_path_rate=0.0),
        "beit.layernorm",
        reading("logits"),
        resized={},
        rotary=True,
        biased=True,
    ),
    "hf-data2vec": HUGGING_FACE(
        partial(hugging_face, "Data2VecVisionForImageClassification", use_shared_relative_position_bias=True, drop_path_rate=0.0),
        "data2vec_vision.layernorm",
        reading("logits"),
        adapted=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        resized={},
        rotary=True,
        biased=True,
    ),
    "hf-msn": HUGGING_FACE(partial(hugging_face, "ViTMSNForImageClassification"), "vit.layernorm", reading("logits")),
    "torchvision": Kind(
        torchvision_vit,
        final="encoder",
        adapted=("mlp.3",),
        checkpointing=None,
        resizing=None,
        features=False,
        packed="self_attention",
    ),
    "open_clip-tower": OPEN_CLIP(open_clip_tower),
    "open_clip-average": OPEN_CLIP(partial(open_clip_tower, pool_type="avg", ls_init_value=1.0)),
    "open_clip-attention": OPEN_CLIP(
        partial(open_clip_tower, attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=HEADS)
    ),
    "open_clip": OPEN_CLIP(open_clip, final="visual.transformer", call=encoded_image),
}


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """A tiny model of the kind `name` in evaluation mode, with seeded weights; `options` go to its constructor."""
    return randomize(KINDS[name].create(**options), seed).eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Seeded weights: unit-variance linear maps (times gain), scales around 1, tokens and positions of size 0.5, small biases."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if noise.dim() > 1 and name.endswith("weight") and not isinstance(module, nn.Embedding):
                value = noise * gain * parameter[0].numel() ** -0.5
            elif noise.dim() == 1 and name.startswith(("weight", "gamma", "lambda")):
                value = 1 + 0.2 * noise
            else:
                value = noise * (0.1 if name.endswith("bias") else 0.5)
            parameter.copy_(value)
    return model


def build_like(model: nn.Module) -> Any:
    """A copy of a model, unreduced."""
    return sv.restore_(copy.deepcopy(model))


def reduce(model: Any, reducer: Reducer, seed: int = 0) -> Any:
    """`reduce_`, with learned heads whose scores lie well apart (fresh ones score all tokens nearly alike)."""
    sv.reduce_(model, reducer)
    if reducer.learned:
        randomize(model.token_reducer, seed + 100, gain=1.5)
    return model


def blocks(model: nn.Module) -> Sequence[nn.Module]:
    """Transformer blocks of a model of any family."""
    return description_of(model).blocks


def prefix(model: nn.Module) -> int:
    """How many class, distillation and register tokens a model of any family has."""
    return description_of(model).prefix


def replace_block(model: nn.Module, index: int, block: nn.Module) -> None:
    """Put another block where block number `index` is."""
    old = blocks(model)[index]
    path = next(path for path, module in model.named_modules() if module is old)
    model.set_submodule(path, block)


def switched_off(reducer: Reducer) -> Reducer:
    """The same reducer, set so that it removes nothing."""
    if isinstance(reducer, Staged):
        return replace(reducer, keep=1.0)
    return replace(reducer, r=0) if isinstance(reducer, PerBlock) else reducer


def images(count: int = 3, size: int | tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output, nothing recorded for a backward."""
    with torch.no_grad():
        return model(x)

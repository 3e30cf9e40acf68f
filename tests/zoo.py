"""Tiny timm models of every kind that is supported, and the reducers asked about.

Nothing in them is degenerate: norms, LayerScale, class and register tokens have weights of their own, attention is neither uniform
nor one-hot, and float32 noise stays near 1e-6.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.reducer import Reducer, Staged

SIZE, PATCH, DIM, DEPTH, HEADS, CLASSES = 64, 8, 48, 4, 3, 10
PATCHES = (SIZE // PATCH) ** 2


class GatedAttention(Attention):
    """timm's own attention with its sigmoid gate switched on, which no entry of `Block` passes through."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, gated=True, **kwargs)


MODELS: dict[str, dict[str, Any]] = {
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
}


def build(name: str, seed: int = 0, **options: Any) -> VisionTransformer:
    """A tiny model of the kind `name` in evaluation mode, with seeded weights; `options` go to its constructor."""
    options = {
        "img_size": SIZE,
        "patch_size": PATCH,
        "embed_dim": DIM,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
        **MODELS[name],
        **options,
    }
    model = options.pop("cls", VisionTransformer)(**options)
    return randomize(model, seed).eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Seeded weights: unit-variance linear maps (times gain), scales around 1, tokens and positions of size 0.5, small biases."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                value = noise * gain * parameter[0].numel() ** -0.5
            elif name in ("weight", "gamma"):
                value = 1 + 0.2 * noise
            else:
                value = noise * (0.1 if name == "bias" else 0.5)
            parameter.copy_(value)
    return model


def build_like(model: VisionTransformer) -> VisionTransformer:
    """A copy of a model, unreduced."""
    return sv.restore_(copy.deepcopy(model))


def reduce(model: VisionTransformer, reducer: Reducer, seed: int = 0) -> VisionTransformer:
    """`reduce_`, with learned heads whose scores lie well apart (fresh ones score all tokens nearly alike)."""
    sv.reduce_(model, reducer)
    if reducer.learned:
        randomize(model.token_reducer, seed + 100, gain=1.5)
    return model


def switched_off(reducer: Reducer) -> Reducer:
    """The same reducer, set so that it removes nothing."""
    if isinstance(reducer, Staged):
        return replace(reducer, keep=1.0)
    return replace(reducer, r=0) if isinstance(reducer, sv.ToMe) else reducer


def images(count: int = 3, size: int | tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output, nothing recorded for a backward."""
    with torch.no_grad():
        return model(x)

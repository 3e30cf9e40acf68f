"""timm's VisionTransformer, Eva and Beit: ViT, DeiT, DINOv2, CLIP, SigLIP, MAE, EVA, DINOv3, PE and all others of plain blocks."""

import importlib
import sys
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from timm.models._features import FeatureGetterNet
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

from squeezevit.core import ops
from squeezevit.core.block import State
from squeezevit.core.cut import (
    ANY_PAIRS,
    Description,
    arguments,
    attention,
    attn_half,
    convert,
    describe,
    mlp_half,
    pairs,
    projections,
    trial_patches,
)
from squeezevit.core.evidence import Attention, compute, is_plain, output, recorded
from squeezevit.core.trace import Trace
from squeezevit.errors import CheckpointError, UnsupportedError
from squeezevit.families.tokens import Intermediates, Without, full_weights, on_grid, own_methods, traced, weighted


def load() -> None:
    """Models that not every version of timm has."""
    if "timm.models.qwen3_vit" in sys.modules:
        importlib.import_module("squeezevit.families.timm_qwen")


@attn_half.register
def _(block: Block, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))


@mlp_half.register(Block)
@mlp_half.register(RelPosBlock)
def _(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@attention.register(Block)
@attention.register(BeitBlock)
@attention.register(RelPosBlock)
def _(block: Any, x: Tensor) -> Attention:
    return _attention(block.attn, output(block.norm1, x))


@attn_half.register
def _(block: ResPostBlock, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x + block.drop_path1(block.norm1(block.attn(x, attn_mask=bias)))


@mlp_half.register(ResPostBlock)
@mlp_half.register(ResPostRelPosBlock)
@mlp_half.register(EvaBlockPostNorm)
def _(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


@attention.register(ResPostBlock)
@attention.register(ResPostRelPosBlock)
def _(block: Any, x: Tensor) -> Attention:
    return _attention(block.attn, x)


@attn_half.register
def _(block: EvaBlock, x: Tensor, bias: Tensor | None = None, rope: Tensor | None = None) -> Tensor:
    y = block.attn(block.norm1(x), rope=rope, attn_mask=bias)
    return x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)


@mlp_half.register(EvaBlock)
@mlp_half.register(BeitBlock)
def _(block: Any, x: Tensor) -> Tensor:
    y = block.mlp(block.norm2(x))
    return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


@attention.register
def _(block: EvaBlock, x: Tensor, rope: Tensor | None = None) -> Attention:
    return _attention(block.attn, output(block.norm1, x), rope)


@attn_half.register
def _(block: EvaBlockPostNorm, x: Tensor, bias: Tensor | None = None, rope: Tensor | None = None) -> Tensor:
    return x + block.drop_path1(block.norm1(block.attn(x, rope=rope, attn_mask=bias)))


@attention.register
def _(block: EvaBlockPostNorm, x: Tensor, rope: Tensor | None = None) -> Attention:
    return _attention(block.attn, x, rope)


@attn_half.register
def _(block: BeitBlock, x: Tensor, bias: Tensor | None = None) -> Tensor:
    if block.attn.relative_position_bias_table is None and bias is not None and len(bias) == 1:
        bias = bias[0]  # as the library has it, for the sake of the last bits
    y = Without(block.attn, relative_position_bias_table=None)(block.norm1(x), shared_rel_pos_bias=bias)
    return x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)


@pairs.register
def _(block: BeitBlock, shared_rel_pos_bias: Tensor | None = None) -> Tensor | None:
    own = None if block.attn.relative_position_bias_table is None else block.attn._get_rel_pos_bias()
    shared = shared_rel_pos_bias if shared_rel_pos_bias is None or shared_rel_pos_bias.dim() == 4 else shared_rel_pos_bias[None]
    return ops.summed(own, shared)


@attn_half.register
def _(block: RelPosBlock, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x + block.drop_path1(block.ls1(Without(block.attn, rel_pos=None)(block.norm1(x), shared_rel_pos=bias)))


@attn_half.register
def _(block: ResPostRelPosBlock, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x + block.drop_path1(block.norm1(Without(block.attn, rel_pos=None)(x, shared_rel_pos=bias)))


@pairs.register(RelPosBlock)
@pairs.register(ResPostRelPosBlock)
def _(block: Any, shared_rel_pos: Tensor | None = None) -> Tensor | None:
    return shared_rel_pos if block.attn.rel_pos is None else block.attn.rel_pos.get_bias()


@arguments.register
def _(block: BeitBlock, patches: Tensor) -> dict[str, Any]:
    return {"shared_rel_pos_bias": ANY_PAIRS}


@arguments.register(RelPosBlock)
@arguments.register(ResPostRelPosBlock)
def _(block: Any, patches: Tensor) -> dict[str, Any]:
    return {"shared_rel_pos": ANY_PAIRS} if block.attn.rel_pos is None else {}


@trial_patches.register(BeitBlock)
@trial_patches.register(RelPosBlock)
@trial_patches.register(ResPostRelPosBlock)
def _(block: Any) -> int:
    window = getattr(getattr(block.attn, "rel_pos", block.attn), "window_size", None)
    return 6 if window is None else window[0] * window[1]


@projections.register(Block)
@projections.register(BeitBlock)
@projections.register(RelPosBlock)
@projections.register(ResPostRelPosBlock)
@projections.register(ResPostBlock)
@projections.register(EvaBlock)
@projections.register(EvaBlockPostNorm)
def _(block: Any) -> tuple[nn.Module, ...]:
    names = ("q_proj", "k_proj") if getattr(block.attn, "qkv", None) is None else ("qkv",)
    found = [m for name in names if isinstance(m := getattr(block.attn, name, None), nn.Module)]
    norm = None if isinstance(block, (ResPostBlock, EvaBlockPostNorm, ResPostRelPosBlock)) else getattr(block, "norm1", None)
    before = (norm,) if isinstance(norm, nn.Module) else ()
    return (*before, *found) if len(found) == len(names) else ()


@arguments.register(EvaBlock)
@arguments.register(EvaBlockPostNorm)
def _(block: Any, patches: Tensor) -> dict[str, Any]:
    return {"rope": patches[:, :1].expand(-1, 2 * _head_dim(block.attn)).cumsum(dim=1).sin()}


def _attention(attn: Any, x: Tensor, rope: Tensor | None = None) -> Attention:
    plain = TimmAttention, AttentionRope, EvaAttention, BeitAttention, RelPosAttention
    known = next((c for c in plain if type(attn).forward is c.forward), None)
    if known is None:
        raise UnsupportedError(
            f"attention of class {type(attn).__module__}.{type(attn).__qualname__} has no plain rows to score by; choose a "
            "reducer with another score (DTPS, Random), or register squeezevit.extend.attention for its block"
        )
    known_keys = recorded(attn.k_proj if attn.qkv is None else attn.qkv) is not None
    folds = rope is None and isinstance(_norm(attn, 1), nn.Identity) and not known_keys
    weight, bias = _weights(attn, 1) if folds else (None, None)
    if weight is not None and weight.shape[0] != attn.num_heads * _head_dim(attn):  # heads that share their keys
        weight = bias = None
    return Attention(
        x, attn.num_heads, lambda n: _project(attn, 0, x[:, :n], rope), lambda: _project(attn, 1, x, rope), weight, bias
    )


def _project(attn: Any, which: int, x: Tensor, rope: Tensor | None) -> Tensor:
    """Scaled queries (which = 0) or keys (which = 1): [B, T, C] -> [B, H, T, d]."""
    weight, bias = (None, None) if attn.qkv is None or recorded(attn.qkv) is not None else _weights(attn, which)
    if attn.qkv is None:
        y = output((attn.q_proj, attn.k_proj)[which], x)
    elif weight is not None:
        y = F.linear(x, weight, bias)
    else:  # known, or an adapter, a quantised leaf, a sharded weight: only the module itself knows
        y = output(attn.qkv, x).chunk(3, dim=-1)[which]
        own = _own_bias(attn, which)
        y = y if own is None else y + own
    d = _head_dim(attn)
    y = y.reshape(y.shape[0], y.shape[1], int(y.shape[2]) // d, d).transpose(1, 2)  # unflatten fixes the batch size in ONNX
    y = compute(_norm(attn, which), y)
    prefix = 0 if rope is None else attn.num_prefix_tokens
    if rope is not None and y.shape[2] > prefix:
        rotated = apply_rot_embed_cat(y[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
        y = torch.cat([y[:, :, :prefix], rotated], dim=2)
    if not which:
        return y * (d**-0.5 if attn.fused_attn else attn.scale)  # fused attention has the scale of its width, whatever is set
    return y if y.shape[1] == attn.num_heads else y.repeat_interleave(attn.num_heads // y.shape[1], dim=1)


def _norm(attn: Any, which: int) -> nn.Module:
    """Of queries (0) or keys (1); BEiT's attention has none."""
    return getattr(attn, ("q_norm", "k_norm")[which], _NO_NORM)


_NO_NORM = nn.Identity()


def _weights(attn: Any, which: int) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of the query (0) or key (1) projection, where it is a plain linear map that may be sliced."""
    if attn.qkv is None:
        linear = (attn.q_proj, attn.k_proj)[which]
        return (linear.weight, linear.bias) if is_plain(linear) else (None, None)
    own = _own_bias(attn, which)
    if not (is_plain(attn.qkv) or (own is not None and not attn.qkv_bias_separate)):  # then timm slices, too
        return None, None
    size = attn.num_heads * _head_dim(attn)
    rows = slice(which * size, (which + 1) * size)
    return attn.qkv.weight[rows], own if own is not None or attn.qkv.bias is None else attn.qkv.bias[rows]


def _head_dim(attn: Any) -> int:
    """Of queries and keys; EVA's attention has not said it in every version."""
    own = getattr(attn, "head_dim", None)
    return round(attn.scale**-2) if own is None else own


def _own_bias(attn: Any, which: int) -> Tensor | None:
    """EVA keeps the biases of its fused projection apart."""
    return None if getattr(attn, "q_bias", None) is None else (attn.q_bias, attn.k_bias)[which]


class ReducedFeatures(Intermediates):
    """What a reduced model puts out before anything is pooled."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """The library's own; tokens' weights go with the features they belong to, for whoever pools them and when."""
        state = self.squeezevit_state
        state.forwards.enter()
        done = False
        try:
            with traced(cast(nn.Module, self), state) as t:
                x = super().forward_features(*args, **kwargs)
            if state.trace is not None:
                state.trace.tokens = x[:, state.prefix :]
            weights = state.final_weights(self)
            if state.grid and state.stages:
                x = on_grid(x, cast(Trace, t), self.squeezevit_state.depth)
                weights = full_weights(cast(Trace, t), x.dtype)
                state.discards = weights is not None
            x.squeezevit_weights = weights
            done = True
        finally:
            state.forwards.exit(done)
        return x

    def _grid_shape(self, x: Tensor) -> tuple[int, int]:
        return self.patch_embed.dynamic_feat_size(x.shape[-2:])


class ReducedVisionTransformer(ReducedFeatures):
    """The same, and how a model pools its tokens."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pooling in which a token counts as many times as it has patches; where all count the same, the library's own."""
        if self._pools_patches(pool_type):
            _require_weights(x, self.squeezevit_state, self)
        return self._pool(x, pool_type, getattr(x, "squeezevit_weights", None))

    def _pools_patches(self, pool_type: str | None) -> bool:
        pool_type = self.global_pool if pool_type is None else pool_type
        return self.attn_pool is not None or pool_type in ("avg", "avgmax")

    def _first_pooled(self) -> int:
        return 0 if self.pool_include_prefix else self.num_prefix_tokens

    def _pool(self, x: Tensor, pool_type: str | None, weights: Tensor | None) -> Tensor:
        pool_type = self.global_pool if pool_type is None else pool_type
        if weights is None:
            return super().pool(x, pool_type)
        first = self._first_pooled()
        if self.attn_pool is not None:
            bias = (weights[:, None, None, first:] + 1e-6).log().to(x.dtype)  # masked tokens weigh 0
            return self.attn_pool(x[:, first:], attn_mask=bias)
        if pool_type == "avgmax":
            return 0.5 * (self._pool(x, "max", weights) + self._pool(x, "avg", weights))
        if pool_type == "max":
            return super().pool(x.masked_fill((weights < 0.5)[..., None], float("-inf")), "max")
        if pool_type == "prr":
            raise UnsupportedError(f"'prr' pooling attends without a mask, which {type(self).__name__} needs in masked training")
        if pool_type != "avg":
            return super().pool(x, pool_type)
        share = weights / weights[:, first:].mean(dim=1, keepdim=True)
        return super().pool((x * share[..., None]).to(x.dtype), pool_type)


class ReducedEva(ReducedVisionTransformer):
    """The same for Eva, whose attention pooling sees the prefix tokens, too."""

    def _first_pooled(self) -> int:
        return 0 if self.attn_pool is not None else self.num_prefix_tokens


class ReducedRelative(ReducedFeatures):
    """The same for models whose head takes the mean of its tokens, or the class token, itself."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        state = self.squeezevit_state
        if self.global_pool == "avg":
            _require_weights(x, state, cast(nn.Module, self))
        return super().forward_head(weighted(x, getattr(x, "squeezevit_weights", None), state.prefix), pre_logits=pre_logits)


def _require_weights(x: Tensor, state: State, module: nn.Module) -> None:
    """Raise UnsupportedError where patches are pooled by weights that the features have lost."""
    weighed = state.stages and (state.reducer.follows(state.training(module)) or (state.grid and state.discards))
    if weighed and not hasattr(x, "squeezevit_weights"):
        raise UnsupportedError(
            f"these features have lost the weights that {state.reducer} gave their tokens, which pooling needs; pool the very "
            "tensor that forward_features returned"
        )


class ReducedNaFlexVit(ReducedFeatures):
    """The same for NaFlexVit, given images of one size: patches with coordinates and a mask are refused."""

    def forward_features(self, patches: Tensor, patch_coord: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        self._require_images(patch_coord)
        return super().forward_features(patches, patch_coord, *args, **kwargs)

    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self._require_images(x.get("patch_coord") if isinstance(x, dict) else kwargs.get("patch_coord"))
        return super().forward_intermediates(x, *args, **kwargs)

    def _require_images(self, patch_coord: Tensor | None) -> None:
        if patch_coord is not None and self.squeezevit_state.stages:
            raise UnsupportedError(
                f"{type(self).__name__} was given patches with coordinates, among which a reducer cannot tell padding; give "
                "images of one size, [B, 3, H, W], or sv.restore_ it first"
            )

    def _pool(self, x: Tensor, pool_type: str | None = None, patch_valid: Any = None) -> Tensor:
        own, weights = super()._pool, getattr(x, "squeezevit_weights", None)
        pool_type = self.global_pool if pool_type is None else pool_type
        if self.attn_pool is not None or pool_type in ("avg", "avgmax", "max"):
            _require_weights(x, self.squeezevit_state, cast(nn.Module, self))
        if weights is None:
            return own(x, pool_type, patch_valid)
        if self.attn_pool is not None:
            first = 0 if self.pool_include_prefix else self.num_prefix_tokens
            return self.attn_pool(x[:, first:], attn_mask=(weights[:, None, None, first:] + 1e-6).log().to(x.dtype))
        if pool_type == "avgmax":
            return 0.5 * (self._pool(x, "max", patch_valid) + self._pool(x, "avg", patch_valid))
        if pool_type == "max":
            return own(x.masked_fill((weights < 0.5)[..., None], float("-inf")), "max", patch_valid)
        return own(weighted(x, weights, self.num_prefix_tokens), pool_type, patch_valid)


@describe.register
def _(model: NaFlexVit) -> Description:
    built_for: dict[str, Any] = getattr(model, "default_cfg", None) or {}
    _, height, width = built_for.get("input_size", (3, 224, 224))
    pools = model.attn_pool is not None or model.global_pool in ("avg", "token", "")
    return Description(
        blocks=tuple(model.blocks),
        prefix=model.num_prefix_tokens,
        class_token=model.embeds.cls_token is not None,
        dim=model.embed_dim,
        channels=model.embeds.in_chans if hasattr(model.embeds, "in_chans") else 3,
        image_size=(height, width),
        mixins=((model, ReducedNaFlexVit),),
        pooled=True,
        refuse_mass="" if pools else f"its {model.global_pool!r} pooling takes no weights",
    )


@describe.register
def _(model: VisionTransformer) -> Description:
    has_class_token = bool(getattr(model, "has_class_token", model.cls_token is not None))
    return _host(model, ReducedVisionTransformer, has_class_token)


@describe.register
def _(model: Eva) -> Description:
    return _host(model, ReducedEva, model.cls_token is not None)


@describe.register(Beit)
@describe.register(VisionTransformerRelPos)
def _(model: Any) -> Description:
    return _host(model, ReducedRelative, model.cls_token is not None)


def _host(model: Any, mixin: type, class_token: bool) -> Description:
    size = getattr(model.patch_embed, "img_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return Description(
        blocks=tuple(model.blocks),
        prefix=model.num_prefix_tokens,
        class_token=class_token,
        dim=model.embed_dim,
        channels=next((m.in_channels for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d)), 3),  # a hybrid has several
        image_size=(int(height), int(width)),
        mixins=((model, mixin),),
        grids=True,
        pooled=True,
        refuse_mass=_refuse_mass(model),
    )


@describe.register
def _(model: FeatureGetterNet) -> Description:
    """What `features_only=True` builds."""
    maps = "" if model.output_fmt == "NLC" else "lays the tokens of its blocks out as images, which reduced tokens do not fill"
    return replace(describe(model.model), needs_grid=maps)


def _refuse_mass(model: Any) -> str:
    if model.global_pool == "prr":
        return "its 'prr' pooling attends without a mask"
    names = ("forward", "forward_features", "forward_head", "pool")
    return own_methods(model, [name for name in names if hasattr(model, name)], "timm.")


@convert.register(VisionTransformer)
@convert.register(Eva)
@convert.register(Beit)
@convert.register(VisionTransformerRelPos)
def _(model: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {Eva: eva, Beit: beit, VisionTransformerRelPos: vision_transformer_relpos}
    library: Any = next((module for kind, module in own.items() if isinstance(model, kind)), vision_transformer)
    converter = library.checkpoint_filter_fn
    try:
        with torch.no_grad():
            return converter(state_dict, model)
    except Exception as error:  # the converter knows other libraries' files by a key or two and fails in its own ways
        raise CheckpointError(
            f"timm cannot fit the checkpoint to this {type(model).__name__} ({error}); build the model it was saved from"
        ) from error

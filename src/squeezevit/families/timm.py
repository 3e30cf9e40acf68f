"""timm's VisionTransformer: ViT, DeiT (distilled too), DeiT-III, DINOv2, CLIP, SigLIP, MAE and all others with plain blocks."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from squeezevit.errors import CheckpointError, UnsupportedError
from squeezevit.families import Host, attention, attn_half, convert, host, mlp_half
from squeezevit.reducer import Attention


@attn_half.register
def _(block: Block, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))


@mlp_half.register
def _(block: Block, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@attention.register
def _(block: Block, x: Tensor) -> Attention:
    return _attention(block.attn, block.norm1(x))


@attn_half.register
def _(block: ResPostBlock, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x + block.drop_path1(block.norm1(block.attn(x, attn_mask=bias)))


@mlp_half.register
def _(block: ResPostBlock, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


@attention.register
def _(block: ResPostBlock, x: Tensor) -> Attention:
    return _attention(block.attn, x)


def _attention(attn: nn.Module, x: Tensor) -> Attention:
    if not isinstance(attn, TimmAttention) or type(attn).forward is not TimmAttention.forward:
        raise UnsupportedError(
            f"attention of class {type(attn).__module__}.{type(attn).__qualname__} has no plain rows to score by; choose a "
            "reducer with another score (DTPS, Random), or register squeezevit.families.attention for its block"
        )
    query = partial(_project, attn, 0)
    key = partial(_project, attn, 1)
    plain = _is_plain(attn.qkv) and isinstance(attn.k_norm, nn.Identity)
    rows = slice(attn.attn_dim, 2 * attn.attn_dim)
    weight = attn.qkv.weight[rows] if plain else None
    bias = attn.qkv.bias[rows] if plain and attn.qkv.bias is not None else None
    return Attention(x, attn.num_heads, query, key, weight, bias)


def _project(attn: TimmAttention, which: int, x: Tensor) -> Tensor:
    """Scaled queries (which = 0) or keys (which = 1): [B, T, C] -> [B, H, T, d]."""
    if _is_plain(attn.qkv):
        rows = slice(which * attn.attn_dim, (which + 1) * attn.attn_dim)
        y = F.linear(x, attn.qkv.weight[rows], None if attn.qkv.bias is None else attn.qkv.bias[rows])
    else:  # an adapter, a quantised leaf, a sharded weight: only the module itself knows
        y = attn.qkv(x).chunk(3, dim=-1)[which]
    y = y.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
    return attn.k_norm(y) if which else attn.q_norm(y) * attn.scale


def _is_plain(linear: nn.Module) -> bool:
    """Whether the module is exactly x W^T + b with an ordinary weight that may be sliced."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor) and not hooked


class ReducedVisionTransformer:
    """What a reduced model does with its tokens after the blocks."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's own; tokens' weights go with the features they belong to, for whoever pools them and when."""
        x = super().forward_features(*args, **kwargs)  # type: ignore[misc]
        state = self.squeezevit_state  # type: ignore[attr-defined]
        if state.trace is not None:
            state.trace.tokens = x[:, state.prefix :]
        x.squeezevit_weights = state.final_weights(state.training(self))
        return x

    def forward_intermediates(self, x: Tensor, *args: Any, output_fmt: str = "NCHW", **kwargs: Any) -> Any:
        """The host's own as tokens; refused as grids, which reduced tokens do not fill."""
        state = self.squeezevit_state  # type: ignore[attr-defined]
        if output_fmt != "NLC" and state.stages:
            raise UnsupportedError(
                f"forward_intermediates(output_fmt={output_fmt!r}) lays tokens out as a grid, which those left by {state.reducer} "
                "do not fill; give output_fmt='NLC', and sv.trace with its scatter_back where a grid is needed"
            )
        return super().forward_intermediates(x, *args, output_fmt=output_fmt, **kwargs)  # type: ignore[misc]

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pooling in which a token counts as many times as it has patches; where all count the same, the host's own."""
        state = self.squeezevit_state  # type: ignore[attr-defined]
        follows = state.reducer.follows(state.training(self))
        if follows and not hasattr(x, "squeezevit_weights") and self._pools_patches(pool_type):
            raise UnsupportedError(
                f"these features have lost the weights that {state.reducer} gave their tokens, which pooling needs; pool the very "
                "tensor that forward_features returned"
            )
        return self._pool(x, pool_type, getattr(x, "squeezevit_weights", None))

    def _pools_patches(self, pool_type: str | None) -> bool:
        pool_type = self.global_pool if pool_type is None else pool_type  # type: ignore[attr-defined]
        return self.attn_pool is not None or pool_type in ("avg", "avgmax")  # type: ignore[attr-defined]

    def _pool(self, x: Tensor, pool_type: str | None, weights: Tensor | None) -> Tensor:
        pool = super().pool  # type: ignore[misc]
        pool_type = self.global_pool if pool_type is None else pool_type  # type: ignore[attr-defined]
        if weights is None:
            return pool(x, pool_type)
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens  # type: ignore[attr-defined]
        if self.attn_pool is not None:  # type: ignore[attr-defined]
            bias = (weights[:, None, None, first:] + 1e-6).log().to(x.dtype)  # masked tokens weigh 0
            return self.attn_pool(x[:, first:], attn_mask=bias)  # type: ignore[attr-defined]
        if pool_type == "avgmax":
            return 0.5 * (self._pool(x, "max", weights) + self._pool(x, "avg", weights))
        if pool_type == "max":
            return pool(x.masked_fill((weights < 0.5)[..., None], float("-inf")), "max")
        if pool_type == "prr":
            raise UnsupportedError(f"'prr' pooling attends without a mask, which {type(self).__name__} needs in masked training")
        if pool_type != "avg":
            return pool(x, pool_type)
        share = weights / weights[:, first:].mean(dim=1, keepdim=True)
        return pool((x * share[..., None]).to(x.dtype), pool_type)


@host.register
def _(model: VisionTransformer) -> Host:
    size = getattr(model.patch_embed, "img_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    proj = getattr(model.patch_embed, "proj", None)
    return Host(
        blocks=tuple(model.blocks),
        prefix=model.num_prefix_tokens,
        class_token=bool(getattr(model, "has_class_token", model.cls_token is not None)),
        dim=model.embed_dim,
        channels=getattr(proj, "in_channels", 3),
        image_size=(int(height), int(width)),
        mixin=ReducedVisionTransformer,
        refuse_mass="its 'prr' pooling attends without a mask" if model.global_pool == "prr" else "",
    )


@convert.register
def _(model: VisionTransformer, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            return checkpoint_filter_fn(state_dict, model)
    except Exception as error:  # the converter knows other libraries' files by a key or two and fails in its own ways
        raise CheckpointError(
            f"timm cannot fit the checkpoint to this {type(model).__name__} ({error}); build the model it was saved from"
        ) from error

"""open_clip's image towers: its own VisionTransformer, and timm's behind its wrapper, alone or inside a CLIP."""

from dataclasses import replace
from typing import Any

from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from squeezevit.errors import UnsupportedError
from squeezevit.families import Host, attention, attn_half, host, mlp_half, multihead, output, projections
from squeezevit.families.tokens import WeightedPooling, weighted
from squeezevit.reducer import Attention


@attn_half.register
def _(block: ResidualAttentionBlock, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x + block.ls_1(multihead.attend(block.attn, block.ln_1(x), bias))


@mlp_half.register
def _(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@attention.register
def _(block: ResidualAttentionBlock, x: Tensor) -> Attention:
    return multihead.scores(block.attn, output(block.ln_1, x))


@projections.register
def _(block: ResidualAttentionBlock) -> tuple[nn.Module, ...]:
    return (block.ln_1,)  # queries and keys come from rows of a parameter


class ReducedVisual:
    """Pooling in which a token counts by its weight, and the normed tokens for traces."""

    def _pool(self, x: Tensor) -> Any:
        state = self.squeezevit_state  # type: ignore[attr-defined]
        if state.trace is not None:
            state.trace.tokens = self.ln_post(x)[:, state.prefix :] if self.attn_pool is None else x[:, state.prefix :]  # type: ignore[attr-defined]
        out = super()._pool(x)  # type: ignore[misc]
        state.final_weights(state.training(self))
        return out

    def _global_pool(self, x: Tensor) -> Any:
        pooled, tokens = super()._global_pool(x)  # type: ignore[misc]
        state = self.squeezevit_state  # type: ignore[attr-defined]
        weights = state.final_weights(state.training(self), last=False)
        if self.pool_type == "avg" and self.attn_pool is None and weights is not None:  # type: ignore[attr-defined]
            pooled = super()._global_pool(weighted(x, weights, state.prefix))[0]  # type: ignore[misc]
        return pooled, tokens


@host.register
def _(model: VisionTransformer) -> Host:
    if not model.transformer.batch_first:
        raise UnsupportedError("this VisionTransformer runs with tokens first; build it with batch_first=True")
    pools = [p.attn for p in (model.attn_pool, getattr(model, "attn_pool_contrastive", None)) if p is not None]
    pools = pools[:1] if getattr(model, "attn_pool_type", "") == "cascade" else pools  # the second then pools the first's queries
    return Host(
        blocks=tuple(model.transformer.resblocks),
        prefix=1,
        class_token=True,
        dim=model.transformer.width,
        channels=model.conv1.in_channels,
        image_size=tuple(model.image_size),
        mixins=((model, ReducedVisual), *((pool, WeightedPooling) for pool in pools)),
        pooled=True,
    )


@host.register(CLIP)
@host.register(CustomTextCLIP)
@host.register(CoCa)
def _(model: Any) -> Host:
    return replace(host(model.visual), tower=model.visual)


@host.register
def _(model: TimmModel) -> Host:
    return host(model.trunk)

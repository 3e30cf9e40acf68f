"""open_clip's image towers: its own VisionTransformer, and timm's behind its wrapper, alone or inside a CLIP."""

from dataclasses import replace
from typing import Any, cast

from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from squeezevit.core.cut import Description, attention, attn_half, describe, mlp_half, projections
from squeezevit.core.evidence import Attention, output
from squeezevit.core.trace import Trace, spread
from squeezevit.errors import UnsupportedError
from squeezevit.families import multihead
from squeezevit.families.tokens import Intermediates, WeightedPooling, own_methods, traced, weighted


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


class ReducedVisual(Intermediates):
    """Pooling in which a token counts by its weight, and the normed tokens for traces."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.squeezevit_state
        state.forwards.enter()
        done = False
        try:
            with traced(cast(nn.Module, self), state):
                out = super().forward(*args, **kwargs)
            done = True
        finally:
            state.forwards.exit(done)
        return out

    def _grid_shape(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]

    def _pool(self, x: Tensor) -> Any:
        state = self.squeezevit_state
        if state.trace is not None:
            state.trace.tokens = self.ln_post(x)[:, state.prefix :] if self.attn_pool is None else x[:, state.prefix :]
        pooled, tokens = super()._pool(x)
        state.final_weights(self)
        if state.grid and state.stages and self.attn_pool is None:
            tokens = spread(tokens, cast(Trace, state.trace).groups)
        return pooled, tokens

    def _global_pool(self, x: Tensor) -> Any:
        pooled, tokens = super()._global_pool(x)
        state = self.squeezevit_state
        weights = state.final_weights(self, last=False)
        if self.pool_type == "avg" and self.attn_pool is None and weights is not None:
            pooled = super()._global_pool(weighted(x, weights, state.prefix))[0]
        return pooled, tokens


@describe.register
def _(model: VisionTransformer) -> Description:
    if not model.transformer.batch_first:
        raise UnsupportedError("this VisionTransformer runs with tokens first; build it with batch_first=True")
    pools = [p.attn for p in (model.attn_pool, getattr(model, "attn_pool_contrastive", None)) if p is not None]
    pools = pools[:1] if getattr(model, "attn_pool_type", "") == "cascade" else pools  # the second then pools the first's queries
    return Description(
        blocks=tuple(model.transformer.resblocks),
        prefix=1,
        class_token=True,
        dim=model.transformer.width,
        channels=model.conv1.in_channels,
        image_size=tuple(model.image_size),
        mixins=((model, ReducedVisual), *((pool, WeightedPooling) for pool in pools)),
        grids=True,
        pooled=True,
        refuse_mass=own_methods(model, ("forward", "_pool", "_global_pool"), "open_clip."),
    )


@describe.register(CLIP)
@describe.register(CustomTextCLIP)
@describe.register(CoCa)
def _(model: Any) -> Description:
    return replace(describe(model.visual), tower=model.visual)


@describe.register
def _(model: TimmModel) -> Description:
    return describe(model.trunk)

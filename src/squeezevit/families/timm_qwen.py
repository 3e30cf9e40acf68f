"""timm's Qwen3 vision towers, which lay their tokens out as a grid after the last block: known blocks in models of their own."""

from typing import Any, cast

from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import Tensor, nn

from squeezevit.core.cut import Description, describe
from squeezevit.core.trace import Trace
from squeezevit.families.tokens import Averaging, Intermediates, blocks_taken, full_weights, on_grid, traced, weighted

_GRID = "lays its tokens out as a grid after the last block, which reduced tokens do not fill"


class ReducedQwen3(Intermediates):
    """An encoder whose features are the full grid, [B, rows, columns, C], each patch holding the token that it ended in."""

    def forward_features(self, x: Tensor) -> Tensor:
        state = self.squeezevit_state
        run = state.forward
        averaged, run.averaging = run.averaging, False
        if not (state.grid and state.stages):
            return super().forward_features(x)
        state.forwards.enter()
        done = False
        try:
            with traced(cast(nn.Module, self), state) as opened:
                # the last block's tokens in a row: the library's own features are cut up as a grid already
                (tokens,) = super(Intermediates, self).forward_intermediates(x, [-1], output_fmt="NLC", intermediates_only=True)
            if state.trace is not None:
                state.trace.tokens = tokens
            done = True
        finally:
            state.forwards.exit(done)
        full = on_grid(tokens, cast(Trace, opened), state.depth)
        if averaged:
            full = weighted(full, full_weights(cast(Trace, opened), full.dtype), 0)
        return full.unflatten(1, self._grid_shape(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Any = None,
        *args: Any,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The library's own; the final features, which it takes from the grid, are those of the last block."""
        state, own = self.squeezevit_state, super().forward_intermediates
        options = {"output_fmt": output_fmt, "intermediates_only": intermediates_only, "output_dict": output_dict, **kwargs}
        if intermediates_only or not (state.grid and state.stages):
            return own(x, indices, *args, **options)
        wanted = blocks_taken(state.depth, indices)
        every = sorted({*wanted, state.depth - 1})
        maps = own(x, every, *args, **{**options, "intermediates_only": True, "output_dict": False})
        last = maps[-1].flatten(2).transpose(1, 2) if output_fmt == "NCHW" else maps[-1]
        final = last.unflatten(1, self._grid_shape(x))
        chosen = [y for y, block in zip(maps, every, strict=True) if block in wanted]
        return {"image_features": final, "image_intermediates": chosen} if output_dict else (final, chosen)

    def _grid_shape(self, x: Tensor) -> tuple[int, int]:
        return self.patch_embed.dynamic_feat_size(x.shape[-2:])


@describe.register(Qwen3VitEncoder)
@describe.register(Qwen3VitClassifier)
def _(model: Any) -> Description:
    encoder = model if isinstance(model, Qwen3VitEncoder) else model.encoder
    averages = model.global_pool == "avg" and encoder.merger is None
    size = encoder.patch_embed.img_size or 768
    height, width = (size, size) if isinstance(size, int) else size
    return Description(
        blocks=tuple(encoder.blocks),
        prefix=0,
        class_token=False,
        dim=encoder.embed_dim,
        channels=encoder.in_chans,
        image_size=(int(height), int(width)),
        mixins=((encoder, ReducedQwen3), *(((model, Averaging),) if averages else ())),
        grids=True,
        needs_grid=_GRID,
    )

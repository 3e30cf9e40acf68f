"""What models do with their tokens after the blocks, shared by the families."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.core.block import Mixin, State
from squeezevit.core.capture import compiling
from squeezevit.core.cut import base_class
from squeezevit.core.trace import Trace, spread
from squeezevit.errors import UnsupportedError


def weighted(x: Tensor, weights: Tensor | None, prefix: int) -> Tensor:
    """Tokens whose plain mean over patches is the mean by weights; prefix tokens as they are: [B, T, C], [B, T]."""
    if weights is None:
        return x
    patches = weights[:, prefix:]
    share = F.pad(patches / patches.mean(dim=1, keepdim=True), (prefix, 0), value=1.0)
    return (x * share[..., None]).to(x.dtype)


def spread_after(blocks: int, patches: Tensor, t: Trace) -> Tensor:
    """Patch tokens that left the first `blocks` blocks, back at all their patches: [B, K, C] -> [B, N0, C].

    A patch that was discarded holds zeros.
    """
    done = [s for s in t.stages if s.block < blocks]
    if all(s.n_out == s.n for s in done):
        return patches  # not a copy, which lies in memory in another way and is summed in another order
    return spread(patches, t.groups_after(len(done) - 1))


def on_grid(x: Tensor, t: Trace, blocks: int) -> Tensor:
    """The same with prefix tokens in front: [B, P + K, C] -> [B, P + N0, C]."""
    patches = x[:, t.prefix :]
    full = spread_after(blocks, patches, t)
    return x if full is patches else torch.cat([x[:, : t.prefix], full], dim=1)


def full_weights(t: Trace, dtype: torch.dtype) -> Tensor | None:
    """How much each token of the full grid counts in pooling: 0 for a patch that was discarded, [B, P + N0]; None: all the same."""
    if not any(s.discards for s in t.stages):
        return None
    return F.pad((t.groups >= 0).to(dtype), (t.prefix, 0), value=1.0)


def own_methods(model: nn.Module, names: Sequence[str], library: str) -> str:
    """Why a model that overrides one of the library's methods cannot keep masses; "" where it overrides none.

    What somebody else's method does with the tokens, as taking their plain mean, cannot be seen from outside.
    """
    base = base_class(model)
    for name in names:
        method = getattr(base, name)
        if not getattr(method, "__module__", library).startswith(library):
            return (
                f"{base.__qualname__}.{name} is its own, not the library's, and may pool tokens as if each stood for one patch; "
                "pool in it by sv.pool, on a model reduced without masses"
            )
    return ""


@contextmanager
def traced(module: nn.Module, state: State) -> Iterator[Trace | None]:
    """The open trace; where the full grid is to be put out and none is open, one for this forward."""
    needed = state.grid and state.stages and state.trace is None
    with Trace(module) if needed else nullcontext(cast("Trace | None", state.trace)) as t:
        yield t


class Intermediates(Mixin):
    """A model whose library has `forward_intermediates`, as timm and open_clip have it."""

    def forward_intermediates(self, x: Tensor, indices: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The library's own; as images, or as many tokens as ever, where `reduce_` was asked for the full grid."""
        state, own = self.squeezevit_state, super().forward_intermediates
        if args:  # by the library's names for them
            kwargs = {**dict(zip(list(inspect.signature(own).parameters)[2:], args, strict=False)), **kwargs}
        output_fmt = kwargs.pop("output_fmt", "NCHW")
        if not (state.grid and state.stages):
            if output_fmt != "NLC" and state.stages:
                raise UnsupportedError(
                    f"forward_intermediates(output_fmt={output_fmt!r}) lays tokens out as a grid, which those left by "
                    f"{state.reducer} do not fill; reduce the model with grid=True, or give output_fmt='NLC'"
                )
            return own(x, indices, output_fmt=output_fmt, **kwargs)
        state.forwards.enter()
        done = False
        try:
            with traced(cast(nn.Module, self), state) as opened:
                out = own(x, indices, output_fmt="NLC", **kwargs)
            done = True
        finally:
            state.forwards.exit(done)
        t, blocks = cast(Trace, opened), blocks_taken(state.depth, indices)
        shape = None if output_fmt == "NLC" else self._grid_shape(x)

        def laid_out(maps: Sequence[Any]) -> list[Any]:
            return [_laid_out(y, block + 1, t, shape) for y, block in zip(maps, blocks, strict=True)]

        if isinstance(out, dict):
            final = {name: self._final(y, t) for name, y in out.items() if name == "image_features"}
            return {**out, "image_intermediates": laid_out(out["image_intermediates"]), **final}
        return (self._final(out[0], t), laid_out(out[1])) if isinstance(out, tuple) else laid_out(out)

    def _grid_shape(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images [B, channels, H, W]."""
        raise NotImplementedError

    def _final(self, x: Tensor, t: Trace) -> Tensor:
        """What left the last block, where that is tokens, with their weights; pooled features are as they are."""
        state = self.squeezevit_state
        if x.dim() != 3:
            return x
        if state.trace is not None:
            state.trace.tokens = x[:, state.prefix :]
        x = on_grid(x, t, state.depth)
        cast(Any, x).squeezevit_weights = full_weights(t, x.dtype)
        state.discards = cast(Any, x).squeezevit_weights is not None
        return x


def blocks_taken(depth: int, indices: Any) -> list[int]:
    """Which blocks' features the libraries put out: all, the last n, or those named, also from the end."""
    last = depth if indices is None else indices
    return list(range(depth - last, depth)) if isinstance(last, int) else sorted({i % depth for i in last})


def _laid_out(x: Any, blocks: int, t: Trace, shape: tuple[int, int] | None) -> Any:
    """Patch tokens at all their patches, [B, N0, C], or as images [B, C, *shape]; of a tuple, the first member is patch tokens."""
    if isinstance(x, tuple):
        return _laid_out(x[0], blocks, t, shape), *x[1:]
    full = spread_after(blocks, x, t)
    return full if shape is None else full.transpose(1, 2).unflatten(2, shape).contiguous()


class Tower(Mixin):
    """A module that returns normed tokens, or a Hugging Face output with `last_hidden_state`.

    They are shown to traces, weighted for `Averaging`, and spread over the full grid where `reduce_` was asked for it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.squeezevit_state
        run = state.forward
        averaged, run.averaging = run.averaging, False
        # Hugging Face's towers make a mask of nothing but True while they are exported
        run.unmasked = len(args) < 2 and all(v is None for k, v in kwargs.items() if k.endswith("attention_mask"))
        state.forwards.enter()
        done = False
        try:
            with traced(cast(nn.Module, self), state) as t:
                out = super().forward(*args, **kwargs)
            tokens = out if isinstance(out, Tensor) else out[0]
            if state.trace is not None:
                state.trace.tokens = self.normed(tokens)[:, state.prefix :]
            weights = state.final_weights(self)
            done = True
        finally:
            run.unmasked = False
            state.forwards.exit(done)
        if state.grid and state.stages:
            out = _all_on_grid(out, cast(Trace, t))
            tokens = out if isinstance(out, Tensor) else out[0]
            weights = full_weights(cast(Trace, t), tokens.dtype)
        return _with_tokens(out, weighted(tokens, weights, state.prefix)) if averaged else out

    def normed(self, tokens: Tensor) -> Tensor:
        """After the final norm, where the library does not return them so."""
        return tokens


def _all_on_grid(out: Any, t: Trace) -> Any:
    """Tokens and hidden states: entry i of these left i blocks."""
    if isinstance(out, Tensor):
        return on_grid(out, t, 1 << 30)
    if isinstance(out, tuple):  # hidden states are tokens in a tuple, attentions have one dimension more
        rest = (_states_on_grid(v, t) if isinstance(v, tuple) and v[0].dim() == 3 else v for v in out[1:])
        return on_grid(out[0], t, 1 << 30), *rest
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = _states_on_grid(out.hidden_states, t)
    return _with_tokens(out, on_grid(out[0], t, 1 << 30))


def _states_on_grid(states: Any, t: Trace) -> Any:
    return tuple(None if x is None else on_grid(x, t, i) for i, x in enumerate(states))


def _with_tokens(out: Any, tokens: Tensor) -> Any:
    if isinstance(out, tuple):
        return tokens, *out[1:]
    out.last_hidden_state = tokens
    return out


class Without:
    """A module as its own forward sees it, but for a few attributes; calling it runs that forward and the module's hooks.

    So attention leaves out a bias of its own that `pairs` gives, without a change to the module, which other threads may run.
    """

    def __init__(self, module: nn.Module, **instead: Any) -> None:
        self.module, self.instead = module, instead

    def __getattr__(self, name: str) -> Any:
        instead = self.__dict__["instead"]
        return instead[name] if name in instead else getattr(self.__dict__["module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.__dict__["module"]).forward(self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.__dict__["module"]
        hooked = module._forward_hooks or module._forward_pre_hooks or not compiling()
        return type(module)._call_impl(self, *args, **kwargs) if hooked else self.forward(*args, **kwargs)


class PoolingMean(Mixin):
    """A module that pools tokens by the plain mean of patches: a token counts by its weight."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = self.squeezevit_state
        weights = state.final_weights(cast(nn.Module, self), last=False)
        return super().forward(weighted(tokens, weights, state.prefix), *args, **kwargs)


class Averaging(Mixin):
    """A model that takes the plain mean of its tower's patch tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forwards = self.squeezevit_state.forwards
        runs = (forwards.current(), forwards.shared)  # the tower may be compiled where this model is not
        for run in runs:
            run.averaging = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            for run in runs:
                run.averaging = False


class WeightedPooling(Mixin):
    """An `nn.MultiheadAttention` that pools tokens by a learned query: a token counts by its weight."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        weights = self.squeezevit_state.final_weights(self, last=False)
        if weights is not None:
            kwargs["key_padding_mask"] = (weights[:, -key.shape[1] :] + 1e-6).log().to(key.dtype)  # masked tokens weigh 0
        return super().forward(query, key, value, **kwargs)

"""One forward of a reduced block: the library's two halves, with a stage before, between or behind them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from squeezevit.core import ops
from squeezevit.core.capture import compiling
from squeezevit.core.cut import Cut, base_class, description_of
from squeezevit.core.evidence import Attention, Recording
from squeezevit.core.guard import Forward, Forwards, Trace, done_with, require_gradient, warn_if_frozen
from squeezevit.core.proof import has_rows, prove
from squeezevit.core.reducer import (
    Carry,
    Heads,
    Reducer,
    Reduction,
    Stage,
    nothing_pruned,
    outgoing_carry,
    outgoing_positions,
)  # fmt: skip
from squeezevit.errors import ConfigError, UnsupportedError

_Library: Any = object  # a class of somebody else's, whose methods no type checker knows


@dataclass(eq=False)
class State:
    """What the reduced blocks of one model share: how it is reduced, and what its forwards left."""

    reducer: Reducer
    prefix: int
    class_token: bool
    stages: tuple[int, ...]
    depth: int
    positional: bool  # whether blocks are told the place of every token, as with rotary embeddings
    grid: bool  # whether the model puts out the full grid again
    pooled: bool  # whether somebody asks for the tokens' weights after the last block
    owner: nn.Module | None = None  # the model that holds learned heads
    discards: bool = False  # whether patches of the full grid were seen to hold no token: pooling then leaves them out
    forwards: Forwards = field(init=False)

    def __post_init__(self) -> None:
        self.forwards = Forwards(len(self.stages))

    @property
    def heads(self) -> Heads | None:
        """The learned heads, or what an adapter library has put around them."""
        return None if self.owner is None else cast(Heads, self.owner._modules["token_reducer"])

    @property
    def forward(self) -> Forward:
        return self.forwards.current()

    @property
    def trace(self) -> Trace | None:
        return self.forwards.open_trace()

    def training(self, module: nn.Module) -> bool:
        """The mode that counts: that of learned heads, so that a model with some blocks frozen in evaluation still trains."""
        heads = self.heads
        return module.training if heads is None else heads.training

    def follows(self, training: bool) -> bool:
        """Whether blocks after a stage must know what the stage did."""
        return self.positional or self.reducer.follows(training)

    def final_weights(self, module: nn.Module, last: bool = True) -> Tensor | None:
        """How much each token that left the last block counts in pooling, [B, T]: its mass, or in masked training its policy.

        module: the model or tower that pools. None where every token counts the same. last: nobody will ask for them again.
        Raises UnsupportedError where the stage that was to write them did not run.
        """
        training = self.training(module)
        if not (self.stages and self.pooled and self.reducer.follows(training)):
            return None
        carry = self.forwards.slot(self.forward, -1)
        if carry is None:
            raise UnsupportedError(self._what_changed(module))
        if last and done_with(training):
            self.forwards.clear()
        return carry.mass if carry.policy is None else carry.policy

    def _what_changed(self, module: nn.Module) -> str:
        try:
            blocks = description_of(module).blocks
        except UnsupportedError:  # a part of the model that pools
            blocks = ()
        gone = [i for i in self.stages if i >= len(blocks) or not isinstance(blocks[i], ReducedBlock)]
        what = f"the stages of blocks {', '.join(map(str, gone))} are gone" if gone else f"block {self.stages[-1]} has not run"
        return (
            f"{type(module).__name__} pools tokens by weights that {self.reducer} gives them, but nobody wrote them: {what} "
            f"({self.depth} blocks then, {len(blocks) or 'unknown'} now); call sv.reduce_ again after changing a model"
        )


def state_of(model: nn.Module) -> State:
    """The state of a reduced model. Raises ConfigError where the model is not reduced, or holds several that are."""
    found: dict[int, State] = {}
    for m in model.modules() if isinstance(model, nn.Module) else ():
        if "squeezevit_state" in vars(m):
            found[id(vars(m)["squeezevit_state"])] = state = vars(m)["squeezevit_state"]
            if m is model:
                return state
    if not found:
        raise ConfigError(f"this {type(model).__name__} is not reduced; call sv.reduce_(model, sv.ETPS()) first")
    if len(found) > 1:
        raise ConfigError(f"this {type(model).__name__} holds {len(found)} models that are reduced; give the one that is meant")
    return next(iter(found.values()))


class Mixin(_Library):
    """What is put in front of a model's or a tower's class, for what it does with tokens after the blocks."""

    squeezevit_state: State


@dataclass(eq=False)
class Site:
    """One reduced block's place: `stage` is its stage number or None, `before` the number of stages ahead of it."""

    state: State
    block: int
    previous: int  # the reduced block ahead of it, -1 for the first
    stage: int | None
    before: int
    last: bool  # no later block reads what stages left, but pooling may
    per_token: tuple[str, ...]  # arguments of the block that have a row for each patch token
    tupled: int  # how many things the block puts out in a tuple, tokens first; 0: tokens alone
    scored: bool  # whether its stage scores by its attention
    fingerprint: Hashable  # what its proof rests on
    recording: Recording | None = None  # of what the stage takes from the block's attention

    @property
    def place(self) -> str | None:
        return None if self.stage is None else self.state.reducer.place

    def carry_in(self, forward: Forward, x: Tensor, training: bool) -> Carry:
        """What the last stage left for this block."""
        state = self.state
        needed = state.follows(training) or (state.reducer.carries and self.stage is not None)
        if not needed or not self.before:
            return Carry(n0=_length(x) - state.prefix)
        carry = state.forwards.carry_in(forward, x, self.block, self.previous, self.before - 1, state.reducer)
        require_gradient(x, carry, state.heads, self.block, state.reducer)
        return carry

    def reduce(self, forward: Forward, s: Stage) -> tuple[Reduction, Carry]:
        """Run this block's stage; what comes of it, and the carry for this block's own attention."""
        state, carry = self.state, s.carry
        if s.k < s.n:
            reduction = state.reducer.reduce(s)
            carry = outgoing_carry(state.reducer, carry, reduction)
        else:
            reduction = nothing_pruned(s.tokens, s.n)
        after = carry._replace(positions=outgoing_positions(carry, reduction)) if state.positional else carry
        if reduction.leaving is None:
            carry = after
        else:  # what leaves does so after this block's attention
            after = Carry(carry.n0, positions=after.positions)
        if state.reducer.carries or state.positional:
            state.forwards.leave(forward, s.index, after)
        trace = state.trace
        if trace is not None:
            trace.record(s.index, self.block, s.n, reduction)
        return reduction, carry

    def leave(self, forward: Forward, y: Tensor, training: bool) -> None:
        """The block has run; what stages left is dropped after the last block, where nobody can ask for it again."""
        state = self.state
        state.forwards.passed(forward, self.block, y)
        pooling_reads = state.pooled and state.reducer.follows(training)
        if self.last and not pooling_reads and done_with(training):
            state.forwards.clear()


class ReducedBlock(_Library):
    """A library's block whose forward is its two halves, with this site's stage before or between them."""

    squeezevit_site: Site
    squeezevit_cut: Cut

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        site, cut = self.squeezevit_site, self.squeezevit_cut
        _require_proof(self, x)
        training, (per_token, pairs) = site.state.training(self), _told(self, args, kwargs)
        forward = site.state.forwards.of(site.block, x)
        carry, leaving = site.carry_in(forward, x, training), None
        if site.place == "before":
            attend = partial(_attend, self, x, partial(_at_places, per_token, carry), partial(_of_pairs, self, pairs, carry))
            reduction, carry = site.reduce(forward, _stage(self, x, carry, attend, training))
            x, leaving = reduction.tokens, reduction.leaving
        here, own = _at_places(per_token, carry), _of_pairs(self, pairs, carry)
        recording = site.recording
        try:
            if recording is not None:
                recording.begin()
            y = cut.attn_half(self, x, _as_bias(carry, own, x), **here)
            if leaving is not None:
                y = ops.take(y, leaving)
            attend = partial(_attend, self, x, lambda: here, lambda: own)
            if site.place == "between":
                y = site.reduce(forward, _stage(self, y, carry, attend, training))[0].tokens
            ahead, y = y, cut.mlp_half(self, y)
            if site.place == "after":
                y = site.reduce(forward, _stage(self, y, carry, attend, training, ahead))[0].tokens
        finally:
            if recording is not None:
                recording.drop()
        site.leave(forward, y, training)
        return (y, *[None] * (site.tupled - 1)) if site.tupled else y

    def extra_repr(self) -> str:
        site = self.squeezevit_site
        where = "reduced tokens" if site.stage is None else f"stage {site.stage}"
        return ", ".join(filter(None, [super().extra_repr(), f"squeezevit: {where} of {site.state.reducer}"]))


def _stage(
    block: ReducedBlock,
    tokens: Tensor,
    carry: Carry,
    attend: Callable[[], Attention],
    training: bool,
    ahead: Tensor | None = None,
) -> Stage:
    """What the reducer sees at this block's stage."""
    site = block.squeezevit_site
    state, stage, heads = site.state, cast(int, site.stage), site.state.heads
    k = state.reducer.count(stage, _length(tokens) - state.prefix, carry.n0)
    if heads is not None and training:
        warn_if_frozen(tokens, heads)
    of_block = (site.block, state.depth, ahead)
    return Stage(tokens, state.prefix, k, stage, state.class_token, carry, attend, heads, training, *of_block)


def _attend(block: ReducedBlock, x: Tensor, rows: Callable[[], dict[str, Any]], pairs: Callable[[], Tensor | None]) -> Attention:
    """The evidence of the block's attention, where x came into the block."""
    return block.squeezevit_cut.attention(block, x, **rows())._replace(pairs=pairs())


def _require_proof(block: ReducedBlock, x: Tensor) -> None:
    """Prove a block again where what its proof rests on has changed since `reduce_`."""
    site = block.squeezevit_site
    if isinstance(x, torch.fx.Proxy):
        raise UnsupportedError(
            f"block {site.block} is traced by torch.fx, which knows no token counts; use forward hooks, the library's own "
            "forward_intermediates, or torch.export"
        )
    found = block.squeezevit_cut.fingerprint(block)
    if found == site.fingerprint:
        return
    if compiling():
        raise UnsupportedError(
            f"block {site.block} has changed since sv.reduce_ ({site.fingerprint} then, {found} now); call sv.reduce_ again before "
            "compiling"
        )
    dim = x.shape[-1]
    biased = site.state.reducer.follows(training=True)
    site.fingerprint = prove(cast(nn.Module, block), site.block, site.state.prefix, dim, site.scored, biased=biased).fingerprint


def _as_bias(carry: Carry, pairs: Tensor | None, x: Tensor) -> Tensor | None:
    """What is added to attention logits: by stages so far, and by the block itself."""
    return ops.summed(pairs, None if carry.bias is None else carry.bias.to(x.dtype))


def _of_pairs(block: ReducedBlock, pairs: Tensor | None, carry: Carry) -> Tensor | None:
    """For the tokens that are left: [1, H, P + N0, P + N0] -> [B, H, P + n, P + n]."""
    if pairs is None:
        return None
    site = block.squeezevit_site
    tokens = site.state.prefix + carry.n0
    if tuple(pairs.shape[-2:]) != (tokens, tokens) or pairs.shape[0] != 1:
        raise UnsupportedError(
            f"block {site.block} has a bias of shape {list(pairs.shape)} for pairs of tokens, but these images have {tokens} "
            "tokens; give images of the size that the model is built for, and no mask"
        )
    return ops.at_pairs(pairs, carry.positions, site.state.prefix)


def _told(block: ReducedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """What this call tells beside the tokens: what has a row per patch token, and the block's bias for pairs of the full grid.

    Flags are left to the library's hooks.
    """
    site, cut = block.squeezevit_site, block.squeezevit_cut
    given = {**{name: args[i] for i, name in enumerate(cut.parameters[: len(args)])}, **kwargs}
    mask = given.get("attention_mask")
    if site.state.forward.unmasked and ("attention_mask" not in cut.paired or _is_boolean(mask)):
        given.pop("attention_mask", None)
    pairs = cut.pairs(block, **{name: given.pop(name) for name in cut.paired if name in given}) if cut.paired else None
    others = {n: v for n, v in given.items() if n not in site.per_token and not _hides_nothing(n, v)}
    if site.tupled and others.get("output_attentions"):
        raise UnsupportedError(
            f"block {site.block}, {base_class(cast(nn.Module, block)).__qualname__}, was asked for its attention maps "
            "(output_attentions=True), which a reduced block of this class does not put out; sv.restore_ the model first"
        )
    masks = [n for n, v in others.items() if has_rows(v) or (n == "is_causal" and v)]
    if masks:
        raise UnsupportedError(
            f"block {site.block}, {base_class(cast(nn.Module, block)).__qualname__}, was called with a mask ({', '.join(masks)}); "
            "masks of the full grid do not fit reduced tokens: call the model without, or sv.restore_ it first"
        )
    return {name: given[name] for name in site.per_token if given.get(name) is not None}, pairs


def _is_boolean(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.bool


def _hides_nothing(name: str, value: Any) -> bool:
    """Whether a mask, true or 1 where tokens are seen, or added to the logits, lets all be seen; it is then no mask."""
    if "mask" not in name or not isinstance(value, Tensor) or value.is_meta or compiling():
        return False
    return not value.any() if value.is_floating_point() else bool(value.all())


def _at_places(per_token: dict[str, Any], carry: Carry) -> dict[str, Any]:
    """The rows of the tokens that are left: [N, D] -> [B, 1, n, D], and so for every member of a tuple."""
    if carry.positions is None or not per_token:
        return per_token
    take = partial(ops.at_positions, positions=carry.positions)
    return {name: tuple(map(take, value)) if isinstance(value, tuple) else take(value) for name, value in per_token.items()}


def _length(x: Tensor) -> int:
    """Tokens of [B, T, C] as a Python number, also where torch.jit traces lengths as tensors."""
    return int(x.shape[1]) if torch.jit.is_tracing() else x.shape[1]

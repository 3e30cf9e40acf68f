"""reduce_ and restore_: a block's class becomes a cached subclass of the host's own, whose forward runs the two halves with a
stage between or before them. Nothing is wrapped and nothing is copied, so keys, isinstance, adapters, deepcopy and pickle stay.
"""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from squeezevit import ops
from squeezevit.errors import ConfigError, UnsupportedError
from squeezevit.families import Cut, Host, Keep, cut, host_class, host_of, knows, load_families, per_token
from squeezevit.modes import evaluation_mode
from squeezevit.predictor import ScoreHeads
from squeezevit.reducer import (
    Attention,
    Carry,
    Reducer,
    Reduction,
    Stage,
    Staged,
    nothing_pruned,
    outgoing_carry,
    outgoing_positions,
)  # fmt: skip

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class State:
    """What the reduced blocks of one model share. Slots are written by their stage alone and dropped on copy."""

    reducer: Reducer
    prefix: int
    class_token: bool
    heads: ScoreHeads | None
    stages: tuple[int, ...]
    positional: bool  # whether blocks are told the place of every token, as with rotary embeddings
    grid: bool  # whether the model puts out the full grid again
    averaging: bool = False  # whether the caller of the tower that runs now takes the plain mean of its patch tokens
    unmasked: bool = False  # whether the tower that runs now was given no mask, so that one its blocks get hides nothing
    trace: Any = None
    slots: list[Carry | None] = field(default_factory=list)  # one for each stage
    thread: int = 0  # in which the running forward began, where known
    recomputed: int = 0  # address of what the last recomputed block put out

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.slots = [None] * len(self.stages)

    def training(self, module: nn.Module) -> bool:
        """The mode that counts: that of learned heads, so that a model with some blocks frozen in evaluation still trains."""
        return module.training if self.heads is None else self.heads.training

    def follows(self, training: bool) -> bool:
        """Whether blocks behind a stage must know what the stage did."""
        return self.positional or self.reducer.follows(training)

    def final_weights(self, training: bool, last: bool = True) -> Tensor | None:
        """How much each token that left the last block counts in pooling, [B, T]: its mass, or in masked training its policy.

        None where every token counts the same. last: nobody will ask for them again.
        """
        if not self.reducer.follows(training):
            return None
        carry = self.slots[-1] if self.slots else None
        if carry is not None and not torch.compiler.is_compiling():
            self.require_own_thread("the model's pooling")
        if last and _done_with_slots(training):
            self.clear()
        return None if carry is None else carry.mass if carry.policy is None else carry.policy

    def require_own_thread(self, who: str) -> None:
        if self.thread and self.thread != threading.get_ident():  # 0: the forward began in compiled code, which cannot tell
            raise UnsupportedError(
                f"{who}: another thread runs this model at the same time, and {self.reducer} leaves something behind between "
                "blocks; give each thread a copy (copy.deepcopy), or run one forward at a time"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "slots": [None] * len(self.stages), "trace": None, "averaging": False, "unmasked": False}


@dataclass(eq=False)
class Site:
    """One reduced block's place: `stage` is its stage number or None, `before` the number of stages ahead of it."""

    state: State
    block: int
    stage: int | None
    before: int
    last: bool  # no later block reads the slots
    pooled: bool  # but pooling may
    per_token: tuple[str, ...]  # arguments of the block that have a row for each patch token
    keeps: tuple[Keep, ...] = ()  # of the modules whose results the stage takes from the block's attention
    seen: int = 0  # address of the block's input in the last forward; see `_check_owner`

    def carry_in(self, x: Tensor, training: bool) -> Carry:
        state = self.state
        needed = state.follows(training) or (state.reducer.carries and self.stage is not None)
        if not needed or not self.before:
            return Carry(n0=_length(x) - state.prefix)
        carry = state.slots[self.before - 1]
        if carry is None:
            raise UnsupportedError(
                f"block {self.block} ran without the blocks before it, but {state.reducer} needs what they left behind; call "
                "the whole model, or sv.restore_ it first"
            )
        if not torch.compiler.is_compiling():
            self._check_owner(x, carry)
        return carry

    def _check_owner(self, x: Tensor, carry: Carry) -> None:
        """The slots must be those of this very forward: not another thread's, nor a later one's where backward recomputes."""
        state = self.state
        if not _in_backward():
            self.seen = _address(x)
            state.require_own_thread(f"block {self.block}")
        elif (carry.bias is not None or carry.positions is not None) and _address(x) not in (self.seen, state.recomputed):
            raise UnsupportedError(
                f"block {self.block} is recomputed in backward after another forward of the same model replaced what its stages "
                f"left; with {state.reducer} and activation checkpointing call backward after each forward, or switch it off"
            )
        if carry.policy is not None and self._learns(x) and not carry.policy.requires_grad:
            raise UnsupportedError(
                f"block {self.block}: reentrant activation checkpointing loses the gradient of the decisions that {state.reducer} "
                "learns by; use the other kind (use_reentrant=False; in timm timm.layers.set_reentrant_ckpt(False))"
            )

    def _learns(self, x: Tensor) -> bool:
        heads = self.state.heads
        trainable = heads is not None and any(p.requires_grad for p in heads.parameters())
        return trainable and torch.is_grad_enabled() and x.requires_grad

    def reduce(
        self, block: nn.Module, x: Tensor, tokens: Tensor, carry: Carry, per_token: Callable[[], dict[str, Any]]
    ) -> tuple[Reduction, Carry]:
        """Run this block's stage on `tokens`; x is what came into the block and what evidence is computed from, where asked for.

        The carry that is returned is for this block's own attention.
        """
        state, stage = self.state, cast(int, self.stage)
        n = _length(tokens) - state.prefix
        k = state.reducer.count(stage, n, carry.n0)
        if k < n:
            head = None if state.heads is None else state.heads[stage]
            cut = type(block).squeezevit_cut  # type: ignore[attr-defined]

            def attend() -> Attention:
                return cut.attention(block, x, **per_token())

            s = Stage(tokens, state.prefix, k, stage, state.class_token, carry, attend, head, state.training(block))
            reduction = state.reducer.reduce(s)
            carry = outgoing_carry(state.reducer, carry, reduction)
        else:
            reduction = nothing_pruned(tokens, n)
        behind = carry._replace(positions=outgoing_positions(carry, reduction)) if state.positional else carry
        if reduction.leaving is None:
            carry = behind
        else:  # only behind this block's attention
            behind = Carry(carry.n0, positions=behind.positions)
        if state.reducer.carries or state.positional:
            state.slots[stage] = behind
            if stage == 0 and (torch.compiler.is_compiling() or not _in_backward()):
                state.thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if state.trace is not None:
            state.trace.record(stage, self.block, n, reduction)
        return reduction, carry

    def leave(self, y: Tensor, training: bool) -> None:
        """Note what a recompute put out; drop the slots after the last block where no backward can ask for them again."""
        if not torch.compiler.is_compiling() and _in_backward():
            self.state.recomputed = _address(y)
        pooling_reads = self.pooled and self.state.reducer.follows(training)
        if self.last and not pooling_reads and _done_with_slots(training):
            self.state.clear()


def _address(x: Tensor) -> int:
    """Where the tensor's data are; 0 for tensors that have none (fake ones, and those inside torch.func transforms)."""
    try:
        return x.data_ptr() if type(x) is Tensor else 0
    except RuntimeError:
        return 0


def _done_with_slots(training: bool) -> bool:
    """Whether no backward can ask for the slots again (reentrant checkpointing runs its forward without grad, but in training)."""
    return torch.compiler.is_compiling() or not (training or torch.is_grad_enabled())


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _length(x: Tensor) -> int:
    """Tokens of [B, T, C] as a Python number, also where torch.jit traces lengths as tensors."""
    return int(x.shape[1]) if torch.jit.is_tracing() else x.shape[1]


class _Subclass(nn.Module):
    """What every dynamic subclass shares: pickling by the host's own class."""

    squeezevit_base: type
    squeezevit_mixin: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.squeezevit_base, self.squeezevit_mixin), vars(self)


class ReducedBlock(_Subclass):
    """A host's block whose forward is its two halves, with this site's stage before or between them."""

    squeezevit_site: Site
    squeezevit_cut: Cut

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        site, cut = self.squeezevit_site, self.squeezevit_cut
        training = site.state.training(self)
        per_token = _per_token(self, args, kwargs)
        place = None if site.stage is None else site.state.reducer.place
        carry = site.carry_in(x, training)
        leaving = None
        if place == "before":
            reduction, carry = site.reduce(self, x, x, carry, partial(_at_places, per_token, carry))
            x, leaving = reduction.tokens, reduction.leaving
        here = _at_places(per_token, carry)
        try:
            for keep in site.keeps:
                keep.begin()
            y = cut.attn_half(self, x, _as_bias(carry, x), **here)
            if leaving is not None:
                y = ops.take(y, leaving)
            if place == "between":
                y = site.reduce(self, x, y, carry, lambda: here)[0].tokens
        finally:
            for keep in site.keeps:
                keep.drop()
        y = cut.mlp_half(self, y)
        site.leave(y, training)
        return y

    def extra_repr(self) -> str:
        site = self.squeezevit_site
        where = "reduced tokens" if site.stage is None else f"stage {site.stage}"
        own = super().extra_repr()
        return ", ".join(filter(None, [own, f"squeezevit: {where} of {site.state.reducer}"]))


def _as_bias(carry: Carry, x: Tensor) -> Tensor | None:
    return None if carry.bias is None else carry.bias.to(x.dtype)


def _per_token(block: ReducedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of what a block was called with beside its tokens, what has a row per patch token. Flags are left to the host's hooks."""
    site, cut = block.squeezevit_site, block.squeezevit_cut
    given = {**dict(zip(cut.parameters, args, strict=False)), **kwargs}
    if site.state.unmasked:
        given.pop("attention_mask", None)
    masks = [n for n, v in given.items() if n not in site.per_token and (_has_rows(v) or (n == "is_causal" and v))]
    if masks:
        raise UnsupportedError(
            f"block {site.block}, {block.squeezevit_base.__qualname__}, was called with a mask ({', '.join(masks)}); masks of the "
            "full grid do not fit reduced tokens: call the model without, or sv.restore_ it first"
        )
    return {name: given[name] for name in site.per_token if given.get(name) is not None}


def _has_rows(value: Any) -> bool:
    return any(map(_has_rows, value)) if isinstance(value, tuple | list) else isinstance(value, Tensor) and value.dim() > 0


def _at_places(per_token: dict[str, Any], carry: Carry) -> dict[str, Any]:
    """The rows of the tokens that are left: [N, D] -> [B, 1, n, D], and so for every member of a tuple."""
    if carry.positions is None or not per_token:
        return per_token
    take = partial(ops.at_positions, positions=carry.positions)
    return {name: tuple(map(take, value)) if isinstance(value, tuple) else take(value) for name, value in per_token.items()}


@cache
def _subclass(base: Any, mixin: Any) -> Any:
    """The one subclass of a host's class with a mixin in front; it keeps the host's name, which wrap policies look for."""
    body = {"squeezevit_base": base, "squeezevit_mixin": mixin, "__module__": base.__module__, "__doc__": base.__doc__}
    if issubclass(mixin, ReducedBlock):
        body["squeezevit_cut"] = cut(base)
    elif "forward" in vars(mixin):
        body["forward"] = _with_signature(mixin.forward, base.forward)
    return type(base.__name__, (mixin, _Subclass, base), body)


def _with_signature(own: Callable[..., Any], of: Callable[..., Any]) -> Callable[..., Any]:
    """A mixin's forward that looks like the host's, which libraries inspect for the names of inputs."""

    @wraps(of)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    return forward


def _rebuild(base: Any, mixin: Any) -> Any:
    load_families()
    subclass = _subclass(base, mixin)
    return subclass.__new__(subclass)


def state_of(model: nn.Module) -> State:
    """The state of a reduced model. Raises ConfigError where the model is not reduced."""
    state = next((vars(m)["squeezevit_state"] for m in model.modules() if "squeezevit_state" in vars(m)), None)
    if state is None:
        raise ConfigError(f"this {type(model).__name__} is not reduced; call sv.reduce_(model, sv.ETPS()) first")
    return state


def reduce_(model: Model, reducer: Reducer, *, grid: bool = False) -> Model:
    """Put a reducer into a model, in place, and return the model; a second call replaces the first.

    grid: the model's tokens (in Hugging Face's models `last_hidden_state` and `hidden_states`) have the full length again, each
    patch holding the token it ended in, for callers that lay them out as an image or count them, as vision-language models do.

    Keys of the state dict stay as they are; a learned reducer adds `token_reducer.*`, and keeps heads that already fit. Each
    block that is touched is first proved: its halves, run on random tokens, must equal the whole. Raises UnsupportedError,
    naming class and block, where they do not or the model is unknown, and ConfigError where the reducer does not fit the
    model; the model is then as before.

    >>> model = reduce_(timm.create_model("vit_tiny_patch16_224"), ETPS(keep=0.5))  # doctest: +SKIP
    """
    if not isinstance(reducer, Reducer):
        raise ConfigError(f"a {type(reducer).__name__} is not a reducer; give the model first, then one as sv.ETPS(keep=0.7)")
    host = host_of(model)
    depth = len(host.blocks)
    stages = reducer.stages(depth)
    _refuse(model, host, reducer)
    if grid and not host.grids:
        raise UnsupportedError(f"{type(model).__name__} puts no full grid out (grid=True); use sv.trace and its scatter_back")
    for i in range(stages[0] if stages else depth, depth):  # later blocks see fewer tokens, too
        prove(host.blocks[i], i, host.prefix, host.dim, reducer.scored and i in stages)
    keeping = [i for i in stages if _keeps(host, i, reducer)]
    rows = [per_token(block, host.dim) for block in host.blocks]
    touched = _touched(reducer, stages, depth, any(rows))
    heads = _heads(model, host, reducer, len(stages))
    restore_(model)
    state = State(reducer, host.prefix, host.class_token, heads, stages, any(rows), grid)
    for i in touched:
        block = host.blocks[i]
        stage = stages.index(i) if i in stages else None
        block.__class__ = _subclass(cast(Any, type(block)), ReducedBlock)
        before = sum(s < i for s in stages)
        keeps = _keep_(block) if i in keeping else ()
        site = Site(state, i, stage, before, last=i == touched[-1], pooled=host.pooled, per_token=rows[i], keeps=keeps)
        block.squeezevit_site = site  # type: ignore[assignment]
    for module, mixin in host.mixins:
        module.__class__ = _subclass(cast(Any, type(module)), mixin)
        module.squeezevit_state = state  # type: ignore[assignment]
    model.squeezevit_state = state  # type: ignore[assignment]
    if heads is not None:
        model.token_reducer = heads
    return model


def retune_(model: nn.Module, reducer: Reducer) -> None:
    """Give a reduced model another reducer of the same class and stages (other ratios), without proving the blocks again.

    For schedules that change the ratio at every step. Raises ConfigError where class, stages or options differ.
    """
    state = state_of(model)
    old = state.reducer
    stages = reducer.stages(len(host_of(model).blocks))
    if type(reducer) is not type(old) or stages != state.stages or _options(reducer) != _options(old):
        raise ConfigError(f"a model reduced by {old} cannot be retuned to {reducer}, whose stages differ; call sv.reduce_ instead")
    state.reducer = reducer


def _options(reducer: Reducer) -> object:
    """All of a reducer but its ratios and stages."""
    return replace(reducer, keep=1.0, at=None) if isinstance(reducer, Staged) else (reducer.weighs, reducer.masks)


def restore_(model: Model) -> Model:
    """Take the reducer out of a model, in place, and return the model: the original, bit for bit. Harmless where none is in.

    >>> restore_(torch.nn.Identity())
    Identity()
    """
    for module in list(model.modules()):
        base = vars(type(module)).get("squeezevit_base")
        if base is not None:
            module.__class__ = base
        for name in ("squeezevit_site", "squeezevit_state"):
            vars(module).pop(name, None)
        _forget_(module)
        if isinstance(module._modules.get("token_reducer"), ScoreHeads):
            del module.token_reducer
    return model


def _keep_(block: nn.Module) -> tuple[Keep, ...]:
    keeps = []
    for projection in cut(type(block)).projections(block):
        keeps.append(Keep())
        projection.register_forward_hook(keeps[-1])
    return tuple(keeps)


def _forget_(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Keep)]:
        del module._forward_hooks[key]


@torch.no_grad()
def _keeps(host: Host, index: int, reducer: Reducer) -> bool:
    """Whether a stage takes norm, queries and keys from its block's attention.

    Not where it runs before attention or asks for no evidence, nor where they would not come out the same: a host may change in
    place what its projections put out, or use its norm for something else as well.
    """
    block = host.blocks[index]
    own = cut(host_class(block))
    modules = own.projections(block)
    if not (reducer.scored and reducer.place == "between" and modules) or next(block.parameters()).is_meta:
        return False
    for module in modules:
        _forget_(module)
    x, _, given = _trial(block, index, host.prefix, host.dim)

    def evidence() -> tuple[Tensor, Tensor, Tensor]:
        a = own.attention(block, x, **given)
        return a.x, a.query(None), a.key()

    with evaluation_mode(block), ops.no_autocast(x):
        computed = evidence()
        for keep in _keep_(block):
            keep.begin()
        try:
            own.attn_half(block, x, **given)
            kept = evidence()
        finally:
            for module in modules:
                _forget_(module)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(computed, kept, strict=True))


def _refuse(model: nn.Module, host: Host, reducer: Reducer) -> None:
    """Raise UnsupportedError on what no proof of a single block would find."""
    name = type(model).__name__
    if reducer.weighs and host.refuse_mass:
        raise UnsupportedError(f"{name} cannot keep masses ({host.refuse_mass}); choose a reducer without, as sv.ETPS()")
    if getattr(reducer, "score", None) == "cls" and not host.class_token:
        raise UnsupportedError(f"{name} has no class token, but {reducer} scores by one; give score='received', or 'auto'")
    if len({id(block) for block in host.blocks}) < len(host.blocks):
        raise UnsupportedError(
            f"{name} uses one block at several depths, which cannot have stages of their own; give each its own copy"
        )


def _touched(reducer: Reducer, stages: tuple[int, ...], depth: int, positional: bool) -> list[int]:
    """Blocks whose class changes: the stages, and those after the first one if they are ever told of it."""
    if not stages:
        return []
    return list(range(stages[0], depth)) if reducer.weighs or reducer.masks or positional else list(stages)


def _heads(model: nn.Module, host: Host, reducer: Reducer, stages: int) -> ScoreHeads | None:
    if not reducer.learned:
        return None
    old = getattr(model, "token_reducer", None)
    if isinstance(old, ScoreHeads) and old.fits(stages, host.dim):
        return old
    if old is not None and not isinstance(old, ScoreHeads):
        raise UnsupportedError(f"{type(model).__name__} already has a token_reducer of class {type(old).__name__}; rename it first")
    like = next(host.blocks[0].parameters())
    dtype = like.dtype if like.is_floating_point() else None
    keep = [reducer.ratio(j) if isinstance(reducer, Staged) else 0.5 for j in range(stages)]
    return ScoreHeads(keep, host.dim, like.device, dtype).train(model.training)


def prove(block: nn.Module, index: int, prefix: int, dim: int, scored: bool) -> None:
    """Run a block whole and in halves on random tokens; refuse it where they differ, or where a bias is not what it should be."""
    base = host_class(block)
    name = f"{base.__module__}.{base.__qualname__}"
    if not knows(base):
        raise UnsupportedError(
            f"block {index} is a {name}, which SqueezeViT does not know how to cut in two; "
            "blocks that are windowed or run attention and MLP side by side cannot be reduced between their halves. For any "
            "other, register attn_half, mlp_half and attention for its class as described in squeezevit.families"
        )
    if "forward" in vars(block):
        raise UnsupportedError(
            f"block {index}, {name}, has a forward of its own set on the instance, "
            "which its stage would never see; remove it first, or put it into a forward hook"
        )
    if next(block.parameters()).is_meta:
        logger.warning("block %d is on the meta device: its cut is not proved; call reduce_ again after loading weights", index)
        return
    try:
        _prove_halves(base, block, index, prefix, dim, scored)
    except (TypeError, AttributeError) as error:  # a host of another version has other names
        if isinstance(error, UnsupportedError):
            raise
        raise UnsupportedError(
            f"block {index}, {name}, cannot be reduced: it does not run as SqueezeViT knows it ({error}); `squeezevit families` "
            "lists the tested versions of its library"
        ) from error


@torch.no_grad()
def _prove_halves(base: Any, block: nn.Module, index: int, prefix: int, dim: int, scored: bool) -> None:
    """The bias is proved by what it is used for: a token with log(2) must count as much as the same token twice."""
    own = cut(base)
    x, arguments, given = _trial(block, index, prefix, dim)
    with evaluation_mode(block), ops.no_autocast(x):
        whole = base.forward(block, x, **arguments)
        halves = own.mlp_half(block, own.attn_half(block, x, **given))
        _require_close(base, index, whole, halves, "its two halves do not add up to its forward")
        if scored:
            _prove_attention(base, index, own.attention(block, x, **given))
        x[:, -1] = x[:, -2]
        twice = {name: _rows(value, (0, 1, 2, 3, 4, 4)) for name, value in given.items()}
        once = {name: _rows(value, (0, 1, 2, 3, 4)) for name, value in given.items()}
        bias = x.new_zeros(2, 1, 1, prefix + 5)
        bias[..., -1] = math.log(2)
        counted = own.attn_half(block, x[:, :-1], bias, **once)
        expected = own.attn_half(block, x, **twice)[:, :-1]
        _require_close(base, index, expected, counted, "its attention does not take an additive bias")


def _trial(block: nn.Module, index: int, prefix: int, dim: int) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Random tokens of two images, with six patches each, what the block must be called with beside them, and the rows in that."""
    parameter = next(block.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    x = torch.randn(2, prefix + 6, dim, generator=torch.Generator().manual_seed(index), device="cpu").to(parameter.device, dtype)
    arguments = cut(host_class(block)).arguments(block, x[0, prefix:])
    return x, arguments, {name: value for name, value in arguments.items() if _has_rows(value)}


def _rows(value: Any, rows: tuple[int, ...]) -> Any:
    return tuple(_rows(v, rows) for v in value) if isinstance(value, tuple) else value[..., rows, :]


def _prove_attention(base: type, index: int, a: Attention) -> None:
    if a.key_weight is not None:
        query = a.query(1)[:, :, 0]
        folded = ops.class_attention_folded(query, a.key_weight, a.x)
        unfolded = ops.class_attention(query, a.key())
        complaint = "its keys are not the plain linear map it states"
        _require_close(base, index, unfolded.to(a.x.dtype), folded.to(a.x.dtype), complaint)


def _require_close(base: type, index: int, expected: Tensor, found: Tensor, complaint: str) -> None:
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    if expected.shape == found.shape and torch.allclose(expected, found, rtol=tolerance, atol=tolerance):
        return
    off = (
        f"by {(expected - found).abs().max().item():.2g}" if expected.shape == found.shape else f"{expected.shape} / {found.shape}"
    )
    raise UnsupportedError(
        f"block {index}, {base.__module__}.{base.__qualname__}, cannot be reduced: {complaint} (they differ {off}). Register "
        "attn_half and mlp_half for this class as described in squeezevit.families"
    )

"""reduce_ and restore_: a block's class becomes a cached subclass of the library's own, whose forward runs the two halves with a
stage before, between or behind them. Nothing is wrapped and nothing is copied, so keys, isinstance, adapters, deepcopy and pickle
stay.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

from squeezevit.core.block import ReducedBlock, Site, State, state_of
from squeezevit.core.cut import Cut, Description, cut, description_of, load_families, require_model
from squeezevit.core.evidence import Recording, forget_
from squeezevit.core.proof import Proved, prove
from squeezevit.core.readout import reads_elsewhere
from squeezevit.core.reducer import Heads, Reducer, Staged
from squeezevit.errors import ConfigError, UnsupportedError

Model = TypeVar("Model", bound=nn.Module)


class _Subclass(nn.Module):
    """What every dynamic subclass shares: it is pickled by the library's own class."""

    squeezevit_base: type
    squeezevit_mixins: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.squeezevit_base, self.squeezevit_mixins), self.__getstate__()  # without what torch compiled of it

    def __prepare_scriptable__(self) -> Any:
        raise UnsupportedError(
            f"{type(self).__name__} is reduced, which torch.jit.script cannot compile; use torch.export or torch.compile, or "
            "sv.restore_ it first"
        )


def _subclass(base: Any, mixins: tuple[Any, ...]) -> Any:
    """The subclass of a library's class with mixins in front; for a block with the handlers that are registered now."""
    return _made(base, mixins, cut(base) if ReducedBlock in mixins else None)


@cache
def _made(base: Any, mixins: tuple[Any, ...], handlers: Cut | None) -> Any:
    """The one such subclass; it keeps the library's name, which wrap policies look for."""
    body = {"squeezevit_base": base, "squeezevit_mixins": mixins, "__module__": base.__module__, "__doc__": base.__doc__}
    if handlers is not None:
        body["squeezevit_cut"] = handlers
    elif own := next((vars(mixin)["forward"] for mixin in mixins if "forward" in vars(mixin)), None):
        body["forward"] = _with_signature(own, base.forward)
    return type(base.__name__, (*mixins, _Subclass, base), body)


def _with_signature(own: Callable[..., Any], of: Callable[..., Any]) -> Callable[..., Any]:
    """A mixin's forward that looks like the library's, which is inspected for the names of inputs."""

    @wraps(of)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    return forward


def _rebuild(base: Any, mixins: tuple[Any, ...]) -> Any:
    load_families()
    subclass = _subclass(base, mixins)
    return subclass.__new__(subclass)


def reduce_(model: Model, reducer: Reducer, *, grid: bool = False) -> Model:
    """Put a reducer into a model, in place, and return the model; a second call replaces the first.

    grid: the model's tokens (in Hugging Face's models `last_hidden_state` and `hidden_states`) have the full length again, each
    patch holding the token it ended in, for callers that lay them out as an image or count them, as dense and most vision-language
    models do; these are refused without it.

    Keys of the state dict stay as they are; a learned reducer adds `token_reducer.*`, and keeps heads that already fit. Each
    block that is touched is first proved: its halves, run on random tokens, must equal the whole. Raises UnsupportedError,
    naming class and block, where they do not or the model is unknown, and ConfigError where the reducer does not fit the
    model; the model is then as before.

    >>> model = reduce_(timm.create_model("vit_tiny_patch16_224"), ETPS(keep=0.5))  # doctest: +SKIP
    """
    _require_kinds(model, reducer)
    return _put_into(model, description_of(model), reducer, grid)


def reduce_as_needed_(model: Model, reducer: Reducer) -> Model:
    """`reduce_`, with the full grid where the model can only be reduced so; for what is run on models of any kind."""
    _require_kinds(model, reducer)
    about = description_of(model)
    return _put_into(model, about, reducer, bool(about.needs_grid))


def _put_into(model: Model, about: Description, reducer: Reducer, grid: bool) -> Model:
    _require_own_classes(model)
    depth = len(about.blocks)
    stages = reducer.stages(depth)
    _refuse(model, about, reducer, stages, grid)
    proofs = _proofs(about, reducer, stages)
    positional = any(proved.per_token or proved.paired for proved in proofs.values())
    heads = _heads(model, about, reducer, len(stages))
    restore_(model)
    owner = None if heads is None else model
    state = State(reducer, about.prefix, about.class_token, stages, depth, positional, grid, about.pooled, owner)
    touched = _touched(reducer, stages, depth, positional)
    for previous, i in zip((-1, *touched), touched, strict=False):
        _place(about, state, proofs[i], i, previous, i == touched[-1])
    for module, mixins in _mixins(about).items():
        module.__class__ = _subclass(cast(Any, type(module)), mixins)
        vars(module)["squeezevit_state"] = state
    vars(model)["squeezevit_state"] = state
    if heads is not None:
        model.token_reducer = heads
    return model


def _place(about: Description, state: State, proved: Proved, i: int, previous: int, last: bool) -> None:
    """Make block number i a reduced one."""
    block, stage = about.blocks[i], state.stages.index(i) if i in state.stages else None
    block.__class__ = _subclass(cast(Any, type(block)), (ReducedBlock,))
    recording = Recording(proved.cut.projections(block)) if proved.records else None
    before, scored = sum(s < i for s in state.stages), state.reducer.scored and stage is not None
    vars(block)["squeezevit_site"] = Site(
        state, i, previous, stage, before, last, proved.per_token, proved.tupled, scored, proved.fingerprint, recording
    )


def _proofs(about: Description, reducer: Reducer, stages: tuple[int, ...]) -> dict[int, Proved]:
    """Of every block from the first stage on, as later blocks see fewer tokens, too."""
    depth, proofs = len(about.blocks), {}
    for i in range(stages[0] if stages else depth, depth):
        scored = reducer.scored and i in stages
        records = scored and reducer.place != "before"
        proofs[i] = prove(about.blocks[i], i, about.prefix, about.dim, scored, records, reducer.follows(training=True))
    return proofs


def _mixins(about: Description) -> dict[nn.Module, tuple[type, ...]]:
    """Of each module, in the order in which they were named."""
    found: dict[nn.Module, tuple[type, ...]] = {}
    for module, mixin in about.mixins:
        found[module] = (*found.get(module, ()), mixin)
    return found


def retune_(model: nn.Module, reducer: Reducer) -> None:
    """Give a reduced model another reducer of the same class and stages (other ratios), without proving the blocks again.

    For schedules that change the ratio at every step. Raises ConfigError where class, stages or options differ.
    """
    state = state_of(model)
    old = state.reducer
    stages = reducer.stages(state.depth)
    if type(reducer) is not type(old) or stages != state.stages or reducer.constant() != old.constant():
        raise ConfigError(f"a model reduced by {old} cannot be retuned to {reducer}, whose stages differ; call sv.reduce_ instead")
    state.reducer = reducer


def restore_(model: Model) -> Model:
    """Take the reducer out of a model, in place, and return the model: the original, bit for bit. Harmless where none is in.

    Raises UnsupportedError, the model as it was, where its class has been subclassed since.

    >>> restore_(torch.nn.Identity())
    Identity()
    """
    require_model(model)
    _require_own_classes(model)
    for module in list(model.modules()):
        base = vars(type(module)).get("squeezevit_base")
        if base is not None:
            module.__class__ = base
        for name in ("squeezevit_site", "squeezevit_state"):
            vars(module).pop(name, None)
        forget_(module)
        if _heads_in(module._modules.get("token_reducer")) is not None:
            del module.token_reducer
    return model


def _require_own_classes(model: nn.Module) -> None:
    """Raise UnsupportedError where somebody made a subclass of a reduced class, as fully_shard and parametrizations do."""
    for name, module in model.named_modules():
        kind = type(module)
        if "squeezevit_base" not in vars(kind) and any("squeezevit_base" in vars(c) for c in kind.__mro__[1:]):
            raise UnsupportedError(
                f"{name or type(model).__name__} became a {kind.__qualname__} after sv.reduce_, by fully_shard or a "
                "parametrization, so that its reducer cannot be taken out or changed; undo that first"
            )


def _require_kinds(model: object, reducer: object) -> None:
    require_model(model)
    if isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise UnsupportedError(
            f"a {type(model).__name__} is a program, not a model with blocks; reduce the model first, then trace or export it"
        )
    if not isinstance(reducer, Reducer):
        raise ConfigError(f"a {type(reducer).__name__} is not a reducer; give the model first, then one as sv.ETPS(keep=0.7)")


def _refuse(model: nn.Module, about: Description, reducer: Reducer, stages: tuple[int, ...], grid: bool) -> None:
    """Raise UnsupportedError on what no proof of a single block would find."""
    name = type(model).__name__
    if reducer.weighs and about.refuse_mass:
        raise UnsupportedError(f"{name} cannot keep masses ({about.refuse_mass}); choose a reducer without, as sv.ETPS()")
    if getattr(reducer, "score", None) == "cls" and not about.class_token:
        raise UnsupportedError(f"{name} has no class token, but {reducer} scores by one; give score='received', or 'auto'")
    if len({id(block) for block in about.blocks}) < len(about.blocks):
        raise UnsupportedError(
            f"{name} uses one block at several depths, which cannot have stages of their own; give each its own copy"
        )
    if about.needs_grid and not grid and stages:
        raise UnsupportedError(
            f"{name} {about.needs_grid}; give grid=True, and every patch gets the token that it ended in: "
            f"sv.reduce_(model, {reducer}, grid=True)"
        )
    if isinstance(reducer, Staged) and reducer.class_token_only:
        why = "is to put patch tokens out (grid=True)" if grid else reads_elsewhere(model, about)
        if why:
            raise ConfigError(
                f"{reducer} leaves few patch tokens behind the last attention, which is right where a model is read at its class "
                f"token alone, but {name} {why}; take at='quarters', as the method 'training-free' has it"
            )
    if grid and not about.grids:
        raise UnsupportedError(f"{name} puts no full grid out (grid=True); use sv.trace and its scatter_back")


def _touched(reducer: Reducer, stages: tuple[int, ...], depth: int, positional: bool) -> list[int]:
    """Blocks whose class changes: the stages, and those after the first one if they are ever told of it."""
    if not stages:
        return []
    return list(range(stages[0], depth)) if reducer.follows(training=True) or positional else list(stages)


def _heads_in(module: nn.Module | None) -> Heads | None:
    """Learned heads, also where an adapter library holds them."""
    return None if module is None else next((part for part in module.modules() if isinstance(part, Heads)), None)


def _heads(model: nn.Module, about: Description, reducer: Reducer, stages: int) -> nn.Module | None:
    """The model's learned heads, where they fit, or fresh ones like its parameters."""
    like = next(about.blocks[0].parameters())
    with like.device, torch.inference_mode(False):
        fresh = reducer.heads(stages, about.dim)
    if fresh is None:
        return None
    old = model._modules.get("token_reducer")
    inner = _heads_in(old)
    if inner is not None and inner.fits(fresh):
        return old
    if inner is not None and inner is not old:
        raise UnsupportedError(
            f"the score heads of {type(model).__name__} are held by a {type(old).__name__}, and {reducer} needs others; merge or "
            "unload the adapter first, as by peft's merge_and_unload()"
        )
    if hasattr(model, "token_reducer") and inner is None:
        kind = type(model.token_reducer).__name__
        raise UnsupportedError(f"{type(model).__name__} already has a token_reducer of class {kind}; rename it first")
    return fresh.to(like.dtype if like.is_floating_point() else None).train(model.training)

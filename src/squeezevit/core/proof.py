"""The proof: a block is run whole and in halves on random tokens, and refused where they differ.

What is proved: the halves add up to the block; a bias of log 2 counts a token as often as the same token twice, or, where attention
takes none, tokens may come in any order; and, for reducers that score by attention, the scores are those of the attention that the
block really computes, head by head.
"""

import logging
import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from squeezevit.core import ops
from squeezevit.core.cut import ANY_PAIRS, RECIPE, Cut, TakesNoMask, base_class, cut, knows
from squeezevit.core.evidence import Attention, Recording, forget_
from squeezevit.core.running import evaluation_mode, quantised, without_hooks
from squeezevit.errors import UnsupportedError

logger = logging.getLogger(__name__)


class Proved(NamedTuple):
    """What is known of a block that was proved."""

    cut: Cut
    per_token: tuple[str, ...]  # arguments that have a row for each patch token
    paired: bool  # whether it has a bias for each pair of tokens
    tupled: int  # how many things it puts out in a tuple, of which all but the first are None; 0: tokens alone
    records: bool  # whether a stage may take norm, queries and keys from the block's attention
    fingerprint: Hashable


@dataclass(frozen=True)
class _Trial:
    """A block, its handlers, random tokens of two images with six patches or more, and what it is called with beside them."""

    block: nn.Module
    name: str
    cut: Cut
    prefix: int
    x: Tensor
    arguments: dict[str, Any]

    @property
    def rows(self) -> dict[str, Any]:
        """Those of the arguments that have a row for each patch token."""
        return {n: value for n, value in self.arguments.items() if has_rows(value) and n not in self.cut.paired}

    @property
    def pairs(self) -> Tensor | None:
        """What the block adds for each pair of tokens."""
        return self.cut.pairs(self.block, **{n: value for n, value in self.arguments.items() if n in self.cut.paired})

    @property
    def patches(self) -> int:
        return self.x.shape[1] - self.prefix

    def attend(self, x: Tensor, places: Sequence[int] | None = None, bias: Tensor | None = None) -> Tensor:
        """The half with attention, for tokens of the patches at these places, None: of all in their order."""
        rows = self.rows if places is None else {n: _rows(value, tuple(places)) for n, value in self.rows.items()}
        own, at = self.pairs, None if places is None else torch.tensor([places], device=x.device).expand(x.shape[0], -1)
        own = None if own is None else ops.at_pairs(own, at, self.prefix)
        return self.cut.attn_half(self.block, x, ops.summed(own, bias), **rows)


def has_rows(value: Any) -> bool:
    return any(map(has_rows, value)) if isinstance(value, (tuple, list)) else isinstance(value, Tensor) and value.dim() > 0


def prove(
    block: nn.Module, index: int, prefix: int, dim: int, scored: bool = False, records: bool = False, biased: bool = True
) -> Proved:
    """Prove block number `index`, which gets `prefix` tokens and patches of `dim` channels.

    scored: its attention's rows, too; records: find out whether a stage may record them; biased: its attention is given a bias.
    Raises UnsupportedError where it cannot be reduced, naming its class and why.
    """
    base = base_class(block)
    kind = f"{base.__module__}.{base.__qualname__}"
    name = f"block {index}, {kind}"
    if not knows(base):
        raise UnsupportedError(
            f"block {index} is a {kind}, which SqueezeViT does not know how to cut in two; blocks that are windowed or run "
            f"attention and MLP side by side cannot be reduced between their halves. For any other, {RECIPE}"
        )
    if "forward" in vars(block):
        raise UnsupportedError(
            f"{name}, has a forward of its own set on the instance, which its stage would never see; remove it first, or put it "
            "into a forward hook"
        )
    if any("DTensor" in (type(p).__name__, type(p.data).__name__) for p in block.parameters()):
        raise UnsupportedError(f"{name}, is sharded already; reduce the model first, and call fully_shard after it")
    handlers = cut(base)
    with _explained(name), torch.no_grad():
        trial = _trial(block, index, name, handlers, prefix, dim)
        if trial.x.is_meta:
            logger.warning("block %d is on the meta device: its cut is not proved; call reduce_ again after loading weights", index)
            tupled = _tupled(_whole(trial))
            return Proved(handlers, tuple(trial.rows), trial.pairs is not None, tupled, False, handlers.fingerprint(block))
        with evaluation_mode(block), without_hooks(block), ops.no_autocast(trial.x):
            tupled = _prove_halves(trial)
            try:
                _prove_bias(trial)
            except TakesNoMask:
                if biased:
                    raise
                _prove_order(trial)
            if scored:
                _prove_scores(trial)
            recorded = records and _records_alike(trial)
            return Proved(handlers, tuple(trial.rows), trial.pairs is not None, tupled, recorded, handlers.fingerprint(block))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Whatever a library's code fails with on the trial becomes a refusal; a library of another version has other names."""
    try:
        yield
    except UnsupportedError as error:
        if name.split(",")[0] in str(error):
            raise
        raise UnsupportedError(f"{name}, cannot be reduced: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UnsupportedError(
            f"{name}, cannot be reduced: it does not run as SqueezeViT knows it ({first}); `squeezevit families` lists the tested "
            "versions of its library and what of a model's options is respected"
        ) from error


def _trial(block: nn.Module, index: int, name: str, handlers: Cut, prefix: int, dim: int) -> _Trial:
    parameter = next(block.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    tokens = prefix + handlers.trial_patches(block)
    x = torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(index), device="cpu").to(parameter.device, dtype)
    some = torch.outer(x[0, :, 0], x[0, :, 1])[None, None]  # for pairs of tokens
    given = {name: some if value is ANY_PAIRS else value for name, value in handlers.arguments(block, x[0, prefix:]).items()}
    return _Trial(block, name, handlers, prefix, x, given)


def _whole(t: _Trial) -> Any:
    return base_class(t.block).forward(t.block, t.x, **t.arguments)  # type: ignore[attr-defined]


def _tupled(whole: Any) -> int:
    return len(whole) if isinstance(whole, tuple) and all(y is None for y in whole[1:]) else 0


def _prove_halves(t: _Trial) -> int:
    """Also how many things the block puts out in a tuple."""
    whole = _whole(t)
    tupled = _tupled(whole)
    halves = t.cut.mlp_half(t.block, t.attend(t.x))
    _require_close(t, whole[0] if tupled else whole, halves, "its two halves do not add up to its forward")
    return tupled


def _prove_bias(t: _Trial) -> None:
    """By what it is used for: a token with log(2) must count as much as the same token twice."""
    x = torch.cat([t.x[:, :-1], t.x[:, -2:-1]], dim=1)
    once = range(t.patches - 1)
    bias = x.new_zeros(2, 1, 1, t.prefix + len(once))
    bias[..., -1] = math.log(2)
    counted = t.attend(x[:, :-1], once, bias)
    expected = t.attend(x, (*once, once[-1]))[:, :-1]
    _require_close(t, expected, counted, "its attention does not take an additive bias")


def _prove_order(t: _Trial) -> None:
    """Without a bias: every token sees all others, wherever they lie, as those within windows of a grid do not."""
    order = torch.randperm(t.patches, generator=torch.Generator().manual_seed(0)).tolist()
    place = torch.tensor([*range(t.prefix), *(t.prefix + i for i in order)], device=t.x.device)
    moved, expected = t.attend(t.x[:, place], order), t.attend(t.x)[:, place]
    _require_close(t, expected, moved, "its attention depends on the order of its tokens")


def _rows(value: Any, rows: tuple[int, ...]) -> Any:
    return tuple(_rows(v, rows) for v in value) if isinstance(value, tuple) else value[..., rows, :]


def _prove_scores(t: _Trial) -> None:
    """The rows that scores come from are those of the attention that really runs, each head's."""
    a = t.cut.attention(t.block, t.x, **t.rows)
    logits, own = a.query(None).float() @ a.key().float().transpose(2, 3), t.pairs
    claimed = (logits if own is None else logits + own).softmax(dim=-1)
    with _Seen() as seen, _plain_attention():
        t.attend(t.x)
    real = next((m for m in seen.maps if m.shape == claimed.shape), seen.maps[0] if seen.maps else None)
    if real is None:
        raise UnsupportedError(
            f"{t.name}, cannot be scored by its attention, which runs where it cannot be seen; choose another implementation (sdpa "
            "or eager), or a reducer with another score (DTPS, Random)"
        )
    _require_close(t, real.to(t.x.dtype), claimed.to(t.x.dtype), "its scores would not be those of its attention")
    if a.key_weight is not None:
        query = a.query(1)[:, :, 0]
        folded, unfolded = ops.class_attention_folded(query, a.key_weight, a.x), ops.class_attention(query, a.key())
        _require_close(t, unfolded.to(a.x.dtype), folded.to(a.x.dtype), "its keys are not the plain linear map it states")


class _Seen(TorchDispatchMode):
    """Sees the attention that runs, as softmax weights of every head: [B, H, T, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            query, key = args[0], args[1]
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scale = (kwargs or {}).get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            logits = query.float() @ key.float().transpose(2, 3) * scale
            mask = (kwargs or {}).get("attn_mask", args[3] if len(args) > 3 and isinstance(args[3], Tensor) else None)
            self.maps.append((logits if mask is None else logits + mask).softmax(dim=-1))
        elif name in ("_softmax", "_safe_softmax") and out.dim() in (3, 4) and out.shape[-1] == out.shape[-2]:
            self.maps.append(out if out.dim() == 4 else out[None])
        return out


@contextmanager
def _plain_attention() -> Iterator[None]:
    """torch's own `nn.MultiheadAttention` as separate steps, not as one that cannot be looked into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _records_alike(t: _Trial) -> bool:
    """Whether norm, queries and keys come out the same where they are recorded in the block's own attention.

    Not where a library changes in place what its projections put out, or uses its norm for something else as well.
    """
    modules = t.cut.projections(t.block)
    if not modules:
        return False

    def evidence() -> tuple[Tensor, Tensor, Tensor]:
        a: Attention = t.cut.attention(t.block, t.x, **t.rows)
        return a.x, a.query(None), a.key()

    for module in modules:
        forget_(module)
    computed, recording = evidence(), Recording(modules)
    recording.begin()
    try:
        t.attend(t.x)
        found = evidence()
    finally:
        for module in modules:
            forget_(module)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(computed, found, strict=True))


def _require_close(t: _Trial, expected: Tensor, found: Tensor, complaint: str) -> None:
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) and not quantised(t.block) else 5e-2
    same = expected.shape == found.shape
    if same and torch.allclose(expected, found, rtol=tolerance, atol=tolerance):
        return
    off = f"by {(expected - found).abs().max().item():.2g}" if same else f"{list(expected.shape)} / {list(found.shape)}"
    raise UnsupportedError(f"{t.name}, cannot be reduced: {complaint} (they differ {off}). Otherwise {RECIPE}")

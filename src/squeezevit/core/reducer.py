"""The reducer protocol: what a method says (one frozen dataclass) and what it is given at a stage.

A new method subclasses `Reducer` (or `Staged`, if it has keep ratios) and writes `reduce`; `squeezevit.extend` says the rest.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import index
from typing import ClassVar, Literal, NamedTuple, SupportsIndex, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.core import kernels, ops
from squeezevit.core.evidence import Attention
from squeezevit.errors import ConfigError

Score = Literal["auto", "cls", "received", "shift"]
Place = Literal["before", "between", "after"]  # of a stage: before the block, between its halves, or behind them
Spread = Literal["quarters", "quarters+last", "every"]  # of stages over the depth
_STRETCH = 4.0  # of fused tokens, at most: real ones need less than 2
EPS = 1e-9  # 0.55 * 100 is 55.00000000000001 in binary: counts are rounded as the decimals the user wrote


class Carry(NamedTuple):
    """What one stage leaves for later blocks."""

    n0: int  # patch tokens before the first stage
    mass: Tensor | None = None  # [B, T] float32, patches each token stands for; prefix tokens have 1
    bias: Tensor | None = None  # [B, 1, 1, T] or [B, 1, T, T] float32, added to attention logits
    policy: Tensor | None = None  # [B, T], 1 for tokens kept so far, 0 for those masked out; with gradient (masked training)
    positions: Tensor | None = None  # [B, N], the original patch whose place a token has, once they differ (rotary embeddings)


class Reduction(NamedTuple):
    """What a reducer returns at a stage. Indices are into the N incoming patch tokens, hosts are outgoing patch positions."""

    tokens: Tensor  # [B, P + outgoing patches, C], prefix first
    kept: Tensor  # [B, K]; kept token j goes out at position j
    pruned: Tensor  # [B, R]
    hosts: Tensor | None = None  # [B, R], None where pruned tokens are discarded; fewer where the last of them are
    scores: Tensor | None = None  # [B, N]
    mass: Tensor | None = None  # [B, P + outgoing patches]
    logits: Tensor | None = None  # [B, N, 2], of a learned head in training
    decision: Tensor | None = None  # [B, N], 1 = keep, with gradient, in training
    policy: Tensor | None = None  # [B, P + N], of a learned head in training: all tokens go on, attention sees those with 1
    leaving: Tensor | None = None  # [B, P + K], the rows that stay; the others leave after this block's attention
    extra: Tensor | None = None  # [B, E]: extra tokens go out after the kept ones; each takes the place of this incoming one


def nothing_pruned(tokens: Tensor, n: int) -> Reduction:
    """All n patch tokens go out as they came: [B, P + n, C]."""
    everything = torch.arange(n, device=tokens.device).expand(tokens.shape[0], -1)
    return Reduction(tokens, everything, everything[:, :0], everything[:, :0])


@dataclass(frozen=True)
class Stage:
    """What a reducer sees at a stage: the tokens, how many to keep, and evidence on request."""

    tokens: Tensor  # [B, P + N, C]
    prefix: int  # P
    k: int
    index: int  # 0-based number of this stage
    class_token: bool
    carry: Carry
    attend: Callable[[], Attention]  # of the block this stage is in
    heads: nn.Module | None = None  # the learned heads of all stages
    training: bool = False
    block: int = 0  # 0-based number of the block this stage is in
    depth: int = 1  # blocks of the model
    ahead: Tensor | None = None  # [B, P + N, C], the tokens ahead of the block's MLP half, at a stage behind it

    @property
    def n(self) -> int:
        return self.tokens.shape[1] - self.prefix

    def scores(self, score: Score = "auto") -> Tensor:
        """Importance of the patch tokens, [B, N] float32: class attention, or attention received where no class token is."""
        if score == "shift":
            return self.shift()
        if score == "received" or (score == "auto" and not self.class_token):
            a = self.attend()
            row = ops.received_attention(a.query(None), a.key(), ops.summed(a.pairs, self.carry.bias), self.carry.mass)
        else:
            row = self.class_attention()
        return row[:, self.prefix :]

    def shift(self) -> Tensor:
        """How far the block's MLP puts out from what it takes in, || MLP(LN(x)) - x ||_2, of the patch tokens: [B, N] float32.

        At a stage behind the block alone, as one has whose reducer has score="shift". Section 3.3 of Choi et al., "Representation
        Shift", ICCV 2025.
        """
        if self.ahead is None:
            raise ConfigError(
                f"stage {self.index} is not behind its block, where alone the shift is known; give score='shift', or the reducer "
                "place = 'after'"
            )
        taken = ops.wide(self.ahead[:, self.prefix :])
        return torch.linalg.vector_norm(ops.wide(self.tokens[:, self.prefix :]) - 2 * taken, dim=-1).float()

    def class_attention(self) -> Tensor:
        """Attention of the class token over all tokens, mean over heads: [B, P + N] float32."""
        a = self.attend()
        query = a.query(1)[:, :, 0]  # (B, H, d)
        bias = ops.summed(None if a.pairs is None else a.pairs[:, :, :1], self.carry.bias)
        if a.key_weight is None:
            return ops.class_attention(query, a.key(), bias)
        return ops.class_attention_folded(query, a.key_weight, a.x, bias)

    def keys(self) -> Tensor:
        """The block's attention keys of the patch tokens, mean over heads: [B, N, d]."""
        a = self.attend()
        if a.key_weight is None:
            return a.key().mean(dim=1)[:, self.prefix :]
        weight = a.key_weight.unflatten(0, (a.heads, -1)).mean(dim=0)  # the mean of linear maps is one: 1/H of the cost
        bias = None if a.key_bias is None else a.key_bias.unflatten(0, (a.heads, -1)).mean(dim=0)
        return F.linear(a.x[:, self.prefix :], weight, bias)

    def normed(self) -> Tensor:
        """Patch tokens as the block's attention gets them, after its norm: [B, N, C]."""
        return self.attend().x[:, self.prefix :]

    def head_logits(self, detach: bool = False) -> Tensor:
        """The learned head's log-probabilities of keeping and of dropping each patch token: [B, N, 2], float32 or wider.

        detach: no gradient goes through the head into what it looks at.
        """
        assert self.heads is not None
        tokens, kept = self.tokens[:, self.prefix :], self.kept_so_far()
        if detach:
            tokens, kept = tokens.detach(), None if kept is None else kept.detach()
        return ops.wide(self.heads(tokens, kept, self.index))

    def kept_so_far(self) -> Tensor | None:
        """In masked training, which patch tokens earlier stages kept, [B, N] with gradient; None before the first."""
        return None if self.carry.policy is None else self.carry.policy[:, self.prefix :]

    def rows(self, kept: Tensor) -> Tensor:
        """Row numbers of the prefix and the kept patch tokens: [B, K] -> [B, P + K]."""
        prefix = torch.arange(self.prefix, device=kept.device).expand(kept.shape[0], -1)
        return torch.cat([prefix, kept + self.prefix], dim=1)

    def keep(self, kept: Tensor) -> Tensor:
        """Prefix and the kept patch tokens, in one copy: [B, K] -> [B, P + K, C]."""
        return ops.take(self.tokens, self.rows(kept))

    def take(self, index: Tensor) -> Tensor:
        """Patch tokens by index: [B, R] -> [B, R, C]."""
        return ops.take(self.tokens, index + self.prefix)

    def squeeze(
        self, kept: Tensor, pruned: Tensor, by_mass: bool = False, alike: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Squeeze the pruned into the kept: tokens [B, P + K, C], hosts [B, R], and the masses [B, P + K] if by mass.

        alike: what patch tokens are matched by, [B, N, D], where that is not they themselves.

        Prefix tokens ride along as reserved tokens that host nobody, which `ops.fuse` returns bit for bit: no second copy.
        """
        if kernels.usable(self.tokens, alike):
            return kernels.squeeze(self.tokens, self.prefix, kept, pruned, self.masses() if by_mass else None, alike)
        tokens, gone = self.keep(kept), self.take(pruned)
        pair = (tokens[:, self.prefix :], gone) if alike is None else (ops.take(alike, kept), ops.take(alike, pruned))
        hosts, cosine = ops.match(*pair)
        if by_mass:
            merged, mass = self.merge_by_mass(tokens, gone, kept, pruned, hosts)
            return merged, hosts, mass
        return ops.fuse(tokens, gone, hosts + self.prefix, *ops.squeeze_weights(tokens, cosine)), hosts, None

    def masses(self) -> Tensor:
        """What each incoming token stands for, [B, P + N] float32: 1 where nothing has been counted yet."""
        mass = self.carry.mass
        return self.tokens.new_full(self.tokens.shape[:2], 1.0, dtype=torch.float32) if mass is None else mass

    def merge_by_mass(self, tokens: Tensor, gone: Tensor, kept: Tensor, pruned: Tensor, hosts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each kept token with those it hosts, weighted by mass, and the masses [B, P + K] going out."""
        mass = self.masses()
        own, weights = mass.gather(1, self.rows(kept)), mass.gather(1, pruned + self.prefix)
        merged = ops.fuse(tokens, gone, hosts + self.prefix, own, weights)
        return merged, own.scatter_add(1, hosts + self.prefix, weights)

    def at_mean_length(self, merged: Tensor, kept: Tensor, pruned: Tensor, hosts: Tensor, total: Tensor) -> Tensor:
        """Merged tokens, each stretched to the mean length of those in it, weighted by mass: [B, P + K, C].

        total: their masses [B, P + K], as `merge_by_mass` returns them beside the tokens.

        A mean of tokens that point different ways is shorter than they are, and what later blocks add then weighs too much beside
        it. Where they nearly cancel, what is left is rounding: it is stretched no more than fourfold. A token that hosts nobody is
        returned as it is, bit for bit.
        """
        length = ops.length(self.tokens)[..., None]  # (B, P + N, 1)
        mass, rows, gone = self.masses(), self.rows(kept), pruned + self.prefix
        own, weights = mass.gather(1, rows), mass.gather(1, gone)
        mean = ops.fuse(ops.take(length, rows), ops.take(length, gone), hosts + self.prefix, own, weights)
        whole = torch.maximum(ops.length(merged)[..., None], mean / _STRETCH)
        alone = (total == own)[..., None]
        return (ops.wide(merged) * torch.where(alone, torch.ones_like(whole), mean / whole)).to(merged.dtype)

    def merge(self, kept: Tensor, pruned: Tensor, hosts: Tensor, weights: Tensor | None = None) -> Tensor:
        """The kept tokens, each the mean of itself and those it hosts, weighted by `weights` [B, N] or plain: [B, P + K, C]."""
        weights = torch.ones_like(self.masses()[:, self.prefix :]) if weights is None else weights
        own = F.pad(weights.gather(1, kept), (self.prefix, 0), value=1.0)
        return ops.fuse(self.keep(kept), self.take(pruned), hosts + self.prefix, own, weights.gather(1, pruned))


class Heads(nn.Module):
    """One learned head for each stage, at `model.token_reducer`: keys `token_reducer.{stage}.*`.

    A head takes patch tokens [B, N, C], and which of them earlier stages kept ([B, N], or None for all), and returns
    log-probabilities of keeping and of dropping each, [B, N, 2]. Called as a whole, so that wrappers around the whole (PEFT's
    `modules_to_save`) take part.
    """

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        for stage, head in enumerate(heads):
            self.add_module(str(stage), head)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, stage: int) -> nn.Module:
        return cast(nn.Module, self._modules[str(stage)])

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def forward(self, tokens: Tensor, kept: Tensor | None, stage: int) -> Tensor:
        return self[stage](tokens, kept)

    def fits(self, other: "Heads") -> bool:
        """Whether these have the same entries as others, so that they can stand in for them."""
        mine, theirs = self.state_dict(), other.state_dict()
        return type(self) is type(other) and {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


@dataclass(frozen=True)
class Reducer:
    """What is done to the tokens, where, and how many stay. Subclasses are frozen dataclasses: intent, no state."""

    learned: ClassVar[bool] = False  # has a score head per stage

    @property
    def place(self) -> Place:
        """Of a stage; a class may set it as an attribute."""
        return "between"

    @property
    def scored(self) -> bool:
        """Whether stages ask for attention evidence; a class may set it as an attribute."""
        return True

    @property
    def carries(self) -> bool:
        """Whether later blocks need something from earlier stages (masses, the first count)."""
        return self.weighs

    @property
    def weighs(self) -> bool:
        """Whether tokens have masses, so that later attention and average pooling must respect them."""
        return False

    @property
    def biases(self) -> bool:
        """Whether masses become a bias of later attention."""
        return self.weighs

    @property
    def masks(self) -> bool:
        """Whether training keeps all tokens and hides the pruned ones, so that later attention and pooling must not see them."""
        return False

    def follows(self, training: bool) -> bool:
        """Whether blocks after a stage, and pooling, must know what the stage did."""
        return self.weighs or (training and self.masks)

    def stages(self, depth: int) -> tuple[int, ...]:
        """Block indices of the stages in a model of `depth` blocks; raises ConfigError where they do not fit."""
        raise NotImplementedError

    def count(self, stage: int, n: int, n0: int) -> int:
        """Patch tokens kept of the n coming into a stage (n0 before the first): 1 <= K <= n; K = n leaves them alone."""
        raise NotImplementedError

    def reduce(self, s: Stage) -> Reduction:
        """Reduce [B, P + N, C] to s.k reserved tokens; called only where s.k < N."""
        raise NotImplementedError

    def heads(self, stages: int, dim: int) -> Heads | None:
        """Fresh learned heads for tokens of `dim` channels; None where nothing is learned."""
        return None

    def at_strength(self, strength: float, patches: int, depth: int) -> "Reducer":
        """The same reducer from a strength of 0, nothing goes, to 1, as much as it can, for so many patches and blocks.

        What budgets are met by; cost falls as strength grows. Raises ConfigError where a method has no such setting.
        """
        raise ConfigError(f"{self} has no keep ratio to plan; give a reducer with one, as sv.ETPS, or write its at_strength")

    def annealed(self, progress: float) -> "Reducer":
        """The reducer at a share of the way into its training, 0 to 1; here always as it is."""
        return self

    def constant(self) -> object:
        """All that `retune_` may not change: everything but ratios."""
        return self.weighs, self.masks

    def setting(self) -> str:
        """What tells it from others of its kind, as a table has room for."""
        return ""


@dataclass(frozen=True)
class Staged(Reducer):
    """A reducer with few stages and a keep ratio for each.

    keep: ratio kept at every stage, or one per stage, each relative to the count before that stage.
    at: 0-based block indices, ascending; None = one quarter, half and three quarters of the depth, (3, 6, 9) of 12; "quarters" =
    the first block, too; "quarters+last" = also the last one, for models that read their class token alone; "every" = all blocks.
    """

    keep: float | tuple[float, ...] = 0.7
    at: tuple[int, ...] | Spread | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "keep", _ratios(name, self.keep))
        if not (self.at is None or (isinstance(self.at, str) and self.at in get_args(Spread))):
            at = _blocks(name, cast(Sequence[int], self.at))
            object.__setattr__(self, "at", at)
            self._check_lengths(at)

    def _check_lengths(self, at: tuple[int, ...]) -> None:
        if isinstance(self.keep, tuple) and len(self.keep) != len(at):
            raise ConfigError(
                f"{type(self).__name__}: keep={self.keep} has {len(self.keep)} ratios but at={at} has {len(at)} stages; "
                "give one ratio per stage, or a single one for all"
            )

    def stages(self, depth: int) -> tuple[int, ...]:
        at: tuple[int, ...]
        if isinstance(self.at, tuple):
            at = self.at
        elif self.at == "every":
            at = tuple(range(depth))
        else:
            last = {depth - 1} if self.at == "quarters+last" else set()
            at = tuple(sorted({depth * i // 4 for i in range(0 if self.at else 1, 4)} | last))
        if at[-1] >= depth:
            raise ConfigError(
                f"{type(self).__name__}: at={at} names block {at[-1]}, but the model has {depth} blocks, "
                f"0 to {depth - 1}; choose stages below {depth}"
            )
        self._check_lengths(at)
        return at

    @property
    def class_token_only(self) -> bool:
        """Whether what it leaves is right only for models that are read at their class token."""
        return self.at == "quarters+last"

    def ratio(self, stage: int) -> float:
        return self.keep[stage] if isinstance(self.keep, tuple) else self.keep

    def at_strength(self, strength: float, patches: int, depth: int) -> "Reducer":
        return replace(self, keep=max(round(1 - strength, 4), 1e-4))

    def annealed(self, progress: float) -> "Reducer":
        """keep(t) = keep + (1 - keep) (1 + cos(pi t)) / 2, as EViT trains (Liang et al. 2022, section 4).

        What samples its own counts (masked training of dTPS and DynamicViT) stays as it is.
        """
        left = still_left(progress)
        if self.masks or not left:
            return self
        ratios = [k + (1 - k) * left for k in (self.keep if isinstance(self.keep, tuple) else (self.keep,))]
        return replace(self, keep=tuple(ratios) if isinstance(self.keep, tuple) else ratios[0])

    def constant(self) -> object:
        return replace(self, keep=1.0, at=None)

    def setting(self) -> str:
        if isinstance(self.keep, tuple):
            return "keep=" + ", ".join(f"{ratio:.2f}" for ratio in self.keep)
        return f"keep={self.keep:.3f}"

    def targets(self, stages: int) -> list[float]:
        """The share of the original patch tokens that each of `stages` stages is to leave."""
        return [math.prod([self.ratio(i) for i in range(j + 1)]) for j in range(stages)]

    def count(self, stage: int, n: int, n0: int) -> int:
        """K_j = ceil(keep_j * K_{j-1}), as EViT and eTPS; never 0."""
        return max(math.ceil(n * self.ratio(stage) - EPS), 1)


@dataclass(frozen=True)
class Scored(Staged):
    """A reducer with a field `score`. Its stages are behind their blocks where that is "shift", which is known only there."""

    @property
    def place(self) -> Place:
        return "after" if getattr(self, "score", None) == "shift" else "between"

    @property
    def scored(self) -> bool:
        return getattr(self, "score", None) != "shift"


def still_left(progress: float) -> float:
    """What a cosine from 1 to 0 has left at a share of the way. Raises ConfigError where that is none."""
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress={progress!r} is no share of the way; give a number from 0 to 1")
    return (1 + math.cos(math.pi * progress)) / 2


def floor_of_first(reducer: Staged, stage: int, n: int, n0: int) -> int:
    """K_j = floor(N * keep_1 * ... * keep_j), as DynamicViT and dTPS, but at least 1 (theirs may reach 0) and at most n."""
    return min(max(math.floor(n0 * reducer.targets(stage + 1)[-1] + EPS), 1), n)


def outgoing_carry(reducer: Reducer, carry: Carry, reduction: Reduction) -> Carry:
    """What a stage leaves behind: masses as they are, their logarithm as the bias of later attention (Bolya et al. 2023), or
    the policy and its bias (Rao et al. 2021)."""
    if reduction.policy is not None:
        return carry._replace(bias=ops.policy_bias(reduction.policy), policy=reduction.policy)
    if reduction.mass is None or not reducer.weighs:
        return carry
    mass = reduction.mass.detach()
    return carry._replace(mass=mass, bias=mass.log()[:, None, None] if reducer.biases else None)


def outgoing_positions(carry: Carry, reduction: Reduction) -> Tensor | None:
    """Whose places the tokens have that a stage leaves: [B, N] of original patches, None where none has left so far."""
    if not reduction.pruned.shape[1]:
        return carry.positions
    index = reduction.kept if reduction.extra is None else torch.cat([reduction.kept, reduction.extra], dim=1)
    return index if carry.positions is None else carry.positions.gather(1, index)


def check_flag(reducer: Reducer, name: str) -> None:
    """Raise ConfigError where a field is not True or False."""
    if not isinstance(value := getattr(reducer, name), bool):
        raise ConfigError(f"{type(reducer).__name__}: {name}={value!r} is neither True nor False; give one of them")


def check_choice(reducer: Reducer, name: str, known: Sequence[str]) -> None:
    """Raise ConfigError where a field that takes one of a few words holds none of them."""
    value = getattr(reducer, name)
    if not isinstance(value, str) or value not in known:
        listed = ", ".join(map(repr, known))
        raise ConfigError(f"{type(reducer).__name__}: {name}={value!r} is not known; choose one of {listed}")


def _ratios(name: str, keep: float | Sequence[float]) -> float | tuple[float, ...]:
    values = tuple(keep) if isinstance(keep, Sequence) and not isinstance(keep, str) else (keep,)
    if not values:
        raise ConfigError(f"{name}: keep={keep!r} is empty; give a ratio above 0 and at most 1, or one per stage")
    ratios = tuple(_ratio(name, keep, value) for value in values)
    return ratios if isinstance(keep, Sequence) else ratios[0]


def _ratio(name: str, keep: object, value: object) -> float:
    try:
        ratio = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        ratio = math.nan
    if isinstance(value, bool | str) or not 0 < ratio <= 1:  # NaN fails the comparison too
        raise ConfigError(f"{name}: keep={keep!r} is not a ratio of tokens kept; give a number above 0 and at most 1, as 0.7")
    return ratio


def _blocks(name: str, at: Sequence[int]) -> tuple[int, ...]:
    values = tuple(at) if isinstance(at, Sequence) and not isinstance(at, str) else (at,)
    good = bool(values) and all(is_index(i) for i in values)
    if not good or any(a >= b for a, b in pairwise(values)):
        raise ConfigError(
            f"{name}: at={at!r} is not a list of stages; give 0-based block indices in ascending order, each once, as (3, 6, 9)"
        )
    return tuple(map(int, values))


def is_index(value: object) -> bool:
    """Whether a value is a whole number of 0 or more (NumPy's too, booleans not)."""
    if not isinstance(value, SupportsIndex) or isinstance(value, bool | type):
        return False
    try:
        return index(value) >= 0
    except (TypeError, RuntimeError):  # an array or a tensor of several numbers
        return False

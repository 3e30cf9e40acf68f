"""eTPS, the half of joint Token Pruning and Squeezing (Wei et al., CVPR 2023) that learns nothing, and its parts as choices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.capture import compiling
from squeezevit.core.reducer import Reduction, Score, Scored, Stage, check_choice, check_flag
from squeezevit.errors import ConfigError

Ranking = Score | Literal["redundancy", "mrmr", "random"]
_RELEVANCE = 0.2  # attention spans orders of magnitude: its fifth root tells twins apart from what nobody looks at, and no more
_MATCHES, _FUSES = ("tokens", "normed", "keys"), ("cosine", "mass", "length")


@dataclass(frozen=True)
class _Squeezing(Scored):
    """Score, split, and squeeze each pruned token into the reserved one most like it. Subclasses say by what."""

    def reduce(self, s: Stage) -> Reduction:
        scores = self.ranking(s)
        kept, pruned = ops.split(scores, s.k)
        tokens, hosts, mass = s.squeeze(kept, pruned, self.weighs, self.alike(s))
        if self.stretches and mass is not None:
            tokens = s.at_mean_length(tokens, kept, pruned, hosts, mass)
        return Reduction(tokens, kept, pruned, hosts, scores, mass)

    def ranking(self, s: Stage) -> Tensor:
        """Scores of the patch tokens, [B, N] float32."""
        raise NotImplementedError

    @property
    def stretches(self) -> bool:
        """Whether fused tokens get the mean length of those in them."""
        return False

    def alike(self, s: Stage) -> Tensor | None:
        """What patch tokens are matched by, [B, N, D]; None for they themselves."""
        return None


@dataclass(frozen=True)
class ETPS(_Squeezing):
    """eTPS: between attention and MLP of a block, tokens with little class attention are squeezed into the others.

    score: "cls" (attention of the class token), "received" (mean attention a token receives), "auto" (the first where the
    model has a class token, else the second; the paper knows class tokens only), "shift" (how far the block's MLP moves a token,
    Choi et al., "Representation Shift", ICCV 2025; it needs no attention, and the stage is then behind the block, whose MLP runs on
    all tokens).
    mass: beyond the paper, tokens remember how many patches they stand for: fused by mass, with log(mass) as a bias of later
    attention and mass-weighted average pooling.
    `Squeeze` with these settings is the same: `Squeeze(score=score, fuse="mass" if mass else "cosine")`.
    K_j = ceil(keep * K_{j-1}); section 3.3 of Wei et al. 2023. Raises ConfigError on values that cannot be meant.

    >>> ETPS(keep=0.5, at=(3, 6, 9)).count(0, 196, 196)
    98
    """

    score: Score = "auto"
    mass: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "score", get_args(Score))
        check_flag(self, "mass")

    @property
    def weighs(self) -> bool:
        return self.mass

    def ranking(self, s: Stage) -> Tensor:
        return s.scores(self.score)


@dataclass(frozen=True)
class Squeeze(_Squeezing):
    """Between attention and MLP, tokens of low score are squeezed into the others, one direction, each into one.

    score: "cls", "received", "auto", "shift" as for `ETPS`; "redundancy": a token is as important as it is unlike every token that
    gets more attention than it (1 - the highest cosine of their keys), so that what is pruned has a more important twin to go to;
    "mrmr", relevant and not redundant (after Peng et al. 2005): that times the fifth root of the attention the token itself gets;
    "random", at the same places in every image; or a function of the `Stage` that returns scores [B, N], float32.
    match: on what a pruned token's host is most like it: its "tokens", tokens as they came into the block and "normed" for its
    attention, or attention "keys" (mean over heads).
    fuse: "cosine", the paper's weights exp(c); "mass": tokens remember how many patches they stand for; "length": that, and a fused
    token is as long as those in it are on average, where their mean would be shorter.
    bias: with masses, later attention counts a token that often (log(mass) on its logits).
    `Squeeze()` is `ETPS()`, and `Squeeze(fuse="mass")` is `ETPS(mass=True)`.
    """

    score: Ranking | Callable[[Stage], Tensor] = "auto"
    match: Literal["tokens", "normed", "keys"] = "tokens"
    fuse: Literal["cosine", "mass", "length"] = "cosine"
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "bias")
        rankings = (*get_args(Score), "redundancy", "mrmr", "random")
        for name, known in (("score", rankings), ("match", _MATCHES), ("fuse", _FUSES)):
            if not (name == "score" and callable(self.score)):
                check_choice(self, name, known)

    @property
    def scored(self) -> bool:
        return super().scored or self.match != "tokens"

    @property
    def weighs(self) -> bool:
        return self.fuse != "cosine"

    @property
    def stretches(self) -> bool:
        return self.fuse == "length"

    @property
    def biases(self) -> bool:
        return self.weighs and self.bias

    def alike(self, s: Stage) -> Tensor | None:
        return None if self.match == "tokens" else s.keys() if self.match == "keys" else s.normed()

    def ranking(self, s: Stage) -> Tensor:
        """Scores of the patch tokens, [B, N] float32."""
        if callable(self.score):
            return _checked(self.score(s), s, self)
        if self.score == "random":
            return ops.position_noise(s.n, s.index, s.tokens.device).expand(s.tokens.shape[0], -1)
        if self.score != "redundancy" and self.score != "mrmr":
            return s.scores(self.score)
        attention = s.scores("auto")
        unlike = ops.uniqueness(s.keys(), attention)
        return unlike if self.score == "redundancy" else unlike * attention**_RELEVANCE


def _checked(scores: Tensor, s: Stage, reducer: Squeeze) -> Tensor:
    """A score function's result. Raises ConfigError where it is not one finite number for each patch token."""
    expected = (s.tokens.shape[0], s.n)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(
            f"{reducer}: the score function returned {found} at stage {s.index}; return one number for each patch token, "
            f"{list(expected)}, without the {s.prefix} prefix tokens (s.tokens[:, s.prefix:])"
        )
    if not compiling() and not scores.is_meta and scores.isnan().any():
        raise ConfigError(f"{reducer}: the score function returned NaN at stage {s.index}, which ranks nothing; mend the function")
    return scores

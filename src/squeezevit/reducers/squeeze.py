"""The parts of TPS as choices: how tokens are scored, on what they are matched, and how they are fused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from squeezevit import ops
from squeezevit.errors import ConfigError
from squeezevit.reducer import Reduction, Score, Stage, Staged, check_flag

Ranking = Score | Literal["redundancy", "mrmr", "random"]
_RELEVANCE = 0.2  # attention spans orders of magnitude: its fifth root tells twins apart from what nobody looks at, and no more
_MATCHES, _FUSES = ("tokens", "normed", "keys"), ("cosine", "mass")


@dataclass(frozen=True)
class Squeeze(Staged):
    """Between attention and MLP, tokens of low score are squeezed into the others, one direction, each into one.

    score: "cls", "received", "auto" as for `ETPS`; "redundancy": a token is as important as it is unlike every token that gets
    more attention than it (1 - the highest cosine of their keys), so that what is pruned has a more important twin to go to;
    "mrmr", relevant and not redundant (after Peng et al. 2005): that times the fifth root of the attention the token itself gets;
    "random", at the same places in every image; or a function of the `Stage` that returns scores [B, N], float32.
    match: on what a pruned token's host is most like it: its "tokens", tokens as they came into the block and "normed" for its
    attention, or attention "keys" (mean over heads).
    fuse: "cosine", the paper's weights exp(c), or "mass": tokens remember how many patches they stand for.
    bias: with masses, later attention counts a token that often (log(mass) on its logits).
    `Squeeze()` is `ETPS()`, and `Squeeze(fuse="mass")` is `ETPS(mass=True)`.
    """

    score: Ranking | Callable[[Stage], Tensor] = "auto"
    match: Literal["tokens", "normed", "keys"] = "tokens"
    fuse: Literal["cosine", "mass"] = "cosine"
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "bias")
        rankings = (*get_args(Score), "redundancy", "mrmr", "random")
        for name, known in (("score", rankings), ("match", _MATCHES), ("fuse", _FUSES)):
            value = getattr(self, name)
            if value not in known and not (name == "score" and callable(value)):
                raise ConfigError(f"Squeeze: {name}={value!r} is not known; choose one of {', '.join(map(repr, known))}")

    @property
    def carries(self) -> bool:
        return self.weighs

    @property
    def weighs(self) -> bool:
        return self.fuse == "mass"

    @property
    def biases(self) -> bool:
        return self.weighs and self.bias

    def reduce(self, s: Stage) -> Reduction:
        scores = self.ranking(s)
        kept, pruned = ops.split(scores, s.k)
        alike = None if self.match == "tokens" else s.keys() if self.match == "keys" else s.normed()
        tokens, hosts, mass = s.squeeze(kept, pruned, self.weighs, alike)
        return Reduction(tokens, kept, pruned, hosts, scores, mass)

    def ranking(self, s: Stage) -> Tensor:
        """Scores of the patch tokens, [B, N] float32."""
        if callable(self.score):
            return self.score(s)
        if self.score == "random":
            return ops.position_noise(s.n, s.index, s.tokens.device).expand(s.tokens.shape[0], -1)
        if self.score != "redundancy" and self.score != "mrmr":
            return s.scores(self.score)
        attention = s.scores("auto")
        unlike = ops.uniqueness(s.keys(), attention)
        return unlike if self.score == "redundancy" else unlike * attention**_RELEVANCE

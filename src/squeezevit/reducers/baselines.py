"""What every table needs beside the methods: plain pruning, chance, and nothing at all."""

from dataclasses import dataclass
from typing import ClassVar, get_args

from squeezevit.core import ops
from squeezevit.core.reducer import Reducer, Reduction, Score, Scored, Stage, Staged, check_choice
from squeezevit.errors import ConfigError


@dataclass(frozen=True)
class TopK(Scored):
    """Between attention and MLP, tokens with little class attention are discarded: eTPS without the squeeze.

    score: as for `ETPS`. With "shift" this is the pruning of Choi et al., "Representation Shift", ICCV 2025.
    """

    score: Score = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "score", get_args(Score))

    def reduce(self, s: Stage) -> Reduction:
        scores = s.scores(self.score)
        kept, pruned = ops.split(scores, s.k)
        return Reduction(s.keep(kept), kept, pruned, scores=scores)


@dataclass(frozen=True)
class Random(Staged):
    """Between attention and MLP, tokens chosen by chance are discarded, at the same places in every image.

    The choice depends on `seed`, the stage and the number of tokens alone, so that an image's output never depends on its batch.
    """

    scored: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"Random: seed={self.seed!r} is not an integer; give one, as seed=0")

    def reduce(self, s: Stage) -> Reduction:
        noise = ops.position_noise(s.n, self.seed * 1009 + s.index, s.tokens.device)
        scores = noise.expand(s.tokens.shape[0], -1)
        kept, pruned = ops.split(scores, s.k)
        return Reduction(s.keep(kept), kept, pruned, scores=scores)


@dataclass(frozen=True)
class Identity(Reducer):
    """No stage: the unreduced model, in the same clothes as the others."""

    scored: ClassVar[bool] = False

    def stages(self, depth: int) -> tuple[int, ...]:
        return ()

    def at_strength(self, strength: float, patches: int, depth: int) -> Reducer:
        return self

"""What happened to the tokens: which were reserved, which were pruned, and where each original patch ended."""

from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from squeezevit.attach import State, state_of
from squeezevit.errors import ConfigError
from squeezevit.reducer import Reduction


@dataclass(frozen=True, eq=False)
class StageTrace:
    """One stage. Indices are into the N patch tokens that came in; kept token j goes out at position j."""

    block: int
    n: int  # N
    n_out: int
    scores: Tensor | None  # [B, N], None where the method does not score single tokens
    kept: Tensor  # [B, K]
    pruned: Tensor  # [B, R]
    hosts: Tensor | None  # [B, R], outgoing positions; None where pruned tokens are discarded

    def destinations(self) -> Tensor:
        """For each incoming patch token the outgoing one it ended in, -1 if discarded: [B, N]."""
        out = self.kept.new_full((self.kept.shape[0], self.n), -1)
        out = out.scatter(1, self.kept, torch.arange(self.kept.shape[1], device=out.device).expand_as(self.kept))
        return out if self.hosts is None else out.scatter(1, self.pruned, self.hosts)


class Trace:
    """Records the last forward of a reduced model while its `with` block is open; readable afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self._state: State = state_of(model)
        self._records: dict[int, StageTrace] = {}
        self._outer: Trace | None = None
        self.prefix = self._state.prefix

    def __enter__(self) -> "Trace":
        self._outer, self._state.trace = self._state.trace, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._state.trace = self._outer

    def record(self, stage: int, block: int, n: int, r: Reduction) -> None:
        scores = None if r.scores is None else r.scores.detach()
        n_out = r.tokens.shape[1] - self.prefix
        self._records[stage] = StageTrace(block, n, n_out, scores, r.kept, r.pruned, r.hosts)

    @property
    def stages(self) -> list[StageTrace]:
        return [self._records[j] for j in sorted(self._records)]

    @property
    def groups(self) -> Tensor:
        """For each original patch the index of the final token it ended in, -1 if dropped without a host: [B, N0]."""
        return self.groups_after(len(self._records) - 1)

    def groups_after(self, stage: int) -> Tensor:
        """The same after stage number `stage` (0-based). Raises ConfigError where no such stage ran."""
        stages = self.stages
        if not 0 <= stage < len(stages):
            raise ConfigError(
                f"there is no stage {stage} in this trace ({len(stages)} were traced, of {self._state.reducer}); run the "
                "model inside `with sv.trace(model) as t:`, with a reducer that has stages"
            )
        groups = stages[0].destinations()
        for s in stages[1 : stage + 1]:
            groups = torch.where(groups < 0, groups, s.destinations().gather(1, groups.clamp(min=0)))
        return groups

    def scatter_back(self, tokens: Tensor, fill: float = 0.0) -> Tensor:
        """The full grid again, for dense tasks: every patch holds its group's token, a dropped one holds `fill`.

        Shapes: patch tokens without prefix [B, K_last, C] -> [B, N0, C]. Raises ConfigError where the count is another.
        """
        if not self._state.stages:
            return tokens
        if not self._records:
            raise ConfigError("nothing was traced; run the model inside `with sv.trace(model) as t:` before scatter_back")
        expected = self.stages[-1].n_out
        if tokens.dim() != 3 or tokens.shape[1] != expected:
            raise ConfigError(
                f"scatter_back takes the {expected} patch tokens that left the last stage, [B, {expected}, C], got "
                f"{list(tokens.shape)}; leave out the {self.prefix} prefix tokens: tokens[:, {self.prefix}:]"
            )
        groups = self.groups[..., None]
        grid = tokens.gather(1, groups.clamp(min=0).expand(-1, -1, tokens.shape[-1]))
        return grid.masked_fill(groups < 0, fill)


def trace(model: nn.Module) -> Trace:
    """Record what a reduced model does to its tokens. Raises ConfigError where the model is not reduced.

    >>> with sv.trace(model) as t:  # doctest: +SKIP
    ...     model(images)
    >>> t.groups.shape  # doctest: +SKIP
    torch.Size([8, 196])
    """
    return Trace(model)

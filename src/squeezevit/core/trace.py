"""What happened to the tokens: which were reserved, which were pruned, and where each original patch ended."""

from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from squeezevit.core.block import State, state_of
from squeezevit.core.reducer import Reduction
from squeezevit.errors import ConfigError


@dataclass(frozen=True, eq=False)
class StageTrace:
    """One stage. Indices are into the N patch tokens that came in; kept token j goes out at position j."""

    block: int
    n: int  # N
    n_out: int
    scores: Tensor | None  # [B, N], None where the method does not score single tokens
    kept: Tensor  # [B, K]
    pruned: Tensor  # [B, R]
    hosts: Tensor | None  # [B, R], outgoing positions; None where pruned tokens are discarded, fewer where the last of them are
    logits: Tensor | None = None  # [B, N, 2], of a learned head in training
    decision: Tensor | None = None  # [B, N], 1 = keep, with gradient, of a learned head in training

    def destinations(self, squeezed: bool = True) -> Tensor:
        """For each incoming patch token the outgoing one it ended in, -1 if discarded (or squeezed, if not asked for): [B, N]."""
        out = self.kept.new_full((self.kept.shape[0], self.n), -1)
        out = out.scatter(1, self.kept, torch.arange(self.kept.shape[1], device=out.device).expand_as(self.kept))
        if not squeezed or self.hosts is None:
            return out
        return out.scatter(1, self.pruned[:, : self.hosts.shape[1]], self.hosts)

    @property
    def discards(self) -> bool:
        """Whether a patch token is gone without a host."""
        return self.n_out < self.n and (self.hosts is None or self.hosts.shape[1] < self.pruned.shape[1])


class Trace:
    """Records the last forward of a reduced model while its `with` block is open, in its own thread; readable afterwards.

    Printed, it is a table: for each stage its block, the patch tokens that came in and went out, the most patches that one token
    stands for in any image, and the share of patches that are dropped without a host by then.
    In masked training no token leaves: every stage has all tokens in `kept`, and what it decided is in `decisions`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state: State = state_of(model)
        self._records: dict[int, StageTrace] = {}
        self.prefix = self._state.prefix
        self.tokens: Tensor | None = None  # [B, N_last, C], patch tokens after the final norm

    def __enter__(self) -> "Trace":
        self._state = state_of(self._model)  # it may have been reduced anew since
        self._state.forwards.open(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._state.forwards.close(self)

    def begin(self) -> None:
        """A forward begins: nothing of an earlier one stays, also where this one fails on the way."""
        self._records.clear()
        self.tokens = None

    def record(self, stage: int, block: int, n: int, r: Reduction) -> None:
        scores = None if r.scores is None else r.scores.detach()
        n_out = r.kept.shape[1] if r.leaving is not None else r.tokens.shape[1] - self.prefix
        self._records[stage] = StageTrace(block, n, n_out, scores, r.kept, r.pruned, r.hosts, r.logits, r.decision)

    def __repr__(self) -> str:
        stages = self.stages
        if not stages:
            why = "run the model inside `with sv.trace(model) as t:`" if self.has_stages else "it has no stages"
            return f"trace of {self._state.reducer}: nothing was recorded; {why}"
        images = len(stages[0].kept)
        rows = [("block", "tokens in", "tokens out", "largest group", "dropped")]
        for j, s in enumerate(stages):
            groups = self.groups_after(j)
            became = ("-", "-")  # of tensors without values
            if not groups.is_meta:
                dropped = (groups < 0).float().mean().item()
                became = (str(int(self._sizes_after(j).max())), f"{100 * dropped:.1f} %")
            rows.append((str(s.block), str(s.n), str(s.n_out), *became))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([f"trace of {self._state.reducer}, {images} image{'' if images == 1 else 's'}", *table])

    @property
    def has_stages(self) -> bool:
        """Whether the model's reducer takes tokens anywhere."""
        return bool(self._state.stages)

    @property
    def stages(self) -> list[StageTrace]:
        return [self._records[j] for j in sorted(self._records)]

    @property
    def groups(self) -> Tensor:
        """For each original patch the index of the final token it ended in, -1 if dropped without a host: [B, N0]."""
        return self.groups_after(len(self._records) - 1)

    def groups_after(self, stage: int) -> Tensor:
        """The same after stage number `stage` (0-based). Raises ConfigError where no such stage ran."""
        return self._places(stage, squeezed=True)

    @property
    def survivors(self) -> Tensor:
        """Which original patches were themselves kept at every stage: [B, N0] bool."""
        return self._places(len(self._records) - 1, squeezed=False) >= 0

    @property
    def logits(self) -> list[Tensor]:
        """Log-probabilities of keep and drop by the learned heads, in training: per stage [B, N, 2], with gradient."""
        return [s.logits for s in self.stages if s.logits is not None]

    @property
    def decisions(self) -> list[Tensor]:
        """What learned heads decided in training: per stage [B, N0], 1 for the original patches kept so far, with gradient."""
        out: list[Tensor] = []
        first = next((s.decision for s in self.stages if s.decision is not None), None)
        if first is None:
            return out
        for j, s in enumerate(self.stages):
            if s.decision is None:  # a keep ratio of 1
                out.append(out[-1] if out else first.new_ones(first.shape[0], self.stages[0].n))
            elif s.n == self.stages[0].n:
                out.append(s.decision)
            else:  # of the tokens that are left, back at the places of their patches
                places = self._places(j - 1, squeezed=False)
                out.append(s.decision.gather(1, places.clamp(min=0)).masked_fill(places < 0, 0))
        return out

    def _places(self, stage: int, squeezed: bool) -> Tensor:
        stages = self.stages
        if not 0 <= stage < len(stages):
            raise ConfigError(
                f"there is no stage {stage} in this trace ({len(stages)} were traced, of {self._state.reducer}); run the "
                "model inside `with sv.trace(model) as t:`, with a reducer that has stages"
            )
        places = stages[0].destinations(squeezed)
        for s in stages[1 : stage + 1]:
            places = torch.where(places < 0, places, s.destinations(squeezed).gather(1, places.clamp(min=0)))
        return places

    @property
    def sizes(self) -> Tensor:
        """How many original patches each final token stands for: [B, K_last] float32; dropped ones count nowhere."""
        return self._sizes_after(len(self._records) - 1)

    def _sizes_after(self, stage: int) -> Tensor:
        groups = self.groups_after(stage)
        counts = torch.zeros(groups.shape[0], self.stages[stage].n_out + 1, device=groups.device)
        return counts.scatter_add_(1, groups + 1, torch.ones_like(groups, dtype=counts.dtype))[:, 1:]

    def scatter_back(self, tokens: Tensor, fill: float = 0.0, stage: int | None = None) -> Tensor:
        """The full grid again, for dense tasks: every patch holds its group's token, a dropped one holds `fill`.

        Shapes: patch tokens without prefix [B, K, C] -> [B, N0, C]. stage: the number of the stage that the tokens left, 0-based;
        None: the last. Raises ConfigError where the count is another.
        """
        if not self.has_stages:
            return tokens
        if not self._records:
            raise ConfigError("nothing was traced; run the model inside `with sv.trace(model) as t:` before scatter_back")
        counts = [s.n_out for s in self.stages]
        number = len(counts) - 1 if stage is None else stage
        groups = self.groups_after(number)
        if tokens.dim() != 3 or tokens.shape[1] != counts[number]:
            raise ConfigError(self._not_those(tokens, counts, number))
        return spread(tokens, groups, fill)

    def _not_those(self, tokens: Tensor, counts: list[int], number: int) -> str:
        expected, found = counts[number], tokens.shape[1] if tokens.dim() == 3 else None
        where = "the last stage" if number == len(counts) - 1 else f"stage {number}"
        remedy = f"leave out the {self.prefix} prefix tokens: tokens[:, {self.prefix}:]"
        if found in counts:
            remedy = f"these left stage {counts.index(found)}: scatter_back(tokens, stage={counts.index(found)})"
        elif found == self.stages[0].n:
            remedy = "these are all of them, before any stage: they need no scattering back"
        return (
            f"scatter_back takes the {expected} patch tokens that left {where}, [B, {expected}, C], got "
            f"{list(tokens.shape)}; {remedy}"
        )


def spread(tokens: Tensor, groups: Tensor, fill: float = 0.0) -> Tensor:
    """For every patch the token of its group, `fill` where that is -1: [B, K, C], [B, N0] -> [B, N0, C]."""
    groups = groups[..., None]
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


def pool(tokens: Tensor, t: Trace) -> Tensor:
    """The mean over an image's patches of a reduced model's tokens: each token counts as often as it has patches.

    Shapes: patch tokens without prefix [B, K, C], and the trace of the forward they come from -> [B, C]. A plain mean counts a
    token that stands for fifty patches as one. Patches dropped without a host do not count. Raises ConfigError where the count is
    another.

    >>> with trace(model) as t:  # doctest: +SKIP
    ...     tokens = model.forward_features(images)[:, 1:]
    >>> pool(tokens, t)  # doctest: +SKIP
    """
    if not isinstance(tokens, Tensor) or not isinstance(t, Trace):
        raise ConfigError(
            f"pool takes tokens and the trace of the forward they come from, got a {type(tokens).__name__} and a "
            f"{type(t).__name__}; see help(sv.pool)"
        )
    if not t.has_stages:
        return tokens.mean(dim=1)
    if not t.stages:
        raise ConfigError("nothing was traced; run the model inside `with sv.trace(model) as t:` before pool")
    if any(s.decision is not None and s.n_out == s.n for s in t.stages):
        raise ConfigError(
            "in masked training all tokens stay, dropped ones among them; pool in evaluation mode, or by the model's own pooling"
        )
    sizes = t.sizes
    if tokens.dim() != 3 or tokens.shape[:2] != sizes.shape:
        raise ConfigError(
            f"pool takes the {sizes.shape[1]} patch tokens that left the last stage, {[*sizes.shape, 'C']}, got "
            f"{list(tokens.shape)}; leave out the {t.prefix} prefix tokens: tokens[:, {t.prefix}:]"
        )
    weights = sizes / sizes.sum(dim=1, keepdim=True)
    return (tokens * weights[..., None].to(tokens.dtype)).sum(dim=1)

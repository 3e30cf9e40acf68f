"""What one training step minimises: the task, the keep ratio of learned heads, and distillation from the unreduced model."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from squeezevit.core.attach import state_of
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Staged
from squeezevit.core.running import evaluation_mode, unwrapped
from squeezevit.core.trace import Trace
from squeezevit.errors import ConfigError
from squeezevit.train import losses


@dataclass(frozen=True)
class LossWeights:
    """Beside the task's 1. The authors of DynamicViT and TPS use 2, 0.5 and 0.5."""

    keep_ratio: float = 2.0
    logits: float = 0.5
    tokens: float = 0.5


class Losses(NamedTuple):
    total: Tensor  # to call backward on
    parts: dict[str, Tensor]  # unweighted, without gradient: "task", "keep_ratio", "logits", "tokens"
    logits: Tensor  # [B, classes]
    kept: list[Tensor]  # for each stage the mean share of the original patches kept, without gradient


class Objective:
    """Weighted sum of the losses of one forward; the same for every reducer, so that a comparison is fair.

    criterion: of logits and targets. teacher: an unreduced model of timm's kind, or None for no distillation; adapt: what makes the
    teacher's images of the student's, None where both want the same. Tokens are compared where the reduced model still has a token
    of that very patch. Raises ConfigError where student and teacher do not fit.
    """

    def __init__(
        self,
        criterion: Callable[[Tensor, Tensor], Tensor],
        weights: LossWeights | None = None,
        teacher: nn.Module | None = None,
        adapt: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.criterion, self.weights, self.adapt = criterion, weights or LossWeights(), adapt
        self.teacher: Any = teacher  # with timm's forward_features and forward_head

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Losses:
        state = state_of(unwrapped(model))
        with Trace(unwrapped(model)) as t:
            logits = model(images)
        task = self.criterion(logits, targets)
        total, parts = task, {"task": task.detach()}

        def add(name: str, loss: Tensor, weight: float) -> None:
            nonlocal total
            total, parts[name] = total + weight * loss, loss.detach()

        decisions = t.decisions
        if decisions and isinstance(state.reducer, Staged) and state.reducer.masks:
            add("keep_ratio", losses.keep_ratio_loss(decisions, state.reducer.targets(len(decisions))), self.weights.keep_ratio)
        if self.teacher is not None:
            teacher_logits, teacher_tokens = self._teach(images, logits, t)
            add("logits", losses.logit_distillation_loss(logits, teacher_logits), self.weights.logits)
            if self.weights.tokens:
                tokens, kept = self._tokens(t, decisions)
                add("tokens", losses.token_distillation_loss(tokens, teacher_tokens, kept), self.weights.tokens)
        shares = [d.detach().mean() for d in decisions] or [logits.new_tensor(s.n_out / t.stages[0].n) for s in t.stages]
        return Losses(total, parts, logits, shares)

    @torch.no_grad()
    def _teach(self, images: Tensor, logits: Tensor, t: Trace) -> tuple[Tensor, Tensor]:
        assert t.tokens is not None
        already = not any(m.training for m in self.teacher.modules())
        with nullcontext() if already else evaluation_mode(self.teacher):
            features = self.teacher.forward_features(images if self.adapt is None else self.adapt(images))
            teacher_logits = self.teacher.forward_head(features)
        teacher_tokens = features[:, description_of(self.teacher).prefix :]
        if teacher_logits.shape != logits.shape:
            raise ConfigError(
                f"the teacher has {teacher_logits.shape[-1]} classes, the model {logits.shape[-1]}; give both the same"
            )
        if self.weights.tokens and teacher_tokens.shape[-1] != t.tokens.shape[-1]:
            raise ConfigError(
                f"the teacher's tokens have {teacher_tokens.shape[-1]} channels, the model's {t.tokens.shape[-1]}; choose a "
                "teacher of the same width, or a token weight of 0"
            )
        patches = t.stages[0].n if t.stages else t.tokens.shape[1]
        if self.weights.tokens and teacher_tokens.shape[1] != patches:
            raise ConfigError(
                f"the teacher has {teacher_tokens.shape[1]} patches, the model {patches}; choose a teacher of the same patch size, "
                "or a token weight of 0"
            )
        return teacher_logits, teacher_tokens

    @staticmethod
    def _tokens(t: Trace, decisions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Patch tokens on the full grid [B, N0, C], and where they are the patch's own [B, N0]."""
        assert t.tokens is not None
        if not t.stages:
            return t.tokens, t.tokens.new_ones(t.tokens.shape[:2])
        if t.stages[-1].n_out == t.stages[0].n and decisions:  # masked: all are there
            return t.tokens, decisions[-1]
        return t.scatter_back(t.tokens), t.survivors

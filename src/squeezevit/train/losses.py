"""Losses that train token reducers, unweighted: usable in anybody's loop with what `sv.trace` gives.

>>> with sv.trace(model) as t:  # doctest: +SKIP
...     logits = model(images)
>>> keep = keep_ratio_loss(t.decisions, reducer.targets(3))  # doctest: +SKIP
>>> distill = distillation_loss(logits, teacher_logits, t.tokens, teacher_tokens, t.decisions[-1])  # doctest: +SKIP
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezevit.errors import ConfigError


def keep_ratio_loss(decisions: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """How far images are from keeping the target share of their patches, squared; mean over stages and images.

    decisions: per stage [B, N0] of 0 and 1, with gradient; targets: per stage the share of the original patches that is to stay,
    keep^j. Eq. 12 of Rao et al. 2021 (DynamicViT), which dTPS trains with too; the authors' weight is 2. Raises ConfigError where
    the numbers of stages differ.

    >>> keep_ratio_loss([torch.tensor([[1.0, 1.0, 0.0, 0.0]])], [0.75]).item()
    0.0625
    """
    if len(decisions) != len(targets) or not decisions:
        raise ConfigError(
            f"{len(decisions)} stages of decisions and {len(targets)} targets; give one target for each stage "
            "(decisions are traced in training mode, of DTPS and DynamicViT)"
        )
    errors = [(d.mean(dim=1) - target).square().mean() for d, target in zip(decisions, targets, strict=True)]
    return torch.stack(errors).mean()


def logit_distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL divergence of the student's class distribution from the teacher's, mean over images: [B, classes] twice.

    Eq. 10 of Rao et al. 2021.
    """
    student, teacher = F.log_softmax(logits.float(), dim=-1), F.log_softmax(teacher_logits.float(), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_distillation_loss(tokens: Tensor, teacher_tokens: Tensor, kept: Tensor) -> Tensor:
    """KL divergence, over channels, of the kept patch tokens from the teacher's at the same places, mean over kept tokens.

    Shapes: [B, N0, C] twice, after the final norm, and kept [B, N0] (above 0.5 = kept; no gradient). The form of the released
    code of DynamicViT and TPS; eq. 11 of Rao et al. 2021 has squares.
    """
    student, teacher = F.log_softmax(tokens.float(), dim=-1), F.log_softmax(teacher_tokens.float(), dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)  # (B, N0)
    kept = (kept.detach() > 0.5).to(divergence.dtype)
    return (divergence * kept).sum() / kept.sum().clamp(min=1)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, tokens: Tensor, teacher_tokens: Tensor, kept: Tensor) -> Tensor:
    """The sum of both divergences from an unreduced teacher; the authors' weight is 0.5.

    Shapes: logits [B, classes], tokens [B, N0, C] after the final norm, kept [B, N0]: the last stage's decisions.
    """
    return logit_distillation_loss(logits, teacher_logits) + token_distillation_loss(tokens, teacher_tokens, kept)

"""A start for learned score heads: before any training they learn to rank tokens as a score that needs no training does."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.core.attach import reduce_as_needed_, restore_
from squeezevit.core.block import state_of
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Staged
from squeezevit.core.running import share_weights, unwrapped, without_hooks
from squeezevit.core.trace import Trace
from squeezevit.errors import ConfigError
from squeezevit.reducers import Squeeze
from squeezevit.reducers.tps import Ranking


@dataclass(frozen=True)
class Warmed:
    """How the last batch went: for each stage the loss, and the share of the guide's kept tokens that the head would keep, too."""

    loss: list[float]
    agreement: list[float]


def warm_heads_(model: nn.Module, batches: Iterable[Tensor], score: Ranking = "mrmr", lr: float = 1e-3) -> Warmed:
    """Teach the score heads alone which tokens a guide keeps, at the ratios that they are to keep; all else stays as it is.

    The guide is the model itself, reduced at the same stages and ratios by `Squeeze(score=score)`. Each head sees the tokens that
    reach its block there, and learns the probability that a token is among those that stay, so that it begins both with an order
    and at its ratio. One step of Adam a batch, images [B, 3, H, W]; a few hundred are enough.

    Raises ConfigError where the model is not reduced by a method with learned heads, they are frozen, or there is no batch.

    >>> warm_heads_(sv.reduce_(model, sv.DTPS(keep=0.7)), batches).agreement  # doctest: +SKIP
    [0.93, 0.91, 0.9]
    """
    net: Any = unwrapped(model)
    state = state_of(net)
    reducer = state.reducer
    if not (reducer.learned and isinstance(reducer, Staged)):
        raise ConfigError(f"{reducer} has no score heads to warm; reduce the model by a method that learns, as sv.DTPS")
    heads, at = net.token_reducer, reducer.stages(len(description_of(net).blocks))
    parameters = list(heads.parameters())
    if not all(p.requires_grad for p in parameters):
        raise ConfigError("the score heads are frozen; call requires_grad_(True) on model.token_reducer before they are warmed")
    guide = restore_(share_weights(net)).eval()
    reduce_as_needed_(guide, Squeeze(keep=reducer.keep, at=at, score=score))
    told, held = None, [p.grad for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for images in batches:
        if not isinstance(images, Tensor):
            raise ConfigError(f"a batch is a {type(images).__name__}; give images [B, 3, H, W] alone, without their labels")
        seen = _seen(guide, images, at)
        losses, agreement = [], []
        with torch.enable_grad():
            for j, (tokens, kept) in enumerate(seen):
                logits = heads[j](tokens.to(parameters[0].dtype)).float()  # [B, N, 2]
                wanted = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device).scatter(1, kept, 0)  # class 0 = keep
                losses.append(F.nll_loss(logits.flatten(0, 1), wanted.flatten()))
                agreement.append(_shared(logits[..., 0].detach(), kept))
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()
        optimizer.step()
        told = Warmed([loss.item() for loss in losses], agreement)
    for p, grad in zip(parameters, held, strict=True):
        p.grad = grad
    if told is None:
        raise ConfigError("there is no batch to warm the score heads on; give batches of images [B, 3, H, W]")
    return told


@torch.no_grad()
def _seen(guide: nn.Module, images: Tensor, at: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """For each stage the patch tokens that come in, [B, N, C], and which of them the guide keeps, [B, K]."""
    about, tokens = description_of(guide), list[Tensor]()
    runs: Any = about.tower or guide
    with without_hooks(guide, whole=True):
        handles = [
            about.blocks[block].register_forward_pre_hook(lambda module, args: tokens.append(args[0][:, about.prefix :]))
            for block in at
        ]
        try:
            with Trace(guide) as t:
                runs(*about.given(images), **about.named(images))
        finally:
            for handle in handles:
                handle.remove()
    return list(zip(tokens, [stage.kept for stage in t.stages], strict=True))


def _shared(scores: Tensor, kept: Tensor) -> float:
    """Of the kept [B, K] the share that is among the K highest scores [B, N]."""
    own = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(kept.shape[1], dim=1).indices, True)
    return float(own.gather(1, kept).float().mean())

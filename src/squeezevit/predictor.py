"""The learned score head of dTPS and DynamicViT (Rao et al. 2021, eq. 1 to 4), with the authors' parameter names."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.families import is_plain


class ScoreHead(nn.Module):
    """Keep / drop log-probabilities from a token and the mean of the others: [B, N, C] -> [B, N, 2], class 0 = keep.

    keep: the probability a fresh head begins with, so that masked training begins at the ratio it aims at (the authors' begin
    at one half whatever the ratio); ranks do not depend on it.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None, keep: float = 0.5) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd), nn.GELU())
        last = nn.Linear(dim // 4, 2, **dd)
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, **dd),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4, **dd),
            nn.GELU(),
            last,
            nn.LogSoftmax(dim=-1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        odds = math.log(keep / (1 - keep)) if keep < 0.99 else 5.0
        nn.init.constant_(last.bias[:1], odds / 2)
        nn.init.constant_(last.bias[1:], -odds / 2)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """kept [B, N]: 1 for tokens that count in the mean, 0 for those dropped at an earlier stage; None = all count.

        The mean's part of the next projection is the same for all tokens of an image and computed once, which leaves out a sixth of
        the head's multiply-adds. `sv.macs`, which runs it without values, counts the head as the papers write it.
        """
        local, shared = self.in_conv(x).split(x.shape[-1] // 2, dim=-1)
        if kept is not None:
            shared = shared * (kept * (x.shape[1] / kept.sum(dim=1, keepdim=True)))[..., None].to(shared.dtype)
        shared = shared.mean(dim=1, keepdim=True)  # (B, 1, C/2)
        first, *rest = cast(Any, self.out_conv)
        if x.is_meta or not is_plain(first) or self.out_conv._forward_hooks or self.out_conv._forward_pre_hooks:
            return self.out_conv(torch.cat([local, shared.expand_as(local)], dim=-1))
        weight = first.weight.split(local.shape[-1], dim=1)
        y = F.linear(local, weight[0]) + F.linear(shared, weight[1], first.bias)  # (B, N, C/2)
        for module in rest:
            y = module(y)
        return y


class ScoreHeads(nn.ModuleList):
    """One head per stage, at `model.token_reducer`: keys `token_reducer.{j}.in_conv.*` and `token_reducer.{j}.out_conv.*`."""

    def __init__(
        self, keep: Sequence[float], dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(ScoreHead(dim, device, dtype, ratio) for ratio in keep)
        self.dim = dim

    def fits(self, stages: int, dim: int) -> bool:
        return len(self) == stages and self.dim == dim

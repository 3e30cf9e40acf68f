"""What the families with torch's own `nn.MultiheadAttention` share."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.core.evidence import Attention
from squeezevit.errors import UnsupportedError


def attend(mha: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Self-attention of x [B, T, C] with an additive bias [B, 1, 1, T] or [B, 1, T, T]."""
    if bias is None:
        return mha(x, x, x, need_weights=False)[0]
    if bias.shape[2] == 1:  # one number per key: no mask of T x T for every head
        return mha(x, x, x, key_padding_mask=bias[:, 0, 0], need_weights=False)[0]
    per_head = bias.expand(-1, mha.num_heads, -1, -1).flatten(0, 1)  # (B*H, T, T)
    return mha(x, x, x, attn_mask=per_head, need_weights=False)[0]


def scores(mha: Any, x: Tensor) -> Attention:
    """Queries and keys of x [B, T, C], from the rows of the packed projection."""
    if type(mha).forward is not nn.MultiheadAttention.forward or mha.in_proj_weight is None:
        raise UnsupportedError(
            f"attention of class {type(mha).__module__}.{type(mha).__qualname__} has no plain rows to score by; if it is an "
            "adapter, merge it first, or choose a reducer with another score (DTPS, Random)"
        )
    C = mha.embed_dim
    d = C // mha.num_heads
    bias = mha.in_proj_bias

    def project(x: Tensor, rows: slice) -> Tensor:
        y = F.linear(x, mha.in_proj_weight[rows], None if bias is None else bias[rows])
        return y.unflatten(-1, (mha.num_heads, d)).transpose(1, 2)

    q, k = slice(0, C), slice(C, 2 * C)
    return Attention(
        x, mha.num_heads, lambda n: project(x[:, :n], q) * d**-0.5, lambda: project(x, k), mha.in_proj_weight[k],
        None if bias is None else bias[k],
    )  # fmt: skip

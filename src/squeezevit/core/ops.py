"""Score, split, match, fuse, squeeze: pure functions on tensors, nothing else.

Letters as everywhere: B batch, T tokens (prefix and patches), N patch tokens, K reserved, R = N - K pruned, C channels,
H heads, d channels of one head. Source of the equations: Wei et al., "Joint Token Pruning and Squeezing Towards More
Aggressive Compression of Vision Transformers", CVPR 2023 (arXiv 2304.10716), section 3.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezevit.core.capture import compiling, exporting


def no_autocast(x: Tensor) -> AbstractContextManager:
    """The context in which float32 stays float32, whatever autocast the caller has switched on (meta tensors know none)."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def class_attention(query: Tensor, keys: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention row of one query token, mean over heads, from scaled queries and keys.

    Shapes: query [B, H, d], keys [B, H, T, d], bias [1 or B, 1 or H, 1, T] or None -> [B, T], float32.
    softmax(q k^T), eq. 3 of Liang et al. 2022 (EViT); the scale is already in the query.

    >>> class_attention(torch.zeros(1, 2, 4), torch.rand(1, 2, 5, 4)).tolist()
    [[0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224]]
    """
    with no_autocast(query):
        logits = (query.float()[:, :, None] @ keys.float().transpose(2, 3)).squeeze(2)  # (B, H, T); q k^T, 2 to 6 x as fast as k q
    return _mean_softmax(logits, bias)


def class_attention_folded(query: Tensor, key_weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`class_attention` without computing the keys: score_h(n) = x_n . (Wk_h^T q_h), O(T C H) instead of O(T C^2).

    Shapes: query [B, H, d] scaled, key_weight [H*d, C], x [B, T, C] (what the key projection is applied to) -> [B, T].
    Exact wherever keys are a plain linear map of x: its bias adds the same number to every key of a head and cancels.
    """
    H, d = query.shape[1:]
    with no_autocast(query):
        weight = key_weight.float().view(H, d, -1)
        folded = torch.einsum("bhd,hdc->bhc", query.float(), weight)  # (B, H, C)
        logits = folded @ x.float().transpose(1, 2)  # (B, H, T)
    return _mean_softmax(logits, bias)


def received_attention(query: Tensor, keys: Tensor, bias: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
    """The attention each token receives, mean over heads and over queries (a query counts `mass` times).

    Shapes: query (scaled) and keys [B, H, T, d], bias [1 or B, 1 or H, 1 or T, T], mass [B, T] -> [B, T], float32; rows sum to 1.
    One head and one block of queries at a time, so that no [B, H, T, T] and, where T is large, no [B, T, T] tensor exists.
    """
    B, H, T, _ = keys.shape
    weight = keys.new_full((B, T), 1.0, dtype=torch.float32) if mass is None else mass.float()
    weight = (weight / weight.sum(dim=1, keepdim=True))[:, None]  # (B, 1, T)
    received = torch.zeros_like(weight)
    with no_autocast(query):
        for h in range(H):
            q, k = query[:, h].float(), keys[:, h].float().transpose(1, 2)
            for first, end in _blocks(T, T):
                logits = q[:, first:end] @ k  # (B, rows, T)
                logits = logits if bias is None else logits + _of_queries(bias, h, first, end).float()
                received = received + weight[..., first:end] @ logits.softmax(dim=-1)
    return received.squeeze(1) / H


def _mean_softmax(logits: Tensor, bias: Tensor | None) -> Tensor:
    logits = logits if bias is None else logits + bias[:, :, 0].float()
    return logits.softmax(dim=-1).mean(dim=1)


def _of_queries(bias: Tensor, head: int, first: int, end: int) -> Tensor:
    """What is added to one head's logits of the queries from `first` to `end`: [1 or B, 1 or rows, T]."""
    own = bias[:, head] if bias.shape[1] > 1 else bias[:, 0]
    return own[:, first:end] if own.shape[1] > 1 else own


def split(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k highest scores and of the rest, each in ascending (spatial) order.

    Shapes: [B, N] -> [B, k], [B, N - k], int64. Ties are broken one way or the other, never both.

    >>> split(torch.tensor([[0.1, 0.9, 0.5]]), 2)
    (tensor([[1, 2]]), tensor([[0]]))
    """
    order = scores.topk(scores.shape[1], dim=1).indices  # topk exports to ONNX, a stable argsort does not
    return ascending(order[:, :k]), ascending(order[:, k:])


def ascending(index: Tensor) -> Tensor:
    """Different numbers [B, M] in ascending order. ExecuTorch has topk but no sort, which is the faster where they are many."""
    if exporting():
        return index.topk(index.shape[1], dim=1, largest=False).values
    return index.sort(dim=1).values


def uniqueness(x: Tensor, importance: Tensor) -> Tensor:
    """How unlike every more important token each token is: 1 - its highest cosine with one of them, 2 for the most important.

    Shapes: [B, N, C], [B, N] -> [B, N], float32. Ties: the first of two counts as more important (in exports either may).
    """
    if torch.onnx.is_in_onnx_export() or exporting():
        order = importance.topk(importance.shape[1], dim=1).indices  # few runtimes have a stable sort
    else:
        order = importance.sort(dim=1, descending=True, stable=True).indices
    with no_autocast(x):
        a = take(F.normalize(wide(x), dim=-1), order)  # so that those that count are those in front
        highest = torch.cat([_highest_before(a, first, end) for first, end in _blocks(a.shape[1], a.shape[1], _TRIANGLE)], dim=1)
    return 1 - torch.zeros_like(highest).scatter(1, order, highest)


def _highest_before(a: Tensor, first: int, end: int) -> Tensor:
    """Highest product of the rows from `first` to `end` with a row before them: [B, N, C] -> [B, end - first]."""
    cosine = a[:, first:end] @ a[:, :end].transpose(1, 2)
    later = torch.ones(cosine.shape[1:], dtype=torch.bool, device=a.device).triu(first)
    return cosine.masked_fill_(later, -1.0).amax(dim=-1)


_PRODUCTS = 2**19  # of tokens with tokens at once: memory then grows with their number and not with its square
_ROWS = 128  # but so many rows at least, as fewer are slower
_TRIANGLE = 256  # and so many at most where a row needs only those before it
_TELLS_NUMBERS = (
    torch.torch_version.TorchVersion(torch.__version__) >= "2.8"
)  # whether a length that is compiled is a number or a symbol
_UNROLLED = 4  # blocks at most in what is compiled or exported, where each is a piece of the program


def _blocks(rows: int, columns: int, most: int = _PRODUCTS) -> list[tuple[int, int]]:
    """Where each block of rows begins and ends; one block where their number is a symbol, as in exports for any image size."""
    if torch.jit.is_tracing():
        rows, columns = int(rows), int(columns)
    if not (_is_number(rows) and _is_number(columns)):
        return [(0, rows)]
    size = min(max(_PRODUCTS // max(columns, 1), _ROWS), most)
    if compiling():
        size = max(size, -(-rows // _UNROLLED))
    return [(first, min(first + size, rows)) for first in range(0, max(rows, 1), size)]


def _is_number(n: int) -> bool:
    if not compiling():
        return True
    if not _TELLS_NUMBERS:
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # brings sympy with it

    return has_static_value(n)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of every image: [B, T, C], [B, M] -> [B, M, C] (a flat row copy: 9 x faster than `gather` on CPU)."""
    B, T, C = x.shape
    return x.reshape(B * T, C).index_select(0, _flat(index, T)).view(B, index.shape[1], C)


def at_positions(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a per-patch table for the patches each image has left.

    Shapes: [N, D], [H, N, D] or [B, H, N, D], and positions [B, n] -> [B, 1 or H, n, D].
    """
    if table.dim() == 4:
        return table.gather(2, positions[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))
    rows = table.index_select(-2, positions.flatten()).unflatten(-2, positions.shape)  # ([H,] B, n, D)
    return rows[:, None] if rows.dim() == 3 else rows.transpose(0, 1)


def summed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two biases of attention, of which either may not be there."""
    return a if b is None else b if a is None else a + b


def at_pairs(pairs: Tensor, positions: Tensor | None, prefix: int) -> Tensor:
    """Rows and columns of what is known of each pair of tokens, for prefix tokens and the patches each image has left.

    Shapes: [1, H, P + N0, P + N0], positions [B, n] -> [B, H, P + n, P + n]; positions None: all patches are there.
    """
    if positions is None:
        return pairs
    first = torch.arange(prefix, device=positions.device).expand(positions.shape[0], -1)
    rows = torch.cat([first, positions + prefix], dim=1)
    flat = rows[:, :, None] * pairs.shape[-1] + rows[:, None]  # (B, T, T)
    found = pairs[0].flatten(1).index_select(1, flat.flatten())
    return found.view(pairs.shape[1], *flat.shape).transpose(0, 1)


def _flat(index: Tensor, rows: int) -> Tensor:
    """Indices into the [B, rows] grid laid out as one line: [B, M] -> [B*M]."""
    first = torch.arange(index.shape[0], device=index.device) * rows
    return (index + first[:, None]).flatten()


def match(reserved: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """For every pruned token the reserved one most like it: one direction, exactly one host, also where cosines tie.

    Shapes: [B, K, C], [B, R, C] -> hosts [B, R] int64, cosine [B, R] float32. c_ij = cos(x_i, x_j), host(i) = argmax_j c_ij
    (Wei et al. 2023, section 3.2). Computed in float32 whatever the tokens' dtype and autocast are: in bfloat16 a third of
    clustered tokens tie.
    """
    with no_autocast(reserved):
        a, b = wide(pruned), wide(reserved)
        # a pruned token's own length does not change which product is the largest, and products are fewer than channels
        along, hosts = best_match(a, b, length(b))
        return hosts, along / length(a)


def best_match(a: Tensor, b: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every row of a its largest product with a row of b, and which row that is.

    Shapes: [B, R, C], [B, K, C] -> [B, R], [B, R] int64. length: products with each row of b are divided by it, [B, K].

    >>> best_match(torch.eye(2)[None], torch.tensor([[[0.0, 3.0], [2.0, 0.0]]]))[0].tolist()
    [[2.0, 3.0]]
    """
    columns, divisor = b.transpose(1, 2), None if length is None else length[:, None]
    found = [_largest(a[:, first:end] @ columns, divisor) for first, end in _blocks(a.shape[1], b.shape[1])]
    return torch.cat([along for along, _ in found], dim=1), torch.cat([index for _, index in found], dim=1)


def _largest(products: Tensor, divisor: Tensor | None) -> tuple[Tensor, Tensor]:
    along, index = (products if divisor is None else products / divisor).max(dim=-1)
    return along, index


def length(x: Tensor) -> Tensor:
    """Euclidean norm of tokens in float32 or wider, never 0: [B, N, C] -> [B, N].

    >>> length(torch.tensor([[[3.0, 4.0]]])).tolist()
    [[5.0]]
    """
    return torch.linalg.vector_norm(wide(x), dim=-1).clamp(min=1e-12)


def fuse(reserved: Tensor, pruned: Tensor, hosts: Tensor, own: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of every reserved token with the pruned tokens it hosts.

    Shapes: reserved [B, K, C], pruned [B, R, C], hosts [B, R], own [B, K], weights [B, R] -> [B, K, C].
    y_j = (own_j x_j + sum_{i in S_j} w_i x_i) / (own_j + sum_{i in S_j} w_i). A token that hosts nobody is returned unchanged,
    bit for bit (own / own = 1). Sums in float32 or wider, result in the dtype of `reserved`.
    """
    B, K, C = reserved.shape
    flat = _flat(hosts, K)
    if exporting():
        own = own + wide(reserved[..., 0]).clamp(0, 0)  # runtimes make one number of a constant, and cannot add to its rows
        if not _scatter:
            return _fuse_by_product(reserved, pruned, hosts, wide(own), wide(weights))
    own, weights = wide(own).reshape(-1), wide(weights).reshape(-1)
    total = _add_rows(own.clone(), flat, weights)  # (B*K)
    share = weights / total.index_select(0, flat)  # (B*R)
    y = wide(reserved).reshape(B * K, C) * (own / total)[:, None]
    y = _add_rows(y, flat, wide(pruned).reshape(-1, C) * share[:, None])
    return y.view(B, K, C).to(reserved.dtype)


_scatter = True  # whether an exported program may add rows by their number, which several runtimes get wrong


def set_scatter(allowed: bool) -> None:
    """Whether `fuse` may scatter in what torch.export captures from now on; otherwise it multiplies by a one-hot matrix."""
    global _scatter
    _scatter = allowed


def _fuse_by_product(reserved: Tensor, pruned: Tensor, hosts: Tensor, own: Tensor, weights: Tensor) -> Tensor:
    """`fuse` by a matrix product with each pruned token's host as one-hot column.

    The numbers that are added are the same to the last bit, as products with 0 and 1 are; their order is the matrix product's, so
    that only hosts of several tokens may differ, by less than 1e-6 of the largest number.
    """
    hot = (torch.arange(reserved.shape[1], device=hosts.device)[:, None] == hosts[:, None]).to(own.dtype)  # (B, K, R)
    total = own + (hot @ weights[..., None]).squeeze(-1)  # (B, K)
    share = weights / total.gather(1, hosts)  # (B, R)
    return (wide(reserved) * (own / total)[..., None] + hot @ (wide(pruned) * share[..., None])).to(reserved.dtype)


def _add_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Add each row to the row of x, a fresh tensor, that `index` names; several may name the same one.

    `index_add` is 4 x faster on CPU, but ONNX has no counterpart that adds duplicates: what is compiled or exported gets
    `scatter_add`, which has.
    """
    if not (compiling() or torch.onnx.is_in_onnx_export()):
        return x.index_add_(0, index, rows)
    return x.scatter_add(0, index if rows.dim() == 1 else index[:, None].expand_as(rows), rows)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_odds(logits: Tensor) -> Tensor:
    """Of keeping: [B, N, 2] -> [B, N]. Ordered as the probability, which would round to 1 where heads are sure."""
    return logits[..., 0] - logits[..., 1]


def decide(logits: Tensor, before: Tensor | None = None) -> Tensor:
    """Sample which tokens to keep: 1 or 0, with the gradient of the relaxed sample (straight-through Gumbel-softmax).

    Shapes: log-probabilities [B, N, 2] (0 = keep), decisions of the stage before [B, N] or None -> [B, N]. What was dropped
    before stays dropped; where all would be, the token most worth keeping is kept. One call of `F.gumbel_softmax` and nothing
    else random (eq. 5 of Rao et al. 2021; section 3.3 of Wei et al. 2023).
    """
    decision = F.gumbel_softmax(logits, hard=True)[..., 0]
    decision = decision if before is None else decision * before
    worth = log_odds(logits).detach()
    worth = worth if before is None else worth.masked_fill(before.detach() < 0.5, -math.inf)
    best = F.one_hot(worth.argmax(dim=1), worth.shape[1])
    none_left = decision.detach().sum(dim=1, keepdim=True) < 0.5
    return decision + best * none_left


def squeeze_masked(x: Tensor, kept: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """`squeeze` at full length, for training: tokens with pruned = 1 are squeezed into those with kept = 1.

    Shapes: [B, N, C], [B, N], [B, N] -> [B, N, C], and the host of every token [B, N]. kept and pruned are 0 or 1; the gradient
    of `pruned` is that of a factor of the token's fuse weight, so tokens that were kept learn what squeezing them would have done.
    """
    with no_autocast(x):
        a = F.normalize(wide(x), dim=-1)
        hidden = (kept.detach() < 0.5)[:, None] | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        cosine, hosts = (a @ a.transpose(1, 2)).masked_fill(hidden, -100.0).max(dim=-1)
    own, weights = squeeze_weights(x, cosine)
    return fuse(x, x, hosts, own, weights * pruned), hosts


def policy_bias(policy: Tensor) -> Tensor:
    """The bias of attention logits that hides tokens with policy 0 from all but themselves: [B, T] -> [B, 1, T, T].

    log(policy_j + (1 - policy_j) [i = j] + 1e-6): a softmax with it is the one Rao et al. 2021 train with (eq. 10), to 1e-6, and
    fused attention takes it.
    """
    hidden = 1 - policy[:, None, None]
    alone = torch.eye(policy.shape[1], dtype=policy.dtype, device=policy.device)
    return (policy[:, None, None] + alone * hidden + 1e-6).log()


def squeeze_weights(reserved: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's weights for `fuse`: e for a reserved token itself (cos(x, x) = 1), exp(c_ij) for a token it hosts.

    Shapes: [B, K, C], [B, R] -> [B, K], [B, R] (eq. 4, Wei et al. 2023).
    """
    return cosine.new_full(reserved.shape[:2], math.e), cosine.exp()


def squeeze(reserved: Tensor, pruned: Tensor) -> Tensor:
    """Squeeze pruned tokens into the reserved ones most like them: match, then fuse with the paper's weights.

    Shapes: [B, K, C], [B, R, C] -> [B, K, C]. With S_j the pruned tokens hosted by j and D_j = e + sum_{i in S_j} exp(c_ij):
    y_j = (e / D_j) x_j + sum_{i in S_j} (exp(c_ij) / D_j) x_i (eq. 4, Wei et al. 2023). Where the released code tests
    `c == max` and feeds a tied token into several hosts, this has exactly one. Raises ValueError on shapes that do not fit.

    >>> x = torch.eye(3)[None]
    >>> squeeze(x[:, :2], x[:, :1])[0, 1].tolist()  # hosts nobody: unchanged
    [0.0, 1.0, 0.0]
    """
    if reserved.dim() != 3 or pruned.dim() != 3 or reserved.shape[::2] != pruned.shape[::2] or not reserved.shape[1]:
        raise ValueError(
            f"squeeze takes reserved [B, K, C] with K >= 1 and pruned [B, R, C], got {list(reserved.shape)} and "
            f"{list(pruned.shape)}; give both the same B and C"
        )
    hosts, cosine = match(reserved, pruned)
    return fuse(reserved, pruned, hosts, *squeeze_weights(reserved, cosine))


def position_noise(n: int, seed: int, device: torch.device) -> Tensor:
    """A fixed pseudo-random number in [0, 1) for each of n positions: [n], float32.

    An integer hash (the finaliser of MurmurHash3) of seed and position, so it needs no generator, no state and no buffer:
    it compiles, exports, and is the same for every image of every batch.
    """
    mask = 0xFFFFFFFF
    h = (torch.arange(n, device=device) + (seed * 0x9E3779B1 & mask)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & mask
    return ((h ^ (h >> 16)) >> 8).float() / 2**24

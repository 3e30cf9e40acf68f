"""Slow, literal transcriptions of the formulas in DESIGN.md section 2, to which the library is compared.

Everything runs in float64, one image at a time, with explicit softmax matrices and Python loops over tokens. Only the
leaves of the host are called (patch and position embedding, norms, Linear layers, MLP, LayerScale); what they are
connected to each other by is written out here. Nothing is shared with the library, and nothing here is fast.

Sources: TPS, Wei et al. 2023 (arXiv 2304.10716); EViT, Liang et al. 2022 (2202.07800); DynamicViT, Rao et al. 2021
(2106.02034); ToMe, Bolya et al. 2023 (2210.09461).
"""

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

BETWEEN = ("etps", "topk", "evit")
BEFORE = ("dtps", "dynamicvit")
METHODS = ("identity", *BETWEEN, *BEFORE, "tome", "slice")


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors [C]; 0 where one of them is zero."""
    length = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / length if length > 0 else 0.0


def match(reserved: Tensor, pruned: Tensor) -> list[int]:
    """For each pruned token of one image, the index of the most similar reserved one; the first of equals.

    reserved [K, C], pruned [R, C] -> R indices below K.
    """
    hosts = []
    for x_i in pruned:
        similarities = [cosine(x_i, x_j) for x_j in reserved]
        hosts.append(similarities.index(max(similarities)))
    return hosts


def fuse(reserved: Tensor, pruned: Tensor, hosts: Sequence[int]) -> Tensor:
    """TPS's fusing for one image: y_j = (e x_j + sum_i exp(c_ij) x_i) / (e + sum_i exp(c_ij)), i over j's guests.

    reserved [K, C], pruned [R, C], hosts R indices below K -> [K, C].
    """
    fused = []
    for j, x_j in enumerate(reserved):
        guests = [x_i for x_i, host in zip(pruned, hosts, strict=True) if host == j]
        weights = [math.exp(cosine(x_i, x_j)) for x_i in guests]
        denominator = math.e + sum(weights)
        y_j = (math.e / denominator) * x_j
        for weight, x_i in zip(weights, guests, strict=True):
            y_j = y_j + (weight / denominator) * x_i
        fused.append(y_j)
    return torch.stack(fused)


def fuse_by_mass(
    reserved: Tensor, pruned: Tensor, hosts: Sequence[int], reserved_mass: Tensor, pruned_mass: Tensor
) -> tuple[Tensor, Tensor]:
    """The mass-weighted plain average of each reserved token and its guests, for one image; their masses add.

    reserved [K, C], pruned [R, C], hosts R indices below K, masses [K] and [R] -> [K, C] and [K].
    """
    fused, masses = [], []
    for j, x_j in enumerate(reserved):
        total, weighted = reserved_mass[j], reserved_mass[j] * x_j
        for i, host in enumerate(hosts):
            if host == j:
                total = total + pruned_mass[i]
                weighted = weighted + pruned_mass[i] * pruned[i]
        fused.append(weighted / total)
        masses.append(total)
    return torch.stack(fused), torch.stack(masses)


def squeeze(reserved: Tensor, pruned: Tensor) -> Tensor:
    """TPS's match and fuse (DESIGN.md section 2): reserved [B, K, C], pruned [B, R, C] -> [B, K, C] in float64."""
    reserved, pruned = reserved.detach().double(), pruned.detach().double()
    return torch.stack([fuse(x, y, match(x, y)) for x, y in zip(reserved, pruned, strict=True)])


def split(scores: Tensor, count: int) -> tuple[list[int], list[int]]:
    """Indices of the `count` highest of scores [N], and of the others, both ascending; of equals the first is kept."""
    ranking = sorted(range(len(scores)), key=lambda n: (-float(scores[n]), n))
    return sorted(ranking[:count]), sorted(ranking[count:])


def per_stage(value: float | Sequence[float], stages: int) -> list[float]:
    """`value` once for each stage, or the values themselves where one is given for each."""
    values = list(value) if isinstance(value, Sequence) else [value] * stages
    assert len(values) == stages, f"{len(values)} values for {stages} stages"
    return values


def reserved_count(method: str, keeps: Sequence[float], patches: int, incoming: int) -> int:
    """Patch tokens reserved at stage j = len(keeps) - 1, given the keep ratios up to and with that stage.

    Between the halves ceil(keep_j * incoming); before a block floor(patches * keep_0 * ... * keep_j), at least 1. The
    tolerance 1e-9 stops binary fractions from rounding a whole number away (0.7 * 10 must not become 8 by ceil).
    """
    if method in BEFORE:
        return max(1, math.floor(patches * math.prod(keeps) + 1e-9))
    return math.ceil(keeps[-1] * incoming - 1e-9)


def stage_counts(method: str, patches: int, keep: float | Sequence[float], stages: int) -> list[int]:
    """Patch tokens that leave each stage, EViT's fused token included; for the methods that take a keep ratio."""
    keeps, counts, incoming = per_stage(keep, stages), [], patches
    for j in range(stages):
        kept = reserved_count(method, keeps[: j + 1], patches, incoming)
        incoming = kept + 1 if method == "evit" and kept < incoming else kept
        counts.append(incoming)
    return counts


def tokens_per_block(depth: int, patches: int, at: Sequence[int], counts: Sequence[int], place: str) -> tuple[list[int], list[int]]:
    """Patch tokens in the attention and in the MLP half of each block, for stages at blocks `at` that leave `counts`.

    place is "before" (the block) or "between" (its halves). Two lists of `depth` numbers, as `vit_macs` takes them.
    """
    attention, mlp, present = [], [], patches
    for block in range(depth):
        leaving = counts[list(at).index(block)] if block in at else present
        attention.append(leaving if place == "before" else present)
        mlp.append(leaving)
        present = leaving
    return attention, mlp


def softmax(logits: Tensor) -> Tensor:
    """exp(logits) / sum exp(logits) over the last dimension, shifted by the maximum against overflow."""
    powers = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    return powers / powers.sum(dim=-1, keepdim=True)


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Head by head softmax(q k^T / sqrt(d) + bias) v, and the softmax matrices.

    queries [T', H, d], keys and values [T, H, d], bias [T] on the key columns -> [T', H * d] and [H, T', T].
    """
    outputs, matrices = [], []
    for head in range(queries.shape[1]):
        q, k, v = queries[:, head], keys[:, head], values[:, head]
        matrix = softmax(q @ k.T / math.sqrt(q.shape[-1]) + bias[None, :])
        outputs.append(matrix @ v)
        matrices.append(matrix)
    return torch.cat(outputs, dim=-1), torch.stack(matrices)


def self_attention(attn: Attention, x: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """timm's `Attention` for one image: x [T, C], mass [T] -> output [T, C], matrices [H, T, T], keys [T, H, d].

    With q/k-norm, the norm of the attention's output and the gate where the module has them; keys are after k-norm.
    """
    assert isinstance(attn, Attention), f"{type(attn).__name__} is not timm's Attention"
    tokens, heads = len(x), attn.num_heads
    qkv = attn.qkv(x)
    width = qkv.shape[-1] // 3
    q, k, v = (qkv[:, i * width : (i + 1) * width].reshape(tokens, heads, width // heads) for i in range(3))
    q, k = attn.q_norm(q), attn.k_norm(k)
    y, matrices = attend(q, k, v, torch.log(mass))
    y = attn.norm(y)
    if attn.gate is not None:
        y = y / (1 + torch.exp(-attn.gate(x)))
    return attn.proj(y), matrices, k


def attention_half(block: nn.Module, x: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first line of a block with its residual, for one image; shapes as in `self_attention`."""
    if isinstance(block, ResPostBlock):
        y, matrices, keys = self_attention(block.attn, x, mass)
        return x + block.norm1(y), matrices, keys
    assert isinstance(block, Block), f"{type(block).__name__} is neither Block nor ResPostBlock"
    y, matrices, keys = self_attention(block.attn, block.norm1(x), mass)
    return x + block.ls1(y), matrices, keys


def mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    """The second line of a block with its residual, for one image: [T, C] -> [T, C]."""
    if isinstance(block, ResPostBlock):
        return x + block.norm2(block.mlp(x))
    return x + block.ls2(block.mlp(block.norm2(x)))


def map_pool(pool: nn.Module, x: Tensor, mass: Tensor) -> Tensor:
    """timm's `AttentionPoolLatent` for one image, with log(mass) on the keys: x [T, C], mass [T] -> [C]."""
    width, heads = x.shape[-1], pool.num_heads
    q = pool.q(pool.latent[0]).reshape(-1, heads, width // heads)
    kv = pool.kv(x)
    k = kv[:, :width].reshape(len(x), heads, width // heads)
    v = kv[:, width:].reshape(len(x), heads, width // heads)
    y, _ = attend(pool.q_norm(q), pool.k_norm(k), v, torch.log(mass))
    y = pool.proj(y)
    y = y + pool.mlp(pool.norm(y))
    return y[0]


def classify(model: VisionTransformer, x: Tensor, mass: Tensor) -> Tensor:
    """Pooling and head for one image: final-norm tokens x [T, C], mass [T] -> logits.

    Average pooling weighs by mass and attention pooling has log(mass) on its keys, over what the host pools.
    """
    if isinstance(model, VisionTransformerDistilled):
        return (model.head(x[0]) + model.head_dist(x[1])) / 2
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    if model.global_pool == "token":
        pooled = x[0]
    elif model.global_pool == "avg":
        pooled = sum(m * token for m, token in zip(mass[first:], x[first:], strict=True)) / mass[first:].sum()
    elif model.global_pool == "map":
        pooled = map_pool(model.attn_pool, x[first:], mass[first:])
    else:
        raise NotImplementedError(f"the oracle has no pooling {model.global_pool!r}; use 'token', 'avg' or 'map'")
    return model.head(model.fc_norm(pooled))


def head_scores(head: nn.Module, x: Tensor) -> Tensor:
    """The learned head of dTPS for one image: log-odds of "keep" for each of the tokens present, [N, C] -> [N].

    `head.in_conv`, the second half of the channels replaced by their mean over the tokens, `head.out_conv`, LogSoftmax
    (which changes nothing where `out_conv` ends in one already), class 0 minus class 1.
    """
    y = head.in_conv(x)
    half = y.shape[-1] // 2
    mean = sum(token[half:] for token in y) / len(y)
    y = torch.stack([torch.cat([token[:half], mean]) for token in y])
    probabilities = softmax(head.out_conv(y))
    return torch.log(probabilities[:, 0]) - torch.log(probabilities[:, 1])


def class_scores(matrices: Tensor, prefix: int) -> Tensor:
    """Class-token attention: row 0 of each head's matrix, mean over heads, patch columns. [H, T, T] -> [N]."""
    heads = len(matrices)
    return sum(matrices[head, 0, prefix:] for head in range(heads)) / heads


def received_scores(matrices: Tensor, mass: Tensor, prefix: int) -> Tensor:
    """Attention each patch receives, mean over heads and, weighted by mass, over all queries. [H, T, T], [T] -> [N]."""
    heads, queries = matrices.shape[:2]
    total = sum(mass[t] * matrices[head, t, prefix:] for head in range(heads) for t in range(queries))
    return total / (heads * mass.sum())


def tome_merge(x: Tensor, keys: Tensor, mass: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, SimpleNamespace | None]:
    """One bipartite soft matching for one image: x [T, C], keys [T, H, d], mass [T] -> x, mass and the stage.

    Tokens at even places are sources, at odd places destinations, counted with the prefix, which itself takes no part.
    The min(r, N // 2) sources most like their best destination (cosine of the keys' mean over heads) are averaged into
    it by mass. Patches go out as the unmerged sources, then the destinations, both ascending. Where nothing is to be
    merged the order stays as it was and the stage is None.
    """
    tokens = len(x)
    r = min(r, (tokens - prefix) // 2)
    if r <= 0:
        return x, mass, None
    metric = keys.mean(dim=1)
    sources = [t for t in range(prefix, tokens) if t % 2 == 0]
    destinations = [t for t in range(prefix, tokens) if t % 2 == 1]
    best = {}
    for s in sources:
        similarities = [cosine(metric[s], metric[d]) for d in destinations]
        best[s] = (max(similarities), destinations[similarities.index(max(similarities))])
    merged = sorted(sorted(sources, key=lambda s: (-best[s][0], s))[:r])
    kept = [s for s in sources if s not in merged] + destinations
    hosts = [kept.index(best[s][1]) for s in merged]
    y, y_mass = fuse_by_mass(x[kept], x[merged], hosts, mass[kept], mass[merged])
    stage = SimpleNamespace(kept=[t - prefix for t in kept], pruned=[t - prefix for t in merged], hosts=hosts)
    return torch.cat([x[:prefix], y]), torch.cat([mass[:prefix], y_mass]), stage


def remove(
    x: Tensor, mass: Tensor, scores: Tensor, count: int, prefix: int, method: str, by_mass: bool, normalize: bool
) -> tuple[Tensor, Tensor, SimpleNamespace]:
    """Take one image down to the `count` highest-scored patches, and do with the others what the method says.

    x [T, C], mass [T], scores [N] -> x, mass and the stage (kept, pruned, hosts; indices into the N incoming patches,
    hosts as positions among the patches going out, None where pruned tokens are discarded).
    """
    patches, patch_mass = x[prefix:], mass[prefix:]
    kept, pruned = split(scores, count)
    y, y_mass, hosts = patches[kept], patch_mass[kept], None
    if method in ("etps", "dtps"):
        hosts = match(patches[kept], patches[pruned])
        if by_mass:
            y, y_mass = fuse_by_mass(patches[kept], patches[pruned], hosts, patch_mass[kept], patch_mass[pruned])
        else:
            y = fuse(patches[kept], patches[pruned], hosts)
    elif method == "evit":
        hosts = [count] * len(pruned)
        if pruned:
            extra = sum(scores[i] * patches[i] for i in pruned)
            if normalize:
                extra = extra / sum(scores[i] for i in pruned)
            y, y_mass = torch.cat([y, extra[None]]), torch.cat([y_mass, y_mass.new_ones(1)])
    stage = SimpleNamespace(kept=kept, pruned=pruned, hosts=hosts)
    return torch.cat([x[:prefix], y]), torch.cat([mass[:prefix], y_mass]), stage


def stage_scores(
    score: str | Sequence[Tensor],
    stage: int,
    image: int,
    patches: Tensor,
    heads: Sequence[nn.Module] | None,
    matrices: Tensor | None,
    mass: Tensor,
) -> Tensor:
    """Scores [N] of one image's patches [N, C] by the rule `score` of `forward`; mass [T] and matrices [H, T, T]."""
    prefix = len(mass) - len(patches)
    if not isinstance(score, str):
        return score[stage][image].detach().double()
    if score == "heads":
        return head_scores(heads[stage], patches)
    if score == "cls":
        return class_scores(matrices, prefix)
    return received_scores(matrices, mass, prefix)


def forward_image(model: VisionTransformer, image: Tensor, index: int, options: SimpleNamespace) -> SimpleNamespace:
    """`forward` for one image [3, height, width], the `index`-th of its batch, with a float64 model in eval mode."""
    prefix, method, stages = model.num_prefix_tokens, options.method, []
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    mass = x.new_ones(len(x))
    patches = len(x) - prefix

    def reduce(block: int, x: Tensor, mass: Tensor, matrices: Tensor | None) -> tuple[Tensor, Tensor]:
        j, incoming = len(stages), len(x) - prefix
        if method == "slice":
            scores, count = torch.arange(incoming, 0, -1, dtype=x.dtype), options.counts[j]
        else:
            scores = stage_scores(options.score, j, index, x[prefix:], options.heads, matrices, mass)
            count = reserved_count(method, options.keeps[: j + 1], patches, incoming)
        x, mass, stage = remove(x, mass, scores, count, prefix, method, options.mass, options.normalize)
        stage.block, stage.scores = block, None if method == "slice" else scores
        stages.append(stage)
        return x, mass

    for number, block in enumerate(model.blocks):
        if number in options.at and options.place == "before":
            x, mass = reduce(number, x, mass, None)
        x, matrices, keys = attention_half(block, x, mass)
        if number in options.at and options.place == "between":
            x, mass = reduce(number, x, mass, matrices)
        if method == "tome":
            x, mass, stage = tome_merge(x, keys, mass, prefix, options.r[number])
            if stage is not None:
                stage.block, stage.scores = number, None
                stages.append(stage)
        x = mlp_half(block, x)
    x = model.norm(x)
    return SimpleNamespace(logits=classify(model, x, mass), features=x, mass=mass, stages=stages)


def forward(
    model: VisionTransformer,
    images: Tensor,
    method: str,
    *,
    keep: float | Sequence[float] | None = None,
    at: Sequence[int] = (),
    r: int | Sequence[int] | None = None,
    mass: bool = False,
    score: str | Sequence[Tensor] = "auto",
    heads: Sequence[nn.Module] | None = None,
    normalize: bool = False,
    counts: Sequence[int] | None = None,
    place: str | None = None,
) -> SimpleNamespace:
    """A plain (unreduced) timm VisionTransformer run in evaluation, in float64, with one method of token reduction.

    images [B, 3, height, width] -> logits [B, classes]; features [B, P + N, C], the tokens after `model.norm`; mass
    [B, P + N]; and stages, each with block, kept [B][K], pruned [B][R], hosts [B][R] or None, scores [B, N] or None.
    kept and pruned are indices into the N patch tokens that came into the stage, ascending (kept of "tome": in the
    order of going out); hosts are positions among the patch tokens going out.

    method, and the options it takes:
      "identity"    nothing is removed.
      "etps"        between the halves of the blocks `at`: ceil(keep * N) reserved, the others squeezed into them.
                    mass=True: averages by mass, log(mass) on later keys, pooling by mass.
      "topk"        the same without squeezing: pruned tokens are discarded.
      "evit"        the same, pruned tokens fused into one token that goes out last: sum of score * token, divided by
                    the sum of scores where normalize=True. No fused token where nothing is pruned.
      "dtps"        before the blocks `at`: max(1, floor(N0 * product of keep)) reserved by `heads`, one module per
                    stage with `in_conv` and `out_conv`; the others squeezed into them. Takes mass=True as "etps" does.
      "dynamicvit"  the same without squeezing.
      "tome"        in every block, between the halves: `r` (one number, or one per block) of `tome_merge`. A stage is
                    listed only where something was merged. Always with mass.
      "slice"       at the blocks `at` the first `counts[j]` patches stay; place "before" the block or "between" halves.

    score, for the methods that rank: "cls", "received", "heads", "auto" ("heads" before blocks; between halves "cls"
    where the model has a class token, else "received"), or the scores themselves, a [B, N] tensor per stage, which
    serves any other rule and avoids near-ties decided by the float type. Of equal scores the lower index is kept.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {METHODS}")
    if mass and method not in ("etps", "dtps", "tome"):
        raise ValueError(f"method {method!r} has no mass")
    model = copy.deepcopy(model).double().eval()
    if isinstance(score, str) and score == "auto":
        score = "heads" if method in BEFORE else "cls" if model.has_class_token else "received"
    if method in BETWEEN or method in BEFORE:
        place = "between" if method in BETWEEN else "before"
    if method not in ("identity", "tome"):
        assert at and list(at) == sorted(set(at)) and at[-1] < len(model.blocks), f"at={at} for method {method!r}"
        assert place in ("before", "between"), f"place={place!r} for method {method!r}"
    options = SimpleNamespace(
        method=method,
        at=tuple(at),
        place=place,
        keeps=None if keep is None else per_stage(keep, len(at)),
        counts=counts,
        r=None if r is None else per_stage(r, len(model.blocks)),
        mass=mass,
        score=score,
        heads=None if heads is None else [copy.deepcopy(head).double().eval() for head in heads],
        normalize=normalize,
    )
    with torch.no_grad():
        singles = [forward_image(model, image.double(), b, options) for b, image in enumerate(images)]
    return SimpleNamespace(
        logits=torch.stack([single.logits for single in singles]),
        features=torch.stack([single.features for single in singles]),
        mass=torch.stack([single.mass for single in singles]),
        stages=[batch_stages(stages) for stages in zip(*(single.stages for single in singles), strict=True)],
    )


def batch_stages(stages: Sequence[SimpleNamespace]) -> SimpleNamespace:
    """The same stage of several images as one: lists with the image first, scores [B, N]."""
    first = stages[0]
    return SimpleNamespace(
        block=first.block,
        kept=[stage.kept for stage in stages],
        pruned=[stage.pruned for stage in stages],
        hosts=None if first.hosts is None else [stage.hosts for stage in stages],
        scores=None if first.scores is None else torch.stack([stage.scores for stage in stages]),
    )


def groups(stages: Sequence[SimpleNamespace], patches: int) -> list[list[int]]:
    """For each of an image's `patches` original patches the patch token it ended in, -1 if dropped without a host.

    Follows every patch through `stages` of `forward` (or the first of them): [B][N0].
    """
    result = []
    for b in range(len(stages[0].kept)):
        ended = []
        for patch in range(patches):
            place = patch
            for stage in stages:
                if place in stage.kept[b]:
                    place = stage.kept[b].index(place)
                elif stage.hosts is None:
                    place = -1
                    break
                else:
                    place = stage.hosts[b][stage.pruned[b].index(place)]
            ended.append(place)
        result.append(ended)
    return result


def masked_topk_forward(
    model: VisionTransformer,
    images: Tensor,
    kept_per_stage: Sequence[Sequence[Sequence[int]]],
    at: Sequence[int],
    place: str = "between",
) -> Tensor:
    """Logits [B, classes] of dropping without dropping: the host's own forward, removed patches hidden as keys.

    The full grid stays to the end, in the host's own blocks and with the host's own `attn_mask`; pooling sees what is
    left. kept_per_stage[j][b] lists indices into the patches that came into stage j, as `forward` gives them. Removed
    patches are hidden from block at[j] on with place="before", from the next block on with place="between".
    """
    model = copy.deepcopy(model).double().eval()
    logits = []
    with torch.no_grad():
        for b, image in enumerate(images):
            x = model.norm_pre(model._pos_embed(model.patch_embed(image[None].double())))
            alive = list(range(model.num_prefix_tokens, x.shape[1]))
            hidden = x.new_zeros(1, 1, 1, x.shape[1])
            for number, block in enumerate(model.blocks):
                for j, stage in enumerate(at):
                    if number == (stage if place == "before" else stage + 1):
                        alive = [alive[i] for i in kept_per_stage[j][b]]
                        hidden[..., model.num_prefix_tokens :] = -math.inf
                        hidden[..., alive] = 0
                x = block(x, attn_mask=hidden)
            for j, stage in enumerate(at):
                if place == "between" and stage + 1 == len(model.blocks):
                    alive = [alive[i] for i in kept_per_stage[j][b]]
            left = [*range(model.num_prefix_tokens), *alive]
            logits.append(model.forward_head(model.norm(x)[:, left])[0])
    return torch.stack(logits)


def vit_macs(
    depth: int,
    dim: int,
    heads: int,
    mlp_hidden: int,
    prefix: int,
    patches: int,
    patch_in: int,
    classes: int,
    tokens_attn: Sequence[int],
    tokens_mlp: Sequence[int],
) -> int:
    """Multiply-adds of a plain ViT for one image, without the reducer's own cost.

    Patch embedding (`patch_in` = 3 * patch height * patch width values per patch), per block qkv, q k^T, attention
    times v and proj on tokens_attn[l] + prefix tokens and both MLP layers on tokens_mlp[l] + prefix tokens, and the
    classifier (for two heads give twice the classes). tokens_attn and tokens_mlp count patch tokens, one per block.
    """
    assert len(tokens_attn) == len(tokens_mlp) == depth, f"{len(tokens_attn)}, {len(tokens_mlp)} for {depth} blocks"
    total = patches * patch_in * dim
    for attention_patches, mlp_patches in zip(tokens_attn, tokens_mlp, strict=True):
        tokens = attention_patches + prefix
        total += tokens * dim * 3 * dim
        for _ in range(heads):
            total += tokens * (dim // heads) * tokens
            total += tokens * tokens * (dim // heads)
        total += tokens * dim * dim
        total += (mlp_patches + prefix) * (dim * mlp_hidden + mlp_hidden * dim)
    return total + dim * classes


def head_macs(dim: int, tokens: int) -> int:
    """Multiply-adds of one learned head of dTPS on `tokens` patches: C to C, C to C/2, C/2 to C/4, C/4 to 2."""
    return tokens * (dim * dim + dim * (dim // 2) + (dim // 2) * (dim // 4) + (dim // 4) * 2)

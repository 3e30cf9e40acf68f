"""A slow, literal transcription of the training forward of dTPS and DynamicViT (DESIGN.md section 2), and of their losses.

Unlike those of `oracles.py` these keep the model's own dtype and record gradients, because gradients are compared too. Nothing
is ever dropped: matrices [B, N, N] over all pairs of patch tokens, one-hot hosts, explicit softmaxes. Only the leaves of the
host are called (patch and position embedding, norms, Linear layers, MLP, LayerScale) and the two Sequentials of a learned
head. Dropout, stochastic depth and patch dropout are left out: models with any are not for this oracle.

Sources: TPS, Wei et al. 2023 (arXiv 2304.10716); DynamicViT, Rao et al. 2021 (2106.02034).
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from oracles import classify, mlp_half, softmax

METHODS = ("dtps", "dynamicvit")
POLICIES = ("additive", "authors")
EPS = 1e-6


def log_softmax(logits: Tensor) -> Tensor:
    """log(exp(logits) / sum exp(logits)) over the last dimension, shifted by the maximum against overflow."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted - torch.log(torch.exp(shifted).sum(dim=-1, keepdim=True))


def head_logits(head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
    """Log-probabilities of (keep, drop) by one learned head: x [B, N, C], previous decision [B, N] -> [B, N, 2].

    The second half of `in_conv`'s channels is replaced by sum(h * D) / sum(D) over the tokens, D the previous decision.
    """
    h = head.in_conv(x)
    half = h.shape[-1] // 2
    own, shared = h[..., :half], h[..., half:]
    mean = (shared * previous[:, :, None]).sum(dim=1) / previous.sum(dim=1)[:, None]
    mean = mean[:, None, :].expand_as(shared)
    return log_softmax(head.out_conv(torch.cat([own, mean], dim=-1)))


def decide(logits: Tensor, previous: Tensor) -> Tensor:
    """D_j = gumbel_softmax(logits, hard=True)[..., 0] * D_{j-1}, with one token kept where none is: [B, N, 2], [B, N] -> [B, N].

    An image without a kept token keeps the one of highest log-odds of those kept so far: 1 is added to its decision.
    """
    decision = F.gumbel_softmax(logits, hard=True)[..., 0] * previous
    added = torch.zeros_like(decision)
    for b in range(len(decision)):
        if not any(value > 0.5 for value in decision[b].tolist()):
            odds = (logits[b, :, 0] - logits[b, :, 1]).tolist()
            alive = [i for i, value in enumerate(previous[b].tolist()) if value > 0.5]
            added[b, max(alive, key=lambda i: odds[i])] = 1
    return decision + added


def cosines(x: Tensor) -> Tensor:
    """c_ij = x_i . x_j / (|x_i| |x_j|) of every pair: [B, N, C] -> [B, N, N]."""
    lengths = torch.sqrt((x * x).sum(dim=-1))
    return (x @ x.transpose(1, 2)) / (lengths[:, :, None] * lengths[:, None, :])


def hosts(similarities: Tensor, decision: Tensor) -> Tensor:
    """One-hot rows: entry ij is 1 where j is the kept token other than i most similar to i, the first of equals.

    similarities [B, N, N], decision [B, N] -> [B, N, N]. Every token has such a row, kept ones too (their weight is 0 and
    only its gradient counts); it is all zeros for a token that is the only one kept.
    """
    tokens = similarities.shape[-1]
    others = 1 - torch.eye(tokens, dtype=similarities.dtype)
    candidates = (decision > 0.5).to(similarities.dtype)[:, None, :] * others
    ranked = torch.where(candidates > 0, similarities.detach(), -math.inf)
    best = (ranked == ranked.amax(dim=-1, keepdim=True)).to(similarities.dtype) * candidates
    return best * (best.cumsum(dim=-1) == 1)


def squeeze(x: Tensor, decision: Tensor, previous: Tensor) -> Tensor:
    """y_j = (e x_j + sum_i w_i x_i) / (e + sum_i w_i) for every token j of the grid, i over the tokens whose host is j.

    w_i = exp(c_{i, host(i)}) (1 - D_j) D_{j-1}: zero but for the tokens pruned at this stage. x [B, N, C], decisions [B, N].
    """
    pruned = (1 - decision) * previous
    similarities = cosines(x)
    weights = torch.exp(similarities) * hosts(similarities, decision) * pruned[:, :, None]
    numerators = math.e * x + weights.transpose(1, 2) @ x
    denominators = math.e + weights.sum(dim=1)
    return numerators / denominators[:, :, None]


def policy_softmax(logits: Tensor, policy: Tensor, form: str) -> Tensor:
    """Attention in which a dropped token is a key to itself alone: logits [B, T, T], policy [B, T] -> weights [B, T, T].

    "additive": softmax(logits + log(m_j + eye_ij (1 - m_j) + 1e-6)). "authors": DynamicViT's own softmax_with_policy,
    (exp(logits - max) m'_ij + eps / T) / (sum of the same without eps / T + eps), m' = m_j + eye_ij (1 - m_j), eps = 1e-6.
    """
    tokens = policy.shape[-1]
    eye = torch.eye(tokens, dtype=logits.dtype)
    seen = policy[:, None, :] + eye * (1 - policy[:, None, :])
    if form == "additive":
        return softmax(logits + torch.log(seen + EPS))
    powers = torch.exp(logits - logits.amax(dim=-1, keepdim=True)) * seen
    return (powers + EPS / tokens) / (powers.sum(dim=-1, keepdim=True) + EPS)


def self_attention(attn: Attention, x: Tensor, policy: Tensor | None, form: str) -> Tensor:
    """timm's `Attention`, head by head: x [B, T, C], policy [B, T] or None where all still see all -> [B, T, C].

    With q/k-norm, the norm of the attention's output and the gate where the module has them.
    """
    assert isinstance(attn, Attention), f"{type(attn).__name__} is not timm's Attention"
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x)
    width = qkv.shape[-1] // 3
    parts = [qkv[..., i * width : (i + 1) * width].reshape(batch, tokens, attn.num_heads, -1) for i in range(3)]
    queries, keys, values = attn.q_norm(parts[0]), attn.k_norm(parts[1]), parts[2]
    outputs = []
    for head in range(attn.num_heads):
        q, k, v = queries[:, :, head], keys[:, :, head], values[:, :, head]
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        outputs.append((softmax(logits) if policy is None else policy_softmax(logits, policy, form)) @ v)
    y = attn.norm(torch.cat(outputs, dim=-1))
    if attn.gate is not None:
        y = y / (1 + torch.exp(-attn.gate(x)))
    return attn.proj(y)


def attention_half(block: nn.Module, x: Tensor, policy: Tensor | None, form: str) -> Tensor:
    """The first line of a block with its residual: [B, T, C] -> [B, T, C]."""
    if isinstance(block, ResPostBlock):
        return x + block.norm1(self_attention(block.attn, x, policy, form))
    assert isinstance(block, Block), f"{type(block).__name__} is neither Block nor ResPostBlock"
    return x + block.ls1(self_attention(block.attn, block.norm1(x), policy, form))


def classify_kept(model: VisionTransformer, x: Tensor, policy: Tensor) -> Tensor:
    """Pooling over the kept tokens, and head: final-norm tokens [B, T, C], policy [B, T] -> logits [B, classes].

    The average is sum(m x) / sum(m); attention pooling has log(m + 1e-6) on its keys.
    """
    mass = policy + EPS if model.global_pool == "map" else policy
    return torch.stack([classify(model, tokens, m) for tokens, m in zip(x, mass, strict=True)])


def forward(
    model: VisionTransformer,
    heads: Sequence[nn.Module],
    images: Tensor,
    method: str,
    at: Sequence[int],
    policy_form: str = "additive",
) -> SimpleNamespace:
    """A plain (unreduced) timm VisionTransformer trained with one learned head (`in_conv`, `out_conv`) for each block in `at`.

    images [B, 3, height, width] -> logits [B, classes]; decisions, [B, N] per stage; stage_logits, [B, N, 2] per stage; and
    tokens [B, N, C], the patch tokens after `model.norm`; all with gradient. One F.gumbel_softmax call per stage is all the
    chance there is, so torch.manual_seed before the call fixes it. Blocks before the first stage use the plain softmax.
    """
    assert method in METHODS, f"method {method!r} is none of {METHODS}"
    assert policy_form in POLICIES, f"policy_form {policy_form!r} is none of {POLICIES}"
    assert len(heads) == len(at), f"{len(heads)} heads for {len(at)} stages"
    prefix, decisions, stage_logits, policy = model.num_prefix_tokens, [], [], None
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    previous = torch.ones_like(x[:, prefix:, 0])
    for number, block in enumerate(model.blocks):
        if number in at:
            logits = head_logits(heads[len(decisions)], x[:, prefix:], previous)
            decision = decide(logits, previous)
            if method == "dtps":
                x = torch.cat([x[:, :prefix], squeeze(x[:, prefix:], decision, previous)], dim=1)
            policy = torch.cat([torch.ones_like(x[:, :prefix, 0]), decision], dim=1)
            decisions.append(decision)
            stage_logits.append(logits)
            previous = decision
        x = mlp_half(block, attention_half(block, x, policy, policy_form))
    x = model.norm(x)
    logits = classify_kept(model, x, torch.ones_like(x[..., 0]) if policy is None else policy)
    return SimpleNamespace(logits=logits, decisions=decisions, stage_logits=stage_logits, tokens=x[:, prefix:])


def keep_ratio_loss(decisions: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """Mean over stages of the mean over images of (mean decision - target)^2: decisions [B, N] -> a number."""
    total = 0.0
    for decision, target in zip(decisions, targets, strict=True):
        for image in decision:
            total = total + (image.sum() / len(image) - target) ** 2 / (len(decisions) * len(decision))
    return total


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the softmaxes over the last dimension, summed, over the number of rows, as the sources do."""
    arguments = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(*arguments, reduction="batchmean", log_target=True)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, tokens: Tensor, teacher_tokens: Tensor, kept: Tensor) -> Tensor:
    """KL of the logits [B, classes] plus KL of the tokens [B, N, C] where kept [B, N] > 0.5, unweighted."""
    chosen = kept > 0.5
    return divergence(logits, teacher_logits) + divergence(tokens[chosen], teacher_tokens[chosen])

"""Rotary models on the full grid: removed tokens stay where they are, hidden from every later attention.

Nothing is gathered, so nothing can lose its position. Everything runs in float64, one image at a time, through the host's own
modules at full length; which tokens go is replayed from a trace, and the class attention they went by is given back to be judged.
"""

import copy
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor

import oracles

Grid = tuple[Tensor, list[Any]]  # tokens [1, T, C] that go into the first block, and each block's rotary embedding


class TimmEva:
    """timm's Eva of pre-norm blocks, with attention that shows its matrix."""

    def __init__(self, model: Eva) -> None:
        self.model, self.blocks, self.prefix, self.norm = model, model.blocks, model.num_prefix_tokens, model.norm
        for block in model.blocks:
            block.attn.fused_attn = False

    def embed(self, image: Tensor) -> Grid:
        x, rope = self.model._pos_embed(self.model.patch_embed(image[None]))
        return self.model.norm_pre(x), [rope[i] if self.model.rope_mixed else rope for i in range(len(self.blocks))]

    def attention(self, block: Any, x: Tensor, bias: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """x with attention's residual [1, T, C], and the matrix [H, T, T]."""
        seen = []
        handle = block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        y = block.attn(block.norm1(x), rope=rope, attn_mask=bias)
        handle.remove()
        return x + (y if block.gamma_1 is None else block.gamma_1 * y), seen[0]

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        y = block.mlp(block.norm2(x))
        return x + (y if block.gamma_2 is None else block.gamma_2 * y)


class HuggingFaceDinov3:
    """Hugging Face's DINOv3ViTModel, with eager attention."""

    def __init__(self, model: Any) -> None:
        self.model, self.blocks, self.norm = model, model.model.layer, model.norm
        self.prefix = 1 + model.config.num_register_tokens
        model.set_attn_implementation("eager")

    def embed(self, image: Tensor) -> Grid:
        rope = self.model.rope_embeddings(image[None])
        return self.model.embeddings(image[None]), [rope] * len(self.blocks)

    def attention(self, block: Any, x: Tensor, bias: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, matrix = block.attention(block.norm1(x), attention_mask=bias, position_embeddings=rope)
        return x + block.layer_scale1(y), matrix[0]

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        return x + block.layer_scale2(block.mlp(block.norm2(x)))


def forward(model: Any, images: Tensor, stages: Sequence[Any], squeeze: str | None = None) -> SimpleNamespace:
    """An unreduced model with the stages of a trace replayed on the full grid.

    images [B, 3, height, width]; stages: block, and kept, pruned, hosts of `sv.trace`. squeeze: what becomes of pruned tokens,
    None = they are discarded, "tps" = fused by similarity, "mass" = averaged by mass, which later attention is told.
    -> tokens [B, P + K, C] after the final norm, and per stage and image the class attention scores[j][b] of the tokens it met.
    """
    model = copy.deepcopy(model).double().eval()
    host = (TimmEva if isinstance(model, Eva) else HuggingFaceDinov3)(model)
    with torch.no_grad():
        singles = [forward_image(host, image.double(), b, stages, squeeze) for b, image in enumerate(images)]
    return SimpleNamespace(
        tokens=torch.stack([s.tokens for s in singles]), scores=list(zip(*(s.scores for s in singles), strict=True))
    )


def forward_image(host: Any, image: Tensor, b: int, stages: Sequence[Any], squeeze: str | None) -> SimpleNamespace:
    """`forward` for one image, the b-th of the trace."""
    x, rope = host.embed(image)
    alive, mass, scores = list(range(host.prefix, x.shape[1])), x.new_ones(x.shape[1]), []
    at = {stage.block: stage for stage in stages}
    for number, block in enumerate(host.blocks):
        x, matrix = host.attention(block, x, key_bias(mass, host.prefix, alive), rope[number])
        if number in at:
            scores.append(matrix[:, 0, alive].mean(dim=0))
            stage = at[number]
            kept, pruned = ([alive[i] for i in index[b].tolist()] for index in (stage.kept, stage.pruned))
            if squeeze:
                FUSE[squeeze](x[0], mass, kept, pruned, stage.hosts[b].tolist())
            alive = kept
        x = host.mlp(block, x)
    return SimpleNamespace(tokens=host.norm(x)[0, [*range(host.prefix), *alive]], scores=scores)


def key_bias(mass: Tensor, prefix: int, alive: Sequence[int]) -> Tensor:
    """log(mass) for the tokens that are left, -inf for the others: [1, 1, T, T]."""
    bias = torch.full_like(mass, -math.inf)
    bias[:prefix], bias[alive] = 0, mass[alive].log()
    return bias.expand(1, 1, len(mass), -1)


def fuse_by_similarity(x: Tensor, mass: Tensor, kept: list[int], pruned: list[int], hosts: list[int]) -> None:
    x[kept] = oracles.fuse(x[kept], x[pruned], hosts)


def fuse_by_mass(x: Tensor, mass: Tensor, kept: list[int], pruned: list[int], hosts: list[int]) -> None:
    x[kept], mass[kept] = oracles.fuse_by_mass(x[kept], x[pruned], hosts, mass[kept], mass[pruned])


FUSE: dict[str, Callable[[Tensor, Tensor, list[int], list[int], list[int]], None]] = {
    "tps": fuse_by_similarity,
    "mass": fuse_by_mass,
}

"""A new method: tokens farthest from the mean token stay, and the others are squeezed into them. It needs no attention."""

from dataclasses import dataclass
from typing import ClassVar

import timm
import torch

import squeezevit as sv
from squeezevit.extend import Method, Reduction, Stage, Staged, register


@dataclass(frozen=True)
class FarFromMean(Staged):
    """keep, at, rounding and their errors come from Staged; a method says what happens at a stage."""

    scored: ClassVar[bool] = False  # asks for no attention

    def reduce(self, s: Stage) -> Reduction:
        patches = s.tokens[:, s.prefix :]  # (B, N, C)
        scores = (patches - patches.mean(dim=1, keepdim=True)).norm(dim=-1)  # (B, N)
        kept, pruned = sv.ops.split(scores, s.k)
        tokens, hosts, _ = s.squeeze(kept, pruned)
        return Reduction(tokens, kept, pruned, hosts, scores)


register(
    Method("far", "far from mean", FarFromMean)
)  # `squeezevit --import new_method bench --methods far`, and every other command

if __name__ == "__main__":
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    sv.reduce_(model, FarFromMean(keep=0.5))
    with torch.inference_mode(), sv.trace(model) as t:
        model(torch.randn(2, 3, 224, 224))
    print(FarFromMean(keep=0.5), [stage.n_out for stage in t.stages])

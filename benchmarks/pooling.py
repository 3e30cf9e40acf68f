"""Retrieval by the mean of patch tokens: the plain mean of a reduced model's tokens beside the mean by group sizes.

    python benchmarks/pooling.py        # benchmarks/results/pooling.json

DINOv2 ViT-S/14 at 224 pixels, crops of photographs on which nothing was chosen. Both means are compared with the mean of the
unreduced model's patch tokens: mean cosine over the crops, without training.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.budget.plan import make_plan
from squeezevit.data import dinov2
from squeezevit.data.probe import cosine
from squeezevit.reducers.catalog import method
from tasks import photographs
from workshop import RESULTS, Sheet, arguments, standard_error

SIZE = 224
METHODS = ("training-free", "etps+mass", "etps", "tome")


@torch.inference_mode()
def means(model: nn.Module, batches: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Of a reduced model's patch tokens, the plain mean and the mean by group sizes: [n, C] each."""
    plain, by_size = [], []
    for x in batches:
        with sv.trace(model) as t:
            tokens = model.forward_features(x)[:, 1:]
        plain.append(tokens.mean(dim=1))
        by_size.append(sv.pool(tokens, t))
    return torch.cat(plain).numpy(), torch.cat(by_size).numpy()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5))
    parser.add_argument("--json", type=Path, default=RESULTS / "pooling.json")
    args = parser.parse_args()
    model, batches = dinov2.dinov2_vit_small(SIZE).eval(), photographs()
    wanted, _ = means(sv.reduce_(model, sv.Identity()), batches)
    sheet = Sheet(args.json, image_size=SIZE, images=len(wanted))
    for share in args.shares:
        for row in map(method, METHODS):
            plan = make_plan(model, row.template(), macs=share, curve=row.curve)
            near = [cosine(found, wanted) for found in means(sv.reduce_(model, plan.reducer), batches)]
            line = {"share": share, "method": row.name, "label": row.label, "macs_share": plan.macs_share}
            line["reducer"] = repr(plan.reducer)
            for name, values in zip(("plain", "by_size"), near, strict=True):
                line |= {name: values.mean(), f"{name}_se": standard_error(values)}
            sheet.add(line, f"{share:.0%} {row.label}: tokens.mean(1) {near[0].mean():.3f}, sv.pool {near[1].mean():.3f}")
    sheet.save()


if __name__ == "__main__":
    main()

"""Without training, on a dense task: maps of saliency from the reduced model's tokens, spread over the full grid again.

    python benchmarks/dense.py        # benchmarks/results/dense.json

The demo's weights come with the decoder that they were trained under: DINOv2 ViT-S/14 and three transposed convolutions, which say
how much each pixel draws the eye. Photographs and crops of scikit-image's and scikit-learn's (those on which nothing was chosen) at
224 pixels. Every method whose tokens have a place on the grid, at the same share of the multiply-adds, the decoder's left out.
Against the unreduced model's map: mean absolute error, correlation over pixels, and the share of the most salient tenth of the
pixels that is found again; against its patch tokens: the mean cosine. Ranks are by paired tests of all pairs within a share,
corrected for their number.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squeezevit as sv
from saliency import SIZE, Decoder, decoder
from squeezevit.budget.plan import make_plan
from squeezevit.budget.solve import OutOfReach
from squeezevit.compare.ranks import ranks
from squeezevit.data import dinov2
from squeezevit.reducers.catalog import method
from tasks import photographs
from workshop import RESULTS, Sheet, arguments, say, standard_error, untrained


@torch.inference_mode()
def maps(model: nn.Module, head: Decoder, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of a reduced model: patch tokens on the full grid [n, N, C] and saliency [n, SIZE, SIZE]."""
    tokens = []
    for x in batches:
        with sv.trace(model) as t:
            patches = model.forward_features(x)[:, 1:]
        tokens.append(t.scatter_back(patches) if t.stages else patches)
    return torch.cat(tokens), torch.cat([head(t) for t in tokens])


def scores(tokens: Tensor, saliency: Tensor, wanted: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
    """Of each image."""
    a, b = saliency.flatten(1).double(), wanted[1].flatten(1).double()
    most = b.shape[1] // 10
    top = torch.zeros_like(b).scatter(1, b.topk(most).indices, 1)
    return {
        "cosine": F.cosine_similarity(tokens, wanted[0], dim=-1).mean(dim=1).double().numpy(),
        "error": (a - b).abs().mean(dim=1).numpy(),
        "correlation": torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]).numpy(),
        "top_tenth": (top.gather(1, a.topk(most).indices).sum(dim=1) / most).numpy(),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.44, 0.35, 0.25))
    parser.add_argument("--json", type=Path, default=RESULTS / "dense.json")
    args = parser.parse_args()
    model, head, batches = dinov2.dinov2_vit_small(SIZE).eval(), decoder(), photographs()
    wanted = maps(sv.reduce_(model, sv.Identity()), head, batches)
    sheet = Sheet(args.json, image_size=SIZE, images=len(wanted[0]))
    readable = (row for row in map(method, untrained()) if row.make is not sv.EViT)  # its extra token is nobody's host
    methods = [row for row in readable if not getattr(row.template(), "class_token_only", False)]
    for share in args.shares:
        found = {}
        for row in methods:
            try:
                plan = make_plan(model, row.name, macs=share)
            except OutOfReach as error:
                say(f"left out: {error}")
                continue
            found[row.name] = scores(*maps(sv.reduce_(model, plan.reducer), head, batches), wanted)
            line = {"share": share, "method": row.name, "label": row.label, "macs_share": plan.macs_share}
            line["reducer"] = repr(plan.reducer)
            for name, values in found[row.name].items():
                line |= {name: values.mean(), f"{name}_se": standard_error(values)}
            sheet.rows.append(line)
            say(f"{share:.0%} {row.label}: " + ", ".join(f"{n} {v.mean():.4f}" for n, v in found[row.name].items()))
        for name in found[methods[0].name]:
            better = {m: -values[name] if name == "error" else values[name] for m, values in found.items()}
            places = ranks(better)
            for line in sheet.rows[-len(found) :]:
                line[f"{name}_rank"] = places[line["method"]]
        for line in sheet.rows[-len(found) :]:
            line["reducer"] = line.pop("reducer")  # last, as tables have it
        sheet.save()


if __name__ == "__main__":
    main()

"""Without training, on a dense task: maps of saliency from the reduced model's tokens, spread over the full grid again.

    python benchmarks/dense.py        # benchmarks/results/dense.json

The demo's weights come with the decoder that they were trained under: DINOv2 ViT-S/14 and three transposed convolutions, which say
how much each pixel draws the eye. Photographs and crops of scikit-image's and scikit-learn's (those on which nothing was chosen) at
224 pixels. Every method at the same share of the multiply-adds, the decoder's left out. Against the unreduced model's map: mean
absolute error, correlation over pixels, and the share of the most salient tenth of the pixels that is found again; against its
patch tokens: the mean cosine.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import ttest_1samp
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.data import dinov2
from squeezevit.plan import make_plan
from training_free import CURVES, TEMPLATES, photographs

OUT = Path(__file__).parent / "results" / "dense.json"
SIZE = 224


class Decoder(nn.Module):
    """Patch tokens [B, N, 384] of a square grid -> saliency [B, SIZE, SIZE], as in the ONNX file."""

    def __init__(self) -> None:
        super().__init__()
        wide = (384, 256, 128, 64)
        for i in (1, 2, 3):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(wide[i - 1], wide[i], 4, stride=2, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(wide[i]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)).relu()
        return F.interpolate(self.final_conv(x), (SIZE, SIZE), mode="bilinear")[:, 0].sigmoid()


def decoder() -> Decoder:
    import onnx

    graph = onnx.load(str(dinov2.weights_path())).graph
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer if i.name.startswith("decoder.")}
    model = Decoder().eval()
    state = {n.removeprefix("decoder."): torch.from_numpy(a.copy()) for n, a in arrays.items()}
    found = model.load_state_dict(state, strict=False)
    if found.unexpected_keys or not all(key.endswith("num_batches_tracked") for key in found.missing_keys):
        raise ValueError(f"the decoder in the file is another one: {found}")
    return model


@torch.inference_mode()
def maps(model: nn.Module, head: Decoder, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Patch tokens on the full grid [n, N, C] and saliency [n, SIZE, SIZE]."""
    tokens = []
    for x in batches:
        if "squeezevit_state" in vars(model):
            with sv.trace(model) as t:
                patches = model.forward_features(x)[:, 1:]
            patches = t.scatter_back(patches)
        else:
            patches = model.forward_features(x)[:, 1:]
        tokens.append(patches)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.44, 0.35))
    args = parser.parse_args()
    model, head = dinov2.dinov2_vit_small(SIZE).eval(), decoder()
    batches = photographs()
    wanted = maps(model, head, batches)
    rows = []
    for share in args.shares:
        found = {}
        for method, template in TEMPLATES.items():
            if "EViT" in method:  # its extra token is nobody's host
                continue
            plan = make_plan(model, template, macs=share, curve=CURVES.get(method))
            found[method] = scores(*maps(sv.reduce_(model, plan.reducer), head, batches), wanted)
            sv.restore_(model)
            row = {"share": share, "method": method, "macs_share": plan.macs_share, "reducer": repr(plan.reducer)}
            for name, values in found[method].items():
                row |= {name: values.mean(), f"{name}_se": values.std(ddof=1) / math.sqrt(len(values))}
            rows.append(row)
            sys.stdout.write(f"{share:.0%} {method}: " + ", ".join(f"{n} {v.mean():.4f}" for n, v in found[method].items()) + "\n")
            sys.stdout.flush()
        for row in rows[-len(found) :]:
            for name, values in found[row["method"]].items():
                if row["method"] != "ToMe":
                    row[f"p_{name}_ToMe"] = float(ttest_1samp(values - found["ToMe"][name], 0).pvalue)
    setting = {"created": now(), "command": command(), "machine": machine(), "versions": versions(), "image_size": SIZE}
    OUT.write_text(json.dumps({**setting, "images": len(wanted[0]), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

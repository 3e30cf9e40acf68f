"""Dense features at full resolution, as people look at them: PCA of patch tokens, and the saliency decoder, by method and budget.

python benchmarks/pca.py            # benchmarks/results/pca.json and docs/pca.jpg

DINOv2 ViT-S/14 at 518 pixels (1,369 patches) with the full grid (`grid=True`), on photographs of scikit-image. Time is that of one
image, in alternating rounds, against the unreduced model; cosine is that of patch tokens, error and correlation are those of
saliency maps, each against the unreduced model's.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

import squeezevit as sv
from drawings import DOCS
from saliency import Decoder, decoder
from squeezevit.bench.timing import alternate
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import share_weights
from squeezevit.data import dinov2, elpv
from workshop import RESULTS, Sheet, arguments

SIZE, PATCH = 518, 14
PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket")
DRAWN = 0.5  # the share of the multiply-adds in the picture


def photographs() -> Tensor:
    """The largest square of each in its middle: [n, 3, SIZE, SIZE], between 0 and 1."""
    out = []
    for name in PHOTOGRAPHS:
        x = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255
        side, (top, left) = min(x.shape[2:]), ((s - min(x.shape[2:])) // 2 for s in x.shape[2:])
        crop = x[..., top : top + side, left : left + side]
        out.append(F.interpolate(crop, (SIZE, SIZE), mode="bicubic", antialias=True)[0].clamp(0, 1))
    return torch.stack(out)


def principal(tokens: Tensor, of: Tensor) -> np.ndarray:
    """Three colours of each patch: its place along the main directions of an image's unreduced tokens `of` [N, C]."""
    mean = of.mean(dim=0)
    *_, directions = torch.linalg.svd(of - mean, full_matrices=False)
    wanted, found = ((x - mean) @ directions[:3].T for x in (of, tokens))
    low, high = wanted.quantile(0.02, dim=0), wanted.quantile(0.98, dim=0)
    side = SIZE // PATCH
    return ((found - low) / (high - low)).clamp(0, 1).view(side, side, 3).numpy()


@torch.inference_mode()
def features(model: nn.Module, head: Decoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens on the full grid [n, N, C], and saliency."""
    tokens = torch.cat([model.forward_features(x[None]) for x in images])[:, 1:]
    return tokens, head(tokens)


def reducers(model: nn.Module, shares: tuple[float, ...]) -> dict[tuple[str, float], Reducer]:
    found: dict[tuple[str, float], Reducer] = {}
    for share in shares:
        found["training-free", share] = sv.preset("training-free", macs=share, model=model)
        found["ToMe", share] = sv.plan(model, sv.ToMe, macs=share)
        found["eTPS", share] = sv.plan(model, sv.ETPS, macs=share)
    return found


def draw(photos: Tensor, columns: dict[str, tuple[Tensor, Tensor]]) -> None:
    """A row of PCA pictures and one of saliency for each photograph: docs/pca.jpg."""
    wanted, _ = next(iter(columns.values()))
    figure, axes = plt.subplots(2 * len(photos), 1 + len(columns), figsize=(10, 4.1 * len(photos)), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for i, photo in enumerate(photos):
        axes[2 * i, 0].imshow(photo.permute(1, 2, 0).numpy())
        for k, (tokens, saliency) in enumerate(columns.values(), 1):
            axes[2 * i, k].imshow(principal(tokens[i], wanted[i]))
            axes[2 * i + 1, k].imshow(saliency[i].numpy(), cmap="magma", vmin=0, vmax=1)
    for axis, title in zip(axes[0], ("photograph", *columns), strict=True):
        axis.set_title(title, fontsize=9)
    figure.savefig(DOCS / "pca.jpg", dpi=80, pil_kwargs={"quality": 85})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shares", nargs="+", type=float, default=(0.65, 0.5, 0.35))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS / "pca.json")
    args = parser.parse_args()
    model, head, photos = dinov2.dinov2_vit_small(SIZE).eval(), decoder(), photographs()
    mean, std = (torch.tensor(v)[:, None, None] for v in (elpv.MEAN, elpv.STD))
    images = (photos - mean) / std
    dense, chosen = sv.macs(model), reducers(model, tuple(args.shares))
    models = {key: sv.reduce_(share_weights(model), reducer, grid=True) for key, reducer in chosen.items()}
    cases: dict[Any, Any] = {"unreduced": model, **models}
    wanted = features(model, head, images)
    sheet, columns = Sheet(args.json, image_size=SIZE, images=len(images), rounds=args.rounds), {"unreduced": wanted}
    with torch.inference_mode():
        times = alternate({k: lambda m=m: m.forward_features(images[:1]) for k, m in cases.items()}, args.rounds)
    for (name, share), reduced in models.items():
        tokens, saliency = features(reduced, head, images)
        if share == DRAWN:
            columns[f"{name}, {share:.0%}"] = tokens, saliency
        pairs = zip(saliency.flatten(1), wanted[1].flatten(1), strict=True)
        row = {
            "method": name, "share": share, "macs_share": sv.macs(reduced) / dense, "reducer": repr(chosen[name, share]),
            "cosine": F.cosine_similarity(tokens, wanted[0], dim=-1).mean().item(),
            "error": (saliency - wanted[1]).abs().mean().item(),
            "correlation": float(np.mean([torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs])),
            "speedup": 1 / times.ratio((name, share), "unreduced"),
            "speedup_best": 1 / times.best_ratio((name, share), "unreduced"),
            "ms": 1e3 * times.median((name, share)), "unreduced_ms": 1e3 * times.median("unreduced"),
        }  # fmt: skip
        sheet.add(
            row, "{share:.0%} {method}: {speedup:.2f}x ({speedup_best:.2f}x), cosine {cosine:.3f}, error {error:.3f}".format(**row)
        )
    sheet.save()
    draw(photos, columns)


if __name__ == "__main__":
    main()

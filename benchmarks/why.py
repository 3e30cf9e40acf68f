"""Why the training-free preset is what it is: pictures and numbers for docs/training-free.md.

    python benchmarks/why.py        # benchmarks/results/why.json, docs/why.jpg and docs/why.svg

DINOv2 ViT-S/14 at 224 pixels on crops of scikit-image's photographs. One stage at block 3, the same tokens for all: what is pruned
by attention, by redundancy and by chance, and how like its host it is. Then the preset at half of the multiply-adds with one choice
changed at a time.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squeezevit as sv
from squeezevit import ops
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.data import dinov2, elpv
from squeezevit.plan import make_plan
from squeezevit.presets import PRESETS
from squeezevit.reducers.names import CURVE
from training_free import crops, features, photographs

OUT = Path(__file__).parent / "results" / "why.json"
DOCS = Path(__file__).parents[1] / "docs"
KEEP, BLOCK = 0.36, 3
RANKINGS = {
    "attention": sv.Squeeze(keep=KEEP, at=(BLOCK,)),
    "redundancy": sv.Squeeze(score="redundancy", keep=KEEP, at=(BLOCK,)),
    "chance": sv.Squeeze(score="random", keep=KEEP, at=(BLOCK,)),
}
PRESET = PRESETS["training-free"]
VARIANTS = {
    "preset": PRESET,
    "redundancy alone": replace(PRESET, score="redundancy"),
    "class attention alone": replace(PRESET, score="auto"),
    "a random order": replace(PRESET, score="random"),
    "one ratio for all stages": PRESET,
    "no stage at block 0": replace(PRESET, at=(3, 6, 9)),
    "a stage in every block": replace(PRESET, at="every"),
    "the paper's weights instead of masses": replace(PRESET, fuse="cosine"),
    "masses without the bias in attention": replace(PRESET, bias=False),
    "matched on keys instead of tokens": replace(PRESET, match="keys"),
}


@torch.inference_mode()
def hosted(model: nn.Module, images: Tensor, reducer: sv.Squeeze) -> tuple[Tensor, Tensor]:
    """Cosine of each pruned token with its host, and the patches reserved [B, K]."""
    tokens: list[Tensor] = []
    sv.reduce_(model, reducer)
    with sv.trace(model) as t:
        model(images)
    sv.reduce_(model, sv.Identity())
    handle = model.blocks[BLOCK].norm2.register_forward_pre_hook(lambda m, args: tokens.append(args[0]))
    model(images)
    handle.remove()
    whole, s = tokens[0][:, 1:], t.stages[0]
    gone, host = ops.take(whole, s.pruned), ops.take(ops.take(whole, s.kept), s.hosts)
    return F.cosine_similarity(gone, host, dim=-1), s.kept


@torch.inference_mode()
def scores(model: nn.Module, image: Tensor, reducer: sv.Squeeze) -> Tensor:
    sv.reduce_(model, reducer)
    with sv.trace(model) as t:
        model(image[None])
    return t.stages[0].scores[0]


def picture(model: nn.Module, images: Tensor) -> None:
    """Photographs, both rankings, and what each keeps at once: docs/why.jpg."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (elpv.MEAN, elpv.STD))
    titles = ("photograph", "class attention", "what it keeps", "redundancy: unlike all\nthat get more attention", "what it keeps")
    figure, axes = plt.subplots(len(images), len(titles), figsize=(10, 2.15 * len(images)), layout="constrained")
    for row, image in zip(axes, images, strict=True):
        photo = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        side = photo.shape[0] // 14
        row[0].imshow(photo)
        for k, name in enumerate(("attention", "redundancy")):
            values = scores(model, image, RANKINGS[name])
            _, kept = hosted(model, image[None], RANKINGS[name])
            shown = np.zeros(side * side)
            shown[kept[0].numpy()] = 1
            mask = np.kron(shown.reshape(side, side), np.ones((14, 14)))[..., None]
            row[1 + 2 * k].imshow(values.argsort().argsort().reshape(side, side).numpy(), cmap="viridis")
            row[2 + 2 * k].imshow(photo * mask + (1 - mask) * (0.25 * photo + 0.6))
        for axis in row:
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.savefig(DOCS / "why.jpg", dpi=130, pil_kwargs={"quality": 88})


def curves(cosines: dict[str, np.ndarray]) -> None:
    """How like their hosts the pruned tokens are: docs/why.svg."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for (name, values), style in zip(cosines.items(), ("--", "-", ":"), strict=True):
        axis.plot(np.sort(values), np.linspace(0, 100, len(values)), style, label=f"pruned by {name}", linewidth=2)
    axis.set(xlabel="cosine of a pruned token with its host", ylabel="% of pruned tokens below", xlim=(0, 1), ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(DOCS / "why.svg")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model = dinov2.dinov2_vit_small(224).eval()
    batches = photographs()
    cosines = {n: torch.cat([hosted(model, x, r)[0] for x in batches]).flatten().numpy() for n, r in RANKINGS.items()}
    likeness = [
        {"pruned_by": n, "mean": float(v.mean()), "below_0.5": float((v < 0.5).mean()), "lowest_tenth": float(np.quantile(v, 0.1))}
        for n, v in cosines.items()
    ]
    for row in likeness:
        sys.stdout.write(f"{row}\n")
    dense = features(sv.restore_(model), batches)
    rows = []
    for name, template in VARIANTS.items():
        plan = make_plan(model, template, macs=0.5, curve=None if "one ratio" in name else CURVE["training-free"])
        found = features(sv.reduce_(model, plan.reducer), batches)
        sv.restore_(model)
        cosine = F.cosine_similarity(found, dense)
        rows.append({"variant": name, "macs_share": plan.macs_share, "reducer": repr(plan.reducer), "cosine": cosine.mean().item()})
        rows[-1]["cosine_se"] = (cosine.std() / len(cosine) ** 0.5).item()
        sys.stdout.write(f"{name}: {rows[-1]['cosine']:.3f} +- {rows[-1]['cosine_se']:.3f}\n")
        sys.stdout.flush()
    curves(cosines)
    picture(model, torch.cat(crops())[[16, 32, 0]])
    setting = {"created": now(), "command": command(), "machine": machine(), "versions": versions(), "keep": KEEP, "block": BLOCK}
    OUT.write_text(json.dumps({**setting, "images": len(dense), "likeness": likeness, "variants": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Why the training-free preset is what it is: pictures and numbers for docs/training-free.md.

    python benchmarks/why.py        # benchmarks/results/why.json, docs/why.jpg and docs/why.svg

DINOv2 ViT-S/14 at 224 pixels on crops of scikit-image's photographs. One stage at block 3, the same tokens for all: what is pruned
by attention, by redundancy and by chance, and how like its host it is. Then the preset at half of the multiply-adds with one choice
changed at a time.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squeezevit as sv
from drawings import draw_likeness, draw_rankings
from squeezevit.bench.machine import header, write_json
from squeezevit.core import ops
from squeezevit.core.trace import StageTrace
from squeezevit.reducers.catalog import method
from tasks import crops, trial
from workshop import RESULTS, arguments, say, standard_error

KEEP, BLOCK = 0.36, 3
RANKINGS = {
    "attention": sv.Squeeze(keep=KEEP, at=(BLOCK,)),
    "redundancy": sv.Squeeze(score="redundancy", keep=KEEP, at=(BLOCK,)),
    "chance": sv.Squeeze(score="random", keep=KEEP, at=(BLOCK,)),
}
PRESET = method("training-free").template()
VARIANTS = {
    "training-free": PRESET,
    "redundancy alone": replace(PRESET, score="redundancy"),
    "class attention alone": replace(PRESET, score="auto"),
    "a random order": replace(PRESET, score="random"),
    "one ratio for all stages": PRESET,
    "no stage at block 0": replace(PRESET, at=(3, 6, 9)),
    "a stage in every block": replace(PRESET, at="every"),
    "the paper's weights instead of masses": replace(PRESET, fuse="cosine"),
    "masses without the bias in attention": replace(PRESET, bias=False),
    "fused tokens as short as their mean": replace(PRESET, fuse="mass"),
    "matched on keys instead of tokens": replace(PRESET, match="keys"),
}


@torch.inference_mode()
def first_stage(model: nn.Module, images: Tensor, reducer: sv.Squeeze) -> StageTrace:
    sv.reduce_(model, reducer)
    with sv.trace(model) as t:
        model(images)
    return t.stages[0]


@torch.inference_mode()
def hosted(model: nn.Module, images: Tensor, reducer: sv.Squeeze) -> Tensor:
    """Cosine of each pruned token with its host."""
    tokens: list[Tensor] = []
    s = first_stage(model, images, reducer)
    sv.restore_(model)
    handle = model.blocks[BLOCK].norm2.register_forward_pre_hook(lambda m, args: tokens.append(args[0]))
    model(images)
    handle.remove()
    whole = tokens[0][:, 1:]
    gone, host = ops.take(whole, s.pruned), ops.take(ops.take(whole, s.kept), s.hosts)
    return F.cosine_similarity(gone, host, dim=-1)


def summary(name: str, cosines: np.ndarray) -> dict[str, object]:
    below, tenth = float((cosines < 0.5).mean()), float(np.quantile(cosines, 0.1))
    return {"pruned_by": name, "mean": float(cosines.mean()), "below_0.5": below, "lowest_tenth": tenth}


def main() -> None:
    arguments(__doc__).parse_args()
    t = trial("photographs")
    cosines = {n: torch.cat([hosted(t.model, x, r) for x in t.batches]).flatten().numpy() for n, r in RANKINGS.items()}
    likeness = [summary(name, values) for name, values in cosines.items()]
    say("\n".join(map(str, likeness)))
    rows = []
    for name, template in VARIANTS.items():
        plan = t.plan(template, 0.5, None if "one ratio" in name else method("training-free").curve)
        near = t.near(t.features(plan.reducer))
        row = {"variant": name, "macs_share": plan.macs_share, "reducer": repr(plan.reducer), "cosine": near.mean()}
        rows.append(row | {"cosine_se": standard_error(near)})
        say(f"{name}: {near.mean():.3f} +- {rows[-1]['cosine_se']:.3f}")
    draw_likeness(cosines)
    shown = torch.cat(crops())[[16, 32, 0]]
    stages = [[first_stage(t.model, image[None], RANKINGS[name]) for name in ("attention", "redundancy")] for image in shown]
    draw_rankings(shown, [[(s.scores[0], s.kept[0]) for s in row] for row in stages])
    found = {"keep": KEEP, "block": BLOCK, "images": len(t.dense), "likeness": likeness, "variants": rows}
    write_json(RESULTS / "why.json", {**header(), **found})


if __name__ == "__main__":
    main()

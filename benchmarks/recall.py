"""Search by a reduced model: how many of the ten nearest photographs are those that the unreduced model finds.

    python benchmarks/recall.py        # benchmarks/results/recall.json

DINOv2 ViT-S/14 on the demo's photographs, solar cells at 168 pixels. Each photograph asks for the ten nearest of all others, by the
cosine of class tokens; recall@10 is the share of the unreduced model's ten that is found. "apart": queries and table by the
reduced model; "mixed": queries by the reduced model, table by the unreduced one. Cells are alike, so that tenth and eleventh are
near: "regret" is how much less similar, by the unreduced model's cosines, the ten that were found are than its own ten.
"""

from pathlib import Path

import numpy as np
import torch

import squeezevit as sv
from squeezevit.budget.plan import make_plan
from squeezevit.data import dinov2, elpv
from squeezevit.data.probe import extract, load_images
from squeezevit.reducers.catalog import method
from workshop import RESULTS, Sheet, arguments, standard_error

SIZE, NEAREST = 168, 10


def cosines(queries: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Of every query with every photograph of the table but itself, [n, n]."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, table))
    similar = a @ b.T
    np.fill_diagonal(similar, -np.inf)
    return similar


def nearest(similar: np.ndarray, k: int = NEAREST) -> np.ndarray:
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


def recall(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Shares [n] of what is wanted that was found."""
    return np.array([len({*a} & {*b}) / len(b) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.35))
    parser.add_argument("--methods", nargs="*", default=("training-free", "tome", "topk", "random"))
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "recall.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    paths, probabilities, _ = elpv.load_elpv()
    chosen = elpv.split(probabilities, 2, args.images)[1]
    batches = load_images([paths[i] for i in chosen], SIZE, 20)
    model = dinov2.dinov2_vit_small(SIZE).eval()
    dense = extract(model, batches)
    truth = cosines(dense, dense)
    wanted = nearest(truth)
    best = np.take_along_axis(truth, wanted, 1).mean(1)
    sheet = Sheet(args.json, image_size=SIZE, images=len(dense), nearest=NEAREST, shares=list(args.shares))
    for share in args.shares:
        for row in map(method, args.methods):
            plan = make_plan(model, row.template(), macs=share, curve=row.curve)
            features = extract(sv.reduce_(model, plan.reducer), batches)
            sv.restore_(model)
            apart, mixed = (nearest(cosines(features, table)) for table in (features, dense))
            line = {"share": share, "method": row.name, "label": row.label, "macs_share": plan.macs_share}
            line["reducer"] = repr(plan.reducer)
            for name, found in (("apart", apart), ("mixed", mixed)):
                values = recall(found, wanted)
                line |= {f"recall_{name}": values.mean(), f"recall_{name}_se": standard_error(values)}
                line[f"first_{name}"] = float(np.mean([w in f for w, f in zip(wanted[:, 0], found, strict=True)]))
            line["regret"] = float((best - np.take_along_axis(truth, apart, 1).mean(1)).mean())
            sheet.add(line, f"{share:.0%} {row.label}: recall@10 {line['recall_apart']:.3f}, mixed {line['recall_mixed']:.3f}")
            sheet.save()


if __name__ == "__main__":
    main()

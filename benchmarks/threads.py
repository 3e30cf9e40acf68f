"""Several threads, one reduced model: how many of many forwards give another answer than alone. None may.

python benchmarks/threads.py        # 100,000 forwards in 8 threads: benchmarks/results/threads.json
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from timm.models.eva import Eva
from torch import Tensor, nn

import squeezevit as sv
from squeezevit.reducers.catalog import method
from workshop import RESULTS, Sheet, arguments

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
HUGGING = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 32, "patch_size": 8, "mlp_ratio": 2}
ROTARY = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "global_pool": "avg"}


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **SIZES, **options)


def dinov2() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**HUGGING))


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


def groups(model: nn.Module, x: Tensor) -> Tensor:
    with sv.trace(model) as t:
        model(x)
    return t.groups.float()


def cases() -> dict[str, tuple[nn.Module, sv.ETPS, dict[str, bool], Callable[[nn.Module, Tensor], Tensor]]]:
    """Fifteen kinds of reducer and model: name -> model, reducer, options of reduce_, what is asked."""
    by_mean = {"global_pool": "avg", "class_token": False}
    preset, plain = method("training-free").template(), nn.Module.__call__
    found = {
        f"vit {r}": (vit(), r, {}, plain) for r in (sv.ETPS(0.5), sv.EViT(0.5), sv.TopK(0.5), sv.Random(0.5), sv.DynamicViT(0.5))
    }
    found |= {f"mean {r}": (vit(**by_mean), r, {}, plain) for r in (sv.ETPS(0.5, mass=True), sv.ToMe(r=2), sv.DTPS(0.5), preset)}
    found |= {f"rotary {r}": (Eva(**SIZES, **ROTARY), r, {}, plain) for r in (sv.ETPS(0.5, mass=True), sv.ToMe(r=2))}
    found |= {f"grid {r}": (dinov2(), r, {"grid": True}, tokens) for r in (sv.ETPS(0.5), sv.ToMe(r=2))}
    found |= {"trace": (vit(), sv.ETPS(0.5), {}, groups), "compiled": (vit(**by_mean), sv.ToMe(r=2), {}, plain)}
    return found


def hammer(model: nn.Module, ask: Callable[[nn.Module, Tensor], Tensor], forwards: int, threads: int) -> dict[str, float]:
    images = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(threads)]
    with torch.no_grad():
        expected = [ask(model, x) for x in images]

    def work(i: int) -> tuple[int, int]:
        wrong = errors = 0
        for _ in range(forwards // threads):
            try:
                with torch.no_grad():
                    wrong += not torch.allclose(ask(model, images[i]), expected[i], rtol=1e-5, atol=1e-5)
            except sv.errors.SqueezeViTError:
                errors += 1
        return wrong, errors

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, range(threads)))
    return {"wrong": sum(w for w, _ in found), "errors": sum(e for _, e in found), "seconds": time.perf_counter() - start}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--forwards", type=int, default=100_000, help="in all")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--json", type=Path, default=RESULTS / "threads.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    everything = cases()
    each = args.forwards // len(everything) // args.threads * args.threads + args.threads
    sheet = Sheet(args.json, thread_count=args.threads)
    for name, (model, reducer, options, ask) in everything.items():
        torch.manual_seed(0)
        sv.reduce_(model.eval(), reducer, **options)
        runs = torch.compile(model, fullgraph=True, backend="eager") if name == "compiled" else model
        found = hammer(runs, ask, each, args.threads)
        sheet.add({"case": name, "forwards": each, **found}, f"{name}: {found}")
    sheet.save()


if __name__ == "__main__":
    main()

"""What each step of a stage costs: score, split, gather, match, fuse, in microseconds and as a share of a whole block.

    python benchmarks/steps.py                        # benchmarks/results/steps_cpu.json
    python benchmarks/steps.py --device cuda --precision bf16

The first stage of DeiT-S at 224 pixels (197 tokens of 384 channels), keep 0.5. Best and median of alternating rounds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import squeezevit as sv
from squeezevit.bench.timing import alternate
from squeezevit.core import ops
from squeezevit.core.cut import attention, mlp_half
from squeezevit.core.running import autocast
from workshop import Sheet, arguments, file_of

KEEP = 0.5


def steps(batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """Each step on what the steps before it leave; the whole block and its MLP half to compare with."""
    model = timm.create_model("deit_small_patch16_224").to(device).eval()
    block: Any = model.blocks[3]
    head = sv.reduce_(timm.create_model("deit_small_patch16_224"), sv.DTPS()).token_reducer[0].to(device).eval()
    x = torch.randn(batch, 197, 384, device=device)
    a = attention(block, x)
    query, keys = a.query(1)[:, :, 0], a.key()
    scores = ops.class_attention_folded(query, a.key_weight, a.x)[:, 1:]
    kept, pruned = ops.split(scores, int(196 * KEEP))
    tokens, gone = ops.take(x, kept + 1), ops.take(x, pruned + 1)
    hosts, cosine = ops.match(tokens, gone)
    weights = ops.squeeze_weights(tokens, cosine)
    key_weight = a.key_weight

    def folded() -> torch.Tensor:
        again = attention(block, x)
        return ops.class_attention_folded(again.query(1)[:, :, 0], key_weight, again.x)

    return {
        "whole block": lambda: block(x),
        "MLP half": lambda: mlp_half(block, x),
        "score, folded (norm, query, class row)": folded,
        "score, from keys that are there": lambda: ops.class_attention(query, keys),
        "score, received (keys and queries are there)": lambda: ops.received_attention(a.query(None), keys),
        "score head of dTPS": lambda: head(x[:, 1:], None),
        "split": lambda: ops.split(scores, kept.shape[1]),
        "gather kept and pruned": lambda: (ops.take(x, kept + 1), ops.take(x, pruned + 1)),
        "match": lambda: ops.match(tokens, gone),
        "fuse": lambda: ops.fuse(tokens, gone, hosts, *weights),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=(1, 16))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    setting = {"rounds": args.rounds, "precision": args.precision, "keep": KEEP}
    sheet = Sheet(args.json or file_of("steps", args.device), args.device, **setting)
    for batch in args.batch_sizes:
        with torch.inference_mode(), autocast(torch.device(args.device), args.precision):
            times = alternate(steps(batch, args.device), args.rounds, warmup=5, device=args.device)
        whole = times.best("whole block")
        for name in times.seconds:
            row = {"batch_size": batch, "step": name, "best_us": 1e6 * times.best(name), "median_us": 1e6 * times.median(name)}
            row["share_of_block"] = times.best(name) / whole
            sheet.add(row, f"batch {batch}, {name}: {row['best_us']:.0f} us, {row['share_of_block']:.1%} of a block")
    sheet.save()


if __name__ == "__main__":
    main()

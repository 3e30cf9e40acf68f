"""How close reducers come to the limit, the same model with its tokens merely sliced: models, sizes, batches, eager and compiled.

    python benchmarks/overhead.py                     # CPU: benchmarks/results/overhead_cpu.json
    python benchmarks/overhead.py --device cuda       # bf16, more models and batches: benchmarks/results/overhead_cuda.json

Best and median of alternating rounds in one run. Weights are random; time depends on shapes alone.
"""

from dataclasses import asdict, replace
from pathlib import Path

import timm
import torch

import squeezevit as sv
from squeezevit.bench.run import measure
from squeezevit.reducers.catalog import method
from workshop import Sheet, arguments, file_of
from workshop import overhead as over

REDUCERS = (
    sv.ETPS(keep=0.7), sv.ETPS(keep=0.5), sv.ETPS(keep=0.5, at=(2, 4, 6, 8)), sv.ETPS(keep=0.5, mass=True),
    sv.DTPS(keep=0.7), sv.DTPS(keep=0.5), sv.DTPS(keep=0.5, at=(2, 4, 6, 8)),
    replace(method("training-free").template(), keep=(0.816, 0.65, 0.635, 0.652)),  # half of ViT-S/16's multiply-adds at 224 pixels
    sv.Squeeze(keep=0.8775, at="every", score="mrmr", fuse="mass"),
)  # fmt: skip
DEIT = {name: f"deit_{name}_patch16_224" for name in ("tiny", "small", "base")}
COMPILED = (sv.ETPS(keep=0.5), sv.DTPS(keep=0.5))  # a variant takes half a minute to compile
CPU = [  # model, pixels, batch size, compiled
    *((DEIT["small"], 224, batch, None) for batch in (1, 8, 16)),
    *((DEIT["tiny"], 224, batch, None) for batch in (1, 8)),
    (DEIT["base"], 224, 1, None),
    (DEIT["small"], 384, 1, None),
    ("vit_large_patch16_224", 224, 1, None),
    (DEIT["small"], 224, 8, "default"),
]
CUDA = [
    *((name, 224, batch, how) for name in DEIT.values() for batch in (1, 8, 64, 256) for how in (None, "default")),
    *((name, 224, 1, "reduce-overhead") for name in DEIT.values()),
    *(("vit_large_patch16_224", size, batch, None) for size in (224, 384, 512) for batch in (1, 8, 64)),
    ("vit_large_patch14_dinov2", 518, 8, None),
]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpu = torch.device(args.device).type == "cuda"
    precision = "bf16" if gpu else "fp32"
    sheet = Sheet(args.json or file_of("overhead", args.device), args.device, rounds=args.rounds, precision=precision)
    for name, size, batch, compiled in CUDA if gpu else CPU:
        if args.models and name not in args.models:
            continue
        model = timm.create_model(name, img_size=size).to(args.device)
        reducers = REDUCERS if compiled is None else COMPILED
        for speed in measure(model, reducers, batch, size, args.rounds, precision, compiled=compiled):
            row = {"model": name, "image_size": size, "batch_size": batch, "compiled": compiled, **asdict(speed)}
            where = f"{name} {size} px, batch {batch}, {compiled or 'eager'}"
            sheet.add(row, f"{where}: {speed.reducer} speed-up {speed.speedup_best:.2f}{over(speed)}")
        sheet.save()


if __name__ == "__main__":
    main()

"""How time and multiply-adds grow with the number of tokens: 224 to 1036 pixels, unreduced and reduced.

    python benchmarks/resolution.py                   # benchmarks/results/resolution_cpu.json
    python benchmarks/resolution.py --device cuda --precision bf16

DINOv2 ViT-S/14 (random weights: time depends on shapes alone), one image. Best and median of alternating rounds.
"""

from dataclasses import asdict
from pathlib import Path

import timm

import squeezevit as sv
from squeezevit.bench.run import measure
from squeezevit.budget.plan import plan_macs
from workshop import Sheet, file_of, overhead, timing_arguments

SIZES = (224, 336, 448, 518, 700, 1036)


def main() -> None:
    parser = timing_arguments(__doc__, batch_size=1)
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    setting = {"batch_size": args.batch_size, "rounds": args.rounds, "precision": args.precision}
    sheet = Sheet(args.json or file_of("resolution", args.device), args.device, **setting)
    for size in args.sizes:
        model = timm.create_model("vit_small_patch14_dinov2", img_size=size).to(args.device).eval()
        reducers = {"unreduced": sv.Identity(), "eTPS 0.7": sv.ETPS(keep=0.7), "eTPS 0.5": sv.ETPS(keep=0.5)}
        reducers["training-free 50 %"] = plan_macs(model, "training-free", 0.5)
        speeds = measure(model, list(reducers.values()), args.batch_size, size, args.rounds, args.precision)
        for name, speed in zip(reducers, speeds, strict=True):
            milliseconds = 1e3 / speed.images_per_second_best
            cost = f"{speed.macs / 1e9:.2f} GMACs, {milliseconds:.0f} ms, speed-up {speed.speedup_best:.2f}{overhead(speed)}"
            row = {"name": name, "image_size": size, "patches": (size // 14) ** 2, **asdict(speed)}
            sheet.add(row, f"{size} px, {name}: {cost}")
    sheet.save()


if __name__ == "__main__":
    main()

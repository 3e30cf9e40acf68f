"""How time and multiply-adds grow with the number of tokens: 224 to 1036 pixels, unreduced and reduced.

    python benchmarks/resolution.py                   # benchmarks/results/resolution_cpu.json
    python benchmarks/resolution.py --device cuda --precision bf16

DINOv2 ViT-S/14 (random weights: time depends on shapes alone), one image. Best and median of alternating rounds.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import timm
import torch

import squeezevit as sv
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.bench.run import measure

RESULTS = Path(__file__).parent / "results"
SIZES = (224, 336, 448, 518, 700, 1036)
REDUCERS = {"unreduced": sv.Identity(), "eTPS 0.7": sv.ETPS(keep=0.7), "eTPS 0.5": sv.ETPS(keep=0.5), "preset 50 %": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    setting = {"created": now(), "command": command(), "machine": machine(args.device), "versions": versions()}
    setting |= {"batch_size": args.batch_size, "rounds": args.rounds, "precision": args.precision}
    rows = []
    for size in SIZES:
        model = timm.create_model("vit_small_patch14_dinov2", img_size=size).to(args.device).eval()
        reducers = {name: r or sv.preset("training-free", 0.5, model) for name, r in REDUCERS.items()}
        speeds = measure(model, list(reducers.values()), args.batch_size, size, args.rounds, args.precision)
        for name, speed in zip(reducers, speeds, strict=True):
            rows.append({"name": name, "image_size": size, "patches": (size // 14) ** 2, **asdict(speed)})
            over = "" if speed.overhead_best is None else f", overhead best {speed.overhead_best:.3f}, median {speed.overhead:.3f}"
            sys.stdout.write(
                f"{size} px, {name}: {speed.macs / 1e9:.2f} GMACs, {1e3 / speed.images_per_second_best:.0f} ms, "
                f"speed-up {speed.speedup_best:.2f}{over}\n"
            )
            sys.stdout.flush()
    kind = torch.device(args.device).type
    (RESULTS / f"resolution_{kind}.json").write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What schedules searched on images gain over the default ones, on images that were not searched on.

    python benchmarks/calibrate.py        # benchmarks/results/calibrate.json

The demo's model (DINOv2 ViT-S/14) and photographs (solar cells): 64 to search on, 400 others to report on. The search begins at
the default: one ratio at blocks 3, 6 and 9, and for the preset its own four.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import squeezevit as sv
from squeezevit.bench.machine import command, machine, now, versions
from squeezevit.calibrate import calibrate
from squeezevit.data import dinov2, elpv

OUT = Path(__file__).parent / "results" / "calibrate.json"
TEMPLATES = (sv.ETPS(), sv.ETPS(mass=True), "training-free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=168)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.5,))
    parser.add_argument("--most", type=int, default=40, help="candidates tried")
    parser.add_argument("--images", type=int, nargs=2, default=(64, 400), help="to search on, and to report on")
    parser.add_argument("--json", type=Path, default=OUT)
    args = parser.parse_args()
    model = dinov2.dinov2_vit_small(args.image_size).eval()
    paths, probabilities, _ = elpv.load_elpv()
    searched, held_out = (
        [elpv.load_batch([paths[i] for i in part[k : k + 16]], args.image_size) for k in range(0, len(part), 16)]
        for part in elpv.split(probabilities, *args.images)
    )
    setting = {"created": now(), "command": command(), "machine": machine(), "versions": versions(), "image_size": args.image_size}
    setting["images"] = {"searched": args.images[0], "held_out": args.images[1]}
    rows = []
    for share in args.shares:
        for name in TEMPLATES:
            template = sv.preset(name, share, model) if isinstance(name, str) else name
            found = calibrate(model, template, share, searched, held_out, most=args.most)
            rows.append({**asdict(found), "reducer": repr(found.reducer), "default": repr(found.default), "share": share})
            own, default = found.held_out
            sys.stdout.write(f"{share:.0%} {found.reducer}: {own:.4f}, default {default:.4f} ± {found.held_out_error:.4f}\n")
            sys.stdout.flush()
            args.json.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

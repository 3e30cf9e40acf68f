"""What schedules searched on images gain over the default ones, on images that were not searched on.

    python benchmarks/calibrate.py        # benchmarks/results/calibrate.json

The demo's model (DINOv2 ViT-S/14) and photographs (solar cells): 64 to search on, 400 others to report on. The search begins at
the default: one ratio at blocks 3, 6 and 9, and for the preset its own four.
"""

from dataclasses import asdict
from pathlib import Path

from squeezevit.budget.calibrate import calibrate
from squeezevit.budget.plan import plan_macs
from squeezevit.data import dinov2, elpv
from squeezevit.data.probe import load_images
from squeezevit.reducers.catalog import method
from workshop import RESULTS, Sheet, arguments

METHODS = ("etps", "etps+mass", "training-free")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--image-size", type=int, default=168)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.5,))
    parser.add_argument("--most", type=int, default=40, help="candidates tried")
    parser.add_argument("--images", type=int, nargs=2, default=(64, 400), help="to search on, and to report on")
    parser.add_argument("--json", type=Path, default=RESULTS / "calibrate.json")
    args = parser.parse_args()
    model = dinov2.dinov2_vit_small(args.image_size).eval()
    paths, probabilities, _ = elpv.load_elpv()
    searched, held_out = (
        load_images([paths[i] for i in part], args.image_size, 16) for part in elpv.split(probabilities, *args.images)
    )
    images = {"searched": args.images[0], "held_out": args.images[1]}
    sheet = Sheet(args.json, image_size=args.image_size, images=images)
    for share in args.shares:
        for name in METHODS:
            preset = method(name).curve is not None  # its default is a plan
            template = plan_macs(model, name, share, image_size=args.image_size) if preset else method(name).template()
            found = calibrate(model, template, share, searched, held_out, most=args.most)
            own, default = found.held_out
            sheet.add(
                {**asdict(found), "reducer": repr(found.reducer), "default": repr(found.default), "share": share},
                f"{share:.0%} {found.reducer}: {own:.4f}, default {default:.4f} ± {found.held_out_error:.4f}",
            )
            sheet.save()


if __name__ == "__main__":
    main()

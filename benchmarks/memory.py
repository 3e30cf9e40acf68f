"""Peak memory of a forward under every reducer, the least of three processes each.

python benchmarks/memory.py [--long]        # benchmarks/results/memory.json; --long: 9,216 and 16,384 tokens alone
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from workshop import RESULTS, Sheet, arguments

CASES = {
    "unreduced": "sv.Identity()",
    "training-free": "replace(method('training-free').template(), keep=KEEP)",
    "ETPS": "sv.ETPS(keep=KEEP)",
    "ETPS(mass=True)": "sv.ETPS(keep=KEEP, mass=True)",
    "ETPS(score='received')": "sv.ETPS(keep=KEEP, score='received')",
    "DTPS": "sv.DTPS(keep=KEEP)",
    "EViT": "sv.EViT(keep=KEEP)",
    "DynamicViT": "sv.DynamicViT(keep=KEEP)",
    "TopK": "sv.TopK(keep=KEEP)",
    "ToMe": "sv.ToMe(r=COUNT)",
    "Random": "sv.Random(keep=KEEP)",
}
PROGRAM = """
import pathlib, timm, torch, squeezevit as sv
from dataclasses import replace
from squeezevit.reducers.catalog import method
def kib(name):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
model = sv.reduce_(timm.create_model({model!r}, img_size={size}, **{options!r}).eval(), {reducer})
images = torch.randn({batch}, 3, {size}, {size})
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not where torch was imported
before = kib("VmRSS")
with torch.inference_mode():
    model(images)
print(before, kib("VmHWM"))
"""


class Setting(NamedTuple):
    """A model and what it is given."""

    model: str
    size: int
    batch: int
    patch: int
    depth: int
    options: dict[str, object]
    keeps: tuple[float, ...]


SHORT = [Setting("deit_small_patch16_224", size, batch, 16, 12, {}, (0.7, 0.5)) for size, batch in ((224, 64), (512, 16))]
LONG = [
    Setting("vit_tiny_patch16_224", size, 1, 8, 4, {"patch_size": 8, "depth": 4, **pooling}, (0.7,))
    for size in (768, 1024)
    for pooling in ({}, {"class_token": False, "global_pool": "avg"})
]


def peak(reducer: str, setting: Setting) -> float:
    """MiB that a forward adds to the peak of resident memory: the least of three processes, as the allocator adds some."""
    program = PROGRAM.format(reducer=reducer, **setting._asdict())
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)]
    return min(int(after) - int(before) for before, after in (run.stdout.split() for run in runs)) / 1024


def measure(setting: Setting) -> Iterator[dict[str, object]]:
    """One row for each keep ratio and reducer."""
    tokens = (setting.size // setting.patch) ** 2
    dense = peak(CASES["unreduced"], setting)
    for keep in setting.keeps:
        removed = round((1 - keep) * tokens / setting.depth * 1.5)
        for name, source in CASES.items():
            reducer = source.replace("KEEP", str(keep)).replace("COUNT", str(removed))
            used = dense if name == "unreduced" else peak(reducer, setting)
            yield {
                "model": setting.model, "options": setting.options, "image_size": setting.size, "batch_size": setting.batch,
                "patch_tokens": tokens, "keep": keep, "reducer": name, "forward_mib": used, "of_unreduced": used / dense,
            }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--long", action="store_true", help="large token counts alone")
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    args = parser.parse_args()
    sheet = Sheet(args.json)
    for setting in LONG if args.long else SHORT + LONG:
        for row in measure(setting):
            text = "{patch_tokens} patch tokens, keep {keep}, {reducer}: {forward_mib:.0f} MiB, {of_unreduced:.2f}".format(**row)
            sheet.add(row, f"{text} {setting.options or ''}".rstrip())
        sheet.save()


if __name__ == "__main__":
    main()

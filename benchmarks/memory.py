"""Peak memory of a forward under each reducer, the least of three processes each; writes benchmarks/results/memory.json.

Run: python benchmarks/memory.py
"""

import json
import subprocess
import sys
from pathlib import Path

from squeezevit.bench.machine import command, machine, now, versions

CASES = {
    "unreduced": "sv.Identity()",
    "ETPS": "sv.ETPS(keep=KEEP)",
    "ETPS(mass=True)": "sv.ETPS(keep=KEEP, mass=True)",
    "ETPS(score='received')": "sv.ETPS(keep=KEEP, score='received')",
    "DTPS": "sv.DTPS(keep=KEEP)",
    "EViT": "sv.EViT(keep=KEEP)",
    "TopK": "sv.TopK(keep=KEEP)",
    "ToMe": "sv.ToMe(r=R)",
}
PROGRAM = """
import pathlib, timm, torch, squeezevit as sv
def kib(name):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
model = sv.reduce_(timm.create_model({model!r}, img_size={size}).eval(), {reducer})
images = torch.randn({batch}, 3, {size}, {size})
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not where torch was imported
before = kib("VmRSS")
with torch.inference_mode():
    model(images)
print(before, kib("VmHWM"))
"""


def peak(reducer: str, model: str, size: int, batch: int) -> float:
    """MiB that a forward adds to the peak of resident memory: the least of three processes, as the allocator adds some."""
    program = PROGRAM.format(reducer=reducer, model=model, size=size, batch=batch)
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)]
    return min(int(after) - int(before) for before, after in (run.stdout.split() for run in runs)) / 1024


def main() -> None:
    rows = []
    for model, size, batch in (("deit_small_patch16_224", 224, 64), ("deit_small_patch16_224", 512, 16)):
        for keep in (0.7, 0.5):
            dense = None
            for name, source in CASES.items():
                r = round((1 - keep) * (size // 16) ** 2 / 12 * 1.5)
                used = peak(source.replace("KEEP", str(keep)).replace("R)", f"{r})"), model, size, batch)
                dense = dense or used
                rows.append({"model": model, "image_size": size, "batch_size": batch, "keep": keep, "reducer": name})
                rows[-1] |= {"forward_mib": used, "of_unreduced": used / dense}
                sys.stdout.write(f"{size} px, keep {keep}, {name}: {used:.0f} MiB, {used / dense:.2f}\n")
    result = {"created": now(), "command": command(), "machine": machine(), "versions": versions(), "rows": rows}
    path = Path(__file__).parent / "results" / "memory.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

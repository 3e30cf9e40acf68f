"""What lies beside an exported model: run.py, which needs neither SqueezeViT nor torch, and a README with the measured figures."""

from pathlib import Path
from string import Template

from squeezevit.bundle import ENGINES, Card

_OPEN = {  # how each runtime is opened and called, on x [B, 3, H, W]
    "onnx": (
        "onnxruntime",
        'model = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])',
        'model.run(["out"], {"images": x})[0]',
    ),
    "openvino": (
        "openvino",
        'model = openvino.Core().compile_model(HERE / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "$hint"})',
        "model(x)[0]",
    ),
    "program": ("torch", 'model = torch.export.load(HERE / "model.pt2").module()', "model(torch.tensor(x))[0].detach().numpy()"),
    "aoti": (
        "torch",
        'model = torch._inductor.aoti_load_package(str(HERE / "model.aoti.pt2"))',
        "model(torch.tensor(x))[0].numpy()",
    ),
}
_RUN = '''"""python run.py photo.jpg ... says what is on photographs. Needs numpy, pillow and $package, and nothing else."""
import json
import sys
from itertools import islice
from pathlib import Path
import numpy as np
import $package
from PIL import Image, ImageOps
HERE = Path(__file__).resolve().parent
CARD = json.loads((HERE / "squeezevit.json").read_text(encoding="utf-8"))
HOW, BATCH, NAMES = CARD["preprocessing"], CARD["exported"]["batch"] or 1, CARD["classes"]
$open

def pixels(path):
    with Image.open(path) as image:
        assert image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")), "32-bit pixels have no fixed range"
        image = ImageOps.exif_transpose(image) if HOW["upright"] else image
        if image.mode.startswith("I"):  # 16 bits: the upper eight
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image, side, (height, width), (w, h) = image.convert("RGB"), HOW["resize"], HOW["crop"], image.size
    size = (side[1], side[0]) if isinstance(side, list) else (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    image = image.resize(size, getattr(Image.Resampling, HOW["interpolation"].upper()))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    x = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).transpose(2, 0, 1)
    mean, std = (np.array(HOW[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    return (x / np.float32(255) - mean) / std
def readable(paths):
    for path in paths:
        try:
            yield path, pixels(path)
        except Exception as error:  # a broken file does not end the run
            print(path, f"cannot be read: {error}", sep="  ")
photographs = readable(sys.argv[1:] if __name__ == "__main__" else ())
while group := list(islice(photographs, BATCH)):
    x = np.stack([x for _, x in group] + [group[-1][1]] * (BATCH - len(group)))  # the model takes $batch at once
    for (path, _), row in zip(group, $call):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        best = [f"{NAMES[k]} {p[k]:.4f}" for k in np.argsort(-row)[:5]] if NAMES else []
        print(path, *(best or [f"norm {np.linalg.norm(row):.6g}", *(f"{v:.6g}" for v in row.flat[:5])]), sep="  ")
'''
_README = """# $host, exported by SqueezeViT

$what

```
python run.py photo.jpg another.jpg
```

needs `numpy`, `pillow` and `$package`. Input `images`, float32 [$batch, 3, $height, $width]; outputs: $outputs.
`squeezevit.json` says how photographs are made ready; `run.py` does it. `SHA256SUMS` sums up every file (`sha256sum --check`).

| | |
|---|---|
$rows

Made $created by `$command`, with $versions.
"""


def write_beside(folder: Path, card: Card) -> None:
    """Write run.py and README.md. The card and classes.txt are the bundle's own."""
    package, opened, call = _OPEN[card.engine]
    batch, hint = card.exported["batch"], {"fp32": "f32"}.get(card.exported["hint"], card.exported["hint"])
    words = {"package": package, "open": Template(opened).safe_substitute(hint=hint), "call": call, "batch": batch or "any number"}
    (folder / "run.py").write_text(Template(_RUN).substitute(words), encoding="utf-8")
    (folder / "README.md").write_text(_readme(card, package), encoding="utf-8")


def _readme(card: Card, package: str) -> str:
    exported, measured = card.exported, card.measured
    height, width = card.preprocessing.crop
    reducer = "unreduced" if card.reducer is None else f"reduced: `{card.reducer}`"
    file, library = ENGINES[card.engine], card.host["library"]
    told = {
        "host": card.host.get("name", card.host["library"]),
        "what": f"`{file}` is a model of {library} for {card.engine}, {exported['precision']}, {reducer}.",
        "package": package, "batch": exported["batch"] or "any number", "height": height, "width": width,
        "outputs": ", ".join(f"`{name}`" for name in exported["outputs"]), "rows": "\n".join(_rows(card)),
        "created": measured["created"], "command": measured["command"].replace("`", "'"),
        "versions": ", ".join(f"{name} {version}" for name, version in card.versions.items()),
    }  # fmt: skip
    return Template(_README).substitute(told)


def _rows(card: Card) -> list[str]:
    measured = card.measured
    speed, compared, machine = measured["speed"], measured["compared"], measured["machine"]
    rows = [("largest difference from torch, in float", f"{compared['error']:.1e} of the largest output")]
    if card.exported["weight_bits"] == 8:
        rows += [
            ("bits of int8 weights", "8, for CPUs with VNNI, AMX or Arm's dot product; on others sums overflow: export it there")
        ]
    if "cosine" in measured:
        rows += [
            ("mean cosine to torch, on images held out", f"{measured['cosine']:.4f}, lowest {measured['lowest_cosine']:.4f}"),
            ("the largest output is the same for", f"{measured['agreement']:.1%} of {measured['images']} images"),
        ]
    if "groups" in measured:
        rows += [("patches that end in the token that torch puts them in", f"{measured['groups']:.1%}")]
    best = {name: f"{1000 * s['min']:.1f} ms (median {1000 * s['median']:.1f})" for name, s in speed["seconds"].items()}
    rows += [
        (f"torch fp32 unreduced, a batch of {speed['batch']}", best["torch_unreduced"]),
        ("torch fp32, this reducer", best["torch"]),
        ("this model", best["exported"]),
        ("as fast as torch fp32 unreduced", f"{speed['speedup_best']:.2f} times (median {speed['speedup']:.2f})"),
        ("images a second", f"{speed['images_per_second']:.1f}"),
        ("measured on", f"{machine['cpu']}, {speed['threads']} threads"),
    ]
    return [f"| {name} | {value} |" for name, value in rows]

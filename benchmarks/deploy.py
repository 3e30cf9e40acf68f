"""The ladder: torch, ONNX Runtime and OpenVINO, fp32, bf16 and int8, dense and reduced, on one CPU: speed, and what it costs.

python benchmarks/deploy.py                      # DINOv2 ViT-S/14 at 224 pixels: benchmarks/results/deploy.json
python benchmarks/deploy.py --image-size 168     # benchmarks/results/deploy_168.json
python benchmarks/deploy.py --model deit_small_patch16_224 --method etps --json benchmarks/results/deploy_deit.json    # speed alone

Each model is exported, verified and timed against the others in alternating rounds. Loss is that of a linear probe on solar cells,
in points against the unreduced model in torch: with the probe fitted on that model's features, and with one fitted on the deployed
model's own. int8 is calibrated on photographs of the part that the probe is fitted on. Formats that compute the same to 1e-4, as
export verifies, lose the same: --judged names those whose loss is measured. --side-by-side times OpenVINO with a batch on each
thread, too, as `squeezevit predict` runs it.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import squeezevit as sv
from squeezevit.bench.timing import alternate
from squeezevit.budget.plan import plan_macs
from squeezevit.data import dinov2, elpv
from squeezevit.data.probe import Probe, cosine, extract, fit_probe, load_images
from squeezevit.embed.engines import open_engine
from workshop import RESULTS, Sheet, arguments, say, standard_error

CALIBRATED, HELD_OUT = 128, 64  # photographs to calibrate int8 on, and to verify it by
IMAGES = 16  # of a round
Run = Callable[[np.ndarray], np.ndarray]
FORMATS: dict[str, dict[str, Any] | None] = {
    "torch fp32": None,
    "torch compiled": None,
    "torch bf16": None,
    "onnx fp32": {"to": "onnx"},
    "openvino fp32": {"to": "openvino"},
    "openvino bf16": {"to": "openvino", "precision": "bf16"},
    "onnx int8": {"to": "onnx", "int8": True},
    "openvino int8": {"to": "openvino", "int8": True},
    "openvino int8 + bf16": {"to": "openvino", "int8": True, "precision": "bf16"},
}


def of_torch(model: nn.Module, name: str) -> Run:
    """The model in torch as it is, compiled, or with weights and images in bf16."""
    if name == "torch bf16":
        model = model.to(torch.bfloat16)
    kind, runs = next(model.parameters()).dtype, torch.compile(model) if name == "torch compiled" else model

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return runs(torch.from_numpy(images).to(kind)).float().numpy()

    return run


def exported(model: nn.Module, how: dict[str, Any], calibration: torch.Tensor, batch: int, size: int, folder: Path) -> Run:
    int8 = calibration if how.get("int8") else None
    sv.export(model, folder, **{**how, "int8": int8}, batch_size=batch, image_size=size, floor=0.5)
    return open_engine(folder, threads=torch.get_num_threads()).run


class Cells:
    """Solar cells for DINOv2 ViT-S/14: a linear probe on the unreduced model's features, and what a deployed model's lose by it."""

    def __init__(self, size: int, fit: int, test: int) -> None:
        paths, probabilities, _ = elpv.load_elpv()
        parts, labels = elpv.split(probabilities, fit, test, seed=0), elpv.is_defective(probabilities)
        self.fit, self.test = (load_images([paths[i] for i in part], size, 16) for part in parts)
        self.labels = tuple(labels[part] for part in parts)
        self.calibration = torch.cat(self.fit)[: CALIBRATED + HELD_OUT]
        self.build = lambda: dinov2.dinov2_vit_small(size)
        self.setting = {"n_fit": len(parts[0]), "n_test": len(parts[1])}

    @cached_property
    def probe(self) -> Probe:
        dense = self.build()
        return fit_probe(extract(dense, self.fit), self.labels[0], extract(dense, self.test), self.labels[1])

    def judge(self, run: Run) -> dict[str, float]:
        """Points lost with the unreduced model's probe and with one of the run's own features, and their cosine."""
        found, own = features(run, self.test), self.probe.hits(self.probe.features)
        refitted = fit_probe(features(run, self.fit), self.labels[0], found, self.labels[1])
        out: dict[str, float] = {}
        for key, hits in (("loss", self.probe.hits(found)), ("loss_refitted", refitted.hits(found))):
            difference = 100 * (own.astype(float) - hits)
            out |= {key: float(difference.mean()), f"{key}_se": standard_error(difference)}
        return out | {"cosine": float(cosine(found, self.probe.features).mean())}


class Speed:
    """A model of timm at random weights, for its speed alone; int8 is calibrated on noise."""

    def __init__(self, name: str, size: int) -> None:
        whole = timm.create_model(name, img_size=size).eval()
        self.build = lambda: copy.deepcopy(whole)
        self.calibration = torch.randn(CALIBRATED + HELD_OUT, 3, size, size, generator=torch.Generator().manual_seed(1))
        self.setting = {"model": name}

    def judge(self, run: Run) -> dict[str, float]:
        return {}


def reduced(model: nn.Module, method: str, share: float, size: int) -> nn.Module:
    """The model at a share of its multiply-adds."""
    return sv.reduce_(model, plan_macs(model, "identity" if share == 1 else method, share, image_size=size))


def features(run: Run, batches: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([run(batch.numpy()) for batch in batches])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", help="of timm, at random weights and for speed alone, instead of DINOv2 and its probe")
    parser.add_argument("--method", default="training-free")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.65, 0.5, 0.35])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--judged", nargs="*", default=list(FORMATS), choices=list(FORMATS), help="formats whose loss is measured")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--fit", type=int, default=800, help="solar cells to fit probes on, and to calibrate on")
    parser.add_argument("--test", type=int, default=1800, help="solar cells to test on")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side-by-side", action="store_true", help="times OpenVINO with a batch on each thread, too")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    size = chosen.image_size
    file = chosen.json or RESULTS / ("deploy.json" if size == 224 else f"deploy_{size}.json")
    subject = Speed(chosen.model, size) if chosen.model else Cells(size, chosen.fit, chosen.test)
    macs = sv.macs(subject.build(), size)
    sheet = Sheet(file, image_size=size, threads=chosen.threads, rounds=chosen.rounds, **subject.setting)

    runs: dict[tuple[int, float, str, int], Run] = {}
    with tempfile.TemporaryDirectory() as name:
        models = {share: reduced(subject.build(), chosen.method, share, size) for share in chosen.shares}
        of_dense = {share: sv.macs(model, size) / macs for share, model in models.items()}
        for share, kind in product(chosen.shares, chosen.formats):
            start, how, model = time.monotonic(), FORMATS[kind], models[share]
            row: dict[str, Any] = {"share": share, "format": kind, "macs_share": of_dense[share], "method": chosen.method}
            for batch in chosen.batch_sizes:
                folder, own = Path(name, f"{share}-{kind}-{batch}"), copy.deepcopy(model)
                made = of_torch(own, kind) if how is None else exported(own, how, subject.calibration, batch, size, folder)
                runs[batch, share, kind, 1] = made
                if chosen.side_by_side and (count := chosen.threads) > 1 and kind.startswith("openvino"):
                    runs[batch, share, kind, count] = open_engine(folder, threads=count, streams=count).run
            if kind in chosen.judged:
                row |= subject.judge(runs[chosen.batch_sizes[0], share, kind, 1])
            row["seconds"] = time.monotonic() - start
            told = ", ".join(f"{key} {row[key]:.4g}" for key in ("cosine", "loss", "loss_refitted") if key in row)
            sheet.add(row, f"{share:.0%} {kind}: {told or 'ready'}")
            sheet.save()
        for batch in chosen.batch_sizes:
            time_all(sheet, {key[1:]: run for key, run in runs.items() if key[0] == batch}, batch, size, chosen.rounds)
    sheet.save()


def time_all(sheet: Sheet, runs: dict[tuple[float, str, int], Run], batch: int, size: int, rounds: int) -> None:
    """Alternating rounds of all models, alone and side by side; seconds of the wall, and of the processor, not of others.

    A round is 16 images one batch after another, on each thread where they are side by side: a model finds its weights where the
    batch before left them, as in use.
    """
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).numpy()
    processor: dict[tuple[float, str, int], list[float]] = {key: [] for key in runs}
    batches = max(IMAGES // batch, 1)

    def one_after_another(run: Run) -> None:
        for _ in range(batches):
            run(x)

    def timed(key: tuple[float, str, int]) -> None:
        start, count = time.process_time(), key[2]
        if count == 1:
            one_after_another(runs[key])
        else:
            list(pool.map(one_after_another, [runs[key]] * count))
        processor[key].append((time.process_time() - start) / count)

    with ThreadPoolExecutor(max(count for *_, count in runs)) as pool:
        times = alternate({key: lambda key=key: timed(key) for key in runs}, rounds)  # type: ignore[misc]
    base, images = next(iter(runs)), batch * batches
    ms = {key: 1e3 * min(seconds) / images for key, seconds in processor.items()}
    for key in runs:
        share, kind, count = key
        row = next(row for row in sheet.rows if (row["share"], row["format"]) == (share, kind))
        t = row[f"batch_{batch}" + (f"_by_{count}" if count > 1 else "")] = {
            "images_per_second": count * images / times.median(key),
            "images_per_second_best": count * images / times.best(key),
            "speedup": count / times.ratio(key, base), "speedup_best": count / times.best_ratio(key, base),
            "processor_ms": ms[key], "processor_speedup": ms[base] / ms[key],
        }  # fmt: skip
        name = f"batch {batch}" + (f", {count} at once" if count > 1 else "")
        say(f"{name}, {share:.0%} {kind}: {t['images_per_second']:.1f} images/s, {t['speedup']:.2f}x ({t['speedup_best']:.2f}x)")


if __name__ == "__main__":
    main()

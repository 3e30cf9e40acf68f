"""Photographs on Ray beside the plain command: speed, starting, memory as the folder grows, and what decoding costs.

    python benchmarks/scale.py speed memory decoding driver paper        # benchmarks/results/scale.json

speed: DINOv2 ViT-S/14 at 112 pixels on photographs of 500 x 375; each way in a process of its own, in turns. Images/s, and
processor seconds an image, are those of the last three quarters, so that starting is told apart. memory: a
tiny model on pictures of 32 pixels, with which all that grows is bookkeeping: peaks of each process's own memory (USS). decoding:
processor milliseconds a photograph. driver: processor time of what the one process that writes does for each row. paper: what ten
million and a billion photographs would take, from the decoding above and the processor time of models in results/deploy.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import timm
import torch
from PIL import Image

import squeezevit as sv
from squeezevit.bench.machine import header, write_json
from squeezevit.data import dinov2
from squeezevit.data.folder import decoding as quiet
from squeezevit.data.pixels import Preprocessing
from squeezevit.embed.reading import at_least, pixels_of
from workshop import RESULTS, arguments, earlier, say

BATCH = 16
WAYS: dict[str, dict[str, Any]] = {  # threads of a model, and of reading or tasks that decode
    "plain, 1 thread": {"threads": 1, "workers": 1},
    "Ray, 1 actor of 1 thread": {"actors": 1, "threads": 1, "workers": 1},
    "plain, 2 threads": {"threads": 2, "workers": 2},
    "Ray, 1 actor of 2 threads": {"actors": 1, "threads": 2, "workers": 1},
    "Ray, 2 actors of 1 thread": {"actors": 2, "threads": 1, "workers": 1},
}
ONE = """
import json, sys, time
began = float(sys.argv[1])
way, bundle, photographs, out = json.loads(sys.argv[2]), *sys.argv[3:6]
from squeezevit.embed import Settings, embed, open_engine
seen = []
def report(what, done, total):
    seen.append((time.time() - began, done))
settings = Settings({batch}, way["workers"])
if "actors" in way:
    from squeezevit import scale
    cluster = scale.Cluster(actors=way["actors"], threads=way["threads"], shard={shard})
    scale.embed([photographs], bundle, out, settings, cluster=cluster, progress=report)
else:
    embed([photographs], open_engine(bundle, threads=way["threads"], features=True), out + ".npy", settings, progress=report)
print("TOLD" + json.dumps(seen))
"""
PAPER = (("torch fp32", 1.0), ("openvino fp32", 1.0), ("openvino fp32", 0.5), ("openvino int8", 0.5), ("openvino fp32", 0.35))
CORES, MACHINES, EFFICIENCY, HOURLY = 16, {"1e+07": 10, "1e+09": 100}, 0.9, 0.04  # assumed; the last: dollars a core and hour
ROLES = {"MapBatches(Model)": "actor", "FlatMap(Decode)": "decoding task", "raylet": "Ray itself", "gcs_server": "Ray itself"}


def run(way: dict[str, Any], bundle: Path, photographs: Path, batch: int, shard: int, watch: Callable[[int], None]) -> Any:
    """Progress of one run in a process of its own: (seconds since it was started, photographs done)."""
    with tempfile.TemporaryDirectory() as out:
        code = ONE.replace("{batch}", str(batch)).replace("{shard}", str(shard))
        given = [str(time.time()), json.dumps(way), str(bundle), str(photographs), f"{out}/table"]
        environment = {**os.environ, "RAY_worker_niceness": "0"}  # Ray's workers give way to others; the plain command does not
        child = subprocess.Popen([sys.executable, "-c", code, *given], stdout=subprocess.PIPE, text=True, env=environment)
        done = threading.Event()
        watcher = threading.Thread(target=lambda: [watch(child.pid) for _ in iter(lambda: done.wait(0.5), True)])
        watcher.start()
        said, _ = child.communicate()
        done.set()
        watcher.join()
    return json.loads(next(line for line in said.splitlines() if line.startswith("TOLD"))[4:])


class Clock:
    """Processor seconds of a process and all its children, by the time since the first look."""

    def __init__(self) -> None:
        self.began, self.times, self.used = time.time(), list[float](), list[float]()
        self.each: dict[int, float] = {}

    def __call__(self, pid: int) -> None:
        try:
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
                with suppress(psutil.Error):
                    spent = process.cpu_times()
                    self.each[process.pid] = spent.user + spent.system
        except psutil.Error:  # it has ended
            return
        self.times.append(time.time() - self.began)
        self.used.append(sum(self.each.values()))

    def between(self, start: float, end: float) -> float:
        return float(np.interp(end, self.times, self.used) - np.interp(start, self.times, self.used))


def photographs(folder: Path, count: int) -> Path:
    """JPEGs of 500 x 375, cut from scikit-image's photographs at places by chance."""
    from skimage import data

    random, sources = np.random.default_rng(0), [Image.fromarray(x) for x in (data.astronaut(), data.coffee(), data.rocket())]
    folder.mkdir(parents=True)
    for i in range(count):
        source = sources[i % 3]
        left, top = random.integers(0, source.width // 4), random.integers(0, source.height // 4)
        piece = source.crop((left, top, left + source.width * 3 // 4, top + source.height * 3 // 4))
        piece.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i:06}.jpg", quality=90)
    return folder


def speed(folder: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    bundle, pictures = folder / "dinov2", photographs(folder / "photographs", count)
    sv.save(dinov2.dinov2_vit_small(112).eval(), bundle, options={"name": "vit_small_patch14_dinov2"})
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    starts: dict[str, list[float]] = {name: [] for name in WAYS}
    costs: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            clock = Clock()
            seen = [(t, n) for t, n in run(way, bundle, pictures, BATCH, 2 * BATCH, clock) if n]
            begins, (last, all_) = seen[0][0], seen[-1]
            first, few = next((t, n) for t, n in seen if n >= count // 4)  # what was made ready meanwhile counts little
            rates[name].append((all_ - few) / (last - first))
            starts[name].append(begins)
            costs[name].append(clock.between(first, last) / (all_ - few))
            say(
                f"{name}: {rates[name][-1]:.1f} images/s, {1000 * costs[name][-1]:.0f} ms of processors an image, first answers "
                f"after {begins:.1f} s"
            )
    rows = []
    for name in WAYS:
        beside = "plain, 1 thread" if name.endswith("1 actor of 1 thread") else "plain, 2 threads"
        row: dict[str, Any] = {"what": "speed", "way": name, "images": count, "rounds": rounds}
        row |= {"images_per_second": median(rates[name]), "images_per_second_best": max(rates[name])}
        row |= {"starting": median(starts[name]), "starting_best": min(starts[name])}
        row |= {"processor_seconds": median(costs[name]), "processor_seconds_best": min(costs[name])}
        if name.startswith("Ray"):
            for what, mine, theirs in (("speed", rates[name], rates[beside]), ("processor", costs[beside], costs[name])):
                ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
                row |= {f"{what}_ratio": median(ratios), f"{what}_ratios": ratios}
            row |= {"beside": beside, "speed_ratio_best": max(rates[name]) / max(rates[beside])}
            say(
                f"{name} over {beside}: {row['speed_ratio']:.2f} (best {row['speed_ratio_best']:.2f}) of its images/s, "
                f"{row['processor_ratio']:.2f} by processor time"
            )
        rows.append(row)
    return rows


def tiny(folder: Path) -> Path:
    sizes = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **sizes).eval()
    sv.save(net, folder / "tiny", options=sizes)
    return folder / "tiny"


def small(folder: Path, count: int) -> Path:
    """Pictures of 32 pixels, a thousand a folder, each a file of its own with one of a thousand contents."""
    random = np.random.default_rng(0)
    contents = folder / "content.jpg"
    for i in range(count):
        target = folder / f"{i // 1000:05}" / f"{i:07}.jpg"
        if not i % 1000:
            target.parent.mkdir(parents=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(contents)
            content = contents.read_bytes()
        target.write_bytes(content)
    contents.unlink()
    return folder


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:  # it has ended
        return []


def memory(folder: Path, counts: list[int]) -> list[dict[str, Any]]:
    bundle, rows = tiny(folder), []
    for count in counts:
        pictures, peaks = small(folder / str(count), count), dict[str, float]()

        def watch(pid: int, peaks: dict[str, float] = peaks) -> None:
            for process in _family(pid):
                try:
                    role = next((r for part, r in ROLES.items() if any(part in c for c in process.cmdline()[:2])), None)
                    own = process.memory_full_info().uss / 2**20 if role else 0.0
                except psutil.Error:
                    continue
                if role:
                    peaks[role] = max(peaks.get(role, 0.0), own)
            with suppress(psutil.Error):
                peaks["driver"] = max(peaks.get("driver", 0.0), psutil.Process(pid).memory_full_info().uss / 2**20)

        seen = run({"actors": 1, "threads": 1, "workers": 1}, bundle, pictures, 64, 2048, watch)
        done = [(t, n) for t, n in seen if n]
        rate = (done[-1][1] - done[0][1]) / (done[-1][0] - done[0][0]) if len(done) > 1 else None
        rows.append({"what": "memory", "images": count, "images_per_second": rate, "seconds": done[-1][0], "peak_mib": peaks})
        said = ", ".join(f"{role} {peak:.0f} MiB" for role, peak in sorted(peaks.items()))
        say(f"{count} pictures: {said}; {done[-1][0]:.0f} s")
    return rows


def decoding(folder: Path, rounds: int = 5) -> list[dict[str, Any]]:
    """Processor seconds a photograph, least and median: whole and as a draft."""
    from skimage import data

    how, rows = Preprocessing(256, (224, 224)), []
    for width, height in ((500, 375), (2000, 1500), (4000, 3000)):
        file = folder / f"{width}.jpg"
        Image.fromarray(data.coffee()).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=90)
        for draft in (False, True):
            times = []
            with quiet():
                for _ in range(rounds):
                    start, repeats = time.process_time(), max(1, 2_000_000 // (width * height))
                    for _ in range(repeats):
                        pixels_of(str(file), how, at_least(how, draft))
                    times.append((time.process_time() - start) / repeats)
            row = {"what": "decoding", "pixels": [width, height], "bytes": file.stat().st_size, "draft": draft}
            rows.append({**row, "seconds": min(times), "seconds_median": median(times)})
            say(f"{width} x {height}{', draft' if draft else ''}: {1000 * min(times):.1f} ms (median {1000 * median(times):.1f})")
    return rows


def driver(folder: Path, width: int = 384, batch: int = 64, count: int = 200_000) -> list[dict[str, Any]]:
    """What the writing process does for each batch, alone: take it, and commit a shard when it is whole."""
    import pyarrow as pa

    from squeezevit.embed.tables import feature_kinds
    from squeezevit.scale.sources import cut, found
    from squeezevit.scale.table import Table

    pictures = small(folder / "named", 2000)
    run_ = {"command": "embed", "model": "m", "preprocessing": {}}
    table = Table(str(folder / "table"), run_, lambda listing: cut(*found([str(pictures)], None, None), listing, 2048))
    schema = pa.schema(list(feature_kinds(width).items()))
    contents, random = [], np.random.default_rng(0)
    for number in range(2048 // batch):
        features = random.standard_normal((batch, width)).astype(np.float32)
        names = [f"s3://bucket/photographs/{number:05}{i:04}.jpg" for i in range(batch)]
        rows = [{"file": n, "status": "ok", "reason": None, "features": f} for n, f in zip(names, features, strict=True)]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as out:
            out.write_table(pa.Table.from_pylist(rows, schema))
        contents.append(sink.getvalue().to_pybytes())
    times = []
    for _ in range(count // 2048):
        began = time.process_time()
        table.commit(0, contents)
        times.append(2048 / (time.process_time() - began))
    size = (folder / "table/part-0000000.parquet").stat().st_size
    table.close()
    row = {"what": "driver", "rows": count, "numbers": width, "rows_per_second": median(times), "rows_per_second_best": max(times)}
    say(f"committing shards: {median(times):.0f} rows a processor second (best {max(times):.0f}), {size / 2048:.0f} bytes a row")
    return [{**row, "bytes_a_row": size / 2048}]


def paper(decoded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arithmetic only: processor time of decoding and of the model, added up; both were measured on cores of one kind."""
    models = {(r["format"], r["share"]): r["batch_16"]["processor_ms"] for r in earlier(RESULTS / "deploy.json")["rows"]}
    rows = []
    for pixels, draft in (([500, 375], False), ([4000, 3000], True), ([4000, 3000], False)):
        each = next(1000 * r["seconds_median"] for r in decoded if r["pixels"] == pixels and r["draft"] == draft)
        for kind in PAPER:
            total = each + models[kind]
            hours = {f"{count:.0e}": count * total / 3.6e6 for count in (10**7, 10**9)}  # of one core
            row = {"what": "paper", "pixels": pixels, "draft": draft, "format": kind[0], "share": kind[1], "decoding_ms": each}
            row |= {"model_ms": models[kind], "decoding_share": each / total, "core_hours": hours}
            row |= {"dollars": {count: HOURLY * h for count, h in hours.items()}}
            row["hours"] = {n: h / (CORES * MACHINES[n] * EFFICIENCY) for n, h in hours.items()}
            rows.append(row)
            say(f"{pixels[0]} x {pixels[1]}{', draft' if draft else ''}, {kind[1]:.0%} {kind[0]}: {total:.0f} ms, {hours}")
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="*", default=["speed", "memory", "decoding", "driver", "paper"])
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", nargs="*", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", type=Path, default=RESULTS / "scale.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "speed": lambda folder: speed(folder, args.images, args.rounds),
        "memory": lambda folder: memory(folder, args.counts),
        "decoding": decoding,
        "driver": driver,
        "paper": lambda folder: paper([row for row in earlier(args.json)["rows"] if row["what"] == "decoding"]),
    }
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows = jobs[part](Path(folder))
        kept = [row for row in earlier(args.json).get("rows", []) if row["what"] != part]
        load = os.getloadavg()[0]
        write_json(args.json, {**header("cpu"), "rows": [*kept, *({**row, "load": load} for row in rows)]})


if __name__ == "__main__":
    main()

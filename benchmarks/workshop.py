"""What every experiment shares: its arguments, its results file, the methods it compares, and how sure it is."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from squeezevit.bench.machine import header, write_json
from squeezevit.bench.run import Speed
from squeezevit.reducers.catalog import methods
from squeezevit.report.rows import method_name

RESULTS = Path(__file__).parent / "results"
PEAK = """
import pathlib, timm, torch, squeezevit as sv
def kib(name):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
model = sv.reduce_(timm.create_model({model!r}, img_size={size}).eval(), sv.{reducer!r})
images = torch.randn({batch}, 3, {size}, {size})
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not where torch was imported
before = kib("VmRSS")
with torch.inference_mode():
    model(images)
print(before, kib("VmHWM"))
"""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A script's arguments; its docstring is its help."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def timing_arguments(description: str | None, batch_size: int, rounds: int = 9) -> argparse.ArgumentParser:
    """Those of a script that times something, with its defaults."""
    parser = arguments(description)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Sheet:
    """A results file: its header, the settings, and rows; written anew with every `save`."""

    def __init__(self, path: Path, device: str = "cpu", /, **settings: Any) -> None:
        self.path, self.head, self.rows = path, {**header(device), **settings}, list[dict[str, Any]]()

    def add(self, row: dict[str, Any], text: str) -> None:
        self.rows.append(row)
        say(text)

    def save(self, **more: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self.head, "rows": self.rows, **more})


def file_of(name: str, device: str) -> Path:
    """The results file of an experiment that is run on several kinds of device."""
    return RESULTS / f"{name}_{torch.device(device).type}.json"


def earlier(path: Path) -> dict[str, Any]:
    """What the file holds already."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def untrained() -> tuple[str, ...]:
    """The methods that need no training, in the catalogue's order."""
    return tuple(n for n, row in methods().items() if n != "identity" and not row.learns)


def known(text: str) -> str:
    """A method on the command line, by the catalogue's name or by what tables call it."""
    return method_name({"method": text})


def overhead(speed: Speed) -> str:
    """How far a reducer is from the limit; nothing where nothing is reduced."""
    return "" if speed.overhead is None else f", overhead best {speed.overhead_best:.3f}, median {speed.overhead:.3f}"


def standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def peak_memory(reducer: Any, model: str, size: int, batch: int) -> float:
    """MiB that a forward adds to the peak of resident memory: the least of three processes, as the allocator adds some."""
    program = PEAK.format(reducer=reducer, model=model, size=size, batch=batch)
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)]
    return min(int(after) - int(before) for before, after in (run.stdout.split() for run in runs)) / 1024

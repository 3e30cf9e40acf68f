"""What a measurement was made on, and the file it is written to."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "squeezevit", "torch", "timm", "transformers", "torchvision", "open_clip_torch", "numpy", "scikit-learn", "onnx", "onnxruntime",
    "openvino", "nncf",
)  # fmt: skip


def header(device: torch.device | str = "cpu") -> dict[str, Any]:
    """How every results file begins: {"created", "command", "machine", "versions"}."""
    return {"created": now(), "command": command(), "machine": machine(device), "versions": versions()}


def write_json(path: Path, content: Any) -> None:
    """Write a results file. NumPy's numbers are written as numbers, what JSON has no word for as text."""
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Processor, cores, threads and device: {"cpu", "cores", "threads", "device"}."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"cpu": _cpu(), "cores": os.cpu_count() or 1, "threads": torch.get_num_threads(), "device": name}


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def command() -> str:
    """The command line this runs under, without the folder the program lies in."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

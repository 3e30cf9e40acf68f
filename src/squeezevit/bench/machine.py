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

_DECISIVE = {
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
}  # fmt: skip


def header(device: torch.device | str = "cpu") -> dict[str, Any]:
    """How every results file begins: {"created", "command", "machine", "versions"}."""
    return {"created": now(), "command": command(), "machine": machine(device), "versions": versions()}


def write_json(path: Path, content: Any) -> None:
    """Write a results file. NumPy's numbers are written as numbers, what JSON has no word for as text."""
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Processor, cores, threads and device: {"cpu", "cores", "threads", "device"}; on Linux "instructions", too.

    Those are what decides how fast a processor multiplies: two of the same name may differ by them.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    told: dict[str, str | int] = {
        "cpu": _cpu(), "cores": os.cpu_count() or 1, "threads": torch.get_num_threads(), "device": name
    }  # fmt: skip
    if found := instructions():
        told["instructions"] = " ".join(sorted(_DECISIVE & found))
    return told


def instructions() -> set[str]:
    """What the processor can do, by the names of Linux; nothing elsewhere."""
    found = [value.split() for name, value in _described() if name in ("flags", "Features")]
    return set(found[0]) if found else set()


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
    names = [value for name, value in _described() if name == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def _described() -> list[tuple[str, str]]:
    """Lines of what Linux knows of the processor, as names and values."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [(name.strip(), value.strip()) for name, found, value in (line.partition(":") for line in lines) if found]

"""The formats: writing a program in each, and running what was written as its user will."""

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from squeezevit import sums
from squeezevit.bundle import ENGINES, companions
from squeezevit.errors import CheckpointError, ConfigError, MissingExtraError, UnsupportedError
from squeezevit.export.graph import quietly, reason

Run = Callable[[np.ndarray], list[np.ndarray]]  # images [B, 3, H, W] -> all outputs
_BINDING = Lock()
HINTS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names
_NEEDED = {  # packages, and the extra that brings them
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export"),
    "openvino": (("onnx", "onnxscript", "openvino"), "openvino"),
    "nncf": (("nncf",), "openvino"),
}


def require(to: str, int8: bool) -> None:
    """Raises MissingExtraError, naming the extra, where something that the format needs is not installed, UnsupportedError where no
    compiler is there, and ConfigError for a format that is not known."""
    if to not in ENGINES or to == "torch":
        raise ConfigError(f"to={to!r} is no format; choose one of {', '.join(name for name in ENGINES if name != 'torch')}")
    for what in (to, *(["nncf"] if int8 else [])):
        packages, extra = _NEEDED.get(what, ((), ""))
        for package in packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                asked = f"to={to!r}{' with int8' if int8 else ''}"
                raise MissingExtraError(f'{asked} needs {package} ({error}): run `pip install "squeezevit[{extra}]"`') from error
    if to == "aoti" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++"))):
        raise UnsupportedError("to='aoti' compiles C++, and no compiler is found; install g++ or clang, or choose to='program'")


def write(program: ExportedProgram, to: str, folder: Path, outputs: list[str]) -> None:
    """Write the program as the file that `ENGINES` names; that of OpenVINO by way of ONNX, until `tidy`.

    Raises UnsupportedError where the format cannot say it.
    """
    file = folder / ENGINES[to]
    try:
        with quietly(), torch.no_grad():
            _WRITERS[to](program, file, outputs)
    except (UnsupportedError, OSError):
        raise
    except Exception as error:  # each converter has its own
        raise UnsupportedError(
            f"the program cannot be written as {to} ({reason(error)}); try another format, or a reducer without what is named there"
        ) from error


def opened(to: str, folder: Path, hint: str = "fp32", threads: int | None = None, streams: int = 1) -> Run:
    """The written model in its runtime.

    hint: what OpenVINO computes in, a key of `HINTS`, as its own choice differs by processor. threads: of the CPU, None: the
    runtime's own choice. streams: calls that OpenVINO computes side by side, from as many threads of the caller's, each with its
    share of the processor; no other runtime does. Raises MissingExtraError where the runtime is not installed, and CheckpointError
    where it cannot open the model.
    """
    file, (package, extra), open_ = folder / ENGINES[to], _RUNTIMES[to], _OPENERS[to]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(f'{folder} is run by {package}: run `pip install "squeezevit[{extra}]"` ({error})') from error
    try:
        with quietly():
            return open_(file, hint, threads, streams)
    except Exception as error:  # each runtime has its own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{package} cannot open {file} ({first}); export the model again, on this machine, or to another format"
        ) from error


def computes_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor; it takes the wish either way."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def identity(to: str, folder: Path) -> str:
    """SHA-256 of the model's file, or of the sums of its files where its weights lie beside it.

    A sum that is listed in the folder counts; `squeezevit.bundle.read_card` holds the files to it.
    """
    file = folder / ENGINES[to]
    found = [sums.of(part) for part in (file, *companions(file)) if part.is_file()]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _write_onnx(program: ExportedProgram, file: Path, outputs: list[str]) -> None:
    converted = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=outputs, optimize=True)
    assert converted is not None
    converted.save(file)


def _write_openvino(program: ExportedProgram, file: Path, outputs: list[str]) -> None:
    import openvino
    from openvino.passes import ConstantFolding, Manager

    _write_onnx(program, file.with_name(ENGINES["onnx"]), outputs)
    model, passes = openvino.Core().read_model(file.with_name(ENGINES["onnx"])), Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(model)
    save_openvino(model, file)


def save_openvino(model: Any, file: Path) -> None:
    """Write graph and weights, in place of those that the model may still be read from."""
    import openvino

    new = file.with_name(f"new.{file.name}")
    openvino.save_model(model, new, compress_to_fp16=False)
    for suffix in (".xml", ".bin"):
        new.with_suffix(suffix).replace(file.with_suffix(suffix))


def tidy(to: str, folder: Path) -> None:
    """Take away the ONNX file that an OpenVINO model was made from."""
    if to == "openvino":
        for left in folder.glob(f"{ENGINES['onnx']}*"):
            left.unlink()


def _write_program(program: ExportedProgram, file: Path, outputs: list[str]) -> None:
    torch.export.save(program, file)


def _write_package(program: ExportedProgram, file: Path, outputs: list[str]) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(file))


def _open_onnx(file: Path, hint: str, threads: int | None, streams: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads or 0
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0].name
    return lambda images: session.run(None, {source: images})


def _open_openvino(file: Path, hint: str, threads: int | None, streams: int) -> Run:
    import openvino

    with _BINDING:  # its first array of a process is to be one thread's: two that come at once wait for each other forever
        _ = openvino.Tensor(np.zeros(1, np.float32)).data
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[hint], "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    if streams > 1:
        settings["NUM_STREAMS"] = streams
    compiled, idle = openvino.Core().compile_model(file, "CPU", settings), SimpleQueue[Any]()
    for _ in range(streams):
        idle.put(compiled.create_infer_request())

    def run(images: np.ndarray) -> list[np.ndarray]:
        request = idle.get()
        try:
            return [value.copy() for value in request.infer({0: images}, share_inputs=True).values()]
        finally:
            idle.put(request)

    return run


def _open_program(file: Path, hint: str, threads: int | None, streams: int) -> Run:
    return _of_torch(torch.export.load(file).module(), threads)


def _open_package(file: Path, hint: str, threads: int | None, streams: int) -> Run:
    from torch._inductor import aoti_load_package

    return _of_torch(aoti_load_package(str(file)), threads)


def _of_torch(module: Callable[..., Any], threads: int | None) -> Run:
    if threads is not None:
        torch.set_num_threads(threads)

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            out = module(torch.tensor(images))  # a copy where torch wants it: the same numbers wherever the array lies
        return [value.numpy() for value in ([out] if isinstance(out, torch.Tensor) else out)]

    return run


_WRITERS: dict[str, Callable[[ExportedProgram, Path, list[str]], None]] = {
    "onnx": _write_onnx, "openvino": _write_openvino, "program": _write_program, "aoti": _write_package
}  # fmt: skip
_OPENERS: dict[str, Callable[[Path, str, int | None, int], Run]] = {
    "onnx": _open_onnx, "openvino": _open_openvino, "program": _open_program, "aoti": _open_package
}  # fmt: skip
_RUNTIMES = {  # the package of each, and the extra that brings it
    "onnx": ("onnxruntime", "export"), "openvino": ("openvino", "openvino"), "program": ("torch", ""), "aoti": ("torch", "")
}  # fmt: skip

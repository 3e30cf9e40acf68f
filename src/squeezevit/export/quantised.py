"""int8 by NNCF: linear layers and attention in int8 with smooth-quant; what scores, matches and fuses tokens stays in float."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from squeezevit.bench.machine import instructions
from squeezevit.bundle import ENGINES
from squeezevit.errors import UnsupportedError
from squeezevit.export.engines import save_openvino
from squeezevit.export.graph import quietly, reason
from squeezevit.export.verified import spread

_OURS = ("squeezevit/reducers/", "squeezevit/core/")
_WEIGHTED = ("MatMul", "Gemm", "Conv", "Einsum")


def weight_bits() -> int:
    """8 where this CPU sums products of int8 in 32 bits (VNNI, AMX, Arm), else 7, as two products of 8 overflow its 16 bits."""
    return 8 if {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp"} & instructions() else 7


def float_nodes(onnx_file: Path) -> list[str]:
    """The names of the nodes that compare tokens with each other, or score them, and are no part of the host's layers.

    They are told by the module whose forward they come from: a reduced block's own, or a learned head.
    """
    import onnx

    names = []
    for node in onnx.load(onnx_file, load_external_data=False).graph.node:
        trace = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.stack_trace"), "")
        lines = [line.replace("\\", "/") for line in trace.splitlines() if "File " in line]
        own = bool(lines) and ("<eval_with_key>" in lines[-1] or any(part in lines[-1] for part in _OURS))
        if node.op_type in _WEIGHTED and (own or any(_OURS[0] in line for line in lines)):
            names.append(node.name)
    return names


def quantise(to: str, folder: Path, images: list[Tensor], batch: int | None) -> None:
    """Put the int8 model in place of the float one. Raises UnsupportedError where NNCF cannot."""
    import nncf

    size = batch or min(8, len(images))
    batches = [spread(images[i : i + size], size).numpy() for i in range(0, len(images), size)]
    ignored = float_nodes(folder / ENGINES["onnx"])
    overflow = nncf.OverflowFix.DISABLE if weight_bits() == 8 else nncf.OverflowFix.ENABLE
    settings: dict[str, Any] = {
        "model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(batches), "fast_bias_correction": True,
        "ignored_scope": nncf.IgnoredScope(names=ignored, validate=False),
        "advanced_parameters": nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
    }  # fmt: skip
    try:
        with quietly():
            _QUANTISERS[to](nncf, folder / ENGINES[to], nncf.Dataset(batches, _named), settings)
    except Exception as error:
        raise UnsupportedError(
            f"NNCF cannot quantise this model for {to} ({reason(error)}); try the other of onnx and openvino, or leave int8 out"
        ) from error


def _named(images: np.ndarray) -> dict[str, np.ndarray]:
    return {"images": images}


def _of_openvino(nncf: Any, file: Path, data: Any, settings: dict[str, Any]) -> None:
    import openvino

    save_openvino(nncf.quantize(openvino.Core().read_model(file), data, **settings), file)


def _of_onnx(nncf: Any, file: Path, data: Any, settings: dict[str, Any]) -> None:
    import onnx

    model = nncf.quantize(onnx.load(file), data, **settings)
    _write_biases_as_rows(model.graph)
    onnx.save(model, file)


def _write_biases_as_rows(graph: Any) -> None:
    """Biases behind products in int8 become [1, N].

    ONNX Runtime joins a product and a bias [N] into one layer before it looks for int8, and finds none then: that layer is computed
    in float, after its weights are made float again.
    """
    import onnx

    vectors = {value.name: value for value in graph.initializer if len(value.dims) == 1}
    makers = {name: node for node in graph.node for name in node.output}
    rows: dict[str, str] = {}
    for node in graph.node:
        products = [makers[name] for name in node.input if name in makers and makers[name].op_type == "MatMul"]
        if node.op_type != "Add" or not any(_is_int8(makers.get(product.input[0])) for product in products):
            continue
        for i, name in enumerate(node.input):
            if name in vectors:
                if name not in rows:
                    row = onnx.TensorProto()
                    row.CopyFrom(vectors[name])
                    row.name = rows[name] = f"{name}/row"
                    row.dims[:] = [1, *row.dims]
                    graph.initializer.append(row)
                node.input[i] = rows[name]
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for name in rows:
        if name not in used:
            graph.initializer.remove(vectors[name])


def _is_int8(node: Any) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


_QUANTISERS = {"openvino": _of_openvino, "onnx": _of_onnx}

"""From a model and a reducer to an ONNX graph for the browser: exported, held against torch, and put into int8 if asked to."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from squeezevit.core.attach import reduce_as_needed_
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import share_weights
from squeezevit.errors import UnsupportedError
from squeezevit.export import engines, verified
from squeezevit.export.engines import Run
from squeezevit.export.graph import Exportable, capture, quietly, reason
from squeezevit.reducers import Identity

PRECISIONS = ("int8", "fp32")
FLOOR = 0.9  # of the mean cosine of int8 to torch
_LINEAR = ["MatMul", "Gemm"]  # with weights: what scores, matches and fuses multiplies tokens by tokens, and stays in float


def exported(net: nn.Module, reducer: Reducer, images: Tensor, folder: Path) -> dict[str, Any]:
    """Write `model.onnx` for one image: outputs "out", "tokens" [1, K, C], and "groups_1" ... [1, N0] for each stage.

    images: at least five, on which it must equal torch to 1e-4. Returns what `sv.trace` says of the first: {"patches", "blocks",
    "counts"}, and the figures of the comparison. Raises UnsupportedError where it cannot be written or its numbers differ.
    """
    module = Exportable(reduce_as_needed_(share_weights(net), reducer), not isinstance(reducer, Identity), tokens=True)
    names = module.names(len(verified.expected(module, images[:1])))
    engines.write(capture(module, 1, (images.shape[-2], images.shape[-1])), "onnx", folder, names)
    figures = verified.agree(module, _one_by_one(engines.opened("onnx", folder)), images, None)
    return {"outputs": names, **_course(module, images[:1]), **figures}


def _one_by_one(run: Run) -> Run:
    """A model for one image, run on several."""

    def all_of(images: np.ndarray) -> list[np.ndarray]:
        each = [run(image[None]) for image in images]
        return [np.concatenate(parts) for parts in zip(*each, strict=True)]

    return all_of


def _course(module: Exportable, image: Tensor) -> dict[str, Any]:
    """Which blocks have stages, and how many patch tokens there are at first and after each."""
    from squeezevit.core.trace import trace

    with torch.inference_mode(), trace(module.model) as t:
        module._run(image)
    assert t.tokens is not None
    counts = [stage.n_out for stage in t.stages]
    patches = t.stages[0].n if t.stages else t.tokens.shape[1]
    return {"patches": patches, "blocks": [stage.block for stage in t.stages], "counts": counts}


def quantised(file: Path) -> None:
    """Put linear layers into int8 in place: weights ahead, for each channel, and what flows between them as it comes.

    Raises UnsupportedError where onnxruntime's tool cannot.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    new = file.with_suffix(".int8.onnx")
    try:
        with quietly():
            quantize_dynamic(
                file, new, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=_LINEAR,
                extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
    except Exception as error:  # whatever the tool stumbles over
        raise UnsupportedError(f"the model cannot be quantised ({reason(error)}); give --precision fp32") from error
    new.replace(file)


def nearness(net: nn.Module, reducer: Reducer, images: Tensor, folder: Path) -> float:
    """The mean cosine of `model.onnx` in a folder with torch. Raises UnsupportedError where an unreduced model's is below `FLOOR`.

    A reduced one has no floor: rounding decides which of two tokens that are nearly as important stays.
    """
    module = Exportable(reduce_as_needed_(share_weights(net), reducer))
    floor = FLOOR if isinstance(reducer, Identity) else -1.0
    return float(verified.close(module, engines.opened("onnx", folder), images, 1, floor)["cosine"])

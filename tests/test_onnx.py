"""Reduced models leave torch as ONNX by its older exporter, any batch size, and onnxruntime gives what torch gives.

The newer one, which `sv.export` takes: tests/test_export.py.
"""

import warnings
from pathlib import Path

import pytest
import torch

import zoo

onnxruntime = pytest.importorskip("onnxruntime")

CASES = [
    *[("plain", name) for name in ("etps", "etps-mass", "dtps", "evit", "topk", "tome", "preset")],
    *[(kind, "preset") for kind in ("qk-norm", "registers", "average-pool", "dinov3", "torchvision")],
]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: value)
def test_onnxruntime_agrees_at_any_batch_size(kind, name, tmp_path: Path):
    model, file = zoo.reduce(zoo.build(kind), zoo.REDUCERS[name]), str(tmp_path / "model.onnx")
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter's own: that it is the older one, and what it makes constant
        axes = {"images": {0: "batch"}, "out": {0: "batch"}}
        torch.onnx.export(
            model, (zoo.images(2),), file, dynamo=False, input_names=["images"], output_names=["out"], dynamic_axes=axes
        )
    for batch in (1, 2, 5):
        assert_agrees(file, model, batch)


def assert_agrees(file: str, model: torch.nn.Module, batch: int) -> None:
    session, x = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]), zoo.images(batch, seed=batch)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), zoo.run(model, x), rtol=1e-4, atol=1e-5)

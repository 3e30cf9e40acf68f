"""Reduced models leave torch as ONNX by both of its exporters, any batch size, and onnxruntime gives what torch gives."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from squeezevit.core.reducer import Reducer, Staged
from squeezevit.reducers.catalog import method, methods

onnxruntime = pytest.importorskip("onnxruntime")

CASES = [
    *[("plain", name) for name in ("etps", "etps-mass", "dtps", "evit", "topk", "tome", "preset")],
    *[(kind, "preset") for kind in ("qk-norm", "registers", "average-pool", "dinov3", "torchvision")],
]
RIVALS = {type(r) for r in zoo.RIVALS.values()} - {type(r) for r in zoo.REDUCERS.values()}  # asked in tests/test_export.py alone
METHODS = [n for n, row in methods().items() if row.make.__module__.startswith("squeezevit.") and row.make not in RIVALS]


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


@pytest.mark.parametrize("name", METHODS)
def test_the_default_exporter_at_one_batch_size(name, tmp_path: Path):
    """Any batch size, and optimised: tests/test_export.py."""
    model, file = small(name), str(tmp_path / "model.onnx")
    export(model, file, optimize=False)  # which takes the longest
    assert_agrees(file, model, 2)


def small(name: str) -> torch.nn.Module:
    """One block, or two where the second must know what the first did."""
    reducer = method(name).template()
    return zoo.reduce(zoo.build("average-pool", depth=2 if reducer.weighs else 1), in_first_block(reducer))


def in_first_block(reducer: Reducer) -> Reducer:
    if isinstance(reducer, Staged):
        return replace(reducer, keep=0.6, at=(0,))
    return replace(reducer, r=(9, 0)) if reducer.weighs else reducer


def export(model: torch.nn.Module, file: str, **options: Any) -> None:
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        torch.onnx.export(model, (zoo.images(2),), file, dynamo=True, verbose=False, **options)


def assert_agrees(file: str, model: torch.nn.Module, batch: int) -> None:
    session, x = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]), zoo.images(batch, seed=batch)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), zoo.run(model, x), rtol=1e-4, atol=1e-5)

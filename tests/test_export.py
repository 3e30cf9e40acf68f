"""Exports are what they were made of: the same numbers in every runtime, verified before anything is written, and free of torch."""

import json
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import squeezevit as sv
import zoo
from squeezevit.bundle import read_card
from squeezevit.cli.export import export as command
from squeezevit.core import ops
from squeezevit.core.reducer import Reducer, Staged
from squeezevit.data.folder import read_image
from squeezevit.data.pixels import Preprocessing
from squeezevit.embed.engines import open_engine
from squeezevit.embed.job import predict
from squeezevit.errors import ConfigError, MissingExtraError, UnsupportedError
from squeezevit.export import engines, graph, quantised, verified
from squeezevit.export.apart import apart
from squeezevit.reducers.catalog import method, methods

for package in ("onnxruntime", "onnxscript", "openvino", "nncf"):
    pytest.importorskip(package)

METHODS = [name for name, row in methods().items() if row.make.__module__.startswith("squeezevit.")]
SIZE, OPTIONS = 32, {"patch_size": 8, "embed_dim": 48, "num_heads": 3}
STOPPING = {f"aten.{name}" for name in ("sort.default", "sort.stable", "alias.default", "new_ones.default", "where.ScalarOther")}
RUNNING = """import runpy, sys
sys.modules.update(torch=None, squeezevit=None)  # what cannot be imported
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def tiny(reducer: Reducer | None, depth: int = 1) -> nn.Module:
    """Patches are averaged, so that already in one block it shows what was done to them."""
    sizes = {"img_size": SIZE, "depth": depth, "num_classes": 5, **OPTIONS}
    model = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **sizes)
    zoo.randomize(model.eval(), 0)
    return model if reducer is None else zoo.reduce(model, reducer)


def of(name: str) -> nn.Module:
    """One block, or two where the second must know what the first did."""
    reducer = method(name).template()
    if isinstance(reducer, Staged):
        reducer = replace(reducer, keep=0.6, at=(0,))
    elif reducer.weighs:
        reducer = replace(reducer, r=(5, 0))
    return tiny(reducer, depth=2 if reducer.weighs else 1)


def written(model: nn.Module, folder: Path, **settings):
    """An export, without the options that all models here share."""
    return sv.export(model, folder, options={**OPTIONS, "depth": len(model.blocks)}, **settings)


def photographs(count: int) -> torch.Tensor:
    return zoo.images(count, SIZE)


@pytest.fixture(autouse=True)
def _untimed(request, monkeypatch):
    """Times are taken once, and tell nothing here."""
    monkeypatch.setattr(verified, "ROUNDS", 1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_runtime(name, tmp_path: Path):
    """At any batch size; and as `sv.export` writes it unless told otherwise: for OpenVINO, at a fixed one, which it folds."""
    module = graph.Exportable(of(name))
    program = graph.capture(module, None, (SIZE, SIZE))
    engines.write(program, "openvino", tmp_path, ["out"])  # by way of ONNX, which stays until tidied
    engines.write(program, "program", tmp_path, ["out"])
    for to in ("onnx", "openvino", "program"):
        figures = verified.agree(module, engines.opened(to, tmp_path), photographs(5), None)
        assert figures == {"error": pytest.approx(0, abs=1e-5), "images": 8, "ties": 0}
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    engines.write(graph.capture(module, 4, (SIZE, SIZE), folds=True), "openvino", fixed, ["out"])
    figures = verified.agree(module, engines.opened("openvino", fixed), photographs(4), 4)
    assert figures == {"error": pytest.approx(0, abs=1e-5), "images": 7, "ties": 0}


@pytest.mark.parametrize(("kind", "layers"), [("qk-norm", 1), ("eva02", 1), ("dinov3", 1), ("torchvision", 0), ("hf-vit", 0)])
def test_queries_keys_and_values_apart(kind, layers):
    """By three layers where they came out of one tensor, at any batch size; what a stage scores by, too."""
    module = graph.Exportable(zoo.reduce(zoo.build(kind, depth=1), sv.Squeeze(keep=0.5, at=(0,), score="mrmr")))
    size = (zoo.SIZE, zoo.SIZE)
    whole, split = (graph.capture(module, None, size, folds=folds) for folds in (False, True))
    a, b = ([str(node.target) for node in program.graph.nodes].count("aten.linear.default") for program in (whole, split))
    assert b - a == 2 * layers
    with torch.no_grad():
        for program in (whole, split):
            torch.testing.assert_close(program.module()(zoo.images(3))[0], module(zoo.images(3))[0], rtol=1e-4, atol=1e-5)


def test_a_layer_of_which_more_than_three_parts_are_used_stays():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            out = self.qkv(x)
            return out.chunk(3, dim=-1)[1] + out[..., :4]

    x = torch.randn(2, 5, 4)
    program = apart(torch.export.export(Odd().eval(), (x,), strict=False))
    assert [str(n.target) for n in program.graph.nodes].count("aten.linear.default") == 1


@pytest.mark.parametrize("reducer", [None, sv.Squeeze(keep=0.5, at=(0,), fuse="mass")])
def test_attention_of_as_many_tokens_as_heads(reducer, tmp_path: Path, monkeypatch):
    """At a fixed batch OpenVINO takes one for the other: such attention is written in another form, with a bias or without.

    Where queries, keys and values are apart it does not; but they are not so in every model.
    """
    monkeypatch.setattr(graph, "apart", lambda program: program)
    width = 16 if reducer is None else 32  # of the image: 3 tokens behind the stage
    model = timm.create_model("vit_tiny_patch16_224", img_size=(8, width), depth=2, num_classes=5, **OPTIONS).eval()
    model, how = zoo.reduce(model, reducer or sv.Identity()), Preprocessing((8, width), (8, width))
    assert written(model, tmp_path / "b", batch_size=2, preprocessing=how).measured["compared"]["error"] < 1e-5
    monkeypatch.setattr(graph, "_CROWDED", {})
    with pytest.raises(UnsupportedError, match=r"gives other numbers than torch: .*batch_size=None \(--batch-size 0\)"):
        written(model, tmp_path / "b", batch_size=2, preprocessing=how)
    assert written(model, tmp_path / "b", batch_size=None, preprocessing=how).measured["compared"]["error"] < 1e-5


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> Path:
    """A bundle of OpenVINO in int8, for four images at once, with classes."""
    folder, patch = tmp_path_factory.mktemp("int8") / "model", pytest.MonkeyPatch()
    patch.setattr(verified, "ROUNDS", 1)
    written(of("etps"), folder, int8=photographs(16), batch_size=4, floor=0.5, classes=["cat", "dog", "owl", "fox", "bee"])
    patch.undo()
    return folder


def test_int8_of_a_static_batch(int8: Path):
    """Constant weights, as eTPS has them, become one number there, to which nothing could be added."""
    card = read_card(int8)
    assert card.exported["batch"] == 4 and card.exported["precision"] == "int8" and card.measured["images"] == 8
    assert card.measured["cosine"] > 0.9 and card.measured["compared"]["error"] < 1e-5
    assert "FakeQuantize" in (int8 / "model.xml").read_text()
    speed = card.measured["speed"]
    assert speed["speedup"] > 0 and {*speed["seconds"]} == {"torch_unreduced", "torch", "exported"}
    assert sorted(f.name for f in int8.iterdir()) == sorted(
        ["README.md", "SHA256SUMS", "classes.txt", "model.bin", "model.xml", "run.py", "squeezevit.json"]
    )
    assert f"{card.measured['cosine']:.4f}" in (int8 / "README.md").read_text()


def photograph(file: Path, size: tuple[int, int] = (70, 41), turn: int | None = None, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    exif = Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
    Image.fromarray(pixels).save(file, exif=exif)
    return file


def test_run_needs_neither_torch_nor_squeezevit(int8: Path, tmp_path: Path):
    files = [photograph(tmp_path / f"{i}.png", turn=6, seed=i) for i in range(5)]  # a whole batch, and one left over
    command = [sys.executable, "-I", "-c", RUNNING, str(int8 / "run.py"), *map(str, files)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    how = read_card(int8).preprocessing
    x = np.stack([how(read_image(str(file))) for file in files])
    out = np.concatenate([engines.opened("openvino", int8)(verified.padded(part, 4))[0] for part in (x[:4], x[4:])])
    names = (int8 / "classes.txt").read_text().split()
    assert [line.split()[:2] for line in lines] == [
        [str(f), names[row.argmax()]] for f, row in zip(files, out[: len(files)], strict=True)
    ]
    assert len((int8 / "run.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("resize", [40, (44, 36)])
def test_run_prepares_photographs_to_the_last_bit(resize, int8: Path, tmp_path: Path):
    script = runpy.run_path(str(int8 / "run.py"))
    how = Preprocessing(resize, (32, 32), "bilinear")
    script["HOW"].update(json.loads(json.dumps(how.to_dict())))
    for name in ("a.png", "b.jpg", "c.tif"):  # Pillow turns the last by itself
        for turn in (None, *range(1, 9)):
            for size in ((70, 41), (41, 70)):
                file = photograph(tmp_path / name, size, turn)
                np.testing.assert_array_equal(script["pixels"](file), how(read_image(str(file))))
    Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(script["pixels"](tmp_path / "deep.png"), how(read_image(str(tmp_path / "deep.png"))))
    for wide in (np.uint32, np.float32):
        Image.fromarray(np.arange(4096, dtype=wide).reshape(64, 64)).save(tmp_path / "wide.tif")
        for ask in (script["pixels"], read_image):
            with pytest.raises(Exception, match="32-bit"):
                ask(tmp_path / "wide.tif")


def test_run_goes_on_after_a_file_that_it_cannot_read(int8: Path, tmp_path: Path):
    good = photograph(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    command = [sys.executable, "-I", "-c", RUNNING, str(int8 / "run.py"), str(tmp_path / "bad.png"), str(good), str(good)]
    bad, *rest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "bad.png  cannot be read" in bad and len(rest) == 2 and rest[0] == rest[1] and "good.png" in rest[0]


def test_no_scatter_and_groups_at_any_batch_size(tmp_path: Path):
    model = of("training-free")
    card = written(model, tmp_path / "out", to="onnx", batch_size=None, scatter=False, groups=True)
    nodes = onnx.load(tmp_path / "out/model.onnx").graph.node
    assert not [n.op_type for n in nodes if "Scatter" in n.op_type]
    assert card.exported["outputs"] == ["out", "groups_1"] and card.exported["batch"] is None
    x = photographs(3)
    with torch.no_grad(), sv.trace(model) as t:
        right = model(x)
    found, groups = engines.opened("onnx", tmp_path / "out")(x.numpy())
    torch.testing.assert_close(torch.from_numpy(found), right, rtol=1e-5, atol=1e-5)
    assert groups.dtype == np.int64
    np.testing.assert_array_equal(groups, t.groups.numpy())


@pytest.mark.parametrize("name", METHODS)
def test_the_form_without_scattering_is_the_same_to_a_millionth(name):
    module = graph.Exportable(of(name), groups=name != "identity")
    without = graph.capture(module, 3, (SIZE, SIZE), scatter=False)
    assert not graph.scatters(without)
    if name in ("etps", "topk"):  # one that fuses, one that only tells where patches went
        assert graph.scatters(graph.capture(module, 3, (SIZE, SIZE)))
    (out, *groups), (expected, *theirs) = without.module()(photographs(3)), module(photographs(3))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))
    assert all(map(torch.equal, groups, theirs))
    # Core ML's converter or ExecuTorch's runtime knows none of these
    parts = [m for m in without.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert not STOPPING & {str(node.target) for part in parts for node in part.graph.nodes}


@pytest.mark.parametrize("hosts", ["several", "one each", "all in one"])
def test_fusing_by_a_product_is_fusing_to_a_millionth(hosts):
    generator = torch.Generator().manual_seed(0)
    reserved, pruned = (torch.randn(2, 98, 384, generator=generator) for _ in range(2))
    index = {
        "several": torch.randint(98, (2, 98), generator=generator), "one each": torch.randperm(98).expand(2, -1),
        "all in one": torch.zeros(2, 98, dtype=torch.int64),
    }[hosts]  # fmt: skip
    weights = ops.squeeze_weights(reserved, torch.rand(2, 98, generator=generator))
    expected, found = ops.fuse(reserved, pruned, index, *weights), ops._fuse_by_product(reserved, pruned, index, *weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if hosts == "one each" else 1e-6)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("name", ["etps", "training-free"])
def test_the_older_exporter(name, batch, tmp_path: Path):
    card = written(of(name), tmp_path / "out", to="onnx", exporter="torchscript", batch_size=batch, groups=True)
    assert card.measured["compared"]["error"] < 1e-4 and card.exported["outputs"] == ["out", "groups_1"]
    found = engines.opened("onnx", tmp_path / "out")(photographs(3).numpy())
    for value, expected in zip(found, verified.expected(graph.Exportable(of(name), groups=True), photographs(3)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hf-vit", "torchvision", "open_clip"])
def test_other_libraries_where_blocks_follow_that_have_no_stage(kind):
    module = graph.Exportable(zoo.reduce(zoo.build(kind, depth=2), sv.ETPS(keep=0.5, at=(0,))), groups=True)
    program = graph.capture(module, None, (zoo.SIZE, zoo.SIZE)).module()
    with torch.no_grad():
        for a, b in zip(program(zoo.images(3)), module(zoo.images(3)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_siglip_2_whose_checks_of_values_have_no_word_in_onnx(tmp_path: Path):
    module = graph.Exportable(zoo.reduce(zoo.build("hf-siglip2", depth=1), sv.ETPS(keep=0.5, at=(0,))))
    engines.write(graph.capture(module, None, (zoo.SIZE, zoo.SIZE)), "openvino", tmp_path, ["out"])
    for to in ("onnx", "openvino"):
        assert verified.agree(module, engines.opened(to, tmp_path), zoo.images(5), None)["error"] < 1e-5


def test_a_program_of_a_static_batch(tmp_path: Path):
    card = written(of("topk"), tmp_path / "b", to="program", batch_size=2)
    assert card.measured["compared"]["error"] < 1e-5 and read_card(tmp_path / "b").engine == "program"


def test_a_package_of_a_static_batch(tmp_path: Path):
    card = written(of("topk"), tmp_path / "b", to="aoti", batch_size=2)
    assert card.measured["compared"]["error"] < 1e-5 and read_card(tmp_path / "b").engine == "aoti"


def in_float(file: Path, folder: Path) -> Counter[str]:
    """The layers whose weights ONNX Runtime makes float again, though they are kept in int8."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimised.onnx").graph
    stored = {value.name for value in graph.initializer}
    floats = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored}
    return Counter(node.op_type for node in graph.node if floats.intersection(node.input))


def test_int8_of_onnxruntime_and_bf16_of_openvino(tmp_path: Path, monkeypatch):
    card = written(of("etps"), tmp_path / "int8", to="onnx", int8=list(photographs(8)), batch_size=2, groups=True, floor=0.5)
    assert card.measured["cosine"] > 0.8 and card.exported["precision"] == "int8"
    own = graph.Exportable(of("etps"), groups=True)
    assert in_float(tmp_path / "int8/model.onnx", tmp_path) <= Counter(["Conv", "Gemm"]), (
        "more than the first layer and the classifier"
    )
    outs = [engines.opened("onnx", tmp_path / "int8")(part.numpy())[1] for part in photographs(8)[1::2].split(2)]
    same = np.concatenate(outs) == verified.expected(own, photographs(8)[1::2])[1]
    assert card.measured["groups"] == same.mean() > 0.5
    assert f"{same.mean():.1%}" in (tmp_path / "int8/README.md").read_text()
    monkeypatch.setattr(engines, "computes_bf16", lambda: True)  # on others OpenVINO computes in float32, and says nothing
    card = written(tiny(None), tmp_path / "bf16", precision="bf16", batch_size=2)
    assert card.measured["cosine"] > 0.98 and card.exported["precision"] == card.exported["hint"] == "bf16"
    monkeypatch.setattr(engines, "computes_bf16", lambda: False)
    with pytest.raises(ConfigError, match="this processor has no bfloat16"):
        written(tiny(None), tmp_path / "none", precision="bf16", batch_size=2)


def test_what_scores_matches_and_fuses_stays_in_float(tmp_path: Path):
    module = graph.Exportable(of("dtps"))
    engines.write(graph.capture(module, 2, (SIZE, SIZE)), "onnx", tmp_path, ["out"])
    names = quantised.float_nodes(tmp_path / "model.onnx")
    products = [n.name for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]
    own = 1 + 4 + 2 + 1  # patches, the block's linear layers, its attention, the classifier
    assert len({*products} - {*names}) == own and len(names) >= 4


def test_numbers_that_a_runtime_gets_wrong_are_caught(tmp_path: Path, monkeypatch):
    """OpenVINO computes the noise of Random otherwise, unless it was made a constant before."""
    plain = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: plain(*args, **{**kwargs, "optimize": False}))
    with pytest.raises(UnsupportedError, match=r"other numbers than torch: \d\.\d+ of the largest output"):
        written(of("random"), tmp_path / "out", batch_size=2)
    assert not [*tmp_path.iterdir()]


def test_below_the_floor_nothing_is_left(tmp_path: Path):
    with pytest.raises(UnsupportedError, match=r"mean cosine to torch is 0\.\d+ .*floor=1; calibrate on more"):
        written(of("topk"), tmp_path / "out", int8=photographs(4), batch_size=2, floor=1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "tflite"}, "to='tflite' is no format; choose one of onnx, openvino, program, aoti"),
        ({"to": "torch"}, "to='torch' is no format"),
        ({"exporter": "fx"}, "exporter='fx': choose one of dynamo, torchscript"),
        ({"exporter": "torchscript"}, "exporter='torchscript' writes to='onnx' in float"),
        ({"exporter": "torchscript", "to": "onnx", "scatter": False}, "exporter='torchscript' writes to='onnx' in float"),
        ({"int8": []}, "int8 has 0 calibration images"),
        ({"int8": photographs(3)}, "int8 has 3 calibration images"),
        ({"int8": zoo.images(8, 48)}, r"calibration image 0 is \[3, 48, 48\], the model takes \[3, 32, 32\]"),
        ({"int8": ["photo.jpg"] * 4}, "calibration image 0 is str"),
        ({"int8": photographs(8), "to": "program"}, "int8 is there for onnx and openvino"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"precision": "fp16"}, "precision='fp16'"),
        ({"precision": "bf16", "to": "onnx"}, "precision='bf16' is OpenVINO's"),
        ({"floor": 2}, "floor=2 is no cosine"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        written(of("topk"), tmp_path / "out", **settings)
    assert not [*tmp_path.iterdir()]


def test_models_and_folders_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ConfigError, match="this model is not reduced; leave groups out"):
        written(tiny(None), tmp_path / "out", groups=True)
    with pytest.raises(ConfigError, match=r"bfloat16 on cpu; export it from float32"):
        written(tiny(None).bfloat16(), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        written(tiny(None), tmp_path / "file/out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is there and is no bundle"):
        written(tiny(None), tmp_path / "full")
    assert {f.name for f in tmp_path.iterdir()} == {"file", "full"}


@pytest.mark.parametrize(("to", "package", "extra"), [("onnx", "onnxruntime", "export"), ("openvino", "nncf", "openvino")])
def test_a_runtime_that_is_missing_is_named(to, package, extra, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'{package}.*pip install "squeezevit\[{extra}\]"'):
        written(of("topk"), tmp_path / "out", to=to, int8=photographs(4))


def test_a_compiler_that_is_missing_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedError, match="no compiler is found; install"):
        written(of("topk"), tmp_path / "out", to="aoti")


def test_what_is_exported_is_what_the_card_says(tmp_path: Path, capsys):
    """A bundle of an unreduced model stays one where nothing is said, and has its reducer in the card where one is named."""
    model, plain = tiny(None), {"to": "onnx", "batch_size": 2}
    sv.save(model, tmp_path / "dense", options={**OPTIONS, "depth": 1}, preprocessing={"resize": SIZE, "crop": (SIZE, SIZE)})
    command(tmp_path / "as-it-is", source=tmp_path / "dense", **plain)
    assert "unreduced, fp32" in capsys.readouterr().out and read_card(tmp_path / "as-it-is").reducer is None
    command(tmp_path / "etps", source=tmp_path / "dense", method="etps", keep="0.5", at="0", with_groups=True, **plain)
    assert "ETPS(keep=0.5" in capsys.readouterr().out and "ETPS" in str(read_card(tmp_path / "etps").reducer)
    x = photographs(2)
    with torch.no_grad():
        for name, expected in (("as-it-is", model), ("etps", sv.reduce_(sv.load(tmp_path / "dense"), sv.ETPS(keep=0.5, at=(0,))))):
            found = engines.opened("onnx", tmp_path / name)(x.numpy())[0]
            torch.testing.assert_close(torch.from_numpy(found), expected(x), rtol=1e-5, atol=1e-5)


def test_features_are_exported_and_classes_are_not_taken_for_them(tmp_path: Path):
    """Five classes without names are no features, either; what the refusal says is done."""
    model, x = of("topk"), photographs(2)
    written(model, tmp_path / "classes", to="onnx", batch_size=2)
    with pytest.raises(ConfigError, match="puts out classes, not features; export its model by `squeezevit export --features`"):
        open_engine(tmp_path / "classes", features=True)
    sv.save(
        model,
        tmp_path / "torch",
        options={**OPTIONS, "depth": 1},
        classes=[*"abcde"],
        preprocessing={"resize": SIZE, "crop": (SIZE, SIZE)},
    )
    command(tmp_path / "features", source=tmp_path / "torch", to="onnx", batch_size=2, features=True)
    found = open_engine(tmp_path / "features", features=True).run(x.numpy())
    expected = open_engine(tmp_path / "torch", features=True).run(x.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 48) and read_card(tmp_path / "features").classes is None
    with pytest.raises(ConfigError, match="was exported with --features, and puts out no classes"):
        predict([tmp_path], open_engine(tmp_path / "features"), tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="features=True puts out no classes"):
        written(model, tmp_path / "none", features=True, classes=[*"abcde"])


def test_classes_are_named_where_the_bundle_has_none(tmp_path: Path):
    """How the model was built is the bundle's to say."""
    sv.save(tiny(None), tmp_path / "torch", options={**OPTIONS, "depth": 1}, preprocessing={"resize": SIZE, "crop": (SIZE, SIZE)})
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    command(tmp_path / "out", source=tmp_path / "torch", to="onnx", batch_size=2, classes=tmp_path / "names.txt")
    assert read_card(tmp_path / "out").classes == tuple("abcde")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match="classes gives 2 names, and the model has 5 outputs"):
        command(tmp_path / "out", source=tmp_path / "torch", to="onnx", batch_size=2, classes=tmp_path / "names.txt")


def test_the_command_exports_a_bundle(tmp_path: Path, capsys):
    model = tiny(sv.EViT(keep=0.6, at=(0,)))
    how = {"resize": SIZE, "crop": (SIZE, SIZE)}
    sv.save(model, tmp_path / "torch", options={**OPTIONS, "depth": 1}, classes=[*"abcde"], preprocessing=how)
    (tmp_path / "photographs").mkdir()
    for i in range(4):
        photograph(tmp_path / f"photographs/{i}.png", seed=i)
    bundle, out, file = tmp_path / "torch", tmp_path / "out", tmp_path / "out.json"
    with pytest.raises(ConfigError, match="--int8 is calibrated on photographs: give --calibrate"):
        command(out, source=bundle, int8=True)
    with pytest.raises(ConfigError, match="is for --int8"):
        command(out, source=bundle, calibrate=tmp_path / "photographs")
    given = {"int8": True, "calibrate": tmp_path / "photographs", "to": "onnx", "batch_size": 2, "floor": 0.0}
    command(out, source=bundle, json_file=file, **given)
    assert "times as fast as torch fp32 unreduced" in capsys.readouterr().out
    card = read_card(out)
    assert card.classes == tuple("abcde") and card.exported["precision"] == "int8"
    assert json.loads(file.read_text())["exported"] == card.exported

"""Folders of photographs through a bundle: the right rows in order by every engine, and the same file whenever a run was ended."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import squeezevit as sv
from squeezevit import sums
from squeezevit.bundle import CARD, ENGINES, card_of, write
from squeezevit.data.folder import decoding, image_or_reason, read_image
from squeezevit.embed import Settings, embed, open_engine, predict
from squeezevit.embed.engines import Engine
from squeezevit.embed.tables import Journal, parts_of, read_about
from squeezevit.errors import CheckpointError, ConfigError, DataError, MissingExtraError, UnsupportedError

SIZES = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
CLASSES = ["cat", "dog", "a, b", "Ünicode", "e"]
DIM = SIZES["embed_dim"]


def model(seed: int = 0, **options):
    torch.manual_seed(seed)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **SIZES, **options).eval()
    torch.nn.init.normal_(net.head.weight, std=0.5)
    return sv.reduce_(net, sv.ETPS(keep=0.6, at=(1,)))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A bundle of torch, and the same model exported for each runtime."""
    root = tmp_path_factory.mktemp("bundles")
    net = model()
    sv.save(net, root / "torch", options=SIZES, classes=CLASSES)
    card = card_of(net, options=SIZES, classes=CLASSES)
    x = torch.randn(4, 3, 32, 32)

    def onnx(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the exporter says of itself
            torch.onnx.export(net, (x,), folder / "model.onnx", dynamo=False, input_names=["images"], output_names=["out"])

    def openvino(folder: Path) -> None:
        runtime = pytest.importorskip("openvino")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runtime.save_model(runtime.convert_model(net, example_input=x, input=[4, 3, 32, 32]), folder / "model.xml", False)

    def program(folder: Path) -> None:
        torch.export.save(torch.export.export(net, (x,)), folder / "model.pt2")

    for engine, fill in {"onnx": onnx, "openvino": openvino, "program": program}.items():
        exported = {"batch": 4, "precision": "fp32", "input": "images", "outputs": ["out"]}
        write(root / engine, replace(card, engine=engine, exported=exported), fill)
    return root


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Twelve small photographs of two folders, three of them spoilt."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(9):
        folder = root / ("a" if i < 5 else "b")
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((60 + i, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    (root / "a/2x.png").write_bytes(b"")
    (root / "a/3x.jpg").write_bytes((root / "a/2.jpg").read_bytes()[:200])
    (root / "b/zebra, striped.png").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def engine(shelf) -> Engine:
    return open_engine(shelf / "torch")


def expected(engine: Engine, file: str) -> np.ndarray:
    return engine.run(engine.card.preprocessing(read_image(file))[None])[0]


def rows_of(file: Path) -> list[dict]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_file_has_its_row_in_order(engine, photographs, tmp_path):
    seen = []
    done = predict([photographs], engine, tmp_path / "p.csv", Settings(4), progress=lambda *step: seen.append(step))
    rows = rows_of(tmp_path / "p.csv")
    names = [str(photographs / n) for n in ("a/0.jpg", "a/1.png", "a/2.jpg", "a/2x.png", "a/3.png", "a/3x.jpg", "a/4.jpg")]
    names += [str(photographs / n) for n in ("b/5.png", "b/6.jpg", "b/7.png", "b/8.jpg", "b/zebra, striped.png")]
    assert [row["file"] for row in rows] == names
    assert [row["status"] == "ok" for row in rows] == [i not in (3, 5, 11) for i in range(12)]
    assert rows[3]["reason"] == "empty file (0 bytes)" and "runcated" in rows[5]["reason"] and "not one of" in rows[11]["reason"]
    assert (done.files, done.read, len(done.failed), done.resumed) == (12, 9, 3, 0)
    assert [step[1:] for step in seen] == [(0, 12), (4, 12), (8, 12), (12, 12)]
    for row in rows:
        if row["status"] == "ok":
            shares = torch.tensor(expected(engine, row["file"])).double().softmax(0)
            best = shares.argsort(descending=True)
            told = [row["class"], *(row[f"class_{i}"] for i in range(2, 6))]
            assert told == [CLASSES[i] for i in best]
            probabilities = [float(row[p]) for p in ("probability", *(f"probability_{i}" for i in range(2, 6)))]
            assert probabilities == pytest.approx(shares[best].tolist(), rel=1e-4)
        else:
            assert row["class"] == row["probability"] == ""


def test_all_kinds_of_tables_say_the_same(engine, photographs, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in ("csv", "json", "parquet"):
        predict([photographs], engine, tmp_path / f"p.{suffix}", Settings(5), top_k=2)
    table = rows_of(tmp_path / "p.csv")
    assert list(table[0]) == ["file", "status", "reason", "class", "probability", "class_2", "probability_2"]
    text = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    columns = parquet.read_table(tmp_path / "p.parquet")
    assert text["model"] == engine.id == json.loads(columns.schema.metadata[b"squeezevit"])["model"]
    for row, other, third in zip(table, text["rows"], columns.to_pylist(), strict=True):
        assert (row["file"], row["status"], row["reason"] or None) == (other["file"], other["status"], other["reason"])
        assert {k: third[k] for k in ("file", "status", "reason", "class", "probability")} == {
            k: v for k, v in other.items() if k != "top"
        }
        assert (row["class"] or None) == other["class"]
        if row["status"] == "ok":
            assert float(row["probability_2"]) == other["top"][1]["probability"] == third["top_probabilities"][1]
            assert row["class_2"] == other["top"][1]["class"] == third["top_classes"][1]
        else:
            assert other["top"] == [] and third["top_classes"] is None


def test_features_stand_beside_their_names_and_the_id(engine, shelf, photographs, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    featured = open_engine(shelf / "torch", features=True)
    done = embed([photographs], featured, tmp_path / "f.npy", Settings(4))
    embed([photographs], featured, tmp_path / "f.parquet", Settings(4))
    features = np.load(tmp_path / "f.npy")
    names = (tmp_path / "f.names.txt").read_text().splitlines()
    about = json.loads((tmp_path / "f.about.json").read_text())
    assert features.shape == (9, DIM) and features.dtype == np.float32 and done.width == DIM and len(names) == 9
    assert about["model"] == featured.id and len(about["unreadable"]) == 3 and done.out[0] == tmp_path / "f.npy"
    assert not list(tmp_path.glob("*.parts"))
    head = sv.load(shelf / "torch").head
    for name, feature in zip(names, features, strict=True):
        logits = head(torch.tensor(feature)).detach().numpy()
        assert np.allclose(logits, expected(engine, name), atol=1e-4)
    rows = parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert np.array_equal([row["features"] for row in rows if row["status"] == "ok"], features)
    assert [row["file"] for row in rows if row["features"] is None] == [row["file"] for row in about["unreadable"]]


def test_engines_agree_and_a_fixed_batch_is_padded(engine, shelf, photographs, tmp_path):
    pytest.importorskip("onnxruntime")
    x = np.random.default_rng(1).standard_normal((7, 3, 32, 32)).astype(np.float32)
    reference = engine.run(x)
    assert reference.shape == (7, 5) and reference.dtype == np.float32
    for name in ("onnx", "openvino", "program"):
        opened = open_engine(shelf / name, threads=1)
        assert opened.batch == 4 and opened.name == name and opened.id != engine.id
        for count in (1, 4, 7):
            assert np.allclose(opened.run(x[:count]), reference[:count], atol=1e-4), (name, count)
        predict([photographs], opened, tmp_path / f"{name}.csv")
    predict([photographs], engine, tmp_path / "torch.csv")
    rows = [rows_of(tmp_path / f"{name}.csv") for name in ("torch", "onnx", "openvino", "program")]
    for first, *others in zip(*rows, strict=True):
        for other in others:
            assert (first["status"], first["class"]) == (other["status"], other["class"])


def test_batches_side_by_side_give_the_same_table(engine, photographs, tmp_path):
    """Two at a time, and an interrupted run goes on."""
    met = threading.Barrier(2, timeout=60)

    def call(images):
        met.wait()
        return engine.call(images)

    two, settings = replace(engine, call=call, streams=2), Settings(3, workers=1)
    predict([photographs], engine, tmp_path / "one.csv", settings)
    predict([photographs], two, tmp_path / "two.csv", settings)
    embed([photographs], engine, tmp_path / "one.npy", settings)

    def stop(what, done, total):
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed([photographs], replace(engine, streams=2), tmp_path / "two.npy", settings, progress=stop)
    assert embed([photographs], replace(engine, streams=2), tmp_path / "two.npy", settings).resumed == 3
    for suffix in ("csv", "npy"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_openvino_computes_batches_side_by_side(shelf, photographs, tmp_path):
    pytest.importorskip("openvino")
    one, two = open_engine(shelf / "openvino", threads=1), open_engine(shelf / "openvino", threads=2, streams=None)
    assert (one.streams, two.streams, open_engine(shelf / "torch", streams=None).streams) == (1, 2, 1)
    for name, opened in (("one", one), ("two", two)):
        embed([photographs], opened, tmp_path / f"{name}.npy", Settings(4))
    assert np.allclose(*(np.load(tmp_path / f"{name}.npy") for name in ("one", "two")), atol=1e-5)


_AT_ONCE = """
import sys, threading, numpy
from squeezevit.embed.engines import open_engine
engine = open_engine(sys.argv[1], threads=8, streams=8)
images, ready = numpy.zeros((2, 3, 32, 32), numpy.float32), threading.Barrier(8)
def run():
    ready.wait()
    engine.run(images)
threads = [threading.Thread(target=run) for _ in range(8)]
sys.setswitchinterval(1e-7)  # threads take turns within what is done once in a process
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done")
"""


def test_the_first_batches_of_a_process_may_come_at_once(shelf):
    """OpenVINO's binding let threads wait for each other forever there: two processes of three, asked in this way."""
    pytest.importorskip("openvino")
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", _AT_ONCE, shelf / "openvino"], capture_output=True, text=True, timeout=90)
        assert ran.stdout == "done\n", ran.stderr


def test_compiled_is_torch(engine, shelf, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="eager")
    )  # the graph alone: code for it takes half a minute
    x = np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype(np.float32)
    compiled = open_engine(shelf / "torch", "compiled")
    assert compiled.id == engine.id and np.allclose(compiled.run(x), engine.run(x), atol=1e-4)


def test_the_id_is_of_the_weights_too(shelf, tmp_path):
    """OpenVINO keeps them in a second file, and the graph of two models may be the same."""
    pytest.importorskip("openvino")
    other = tmp_path / "other"
    other.mkdir()
    for file in (shelf / "openvino").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = bytearray((other / "model.bin").read_bytes())
    weights[-1] ^= 1
    (other / "model.bin").write_bytes(weights)
    (other / sums.NAME).unlink()
    sums.write(other)
    assert open_engine(other).id != open_engine(shelf / "openvino").id


@pytest.mark.parametrize("name", ["torch", "onnx", "program"])
def test_opening_a_bundle_sums_each_of_its_files_once(name, shelf, monkeypatch):
    pytest.importorskip("onnxruntime")
    own, read = sums._digest, []
    monkeypatch.setattr(sums, "_digest", lambda file: read.append(file.name) or own(file))
    opened = open_engine(shelf / name)
    assert sorted(read) == sorted({file.name for file in (shelf / name).iterdir()} - {sums.NAME})
    assert opened.id == own(shelf / name / ENGINES[name])


def tables(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def run_of(kind: str, photographs: Path, engine: Engine, out: Path):
    settings = Settings(2, workers=1)
    return (predict if kind in ("csv", "json") else embed)([photographs], engine, out / f"t.{kind}", settings)


@pytest.mark.parametrize("kind", ["csv", "json", "npy", "parquet"])
def test_a_run_ended_at_any_batch_gives_the_same_file(kind, engine, photographs, tmp_path, monkeypatch):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    whole = tmp_path / "whole"
    whole.mkdir()
    run_of(kind, photographs, engine, whole)
    run, add = Engine.run, Journal.add
    for batch in range(6):
        for where in ("run", "add", "finish"):
            part, calls = tmp_path / f"{where}{batch}", []
            part.mkdir()

            def ends(self, *given, where=where, batch=batch, calls=calls):
                calls.append(1)
                if len(calls) > batch:
                    raise KeyboardInterrupt
                return (run if where == "run" else add)(self, *given)

            def torn(self, write):
                write(self.folder / f"half{self.out.suffix}")
                raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                {
                    "run": lambda p: p.setattr(Engine, "run", ends),
                    "add": lambda p: p.setattr(Journal, "add", ends),
                    "finish": lambda p: p.setattr(Journal, "finish", torn),
                }[where](patched)
                try:
                    run_of(kind, photographs, engine, part)
                except KeyboardInterrupt:
                    assert tables(part) == {}, "half a table was written"
                else:
                    assert where == "run" and batch == 5  # of the six batches one has nothing readable, and the model is not called
            done = run_of(kind, photographs, engine, part)
            assert tables(part) == tables(whole)
            assert where == "run" or done.resumed == (12 if where == "finish" else 2 * batch)
            assert not list(part.glob("*.parts"))


@pytest.mark.parametrize("spoil", ["cut line", "cut features", "zeros", "other features"])
def test_what_a_crash_leaves_half_written_is_done_again(spoil, engine, photographs, tmp_path, monkeypatch):
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    run_of("npy", photographs, engine, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish", lambda self, write: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_of("npy", photographs, engine, tmp_path / "part")
    parts = tmp_path / "part/t.npy.parts"
    rows, features = parts / "rows.jsonl", parts / "features.f32"
    if spoil == "cut line":
        rows.write_bytes(rows.read_bytes()[:-20])
    elif spoil == "cut features":
        features.write_bytes(features.read_bytes()[:-20])
    elif spoil == "zeros":
        rows.write_bytes(rows.read_bytes()[:-150] + b"\0" * 150)
    else:
        features.write_bytes(b"\1" + features.read_bytes()[1:])
    done = run_of("npy", photographs, engine, tmp_path / "part")
    assert done.resumed == (0 if spoil == "other features" else 10)
    assert tables(tmp_path / "part") == tables(tmp_path / "whole")


def test_a_killed_process_goes_on(engine, shelf, photographs, tmp_path):
    """SIGKILL in the midst of a run, and the same run again here."""
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    run_of("npy", photographs, engine, tmp_path / "whole")
    code = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from squeezevit.embed import *\n"
        "pace = lambda what, done, total: time.sleep(0.0 if done < 6 else 60)\n"
        "embed([sys.argv[1]], open_engine(sys.argv[2]), sys.argv[3], Settings(2, workers=1), progress=pace)\n"
    )
    out = tmp_path / "part/t.npy"
    child = subprocess.Popen([sys.executable, "-c", code, photographs, shelf / "torch", out])
    journal = tmp_path / "part/t.npy.parts/rows.jsonl"
    until = time.monotonic() + 300  # where others keep the machine busy
    while time.monotonic() < until and not (journal.is_file() and journal.read_bytes().count(b"\n") >= 3):
        time.sleep(0.05)
    with pytest.raises(ConfigError, match="another process is writing"):
        run_of("npy", photographs, engine, tmp_path / "part")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert run_of("npy", photographs, engine, tmp_path / "part").resumed == 6
    assert tables(tmp_path / "part") == tables(tmp_path / "whole")


@pytest.fixture
def begun(engine, photographs, tmp_path, monkeypatch):
    """A run over five photographs, ended after the first batch."""
    files = [photographs / f"a/{n}" for n in ("0.jpg", "1.png", "2.jpg", "3.png", "4.jpg")]
    add = Journal.add
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", lambda self, *given: add(self, *given) if not self.done else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(files, engine, tmp_path / "f.npy", Settings(2))
    return files, tmp_path / "f.npy"


def test_another_run_in_its_place_is_refused_by_name(begun, engine, shelf):
    files, out = begun
    other = replace(engine, id="f" * 64)
    for told, runs, settings, names in (
        ("5 files, and now there are 4; file 5 was", engine, Settings(2), files[:4]),
        ("file 1 was", engine, Settings(2), files[1:]),
        ("batch size 2, and this one has 3", engine, Settings(3), files),
        ("model", other, Settings(2), files),
        ("preprocessing", engine, Settings(2, draft=True), files),
        ("preprocessing", engine, Settings(2, upright=False), files),
        ("engine torch, and this one has compiled", replace(engine, name="compiled"), Settings(2), files),
        ("card", replace(engine, card=replace(engine.card, classes=tuple("VWXYZ"))), Settings(2), files),
    ):
        with pytest.raises(ConfigError, match=told) as error:
            embed(names, runs, out, settings)
        assert f"remove {out}.parts" in str(error.value)
    assert embed(files, engine, out, Settings(2)).resumed == 2


def test_a_file_changed_between_two_parts_is_noticed(begun, engine, tmp_path):
    files, _ = begun
    copies = [tmp_path / file.name for file in files]
    for copy, file in zip(copies, files, strict=True):
        copy.write_bytes(file.read_bytes())
    again = tmp_path / "again.npy"
    with pytest.raises(RuntimeError):
        embed(
            copies,
            engine,
            again,
            Settings(2),
            progress=lambda what, done, total: None if done < 4 else (_ for _ in ()).throw(RuntimeError),
        )
    for other in (files[2].read_bytes() + b"0", files[0].read_bytes()[::-1]):  # of another size, and of the same
        copies[0].write_bytes(other)
        with pytest.raises(ConfigError, match="file 1 was"):
            embed(copies, engine, again, Settings(2))


def test_a_bundle_of_another_precision_runs(tmp_path):
    sv.save(model().to(torch.bfloat16), tmp_path / "b", options=SIZES)
    assert open_engine(tmp_path / "b").run(np.zeros((2, 3, 32, 32), np.float32)).dtype == np.float32


def test_features_of_clip_are_those_that_compare_with_texts(tmp_path):
    """Projected, in torch and as a program; the tower alone would put out others, of another width."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config={**sizes, "vocab_size": 99}, projection_dim=20)
    clip = sv.reduce_(transformers.CLIPModel(config).eval(), sv.ETPS(keep=0.5, at=(0,)))
    how, x = {"resize": 32, "crop": (32, 32)}, torch.randn(2, 3, 32, 32)
    sv.save(clip, tmp_path / "b", preprocessing=how)
    sv.export(clip, tmp_path / "p", to="program", batch_size=2, preprocessing=how)
    with torch.inference_mode():
        expected = clip.visual_projection(clip.vision_model(x).pooler_output).numpy()
    for folder in ("b", "p"):
        np.testing.assert_allclose(open_engine(tmp_path / folder).run(x.numpy()), expected, atol=1e-5)


def interrupted(*given, **settings):
    raise KeyboardInterrupt


def partly_removed(folder, ignore_errors=False):
    """What `rmtree` leaves where it is interrupted: files go in whatever order the file system has."""
    rmtree(folder / "before" if (folder / "before").is_dir() else folder, ignore_errors)
    if not ignore_errors and folder.name.endswith(".parts"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_adding_to_a_table(suffix, engine, photographs, tmp_path, monkeypatch):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "x").mkdir()
    out, at_once = tmp_path / f"f.{suffix}", tmp_path / f"x/f.{suffix}"
    embed([photographs / "a"], engine, out, Settings(2))
    with pytest.raises(ConfigError, match="do not compare"):
        embed([photographs], replace(engine, id="0" * 64), out, Settings(2), append=True)
    with pytest.raises(ConfigError, match="do not compare"):
        embed([photographs], engine, out, Settings(2, upright=False), append=True)
    with monkeypatch.context() as patched:  # ended once the new table is in place, and the journal not yet removed
        patched.setattr(Journal, "forget", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed([photographs], engine, out, Settings(2), append=True)
    with monkeypatch.context() as patched:  # ended while the journal is removed, of which the old table is the first to go
        patched.setattr("squeezevit.embed.tables.shutil.rmtree", partly_removed)
        with pytest.raises(KeyboardInterrupt):
            embed([photographs], engine, out, Settings(2), append=True)
    assert not (parts_of(out) / "before").exists() and parts_of(out).is_dir()
    assert embed([photographs], engine, out, Settings(2), append=True).files == 0
    embed([photographs], engine, at_once, Settings(2))
    if suffix == "parquet":
        import pyarrow.parquet

        told, whole = (pyarrow.parquet.read_table(file).to_pylist() for file in (out, at_once))
        assert [r["file"] for r in told] == [r["file"] for r in whole]
        assert np.allclose(*([r["features"] for r in rows if r["features"]] for rows in (told, whole)), atol=1e-5)
    else:
        assert np.allclose(np.load(out), np.load(at_once), atol=1e-5)
        assert out.with_suffix(".names.txt").read_text() == at_once.with_suffix(".names.txt").read_text()
        assert json.loads(out.with_suffix(".about.json").read_text()) == json.loads(at_once.with_suffix(".about.json").read_text())
    assert read_about(out)[0] == read_about(at_once)[0]


def test_photographs_are_turned_as_the_bundle_or_the_user_says(engine, tmp_path):
    picture = Image.fromarray(np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "p").mkdir()
    picture.save(tmp_path / "p/turned.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "p/upright.png")
    picture.save(tmp_path / "p/lying.png")
    stored = replace(engine, card=replace(engine.card, preprocessing=replace(engine.card.preprocessing, upright=False)))
    for opened, upright, twin in (
        (engine, None, "upright"), (engine, False, "lying"), (stored, None, "lying"), (stored, True, "upright")
    ):  # fmt: skip
        embed([tmp_path / "p"], opened, tmp_path / "f.npy", Settings(3, upright=upright))
        names = [Path(n).stem for n in (tmp_path / "f.names.txt").read_text().splitlines()]
        features = dict(zip(names, np.load(tmp_path / "f.npy"), strict=True))
        assert np.allclose(features["turned"], features[twin], atol=1e-5) and not np.allclose(
            features["upright"], features["lying"]
        )


def test_drafts_are_smaller_and_never_too_small(engine, tmp_path):
    y, x = np.mgrid[0:500, 0:700] / 40
    pixels = np.stack([np.sin(x + y), np.cos(x), np.sin(y)], -1) * 100 + 128
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "large.jpg", quality=90)
    with decoding():
        sizes = [image_or_reason(str(tmp_path / "large.jpg"), True, least).size for least in (None, 300, 250, 125, 60, 2)]
    assert sizes == [(700, 500), (700, 500), (350, 250), (175, 125), (88, 63), (88, 63)]
    features = []
    for draft in (False, True):
        embed([tmp_path / "large.jpg"], engine, tmp_path / f"{draft}.npy", Settings(draft=draft))
        features.append(np.load(tmp_path / f"{draft}.npy")[0])
    a, b = features
    assert not np.array_equal(a, b) and a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_any_number_of_readers_and_numbers_that_are_not_finite(engine, photographs, tmp_path):
    for workers in (0, 1, 5):
        embed([photographs], engine, tmp_path / f"{workers}.npy", Settings(4, workers))
    assert len({(tmp_path / f"{workers}.npy").read_bytes() for workers in (0, 1, 5)}) == 1

    def odd(images: np.ndarray) -> np.ndarray:
        out = engine.call(images)
        out[1] = np.nan
        return out

    done = predict([photographs / "a"], replace(engine, call=odd), tmp_path / "p.csv")
    assert [row["status"] for row in done.rows] == ["ok", "not finite", "ok", "unreadable", "ok", "unreadable", "ok"]
    done = embed([photographs / "a"], replace(engine, call=odd), tmp_path / "f.npy")
    assert len(np.load(tmp_path / "f.npy")) == done.read == 4


def test_names_that_are_no_text(engine, tmp_path):
    """Bytes that are not UTF-8, and a line break: a row each, and the same when the run goes on."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "p") + b"\xff"))
    folder.mkdir()
    for name in ("a\nb.png", "c\u2028,d.png"):
        Image.new("RGB", (40, 40), "red").save(folder / name)
    for out, names in ((predict, rows_of), (embed, lambda file: file.with_suffix(".names.txt").read_text().splitlines())):
        file = tmp_path / ("t.csv" if out is predict else "t.npy")
        assert out([folder, folder / "a\nb.png"], engine, file).read == 2 and len(names(file)) == 2


def test_what_cannot_be_meant_is_refused_before_any_work(engine, shelf, photographs, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt/x.jpg").write_bytes(b"x")
    (tmp_path / "table.npy").write_bytes(b"x")
    unnamed = replace(engine, card=replace(engine.card, classes=None))
    fewer = replace(engine, card=replace(engine.card, classes=("a", "b")))
    tokens = replace(engine, call=lambda images: np.zeros((len(images), 7, 5)))
    csv_, npy = tmp_path / "p.csv", tmp_path / "f.npy"
    for call, kind, told in (
        (lambda: predict([photographs], unnamed, csv_), ConfigError, "squeezevit embed"),
        (lambda: predict([photographs], fewer, csv_), ConfigError, "puts out 5 numbers, and its card names 2"),
        (lambda: predict([photographs], engine, tmp_path / "p.txt"), ConfigError, "ends in .csv, .json, .parquet"),
        (lambda: predict([photographs], engine, tmp_path / "no/p.csv"), ConfigError, "a folder that exists"),
        (lambda: predict([photographs], engine, csv_, top_k=0), ConfigError, "top_k=0"),
        (lambda: predict([tmp_path / "gone"], engine, csv_), DataError, "does not exist"),
        (lambda: predict([tmp_path / "empty"], engine, csv_), DataError, "holds no image"),
        (lambda: predict([], engine, csv_), DataError, "no photographs"),
        (lambda: embed([tmp_path / "spoilt"], engine, npy), DataError, "none of 1 files"),
        (lambda: embed([photographs], engine, tmp_path / "table.npy", append=True), DataError, "cannot be added to"),
        (lambda: embed([photographs], tokens, tmp_path / "g.npy"), UnsupportedError, "not a row for each"),
        (lambda: engine.run(np.zeros((1, 3, 40, 32), np.float32)), ConfigError, "takes"),
        (lambda: Settings(0), ConfigError, "batch_size=0"),
        (lambda: Settings(workers=-1), ConfigError, "workers=-1"),
        (lambda: open_engine(shelf / "torch", "onnx"), ConfigError, "leave --engine out"),
        (lambda: open_engine(shelf / "torch", "onnxruntime"), ConfigError, "give a bundle exported to onnx"),
        (lambda: open_engine(shelf / "onnx", "compiled"), ConfigError, "leave --engine out"),
        (lambda: open_engine(shelf / "torch", "tensorrt"), ConfigError, "not known"),
        (lambda: open_engine(shelf / "onnx", features=True), ConfigError, "squeezevit export --features"),
        (lambda: open_engine(shelf / "onnx", streams=2), ConfigError, "takes one batch after another; leave streams out"),
        (lambda: open_engine(tmp_path / "empty"), CheckpointError, "no bundle"),
    ):
        with pytest.raises(kind, match=told):
            call()
    for runtime, extra in (("onnxruntime", "export"), ("openvino", "openvino")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, runtime, None)
            with pytest.raises(MissingExtraError, match=rf"squeezevit\[{extra}\]"):
                open_engine(shelf / ("onnx" if extra == "export" else "openvino"))
    assert not (tmp_path / "f.npy.parts").exists()  # of a run that could give no features nothing is left to go on with
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"squeezevit\[predict\]"):
        predict([photographs], engine, tmp_path / "p.parquet")


def test_a_model_file_that_no_runtime_opens(shelf, tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (tmp_path / CARD).write_text((shelf / "onnx" / CARD).read_text())
    (tmp_path / "classes.txt").write_text((shelf / "onnx/classes.txt").read_text())
    sums.write(tmp_path)
    with pytest.raises(CheckpointError, match="onnxruntime cannot open"):
        open_engine(tmp_path)


def test_a_table_that_is_there_is_replaced_only_when_the_new_one_is_whole(engine, photographs, tmp_path):
    out = tmp_path / "p.csv"
    out.write_text("old")
    with pytest.raises(RuntimeError):
        predict([photographs], engine, out, progress=lambda *_: (_ for _ in ()).throw(RuntimeError))
    assert out.read_text() == "old"
    predict([photographs], engine, out)
    assert len(rows_of(out)) == 12


def test_the_commands(shelf, photographs, tmp_path):
    import typer

    from squeezevit.cli import options
    from squeezevit.cli.predict import embed, predict

    app = typer.Typer()
    for command in (predict, embed):
        app.command(cls=options.Command)(command)
    given = [str(photographs), "--from", str(shelf / "torch"), "--workers", "1", "--batch-size", "4"]
    told = CliRunner().invoke(app, ["predict", *given, "--out", str(tmp_path / "p.json"), "--top-k", "3"], catch_exceptions=False)
    assert told.exit_code == 0 and len(json.loads((tmp_path / "p.json").read_text())["rows"][0]["top"]) == 3
    told = CliRunner().invoke(app, ["embed", *given, "--out", str(tmp_path / "f.npy")], catch_exceptions=False)
    assert told.exit_code == 0 and np.load(tmp_path / "f.npy").shape == (9, DIM)
    for command in ("predict", "embed"):
        out = ["--out", str(tmp_path / "r.parquet")]
        told = CliRunner().invoke(app, [command, *given, *out, "--streams", "2", "--engine-on", "ray"])
        assert isinstance(told.exception, ConfigError) and "--streams 2 is of runs in this process" in str(told.exception)

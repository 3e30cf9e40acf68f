"""A stranger's method is one file and one row of the catalogue: every command then knows it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import squeezevit as sv
from squeezevit import cli
from squeezevit.errors import ConfigError
from squeezevit.reducers import catalog
from squeezevit.report.demo import Settings, run_demo

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ("--model", "vit_tiny_patch16_224", "--image-size", "32")


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    """The example, imported anew and forgotten afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(catalog, "_METHODS", dict(catalog._METHODS))
    sys.modules.pop("new_method", None)
    yield
    sys.modules.pop("new_method", None)


def run(*argv: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--import", "new_method", *argv])
    assert exit_.value.code in (code, None)


def test_it_is_benchmarked(tmp_path, capsys):
    run(
        "bench",
        *TINY,
        "--methods",
        "far,etps",
        "--keep",
        "0.5",
        "--rounds",
        "1",
        "--batch-size",
        "1",
        "--json",
        f"{tmp_path}/b.json",
    )
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["far", "etps"] and rows[0]["macs"] < rows[1]["macs"]
    assert "far from mean" in capsys.readouterr().out


def test_it_is_planned(tmp_path):
    run("plan", *TINY, "--method", "far", "--macs", "60%", "--json", f"{tmp_path}/p.json")
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["reducer"].startswith("FarFromMean") and abs(plan["macs_share"] - 0.6) < 0.06


def test_it_is_trained(tmp_path):
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    small = "model.options={depth: 2, embed_dim: 24, num_heads: 2}"
    options = ("--set", small, "--set", "model.image_size=32", "--set", "data.workers=0", "--set", "tensorboard=false")
    data = ("--data", f"{tmp_path}/photos", "--out", f"{tmp_path}/run", "--model", "vit_tiny_patch16_224")
    much = ("--epochs", "1", "--batch-size", "4", "--at", "1", "--device", "cpu", "--set", "reducer.anneal_epochs=0.5")
    run("train", *data, "--method", "far", "--keep", "0.5", *much, *options, "--set", "model.pretrained=false")
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_it_is_in_the_demo_and_its_report(tmp_path):
    import new_method  # noqa: F401  # registers it

    settings = Settings(image_size=56, n_train=24, n_test=8, rounds=1, targets=(0.5,), methods=("far", "tome"))
    results = run_demo(tmp_path, settings, lambda what, done, total: None)
    assert [row["method"] for row in results["rows"]] == ["far", "tome"]
    assert "far from mean" in (tmp_path / "report.html").read_text()


def test_a_module_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--import", "no_such_methods", "bench"])
    assert "--import no_such_methods" in capsys.readouterr().err


def test_a_method_that_saved_models_could_not_name_is_refused(monkeypatch):
    monkeypatch.setattr(catalog, "_METHODS", dict(catalog._METHODS))
    twin = type("TopK", (sv.TopK,), {"__module__": __name__})
    with pytest.raises(ConfigError, match="there already is a reducer class TopK"):
        catalog.register(catalog.Method("twin", "twin", twin))

    def needs(strength):
        return sv.TopK(keep=strength)

    with pytest.raises(ConfigError, match="cannot be made without options"):
        catalog.register(catalog.Method("needs", "needs", needs))

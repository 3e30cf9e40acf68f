"""The listing of families: in the docs as in the code, true of what is installed, and heard where a version is untested."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import squeezevit as sv
from squeezevit import cli
from squeezevit.core import supported
from squeezevit.core.supported import listing

DOCS = Path(__file__).parent.parent / "docs" / "models.md"


def test_the_table_in_the_docs_is_the_one_in_the_code():
    text = DOCS.read_text()
    generated = text.split("<!-- generated -->\n")[1].split("<!-- end -->")[0]
    assert generated == supported.as_markdown(), "docs/models.md is out of date: paste what supported.as_markdown() gives"


def test_the_registries_in_the_docs_are_those_that_were_walked():
    rows = json.loads((DOCS.parent.parent / "benchmarks" / "results" / "registry.json").read_text())["rows"]
    counts = Counter((row["library"], row["verdict"]) for row in rows)
    assert not [row["name"] for row in rows if row["verdict"] == "accepted, then fails"]
    verdicts = ("supported", "needs the grid", "supported, not run", "refused", "cannot be built")
    lines = ["| | supported | with `grid=True` | not run | refused | cannot be built |", "|---|---|---|---|---|---|"]
    for library, of in (("timm", "names"), ("transformers", "classes")):
        lines.append(f"| {library}, {of} | {' | '.join(str(counts[library, verdict]) for verdict in verdicts)} |")
    table = DOCS.read_text().split("<!-- registry -->\n")[1].split("<!-- end of registry -->")[0]
    assert table == "\n".join(lines) + "\n"
    assert sum(counts["transformers", verdict] for verdict in verdicts[:2]) >= 110
    assert sum(counts["timm", verdict] for verdict in verdicts[:2]) >= 300


@pytest.mark.parametrize("family", listing(), ids=lambda f: f.library)
def test_the_installed_version_is_a_tested_one_and_has_the_classes(family):
    pytest.importorskip(family.library)
    assert family.tested, f"{family.library} {family.installed}: test it, then widen the range"
    where = {"timm": "timm.models", "torchvision": "torchvision.models.vision_transformer", "open_clip": "open_clip.transformer"}
    module = importlib.import_module(where.get(family.library, family.library))
    elsewhere = {
        "VisionTransformerDistilled": "timm.models.deit",
        "TimmModel": "open_clip.timm_model",
        "NaFlexVit": "timm.models.naflexvit",
        **{name: "timm.models.qwen3_vit" for name in ("Qwen3VitEncoder", "Qwen3VitClassifier")},
    }
    others = []
    if family.library == "transformers":  # some towers are not among what the library names at its top
        from squeezevit.families.transformers import _LAYERS

        paths = [package if "." in package else f"{package}.modeling_{package}" for package in _LAYERS]
        others = [importlib.import_module(f"transformers.models.{path}") for path in paths]
    for name in family.models:
        places = [importlib.import_module(elsewhere[name]) if name in elsewhere else module, *others]
        assert any(hasattr(place, name) for place in places), name


@pytest.mark.parametrize(
    ("installed", "tested"), [("1.0.19", False), ("1.0.20", True), ("1.0.31.dev0", True), ("1.1", False), (None, False)]
)
def test_versions_compare_as_numbers(installed, tested, monkeypatch):
    monkeypatch.setattr(supported.Family, "installed", installed)
    assert listing()[0].tested is tested


def test_an_untested_version_warns_once_and_works():
    code = """
import warnings, timm
from squeezevit.core import supported
supported.TABLE = tuple(supported.replace(f, before="1.0.21") if f.library == "timm" else f for f in supported.TABLE)
import squeezevit as sv
model = timm.create_model("vit_tiny_patch16_224", depth=4)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    sv.reduce_(model, sv.ETPS())
    sv.reduce_(model, sv.TopK())
print([str(w.message) for w in found])
""".replace("supported.replace", "__import__('dataclasses').replace")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.count("is not among the versions that SqueezeViT was tested with, 1.0.20 to below 1.0.21") == 1


def test_the_command_lists_them(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["families"])
    said = capsys.readouterr().out
    assert all(f.library in said for f in listing())
    assert "DINOv3ViTModel" in said and "within windows" in said


def test_the_module_lists_itself():
    assert sv.families() == listing()


def test_names_of_refused_classes_are_listed_by_reason():
    f = replace(listing()[0], refused={"A": "x", "B": "y", "C": "x"})
    assert f.reasons == {"x": ["A", "C"], "y": ["B"]}

"""Every example runs, and says something."""

import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NEEDS = {
    "audio_video": "transformers",
    "train_hf": "transformers",
    "train_vlm": "transformers",
    "train_lightning": "lightning",
    "vlm": "transformers",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, capsys):
    pytest.importorskip(NEEDS.get(path.stem, "squeezevit"))
    with warnings.catch_warnings():
        if path.stem in NEEDS:
            warnings.simplefilter("ignore")  # those of other libraries about each other
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < (60 if path.stem.startswith("train_") else 40)

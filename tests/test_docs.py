"""README and docs say what is true: code blocks run, commands exist, links lead somewhere, tables are those of the results files.

A code block that cannot run has `<!-- not run: reason -->` on the line before it, with a reason of NOT_RUN.
"""

import importlib
import json
import re
import shlex
import socket
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import timm
import transformers
import typer

import squeezevit as sv
import vlm_zoo
from squeezevit import cli
from squeezevit.budget import latency
from squeezevit.cli import app
from squeezevit.reducers import catalog
from squeezevit.report.rows import method_name

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {"executorch and coremltools are no dependencies": 1}  # how many blocks may be left out, by reason
FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMENT = re.compile(r"<!--.*?-->", re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    line: int
    language: str
    code: str
    reason: str | None


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = [Block(text.count("\n", 0, m.start("code")), m["language"], m["code"], m["reason"]) for m in FENCE.finditer(text)]
    return [block for block in found if block.language == language]


def spans(page: Path) -> list[str]:
    """Code within sentences, on one line each."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", page.read_text()))]


def with_code(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    cut_off(monkeypatch, tmp_path)
    return tmp_path


def cut_off(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A folder to run pages in, without a network and in little time.

    What a page asks of a model hub is of the same class, narrower, with random weights. No time is measured: a block takes as many
    seconds as it has tokens.
    """

    def refuse(*args, **kwargs):
        raise AssertionError("a code block asks for the network")

    def create_model(name, pretrained=False, **kwargs):
        return create(name, pretrained=False, **{"embed_dim": 48, "num_heads": 3, **kwargs})

    def from_pretrained(name, **kwargs):
        if Path(name).is_dir():
            return load(name, **kwargs)
        sizes = {"image_size": 56, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3}
        return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes)).eval()

    def profile(meter, *ignored):
        tokens = (meter.about.prefix + 1, meter.about.prefix + meter.patches)
        return latency.Profile(meter.depth, meter.about.prefix, tokens, tokens, tokens, 0.0, 0.0)

    def ratio(meter, reducer, *ignored):
        clock = latency.Clock(meter, reducer)
        return clock.seconds(reducer), clock.seconds(reducer) / clock.dense

    class Processor:
        def apply_chat_template(self, messages, **kwargs):
            return vlm_zoo.prompt("qwen2.5-vl")

        def batch_decode(self, ids, **kwargs):
            return [str(row.tolist()) for row in ids]

    create, load = timm.create_model, transformers.AutoModelForImageClassification.from_pretrained
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda name: vlm_zoo.model("qwen2.5-vl"))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: Processor())
    monkeypatch.setattr(latency, "profile", profile)
    monkeypatch.setattr(latency, "ratio", ratio)
    monkeypatch.setattr(catalog, "_METHODS", dict(catalog._METHODS))  # a method that a page registers is gone afterwards
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))  # of profiles
    monkeypatch.chdir(folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch.onnx")
@pytest.mark.parametrize("page", with_code("python"), ids=lambda page: page.stem)
def test_the_code_blocks_of_a_page_run_in_their_order(page, offline, monkeypatch, capsys):
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses and pickles look for their module
    for block in blocks(page, "python"):
        if block.reason is None:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), vars(module))


def test_code_blocks_are_left_out_for_known_reasons_alone():
    assert Counter(block.reason for page in PAGES for block in blocks(page, "python") if block.reason) == NOT_RUN


def test_code_blocks_say_their_language():
    found = {m["language"] for page in PAGES for m in FENCE.finditer(page.read_text())}
    assert found == {"python", "sh"}
    indented = [
        f"{page.name}: {line}" for page in PAGES for line in FENCE.sub("", page.read_text()).splitlines() if line[:4] == " " * 4
    ]
    assert not [line for line in indented if "squeezevit" in line], "commands stand in blocks of sh"


# commands


@pytest.fixture(scope="module")
def methods_of_pages(tmp_path_factory):
    """The methods that CONTRIBUTING and the tutorial register."""
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, tmp_path_factory.mktemp("pages"))
        before = {*catalog._METHODS}
        for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "tutorials" / "method.md"):
            names = {"__name__": "__main__"}
            for block in blocks(page, "python"):
                exec(block.code, names)
        return {name: row for name, row in catalog._METHODS.items() if name not in before}


@pytest.fixture
def stranger(methods_of_pages, offline):
    """Commands may name the methods that pages register."""
    catalog._METHODS.update(methods_of_pages)  # of this test alone, as `offline` has it


def commands(page: Path) -> list[str]:
    """Lines of the page's blocks of sh."""
    lines = [line for block in blocks(page, "sh") for line in block.code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip()]


def words(command: str) -> list[str]:
    """Without a comment, and without dots that stand for what is yours."""
    return [word for word in shlex.split(command, comments=True) if word != "..."]


def arguments(command: list[str]) -> list[str] | None:
    """What the command line gets, also from a launcher; None where the command is another."""
    return command[command.index("squeezevit") + 1 :] if "squeezevit" in command else None


@cache
def group():
    return typer.main.get_command(app.app)


def require_known(argv: list[str], complete: bool) -> None:
    """Raise where a command, an option or its value is not known, or, if complete, one is missing."""
    place = next(i for i, word in enumerate(argv) if word in group().commands)
    context = group().make_context("squeezevit", list(argv))
    try:
        values = group().commands[argv[place]].make_context(argv[place], argv[place + 1 :], parent=context).params
    except typer.BadParameter as error:
        if complete or type(error).__name__ != "MissingParameter":
            raise
    else:
        for name in f"{values.get('method') or ''},{values.get('methods') or ''}".split(","):
            assert not name or catalog.method(name)


@pytest.mark.parametrize("page", with_code("sh"), ids=lambda page: page.stem)
def test_commands_in_blocks_are_whole(page, stranger):
    for command in map(words, commands(page)):
        argv = arguments(command)
        if argv is None:
            require_elsewhere(" ".join(command))
        else:
            require_known(argv[: argv.index(">")] if ">" in argv else argv, complete=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_sentences_exist(page, stranger):
    for span in spans(page):
        if span.startswith("squeezevit "):
            require_known(words(span)[1:], complete=False)
        elif span.startswith(("make ", "python ", "pip ")):
            require_elsewhere(span)


def require_elsewhere(command: str) -> None:
    """Targets of make, extras of pip and scripts with their options exist."""
    first, *rest = words(command)
    if first == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), command
    elif first == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(name in extras for found in re.findall(r"\[(.+?)\]", command) for name in found.split(",")), command
    else:
        assert first == "python", command
        if rest[0].endswith("/run.py") or rest[:2] == ["-m", "http.server"]:  # of an exported bundle; Python's own
            return
        script = (ROOT / rest[0]).read_text() + (ROOT / "benchmarks" / "workshop.py").read_text()
        assert all(f'"{word}"' in script for word in rest if word.startswith("--")), command


def test_training_commands_are_configurations(offline, capsys):
    """What the training page says in its blocks becomes a whole configuration, recipes and fields of --set included."""
    said_so = [arguments(command) for command in map(words, commands(ROOT / "docs" / "training.md"))]
    trained = [argv for argv in said_so if argv[0] == "train"]
    for argv in trained:
        argv, file = (argv[: argv.index(">")], argv[-1]) if ">" in argv else (argv, None)
        with pytest.raises(SystemExit, match="0"):
            cli.main(argv if "--print-config" in argv else [*argv, "--print-config"])
        said = capsys.readouterr().out
        assert said.startswith("model:"), said
        if file:
            Path(file).write_text(said)
    assert len(trained) == 14


# names and links


def test_names_of_the_package_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:sv|squeezevit)(?:\.\w+)+)", FENCE.sub("", page.read_text())):
            if name.endswith(".json"):
                continue
            module, *rest = name.replace("sv.", "squeezevit.", 1).split(".") if name.startswith("sv.") else name.split(".")
            found = importlib.import_module(module)
            for part in rest:
                if not hasattr(found, part):
                    importlib.import_module(f"{found.__name__}.{part}")
                found = getattr(found, part)


def test_files_that_are_named_exist():
    for page in PAGES:
        for span in spans(page):
            if re.fullmatch(
                r"(src|tests|benchmarks|examples|docs|core|reducers|families|budget|data|bench|report|train|cli)/[\w./-]*", span
            ):
                assert any((base / span).exists() for base in (ROOT, ROOT / "src" / "squeezevit")), f"{page.name}: {span}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """On a code host; what stands in comments is the site's alone, and `make docs` follows it."""
    for link in LINK.findall(COMMENT.sub("", FENCE.sub("", page.read_text()))):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_an_index():
    """Of its own folder, or, as all that is not in a folder of the pages, in that of docs/."""
    docs = ROOT / "docs"
    for page in PAGES:
        index = page.parent / "index.md" if page.parent != ROOT and page.name != "index.md" else docs / "index.md"
        assert page == index or page.resolve() in {
            (index.parent / link.split("#")[0]).resolve() for link in LINK.findall(index.read_text())
        }


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 90


def test_the_readme_counts_right():
    model = timm.create_model("deit_small_patch16_224")
    counts = [sv.macs(model), sv.macs(sv.reduce_(model, sv.ETPS(keep=0.5, at=(3, 6, 9))))]
    assert "{:.2f} -> {:.2f} GMACs".format(*(count / 1e9 for count in counts)) in (ROOT / "README.md").read_text()


# tables


def table(page: Path, first: str) -> list[list[str]]:
    """Rows of the table whose header begins so, cells without bold."""
    lines = iter(page.read_text().splitlines())
    assert any(line.startswith(first) for line in lines), first
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return rows


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@cache
def label_of(method: str, label: str | None) -> str:
    return catalog.method(method_name({"method": method, "label": label or method})).label


def label(row: dict) -> str:
    return label_of(row["method"], row.get("label"))


def percent(row: dict) -> str:
    return f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_se']:.1f}"


def cosine(row: dict) -> str:
    return f"{row.get('cosine', 1):.3f}"


def test_the_table_of_the_readme_is_of_its_file():
    board = results("leaderboard")
    tasks = {
        task: {label(r): r for r in (board[task]["dense"], *board[task]["rows"]) if r["share"] in (0.5, 1)}
        for task in ("emoji", "cells", "photographs")
    }
    found = table(ROOT / "README.md", "| method | emoji accuracy")
    assert len(found) == 7 and found[0][0] == "unreduced"
    for name, *cells in found:
        emoji, cell, photo = (rows[name] for rows in tasks.values())
        assert cells == [percent(emoji), cosine(emoji), percent(cell), cosine(cell), cosine(photo)], name


def test_the_whole_comparison_is_of_the_same_file():
    board = results("leaderboard")
    tasks = [(board[task]["dense"], *board[task]["rows"]) for task in ("emoji", "cells", "cells at 112", "photographs")]
    found = table(ROOT / "docs" / "training-free.md", "| MACs | method | emoji accuracy")
    assert len(found) == 28
    for share, name, *cells in found:
        *probed, photo = (
            next(r for r in rows if f"{r['share']:.0%}" == share.replace(" ", "") and label(r) == name) for rows in tasks
        )
        assert cells == [text for row in probed for text in (percent(row), cosine(row))] + [cosine(photo)], (share, name)


def test_the_headline_of_the_readme_is_of_its_file():
    demo = results("demo")
    row = next(r for r in demo["rows"] if label(r) == "training-free" and r["target"] == 0.5)
    headline = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("**"))
    assert (
        f"{row['speedup']:.2f} times as fast" in headline
        and f"({percent(row)} %, unreduced {percent(demo['dense'])} %)" in headline
    )
    assert row["accuracy"] >= demo["dense"]["accuracy"]


def test_the_table_of_the_demo_is_of_its_file():
    demo = results("demo")
    found = table(ROOT / "docs" / "results.md", "| method | % of dense MACs")
    assert len(found) == 1 + len(demo["rows"])
    for cells, row in zip(found, [demo["dense"], *demo["rows"]], strict=True):
        against = f"{100 * row['paired_difference']:+.1f} ± {100 * row['paired_difference_se']:.1f}" if row["target"] < 1 else ""
        share, cost, speedup = f"{100 * row['macs_share']:.1f}", f"{row['macs'] / 1e9:.2f}", f"{row['speedup']:.2f}"
        assert cells == [label(row), share, cost, speedup, percent(row), against, cosine(row)]


def test_the_tables_of_the_vision_language_page_are_of_their_files():
    page, cost, quality = ROOT / "docs" / "vlm.md", results("vlm")["rows"], results("vlm_quality")["rows"]
    for cells, row in zip(table(page, "| keep | method | prompt"), cost, strict=True):
        shares = [
            f"{row[name]:.{digits}f}" for name, digits in (("prefill_share_best", 3), ("of_predicted_best", 2), ("of_text_best", 2))
        ]
        assert cells[:3] == [f"{row['keep']:g}", row["what"], str(row["tokens"])] and cells[4:7] == shares
        assert cells[3] == f"{row['prefill_seconds_best']:.2f} s" and cells[8] == f"{row['cache_bytes'] / 2**20:.2f} MiB"
        assert cells[7] == f"{1e3 * row['squeeze_seconds_best']:.0f} ms" and cells[9] == f"{row['tokens_per_second_best']:.1f}"
    for cells, row in zip(table(page, "| keep | ends"), results("vlm_both")["rows"], strict=True):
        shares = [f"{row['of_dense_best']:.3f}", f"{row['of_dense']:.3f}"]
        assert cells == [f"{row['keep']:g}", row["ends"], f"{row['seconds_best']:.2f} s", *shares]
    found = table(page, "| method, places")
    for name, *cells in found:
        rows = [row for row in quality if f"{row['what']}, {row['places']}" == name]
        rows.sort(key=lambda row: -row["tokens"])
        assert cells == [f"{r['kl']:.3f} ± {r['kl_se']:.3f}" for r in rows] + [f"{100 * r['accuracy']:.1f}" for r in rows]
    assert len(found) == 22 and len(quality) == 1 + 4 * len(found)


def test_the_tables_of_the_page_on_scale_are_of_their_files():
    page, rows = ROOT / "docs" / "scale.md", results("scale")["rows"]
    for cells, row in zip(table(page, "| MACs | method | recall@10"), results("recall")["rows"], strict=True):
        assert cells == [
            f"{100 * row['share']:.0f} %", row["label"], f"{row['recall_apart']:.3f} ± {row['recall_apart_se']:.3f}",
            f"{row['recall_mixed']:.3f} ± {row['recall_mixed_se']:.3f}", f"{row['first_apart']:.3f}", f"{row['regret']:.4f}",
        ]  # fmt: skip
    memory = [row for row in rows if row["what"] == "memory"]
    for cells, row in zip(table(page, "| photographs | actor"), memory, strict=True):
        peaks = [f"{row['peak_mib'][role]:.0f}" for role in ("actor", "decoding task", "driver")]
        assert cells == [f"{row['images']:,}", *peaks]
    paper = [row for row in rows if row["what"] == "paper"]
    for cells, row in zip(table(page, "| photographs | model | decoding"), paper, strict=True):
        size = "{} x {}".format(*row["pixels"]) + (", draft" if row["draft"] else "")
        times = [f"{row['decoding_ms']:.1f}", f"{row['model_ms']:.1f}"]
        assert cells[:4] == [size, f"{row['format']}, {100 * row['share']:.0f} %", *times]
        hours = [row["core_hours"][count] for count in ("1e+07", "1e+09")]
        each = row["decoding_ms"] + row["model_ms"]
        assert hours == pytest.approx([10**7 * each / 3.6e6, 10**9 * each / 3.6e6])
        assert cells[4:] == [f"{100 * row['decoding_share']:.0f} %", *map(", ".join, zip(
            (f"{h:,.0f}" for h in hours),
            (f"{row['hours'][count]:.1f} h" for count in ("1e+07", "1e+09")),
            (f"$ {row['dollars'][count]:,.0f}" for count in ("1e+07", "1e+09")),
            strict=True,
        ))]  # fmt: skip


def test_the_table_of_the_browser_is_of_its_file():
    rows = results("browser")["rows"]
    found = table(ROOT / "docs" / "deploy.md", "| weights | method | ms")
    assert len(found) == len(rows) == 8
    for cells, row in zip(found, rows, strict=True):
        assert cells[:2] == [f"{row['precision']}, {row['megabytes']:.0f} MB", label(row)]
        assert cells[2:4] == [f"{row['ms']:.0f} ({row['ms_best']:.0f})", f"{row['speedup']:.2f} ({row['speedup_best']:.2f})"]
        assert cells[4:] == [f"{row['cosine']:.3f}", f"{row['rounding']:.3f}"]


def test_one_preset_has_one_name():
    cells = [
        cell.strip(" *") for page in PAGES for line in page.read_text().splitlines() if line[:1] == "|" for cell in line.split("|")
    ]
    assert not [cell for cell in cells if cell.split(" ")[0] == "preset"]

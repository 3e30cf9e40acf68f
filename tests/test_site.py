"""The site of the pages: every public name is on the API pages, quoted messages are those of the source, results get their pages.

`make docs` builds it, with warnings as errors; what is here needs no build.
"""

import doctest
import importlib
import inspect
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("griffe")
pytest.importorskip("mkdocs")
import griffe

import docstrings
import dotplots
import hooks
import listings
import mechanism
import messages
import results
import squeezevit as sv
import squeezevit.extend
import values

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def documented() -> list[tuple[str, object]]:
    """What the API pages ask for, by path, and what that is."""
    paths = [path for page in sorted((DOCS / "api").glob("*.md")) for path in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    return [(path, found(path)) for path in paths]


def found(path: str) -> object:
    """A module, or what it holds under the path's last name."""
    holder, _, name = path.rpartition(".")
    module = importlib.import_module(holder)
    return getattr(module, name) if hasattr(module, name) else importlib.import_module(path)


@pytest.mark.parametrize("module", [sv, squeezevit.extend], ids=lambda module: module.__name__)
def test_every_public_name_is_on_the_api_pages(module):
    there = [id(thing) for _, thing in documented()]
    assert [name for name in module.__all__ if id(getattr(module, name)) not in there] == []


def test_nothing_is_on_the_api_pages_twice():
    paths = [path for path, _ in documented()]
    assert len(paths) == len(set(paths))


@pytest.fixture(scope="module")
def loaded():
    """The package as the API pages read it, without importing it."""
    extensions = griffe.load_extensions(docstrings.Prose())
    return griffe.load("squeezevit", search_paths=[ROOT / "src"], extensions=extensions, resolve_aliases=True)


def test_every_parameter_is_in_a_signature_of_the_api_pages(loaded):
    for path, thing in documented():
        if not callable(thing) or (isinstance(thing, type) and issubclass(thing, Exception)):
            continue
        read = loaded[path.removeprefix("squeezevit.")]
        wanted = [name for name in inspect.signature(thing).parameters if name not in ("args", "kwargs")]
        shown = {parameter.name.lstrip("*") for parameter in read.parameters}
        assert [name for name in wanted if name not in shown] == [], path


def test_comments_behind_fields_are_read(loaded):
    assert loaded["core.reducer.Reduction.hosts"].docstring.value.startswith("[B, R], None where pruned tokens")
    assert "- **`at`**: 0-based block indices" in loaded["core.reducer.Staged"].docstring.value


def quotes() -> list[str]:
    """Messages that the page of remedies quotes in its headings."""
    return re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.M)


@pytest.fixture(scope="module")
def collected() -> list[str]:
    return [message.text for message in messages.collect()]


@pytest.mark.parametrize("quote", quotes())
def test_a_quoted_message_is_one_of_the_source(quote, collected):
    parts = [re.escape(part.strip()) for part in quote.split(messages.GAP) if part.strip()]
    assert any(re.search(".*".join(parts), text) for text in collected), quote


def test_messages_are_collected(collected):
    assert len(quotes()) > 40 and len(collected) > 350
    assert not [text for text in collected if "{" in text and "'mean'" not in text and "{'name'" not in text], "braces are gaps"


def test_every_results_file_has_an_experiment():
    assert [name for name in results.files() if name not in results.EXPERIMENTS] == []
    assert [name for name in results.EXPERIMENTS if name not in results.files()] == []


def test_pages_of_results_hold_every_row():
    pages = results.pages()
    assert len(pages) == 1 + len(results.files())
    for name, path in results.files().items():
        rows = sum(len(rows) for _, rows in results.sections(results.json.loads(path.read_text())))
        assert pages[f"benchmarks/{name}.md"].count("<tr>") == rows + pages[f"benchmarks/{name}.md"].count("<thead>") > 0, name


def test_a_page_of_results_has_its_numbers():
    page = results.pages()["benchmarks/leaderboard.md"]
    emoji = results.json.loads((results.RESULTS / "leaderboard.json").read_text())["emoji"]
    first = next(row for row in emoji["rows"] if row["method"] == "training-free" and row["share"] == 0.5)
    assert f"{100 * first['accuracy']:.1f} ± {100 * first['accuracy_se']:.1f}" in page and "AMD EPYC" in page
    assert "python benchmarks/leaderboard.py" in page and page.count("ms an image, batch 16") == page.count("ms an image, batch 1<")
    assert " G<" not in results.pages()["benchmarks/dense.md"], "it has no multiply-adds, so its charts have shares alone"
    assert "1.65 G<" in results.pages()["benchmarks/demo.md"]


@pytest.mark.parametrize("module", [docstrings, hooks, messages, dotplots, values], ids=lambda module: module.__name__)
def test_examples_of_the_tools_hold(module):
    told = doctest.testmod(module)
    assert told.attempted and not told.failed


def test_plots_need_values():
    assert dotplots.dots([], "ms") == ""
    assert 'aria-label="ms: 2 rows from 1 to 3' in dotplots.dots([("a", "", 1.0), ("b", "", 3.0)], "ms")


@pytest.mark.parametrize("draw", [mechanism.stages, mechanism.stage, mechanism.weights, mechanism.blocks, mechanism.mass])
def test_a_drawing_is_that_of_its_script(draw):
    text = (DOCS / "how" / f"{draw.__name__}.svg").read_text()
    assert draw() == text, "run python docs/tools/mechanism.py"
    assert ElementTree.fromstring(text).find("{http://www.w3.org/2000/svg}title").text


def test_drawn_counts_are_those_of_the_library():
    reducer = sv.ETPS(keep=0.5)
    n = 196
    for j, shown in enumerate((98, 49, 25)):
        n = reducer.count(j, n, 196)
        assert shown == n
    assert mechanism.counts(196, 0.5, (3, 6, 9), 12) == [196] * 3 + [98] * 3 + [49] * 3 + [25] * 3


def test_links_of_the_repository_become_pages():
    assert hooks.place_of("README.md") == ("index.md", "")
    assert hooks.place_of("benchmarks/results/finetune/cpu") == ("benchmarks/finetune.md", "")
    assert hooks.section("Three lines").startswith("```python")


def test_the_command_line_is_listed():
    page = listings.commands()
    assert "## squeezevit bench" in page and "<code>--batch-size</code>" in page


def test_nothing_is_fetched_from_elsewhere():
    config, assets = (ROOT / "mkdocs.yml").read_text(), (DOCS / "assets").glob("*")
    assert "font: false" in config and "analytics" not in config
    assert not [file.name for file in assets if re.search(r"https?://(?!www\.w3\.org/)", file.read_text())]


def test_charts_have_a_colour_for_each_method_in_both_schemes():
    light, dark = hooks.colours().splitlines()
    assert light.startswith('[data-md-color-scheme="default"]') and "--m-class-token: #004d40;" in light
    assert dark.startswith('[data-md-color-scheme="slate"]') and "--m-class-token: #7fe0cf;" in dark

"""What the site has beside the files of docs/: pages of the repository's other files, and links that lead to them there.

Links in the sources are those of the repository, so that a code host shows them as they are; here each becomes the page that its
file has on the site. A page of tokens in the browser, `site/page/`, that another command built stays where it is.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import listings
import messages
import results
from squeezevit.report import charts

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
PART = re.compile(r"^<!-- README\.md: (.+) -->$", re.M)
ALONE = re.compile(r"^<!-- site: (.+) -->$", re.M)  # what only the site has, and a code host should not show
DRAWING = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>(?:\.\./)*how/[\w-]+\.svg)\)")
REPOSITORY = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
SOURCES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
ELSEWHERE: set[str] = set()  # links to other sites, for a list
MADE_IN_THE_BROWSER = "page/index.html"
METHODS = "assets/methods.css"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the browser's page aside, which mkdocs would delete, and give every results file its place in the navigation."""
    site = Path(config.site_dir)
    if (site / "page").is_dir() and not (site / ".page").exists():
        (site / "page").rename(site / ".page")
    benchmarks = next(part["Benchmarks"] for part in config.nav if "Benchmarks" in part)
    benchmarks.extend({group: pages} for group, pages in results.navigation().items())
    return config


def colours() -> str:
    """The methods' colours in charts, on white and on black."""
    schemes = {"default": charts.css_variables(dark=False), "slate": charts.css_variables(dark=True)}
    return "".join(f'[data-md-color-scheme="{name}"] {{ {variables} }}\n' for name, variables in schemes.items())


def on_post_build(config: MkDocsConfig) -> None:
    """Put the browser's page back, and list what leads elsewhere: nobody follows those links here, as a build needs no network."""
    site = Path(config.site_dir)
    (site / "links.txt").write_text("".join(f"{link}\n" for link in sorted(ELSEWHERE)))
    if (site / ".page").is_dir():
        (site / ".page").rename(site / "page")


def on_build_error(error: Exception, **kwargs: Any) -> None:
    site = ROOT / "site"
    if (site / ".page").is_dir():
        (site / ".page").rename(site / "page")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "examples.md": listings.examples(ROOT / "examples"),
        "messages.md": messages.page(),
        "api/command-line.md": listings.commands(),
        METHODS: colours(),
        **results.pages(),
    }
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")
    markdown = PART.sub(lambda found: relinked(section(found[1]), "README.md", uri, files), markdown)
    markdown = relinked(ALONE.sub(r"\1", markdown), source, uri, files)
    if uri == "index.md":
        markdown = markdown.replace("<!-- buttons -->", buttons(Path(config.site_dir)))
        markdown = re.sub(r"^\| \[README\].*\n", "", markdown, flags=re.M)  # whose parts stand here
        page.meta["hide"] = ["navigation", "toc"]
    if uri.startswith("benchmarks/"):
        page.meta["hide"] = ["toc"]  # tables take the room
    return DRAWING.sub(lambda found: drawing(found, source), markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """A script of ours for pages opened from the disk, where the theme would ask another machine for one."""
    ELSEWHERE.update(re.findall(r'<a [^>]*href="(https?://[^"]+)"', output))
    own = posixpath.relpath("assets/worker.js", posixpath.dirname(page.file.dest_uri) or ".")
    return output.replace("https://unpkg.com/iframe-worker/shim", own)


def section(title: str) -> str:
    """The text under a heading of the README, up to the next section."""
    text = (ROOT / "README.md").read_text()
    return re.split(rf"^##? {re.escape(title)}\n", text, flags=re.M)[1].split("\n## ", 1)[0].strip("\n")


def relinked(markdown: str, source: str, uri: str, files: Files) -> str:
    """Links of a file of the repository as links of a page of the site; those that have no page stay, and mkdocs complains."""

    def new(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
        target, anchor = place_of(path)
        if files.get_file_from_path(target) is None:
            return found[0]
        return posixpath.relpath(target, posixpath.dirname(uri) or ".") + (anchor or found["anchor"] or "")

    outside = FENCE.split(markdown)
    return "".join(a + b for a, b in zip((LINK.sub(new, part) for part in outside), [*FENCE.findall(markdown), ""], strict=True))


def place_of(path: str) -> tuple[str, str]:
    """The page of a file of the repository, and the anchor there.

    >>> place_of("docs/guide.md"), place_of("benchmarks/results/why.json"), place_of("examples/vlm.py")
    (('guide.md', ''), ('benchmarks/why.md', ''), ('examples.md', '#vlmpy'))
    """
    if path in REPOSITORY:
        return REPOSITORY[path], ""
    if path.startswith("benchmarks/results/"):
        return f"benchmarks/{results.page_of(path.removeprefix('benchmarks/results/'))}.md", ""
    if path == "examples":
        return "examples.md", ""
    if path.startswith("examples/"):
        return "examples.md", "#" + path.removeprefix("examples/").replace(".", "")
    return path.removeprefix("docs/"), ""


def drawing(found: re.Match[str], source: str) -> str:
    """A drawing of ours within the page, so that it follows the page's dark and light."""
    svg = (ROOT / posixpath.dirname(source) / found["path"]).read_text()
    return f'<figure class="drawing">{svg.strip()}</figure>'


def buttons(site: Path) -> str:
    """Ways to begin; the page that computes in the browser is one of them where it was built."""
    ways = [
        "[Your first reduction](tutorials/first.md){ .md-button .md-button--primary }",
        "[How it works](how-it-works.md){ .md-button }",
    ]
    if (site / ".page" / "index.html").exists():
        ways.append(f'<a class="md-button" href="{MADE_IN_THE_BROWSER}">Squeeze a photograph of yours in this browser</a>')
    return " ".join(ways)

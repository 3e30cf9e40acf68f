"""The report and its pictures: what must be true of them, not how they look."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from PIL import Image  # noqa: E402

from squeezevit.errors import ConfigError, DataError  # noqa: E402
from squeezevit.reducers import ETPS, Identity, ToMe, TopK, catalog  # noqa: E402
from squeezevit.report import (  # noqa: E402
    Panel,
    StageGroups,
    charts,
    demo,
    draw_stage,
    figure,
    panels,
    show,
    stages_from_trace,
    write_report,
)
from squeezevit.report.charts import accuracy_chart, cosine_chart, speed_chart  # noqa: E402
from squeezevit.report.findings import few_left, findings, headline, ties  # noqa: E402
from squeezevit.report.html import picture_uri  # noqa: E402
from squeezevit.report.overlay import (  # noqa: E402
    columns_for,
    fill_stage,
    group_colours,
    outline_mask,
    palette,
    patch_of_pixel,
)
from squeezevit.report.rows import current, method_name  # noqa: E402

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LABELS = {
    "etps": "eTPS", "etps+mass": "eTPS+mass", "evit": "EViT", "topk": "TopK", "tome": "ToMe", "random": "Random",
}  # fmt: skip
GREY = np.full((224, 224, 3), 150, dtype=np.uint8)
VOID = {"meta", "img", "br", "wbr", "hr", "link", "input"}


def photo(height: int = 224, width: int = 224) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


def trace(stages: list[tuple[list[int], list[int] | None]], patches: int, extra: bool = False) -> SimpleNamespace:
    """A finished trace of one image: per stage the kept tokens, and the others' hosts, or None if they are dropped."""
    group = np.arange(patches)
    traced, groups = [], []
    count = patches
    for block, (kept, hosts) in enumerate(stages, start=3):
        pruned = [i for i in range(count) if i not in kept]
        goes_to = np.full(count, -1)
        goes_to[kept] = np.arange(len(kept))
        if hosts is not None:
            goes_to[pruned] = hosts
        group = np.where(group >= 0, goes_to[group], -1)
        rows = (None if row is None else torch.tensor([row]) for row in (kept, pruned, hosts))
        named = dict(zip(("kept", "pruned", "hosts"), rows, strict=True))
        traced.append(SimpleNamespace(block=block, scores=None, **named))
        groups.append(torch.from_numpy(group)[None])
        count = len(kept) + extra
    return SimpleNamespace(stages=traced, groups=groups[-1], groups_after=lambda index: groups[index])


def row(method: str, target: float, accuracy: float, **other: Any) -> dict[str, Any]:
    return {
        "method": method,
        "label": LABELS.get(method, method),
        "reducer": f"{method}(at=(3, 6, 9))",
        "target": target,
        "macs": int(target * 6e9),
        "macs_share": target,
        "tokens": [182, 130, 92],
        "images_per_second": 40 / target,
        "speedup": 0.9 / target,
        "speedup_best": 0.95 / target,
        "accuracy": accuracy,
        "accuracy_se": 0.018,
        "paired_difference": accuracy - 0.85,
        "paired_difference_se": 0.01,
        "cosine": 0.5 + accuracy / 2,
        "cosine_se": 0.002,
        **other,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    methods = {"etps": 0.83, "etps+mass": 0.845, "evit": 0.8, "topk": 0.76, "tome": 0.842, "random": 0.81}
    rows = [row(m, t, a - (0.65 - t) / 5) for t in (0.65, 0.5, 0.35) for m, a in methods.items()]
    return {
        "created": "2000-01-01T00:00:00+00:00",
        "command": "squeezevit demo --out 'a <b> & c'",
        "machine": {"cpu": "a <processor>", "cores": 2, "threads": 1, "device": "cpu"},
        "versions": {"torch": "0.0"},
        "settings": {"image_size": 224, "n_train": 8, "n_test": 4, "seed": 0, "batch_size": 2, "rounds": 3, "quick": False},
        "model": {"name": "vit_test", "parameters": 22_000_000, "weights": "none", "sha256": "0" * 64},
        "dense": row("dense", 1.0, 0.85, cosine=1.0, speedup=1.0),
        "rows": rows,
        "seconds": 1.0,
    }  # fmt: skip


class Page(HTMLParser):
    """A page as a list of tags and its text; fails where a tag is left open or closed twice."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.words = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.words += data
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data


def render(results: dict[str, Any], tmp_path: Any, figures: dict[str, Any] | None = None) -> tuple[Page, str]:
    path = tmp_path / "report.html"
    write_report(results, figures or {}, path)
    source = path.read_text(encoding="utf-8")
    return Page(source), source


def test_stages_follow_every_token_to_its_own_patch() -> None:
    first, second = stages_from_trace(trace([([0, 2, 3], [0, 2, 2]), ([0, 2], [1])], patches=6))
    assert first.after.tolist() == [0, 0, 1, 2, 2, 2]
    assert first.pruned.tolist() == [False, True, False, False, True, True]
    assert second.before.tolist() == first.after.tolist()
    assert second.after.tolist() == [0, 0, 1, 1, 1, 1]
    assert second.pruned.tolist() == [False, True, True, False, True, True]
    assert (first.caption, second.caption) == ("block 3: 3 reserved, 3 pruned", "block 4: 2 reserved, 1 pruned")


def test_stages_of_dropped_tokens_have_no_group() -> None:
    (stage,) = stages_from_trace(trace([([1, 2], None)], patches=4))
    assert stage.after.tolist() == [-1, 0, 1, -1]
    assert not stage.hosted
    assert "2 dropped" in stage.caption


def test_an_extra_token_has_no_own_patch() -> None:
    first, second = stages_from_trace(trace([([0, 1], [2, 2]), ([0, 2], [2])], patches=4, extra=True))
    assert first.extra == 1
    assert first.pruned.tolist() == [False, False, True, True]
    assert second.pruned.tolist() == [False, True, True, True]


@pytest.mark.parametrize("grid", [(4, 6), (7, 5), (16, 16)])
@pytest.mark.parametrize("wished", [False, True])
def test_groups_that_touch_differ_in_colour(grid: tuple[int, int], wished: bool) -> None:
    rng = np.random.default_rng(0)
    after = rng.integers(-1, grid[0] * grid[1] // 3, grid[0] * grid[1])
    previous = np.zeros(len(after), dtype=int) if wished else None
    colours = group_colours(after, grid, previous).reshape(grid)
    groups = after.reshape(grid)
    for y in range(grid[0]):
        for x in range(grid[1]):
            shared = groups[y, x] >= 0 and (after == groups[y, x]).sum() > 1
            assert (colours[y, x] >= 0) == shared
            for other in ((y, x + 1), (y + 1, x - 1), (y + 1, x), (y + 1, x + 1)):
                if other[0] < grid[0] and 0 <= other[1] < grid[1] and min(colours[y, x], colours[other]) >= 0:
                    assert (colours[y, x] == colours[other]) == (groups[y, x] == groups[other])


def test_a_group_keeps_its_colour_from_stage_to_stage() -> None:
    first = np.array([0, 0, 1, 1, 2, 2, 2, 3])
    second = np.array([0, 0, 1, 1, 1, 1, 1, 3])
    before = group_colours(first, (1, 8))
    assert group_colours(second, (1, 8), before)[4] == before[4]


def test_colours_can_be_told_apart() -> None:
    colours = palette(12)
    gaps = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + np.eye(12)
    assert gaps.min() > 0.15
    assert np.array_equal(palette(30)[:12], colours)


def test_outline_lies_exactly_on_group_borders() -> None:
    grid, size = (3, 4), (90, 122)
    after = np.array([0, 0, 1, 1, 0, 2, 2, 1, 3, 3, 2, 1])
    group = after[patch_of_pixel(grid, size)]
    mask = outline_mask(group, 1)
    expected = np.zeros(size, dtype=bool)
    for y in range(size[0]):
        for x in range(size[1]):
            around = group[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            expected[y, x] = (around != group[y, x]).any()
    assert np.array_equal(mask, expected)
    assert not outline_mask(np.zeros(size, dtype=int), 3).any()


def test_drawing_changes_borders_and_pruned_patches_only() -> None:
    """On a reserved patch that hosts others only border and dot are drawn; between patches of one group nothing is."""
    after = np.repeat(np.arange(8), 8)  # one group per row of patches
    pruned = np.arange(64) % 8 != 0
    drawn = np.asarray(draw_stage(GREY, np.arange(64), after, (8, 8), pruned)).astype(int)
    cell = drawn.shape[0] // 8
    hosts = drawn[:, :cell]
    reserved = (hosts == 150).all(axis=-1)
    assert reserved.mean() > 0.4
    inside = drawn[cell // 2, 2 * cell : 7 * cell]
    assert (inside == inside[0]).all()
    assert (inside[0] != 150).any()
    border = drawn[cell - 1, 2 * cell : 7 * cell]
    assert (np.abs(border - inside[0]).sum(axis=-1) > 60).all()
    line = palette(12)[group_colours(after, (8, 8))[0]] * 255
    assert np.abs(drawn[cell - 3, 2 * cell : 7 * cell] - line).max() <= 1


def test_untouched_tokens_show_the_photograph() -> None:
    stage = np.arange(64)
    drawn = np.asarray(draw_stage(GREY, stage, stage, (8, 8), np.zeros(64, dtype=bool)))
    mask = outline_mask(stage[patch_of_pixel((8, 8), drawn.shape[:2])], 1)
    assert (drawn[~mask] == 150).all()
    assert (drawn[mask] < 150).all()


def test_dropped_patches_are_darker_and_darker_still_when_dropped_earlier() -> None:
    before, after = np.arange(64), np.arange(64)
    before[:16] = after[:32] = -1
    drawn = np.asarray(draw_stage(GREY, before, after, (8, 8), after < 0)).mean(axis=(1, 2))
    earlier, now, kept = (part.mean() for part in (drawn[:110], drawn[114:222], drawn[226:]))
    assert earlier < now < 0.7 * kept
    assert len(np.unique(np.asarray(draw_stage(GREY, before, after, (8, 8), after < 0))[30:50, 30:50])) > 1  # the hatch


def test_what_joined_now_is_washed_more_strongly() -> None:
    before, after = np.arange(64), np.zeros(64, dtype=int)
    before[:32] = 0
    pruned = np.arange(64) > 0
    drawn = np.asarray(draw_stage(GREY, before, after, (8, 8), pruned)).astype(int)
    early, late = np.abs(drawn[150, 300] - 150).sum(), np.abs(drawn[400, 300] - 150).sum()
    assert late > 1.2 * early


def test_a_group_is_filled_with_the_mean_colour_of_its_patches() -> None:
    grid, after = (8, 8), np.arange(64) // 3  # groups that go over the ends of rows
    drawn = np.asarray(fill_stage(picture := photo(448, 448), after, grid))
    group = after[patch_of_pixel(grid, drawn.shape[:2])]
    inside = ~outline_mask(group, 1)
    for number in (0, 7, 21):
        mean = picture[group == number].mean(axis=0)
        assert np.abs(drawn[inside & (group == number)] - mean).max() <= 0.5
    line = np.abs(drawn[~inside].astype(int) - np.stack([picture[group == g].mean(axis=0) for g in group[~inside]]))
    assert line.sum(axis=-1).min() > 30
    assert (~inside).mean() < 0.1  # thin


def test_dropped_patches_are_hatched_and_dark_among_mean_colours() -> None:
    after = np.where(np.arange(64) < 32, -1, np.arange(64) - 32)
    drawn = np.asarray(fill_stage(GREY, after, (8, 8)))
    dropped, kept = drawn[20:200], drawn[250:430]
    assert dropped.mean() < 0.6 * kept.mean()
    assert len(np.unique(dropped[5:25, 5:25])) > 1 and (kept == 150).mean() > 0.8


def test_styles_are_two() -> None:
    stages = stages_from_trace(trace([(list(range(8)), list(range(8)))], patches=16))
    mean, outlines = (np.asarray(panels(photo(), stages, style=style)[1].image) for style in ("mean", "outlines"))
    assert np.array_equal(mean, np.asarray(panels(photo(), stages)[1].image))
    assert not np.array_equal(mean, outlines)
    with pytest.raises(ConfigError, match="style 'cubist' is not known; choose from mean, outlines"):
        show.check_style("cubist")


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 1), (5, 1), (6, 2), (7, 2), (9, 3), (13, 3), (25, 5)])
def test_no_row_of_a_figure_is_nearly_empty(count: int, rows: int) -> None:
    columns = columns_for(count)
    assert -(-count // columns) == rows
    assert count - (rows - 1) * columns >= 0.6 * columns


@pytest.mark.parametrize(
    ("reducer", "counts", "fewer", "words"),
    [
        (ETPS(keep=0.5), [(257, 129), (129, 65), (65, 33)], 2.13, "eTPS, half of the tokens at each of 3 stages, 2.1 x fewer"),
        (TopK(keep=0.7), [(256, 180)], 1.04, "TopK, 70 % of the tokens at one stage, 4 % fewer multiply-adds"),
        (TopK(keep=0.5), [(4, 2)], 1.5, "TopK, half of the tokens at one stage"),
        (TopK(keep=0.7), [(4, 3)], 1.5, "TopK, three quarters of the tokens at one stage"),
        (ToMe(r=8), [(64, 56), (56, 48), (48, 40)], 1.0, "ToMe, from 64 to 40 tokens in 3 stages, as many multiply-adds"),
        (Identity(), [], 1.0, "unreduced, as many multiply-adds"),
    ],
)
def test_titles_say_what_was_counted(reducer: Any, counts: list[tuple[int, int]], fewer: float, words: str) -> None:
    none = np.zeros(0, dtype=int)
    stages = [StageGroups(3, none, none, none < 0, k, n - k) for n, k in counts]
    assert show.in_words(reducer, stages, fewer).startswith(words)


@pytest.mark.parametrize(("size", "grid"), [((224, 336), (16, 24)), ((518, 518), (37, 37)), ((250, 199), (7, 5))])
def test_any_size_and_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    count = grid[0] * grid[1]
    after = np.arange(count) // 3
    drawn = draw_stage(photo(*size), np.arange(count), after, grid, np.arange(count) % 3 > 0)
    assert drawn.width * size[0] == drawn.height * size[1]
    assert min(drawn.size) >= 448


def test_shapes_that_do_not_fit_are_refused() -> None:
    index = np.arange(63)
    with pytest.raises(DataError, match="after has shape"):
        draw_stage(photo(), np.arange(64), index, (8, 8), np.zeros(64, dtype=bool))
    with pytest.raises(DataError, match="uint8"):
        draw_stage(photo().astype(float), np.arange(64), np.arange(64), (8, 8), np.zeros(64, dtype=bool))
    with pytest.raises(DataError, match="63 patches form no square"):
        panels(photo(), [StageGroups(3, index, index, index < 0, 63, 0)])


def test_figure_has_a_panel_per_stage() -> None:
    stages = stages_from_trace(trace([(list(range(8)), list(range(8))), ([0, 3, 5], [0, 1, 2, 0, 1])], patches=16))
    drawn = panels(photo(), stages)
    assert [panel.caption for panel in drawn] == [
        "photograph, 16 patches",
        "block 3: 8 reserved, 8 pruned",
        "block 4: 3 reserved, 5 pruned",
    ]
    one_row, one_column = figure(photo(), stages, title="title"), figure(photo(), stages, columns=1)
    assert one_row.width > 3 * 448
    assert one_column.height > 3 * 448
    assert figure(photo(), []).width < 600


def test_report_is_whole_and_loads_nothing(results: dict[str, Any], tmp_path: Any) -> None:
    picture = Image.fromarray(photo())
    page, source = render(results, tmp_path, {"cell 1": picture, "cell 2": [Panel(picture, "photograph")]})
    assert "http" not in source
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', source)
    assert references
    assert set(references) <= set(ids)
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_report_has_every_row_with_its_numbers(results: dict[str, Any], tmp_path: Any) -> None:
    page, _ = render(results, tmp_path)
    table = [cells for cells in page.cells if len(cells) > 1]
    assert len(table) == 1 + 1 + len(results["rows"])
    for expected, cells in zip([results["dense"], *results["rows"]], table[1:], strict=True):
        assert cells[0] == expected["label"] + expected["reducer"]
        assert cells[1] == f"{expected['macs'] / 1e9:.2f}"
        assert f"{100 * expected['accuracy']:.1f} ± 1.8" in cells[5]


def test_report_escapes_what_it_is_given(results: dict[str, Any], tmp_path: Any) -> None:
    for other in (results["rows"][0], results["rows"][6]):
        other.update(method="<i>&new", label="<script>alert(1)</script>", reducer='X(a="<&>")')
    page, source = render(results, tmp_path, {"<u>figure</u>": Image.fromarray(photo())})
    assert not {"script", "i", "u", "b"} & {tag for tag, _ in page.tags}
    for text in ("<script>alert(1)</script>", 'X(a="<&>")', "a <b> & c", "a <processor>", "<u>figure</u>"):
        assert text in page.words
    assert "<i>" not in source


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_report_fits_a_phone(with_preset: dict[str, Any], tmp_path: Any) -> None:
    """Nothing but what scrolls by itself, as the table, is wider than 390 pixels; windows have at least 500, hence a frame."""
    picture = Image.fromarray(photo())
    sides = [Panel(picture, f"{name}: 32 tokens left, cosine 0.991") for name in ("photograph", "training-free", "TopK", "ToMe")]
    render(with_preset, tmp_path, {"a cell (cells/images/cell0001.png), 50 % of the MACs": sides, "a sheet": picture})
    (tmp_path / "frame.html").write_text(
        '<iframe id=f src="report.html" style="width:390px;height:3000px;border:0"></iframe><script>f.onload = () => {'
        "const d = f.contentDocument; const wide = [...d.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') && "
        "e.getBoundingClientRect().right > 391).map(e => e.tagName); "
        "document.title = `${f.contentWindow.innerWidth} ${d.documentElement.scrollWidth} wide:${wide}`; }</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--allow-file-access-from-files", "--virtual-time-budget=3000", "--hide-scrollbars", "--dump-dom"]
    command = [str(BROWSER), *flags, (tmp_path / "frame.html").as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>390 390 wide:</title>" in seen


def test_report_without_timings(results: dict[str, Any], tmp_path: Any) -> None:
    timings = dict.fromkeys(("images_per_second", "speedup", "speedup_best"))
    results["rows"][0].update(timings)
    page, _ = render(results, tmp_path)
    assert "This run holds no values" not in page.words
    for other in [results["dense"], *results["rows"]]:
        other.update(timings, cosine=None, cosine_se=None)
    page, _ = render(results, tmp_path)
    assert page.words.count("This run holds no values for this chart.") == 2
    assert "None" not in page.words


def test_charts_draw_every_method_and_the_dense_model(results: dict[str, Any]) -> None:
    for draw in (accuracy_chart, cosine_chart, speed_chart):
        words = re.findall(r"<text[^>]*>([^<]*)</text>", draw(results))
        assert {other["label"] for other in results["rows"]} <= set(words)
        assert any(word.startswith("dense") for word in words)


def test_a_method_has_one_colour_in_all_charts_and_no_two_methods_share_it(results: dict[str, Any]) -> None:
    variables = [set(re.findall(r"var\(--m-([\w-]+),", draw(results))) for draw in (accuracy_chart, speed_chart)]
    assert variables[0] == variables[1]
    assert len(variables[0]) == 6


def test_ties_are_within_one_standard_error_of_the_difference() -> None:
    best = row("A", 0.5, 0.80)
    near, far = row("B", 0.5, 0.80 - 0.0141), row("C", 0.5, 0.80 - 0.0142)  # sqrt(2) * 0.01 lies between
    assert ties([best, near, far], best) == [near]
    unpaired = row("D", 0.5, 0.78, paired_difference_se=None)
    assert ties([best, unpaired], best) == [unpaired]  # sqrt(2) * 0.018


def test_findings_follow_the_numbers(results: dict[str, Any]) -> None:
    said = dict(findings(results))
    assert said["At 65 % of the MACs"][0].startswith("Highest accuracy: eTPS+mass, 84.5 ± 1.8 %, tied with ToMe. Behind it")
    assert "Tied with the dense model: eTPS+mass and ToMe." in said["At 65 % of the MACs"][1]
    assert said["At 35 % of the MACs"][1] == "Every method is below the dense model."
    assert "TopK at 65 %, 50 % and 35 %" in said["Over all budgets"][1]
    turned = copy.deepcopy(results)
    for other in turned["rows"]:
        other["accuracy"] = 0.95 if other["method"] == "topk" else 0.7
        other["paired_difference"] = other["accuracy"] - 0.85
    said = dict(findings(turned))
    assert said["At 50 % of the MACs"][0].startswith("Highest accuracy: TopK")
    assert said["At 50 % of the MACs"][1].startswith("Above the dense model: TopK.")
    assert said["Over all budgets"][1].startswith("No method is behind random pruning")


@pytest.fixture
def with_preset(results: dict[str, Any]) -> dict[str, Any]:
    """The same run, of the preset, too."""
    preset = row("training-free", 0.5, 0.851, label="training-free", cosine=0.991, tokens=[144, 118, 77, 49, 32], speedup=1.84)
    results["rows"].insert(0, preset)
    return results


def test_the_first_sentence_says_what_the_run_says(with_preset: dict[str, Any]) -> None:
    preset = with_preset["rows"][0]
    assert headline(with_preset) == "training-free: half the work, the same accuracy (+0.1 ± 1.0 points), 1.8 times as fast."
    preset.update(paired_difference=-0.034, macs_share=0.35, speedup=0.87)
    assert headline(with_preset) == "training-free: 35 % of the work, 3.4 ± 1.0 points of accuracy lost, 0.9 times as fast."
    preset.update(paired_difference=0.021, speedup=None)
    assert headline(with_preset) == "training-free: 35 % of the work, 2.1 ± 1.0 points of accuracy gained."
    del with_preset["rows"][0]
    assert headline(with_preset).startswith("eTPS: half the work, 5.0 ± 1.0 points of accuracy lost")


@pytest.mark.parametrize("why", ["quick", "error"])
def test_where_accuracy_is_coarse_fidelity_comes_first_and_nothing_is_ranked_by_accuracy(
    why: str, with_preset: dict[str, Any], tmp_path: Any
) -> None:
    with_preset["settings"].update(quick=why == "quick", n_test=120)
    with_preset["dense"]["accuracy_se"] = 0.04
    for other in with_preset["rows"]:
        if other["method"] == "random":  # by luck
            other.update(accuracy=0.99, paired_difference=0.14, cosine=0.5)
    assert headline(with_preset) == (
        "training-free: half the work, features at a cosine of 0.991 to the unreduced model's, 1.8 times as fast. 120 photographs "
        "tell accuracies to ± 4.0 points only, too coarse to rank methods by."
    )
    sentences = " ".join(sentence for _, part in findings(with_preset) for sentence in part)
    assert "ccuracy" not in sentences and "Random at 0 of 3" in sentences and "mean cosine 0.991" in sentences
    page, source = render(with_preset, tmp_path)
    head = next(cells for cells in page.cells if cells[0] == "Method")
    assert head.index("Cosine to dense") < head.index("Accuracy, %")
    assert "<strong>0.991 ± 0.002</strong>" in source.replace("\N{NO-BREAK SPACE}", " ") and "<strong>99.0" not in source
    assert source.index('id="fidelity-title"') < source.index('id="accuracy-title"')


def test_the_page_begins_with_the_sentence_and_says_what_the_preset_is(with_preset: dict[str, Any], tmp_path: Any) -> None:
    page, _ = render(with_preset, tmp_path)
    words = page.words.replace("\N{NO-BREAK SPACE}", " ")
    assert words.index(headline(with_preset)) < words.index("The vision transformer vit_test")
    assert "training-free is this library's preset" in words and "in 4 stages" in words
    del with_preset["rows"][0]
    assert "preset" not in render(with_preset, tmp_path)[0].words


def test_why_some_end_with_few_tokens_follows_from_their_stages(results: dict[str, Any], tmp_path: Any) -> None:
    assert few_left(results) == ""  # results that do not tell the blocks
    stages = {"tome": list(range(12)), "etps": [0, 3, 6, 9]}
    for other in results["rows"]:
        at = stages.get(other["method"], [3, 6, 9])
        other.update(stages=at, depth=12, tokens=[*range(144, 144 - len(at), -1), 9])
    said = few_left(results)
    assert "at 35 % of the work" in said
    assert "From block 3 on: eTPS+mass, EViT, TopK and Random. The 3 blocks before it, 25 % of all, run on all 144 patch" in said
    assert "In 4 stages from the first block on: eTPS, with 9 tokens at the end." in said
    assert "In every block: ToMe, with 138 tokens left halfway and 9 tokens at the end." in said
    assert said in render(results, tmp_path)[0].words.replace("\N{NO-BREAK SPACE}", " ")


def test_the_demo_draws_the_preset_plain_pruning_and_tome_side_by_side() -> None:
    def points(*names: str) -> list[demo.Point]:
        return [demo.Point(catalog.method(n), t, catalog.method(n).template()) for t in (0.65, 0.45, 0.35) for n in names]

    shown = demo._shown(points("etps", "tome", "random", "topk", "training-free"))
    assert [(point.method.name, point.target) for point in shown] == [("training-free", 0.45), ("topk", 0.45), ("tome", 0.45)]
    assert [point.method.name for point in demo._shown(points("etps", "dtps", "evit", "random"))] == ["etps", "dtps", "evit"]


def test_side_by_side_panels_tell_tokens_and_fidelity() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_vit", img_size=64, num_classes=0).eval()
    chosen = [
        demo.Point(catalog.method("topk"), 0.5, TopK(keep=0.5, at=(1, 3))),
        demo.Point(catalog.method("tome"), 0.5, ToMe(r=0)),
    ]
    first, pruned, untouched = demo._side_by_side(net, Image.fromarray(photo()), chosen, demo.Settings(image_size=64))
    assert first.caption == "photograph"
    assert re.fullmatch(r"TopK: 4 tokens left, cosine -?0\.\d{3}", pruned.caption)
    assert untouched.caption == "ToMe: all tokens left, cosine 1.000"


def test_a_missed_budget_is_marked(results: dict[str, Any], tmp_path: Any) -> None:
    assert "†" not in render(results, tmp_path)[0].words
    results["rows"][3]["macs_share"] += 0.02
    assert "misses its budget" in render(results, tmp_path)[0].words


def test_pictures_are_made_to_fit() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8))
    uri, size = picture_uri(noise, 40_000)
    assert len(uri) < 1.4 * 40_000
    assert abs(size[0] * 600 - size[1] * 800) < 800


def test_every_method_of_the_demo_has_a_look_of_its_own_and_so_have_four_strangers() -> None:
    names = [*demo.compared(), "dtps", "dynamicvit", "a", "b", "c", "d"]
    looks = list(charts.looks(names).values())
    assert len({look.marker for look in looks}) == len({look.light for look in looks}) == len(looks)
    found = {charts.marker_svg(style) for style in charts.styles([{"method": name} for name in names]).values()}
    assert len(found) == len(names)


def test_a_stranger_is_drawn_as_it_says_or_in_a_spare_look(
    results: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = catalog.Look("red", "pink", "4")  # a marker that the report has no shape for
    for row in (catalog.Method("mine", "mine", TopK, look=own), catalog.Method("yours", "yours", TopK)):
        monkeypatch.setitem(catalog._METHODS, row.name, row)
    for other in results["rows"]:
        if other["method"] in ("topk", "random"):
            other.update(method={"topk": "mine", "random": "yours"}[other["method"]])
    page, source = render(results, tmp_path)
    assert "--m-mine: red;" in source and "--m-mine: pink;" in source
    assert "var(--m-mine, #ff0000)" in source and "var(--m-spare-0, " in source
    assert page.words.count("This run holds no values") == 0


@pytest.mark.parametrize(
    ("file", "part"), [("demo", None), ("methods_cpu", None), ("bench", None), ("leaderboard", "emoji"), ("dense", None)]
)
def test_earlier_results_are_read_by_the_names_of_today(file: str, part: str | None) -> None:
    content = json.loads((RESULTS / f"{file}.json").read_text())
    rows = (content if part is None else content[part])["rows"]
    known = catalog.methods()
    for old, row in zip(rows, map(current, rows), strict=True):
        assert row["method"] in known
        assert row["label"] == known[row["method"]].label
        assert {k: v for k, v in row.items() if k not in ("method", "label")} == {
            k: v for k, v in old.items() if k not in ("method", "label")
        }
    if file == "demo":
        assert tuple(dict.fromkeys(map(method_name, rows))) == demo.compared()


def test_the_committed_demo_becomes_a_report(tmp_path: Any) -> None:
    page, source = render(json.loads((RESULTS / "demo.json").read_text()), tmp_path)
    labels = [cells[0] for cells in page.cells if len(cells) > 1]
    assert sum(label.startswith("training-free") for label in labels) == 3
    assert not any(label.startswith("preset") for label in labels)
    assert "var(--m-training-free, #1d7a2c)" in source
    assert "--m-spare-" not in source.split("</style>")[1]
    assert "random pruning by more than one standard error" in page.words


def test_a_method_that_nobody_knows_keeps_its_name() -> None:
    assert current({"method": "Somebody's", "label": "theirs"}) == {"method": "Somebody's", "label": "theirs"}
    assert current({"method": "EViT", "label": "EViT (normalised)"})["method"] == "evit+norm"
    assert current({"method": "EViT"}) == {"method": "evit", "label": "EViT"}


def test_the_demo_compares_the_methods_asked_for() -> None:
    names = [row.name for row in demo.chosen(demo.Settings(methods=("ToMe", "preset", "identity", "tome")))]
    assert names == ["tome", "training-free"]
    assert demo.compared() == ("training-free", "etps", "etps+mass", "evit+norm", "topk", "tome", "random")
    with pytest.raises(ConfigError, match="'nonsense' is not known"):
        demo.chosen(demo.Settings(methods=("nonsense",)))
    with pytest.raises(ConfigError, match="dtps scores by heads that are learned"):
        demo.chosen(demo.Settings(methods=("dtps",)))
    with pytest.raises(ConfigError, match="leaves nothing to compare"):
        demo.chosen(demo.Settings(methods=("identity",)))

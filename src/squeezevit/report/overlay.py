"""Token groups on photographs: which patches are reserved, and into which host each pruned one was squeezed.

A *group* is all the patches that ended in one token. In the style "mean" a group is filled with the mean colour of its patches, as
the paper on ToMe draws them. In the style "outlines" reserved patches show the photograph; the pruned ones of a group are washed
with the group's colour; a host carries a dot. Patches that were dropped without a host are dark and hatched in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from squeezevit.errors import DataError

SHORT_SIDE = 448  # a smaller photograph is enlarged by a whole factor until its short side has this many pixels
Style = Literal["mean", "outlines"]
STYLES: tuple[Style, ...] = get_args(Style)
COLUMNS = (5, 4, 3)  # of a figure with more panels than fit in one row
COLOURS = 12  # more are made only where that many neighbours leave no choice
LUMA = np.array([0.299, 0.587, 0.114])
INK, FAINT, PAPER = (27, 31, 36), (91, 99, 110), (255, 255, 255)


@dataclass(frozen=True, eq=False)
class StageGroups:
    """One reduction of one image, seen from its N0 original patches.

    `before`, `after`: int [N0], the token each patch belongs to, -1 where it was dropped without a host.
    `pruned`: bool [N0], the patch's own token is gone, since this stage or an earlier one.
    `reserved`, `removed`: how many tokens this stage kept and pruned. `hosted`: the pruned ones found hosts.
    `extra`: tokens this stage added (EViT's fused token: 1).
    """

    block: int
    before: np.ndarray
    after: np.ndarray
    pruned: np.ndarray
    reserved: int
    removed: int
    hosted: bool = True
    extra: int = 0

    @property
    def caption(self) -> str:
        """For example `block 3: 128 reserved, 128 pruned`."""
        if not self.hosted:
            return f"block {self.block}: {self.reserved} reserved, {self.removed} dropped"
        fused = f" into {self.extra} extra token" if self.extra else ""
        return f"block {self.block}: {self.reserved} reserved, {self.removed} pruned{fused}"


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture and the words that go under it."""

    image: Image.Image
    caption: str


def stages_from_trace(t: Any, image_index: int = 0) -> list[StageGroups]:
    """The stages of one image of a finished `sv.trace`, first stage first.

    A token's *own* patch is the one it began as; it is followed through the kept indices, so that a host can be told
    from what it hosts. EViT's fused token has no own patch.
    """
    stages: list[StageGroups] = []
    own = before = None
    for index, traced in enumerate(t.stages):
        kept, removed = _numpy(traced.kept[image_index]), _numpy(traced.pruned[image_index])
        hosts = None if traced.hosts is None else _numpy(traced.hosts[image_index])
        after = _numpy(t.groups_after(index)[image_index])
        if own is None or before is None:
            own = before = np.arange(len(after))
        extra = 0 if hosts is None or not len(hosts) else max(0, int(hosts.max()) + 1 - len(kept))
        own = np.concatenate([own[kept], np.full(extra, -1)])
        pruned = ~np.isin(np.arange(len(after)), own)
        stages.append(
            StageGroups(traced.block, before, after, pruned, len(kept), len(removed), hosted=hosts is not None, extra=extra)
        )
        before = after
    return stages


def draw_stage(
    photo: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    grid: tuple[int, int],
    pruned: np.ndarray,
    colours: np.ndarray | None = None,
) -> Image.Image:
    """The photograph with its token groups after one stage, in the style "outlines".

    `photo`: uint8 [H, W, 3]. `before`, `after`: int [N0], `pruned`: bool [N0], as in `StageGroups`. `grid`: (rows, columns),
    rows * columns = N0. `colours`: int [N0] from `group_colours`, made here when absent. Patches that joined their
    group at this stage are washed more strongly than those that came with an earlier one. The result is H x W, or a
    whole multiple of it where the short side is under 448 pixels. Raises `DataError` where the shapes do not fit.
    """
    before, after, pruned = _checked(photo, before, after, grid, pruned)
    if colours is None:
        colours = group_colours(after, grid)
    canvas = _canvas(photo)
    height, width = canvas.shape[:2]
    patch = patch_of_pixel(grid, (height, width))
    cell = min(height / grid[0], width / grid[1])

    joined = _joined_now(before, after, pruned)
    grey = canvas @ LUMA
    coloured = colours >= 0
    tint = palette(int(colours.max(initial=0)) + 1)[colours] * 255  # [N0, 3]; the last colour where -1, masked below
    wash = np.where(coloured & pruned, np.where(joined, 0.52, 0.36), 0.0)[patch][..., None]
    canvas = np.where(wash > 0, grey[..., None] * (1 - wash) + tint[patch] * wash, canvas)
    canvas = _hatch(canvas, (after < 0)[patch], (before < 0)[patch], cell)
    canvas = _outline(canvas, after, colours, tint, patch, cell)
    for host in np.flatnonzero(coloured & ~pruned).tolist():
        _dot(canvas, patch, host, grid, tint[host], radius=max(2.5, cell * 0.2))
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def fill_stage(photo: np.ndarray, after: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """The photograph after one stage in the style "mean": every group in the mean colour of its patches, with a thin outline.

    `photo`, `after`, `grid` and the size of the result are as in `draw_stage`.
    """
    after = np.asarray(after)
    _check(photo, grid, after=after)
    canvas = _canvas(photo)
    height, width = canvas.shape[:2]
    group = after[patch_of_pixel(grid, (height, width))]
    mean = _mean_colours(canvas, group)
    light = (mean @ LUMA > 90)[:, None]
    line = np.where(light, mean * 0.6, mean * 0.6 + 70)
    out = np.where(outline_mask(group, 1)[..., None], line[group], mean[group])  # group -1 is the last row, hatched below
    dropped = group < 0
    out = _hatch(np.where(dropped[..., None], canvas, out), dropped, np.zeros_like(dropped), min(height / grid[0], width / grid[1]))
    return Image.fromarray(np.clip(np.rint(out), 0, 255).astype(np.uint8))


def panels(
    photo: np.ndarray, stages: Sequence[StageGroups], grid: tuple[int, int] | None = None, style: Style = "mean"
) -> list[Panel]:
    """The photograph, then one drawing per stage, each with its caption.

    `grid` may be left out where the patches form a square. In the style "outlines" a group keeps its host's colour where it can.
    """
    patches = f", {len(stages[0].after)} patches" if stages else ""
    out = [Panel(Image.fromarray(np.rint(_canvas(photo)).astype(np.uint8)), f"photograph{patches}")]
    colours = None
    for stage in stages:
        grid = grid or _square(len(stage.after))
        if style == "mean":
            out.append(Panel(fill_stage(photo, stage.after, grid), stage.caption))
            continue
        _checked(photo, stage.before, stage.after, grid, stage.pruned)
        colours = group_colours(stage.after, grid, colours)
        out.append(Panel(draw_stage(photo, stage.before, stage.after, grid, stage.pruned, colours), stage.caption))
    return out


def figure(
    photo: np.ndarray,
    stages: Sequence[StageGroups],
    grid: tuple[int, int] | None = None,
    *,
    style: Style = "mean",
    title: str | None = None,
    columns: int | None = None,
) -> Image.Image:
    """`panels` side by side, as `sheet` lays them out."""
    return sheet(panels(photo, stages, grid, style), stages, style=style, title=title, columns=columns)


def sheet(
    drawn: Sequence[Panel],
    stages: Sequence[StageGroups],
    *,
    style: Style = "mean",
    title: str | None = None,
    columns: int | None = None,
) -> Image.Image:
    """Panels in rows with their captions and a legend, on white; at most `columns` to a row, by default so that rows are full."""
    width, height = drawn[0].image.size
    columns = min(columns or columns_for(len(drawn)), len(drawn))
    gap, margin, size = 16, 20, max(15, round(width / 26))
    caption_font, title_font = _font(size), _font(round(size * 1.3))
    captions = [_wrap(panel.caption, caption_font, width) for panel in drawn]
    line = round(size * 1.3)
    row_height = height + 8 + line * max(map(len, captions)) + gap
    rows = -(-len(drawn) // columns)
    sheet_width = 2 * margin + columns * width + (columns - 1) * gap
    title_lines = _wrap(title, title_font, sheet_width - 2 * margin) if title else []
    top = margin + len(title_lines) * round(line * 1.3) + (gap if title else 0)
    legend = _legend_parts(stages, style)
    legend_rows = _flow(legend, caption_font, size, sheet_width - 2 * margin)
    legend_height = len(legend_rows) * round(size * 1.7)
    page = Image.new("RGB", (sheet_width, top + rows * row_height + legend_height + margin // 2), PAPER)
    pen = ImageDraw.Draw(page)
    for index, words in enumerate(title_lines):
        pen.text((margin, margin - 4 + index * round(line * 1.3)), words, fill=INK, font=title_font)
    for index, (panel, lines) in enumerate(zip(drawn, captions, strict=True)):
        x, y = margin + index % columns * (width + gap), top + index // columns * row_height
        page.paste(panel.image, (x, y))
        pen.multiline_text((x, y + height + 8), "\n".join(lines), fill=INK, font=caption_font, spacing=size * 0.2)
    for index, parts in enumerate(legend_rows):
        _draw_legend(page, parts, (margin, top + rows * row_height + index * round(size * 1.7)), size, caption_font)
    return page


def columns_for(count: int) -> int:
    """How many of so many panels go into a row: all where they fit, otherwise what leaves the fewest places empty.

    >>> columns_for(5), columns_for(13)  # a last row of one, with four columns
    (5, 5)
    """
    return count if count <= COLUMNS[0] else min(COLUMNS, key=lambda columns: -count % columns)


def frames(drawn: Sequence[Panel], title: str, longest: int) -> list[Image.Image]:
    """One picture for each panel, all of one size: the title above, the panel at most `longest` pixels long, its caption below."""
    scale = min(1.0, longest / max(drawn[0].image.size))
    width, height = (max(1, round(side * scale)) for side in drawn[0].image.size)
    margin, size = 10, max(13, round(width / 36))
    sheet_width, font, line = max(width, 360) + 2 * margin, _font(size), round(size * 1.35)
    above = _wrap(title, font, sheet_width - 2 * margin)
    below = [_wrap(panel.caption, font, sheet_width - 2 * margin) for panel in drawn]
    top = margin + line * len(above) + 4
    out = []
    for panel, lines in zip(drawn, below, strict=True):
        page = Image.new("RGB", (sheet_width, top + height + 6 + line * max(map(len, below)) + margin), PAPER)
        pen = ImageDraw.Draw(page)
        pen.multiline_text((margin, margin - 4), "\n".join(above), fill=INK, font=font, spacing=size * 0.2)
        page.paste(panel.image.resize((width, height), Image.Resampling.LANCZOS), ((sheet_width - width) // 2, top))
        pen.multiline_text((margin, top + height + 6), "\n".join(lines), fill=FAINT, font=font, spacing=size * 0.2)
        out.append(page)
    return out


def group_colours(
    after: np.ndarray,
    grid: tuple[int, int],
    previous: np.ndarray | None = None,
) -> np.ndarray:
    """A colour number for every patch, int [N0]; -1 for groups of one patch and for dropped patches.

    Groups that touch, corners included, never share a number. Large groups choose first: the colour most of their
    patches had in `previous` (the answer for the stage before) if no neighbour has it, otherwise one that is far from
    the neighbours' colours and little used.
    """
    members = Counter(after[after >= 0].tolist())
    shared = [group for group, count in members.most_common() if count > 1]
    touching = _touching(after.reshape(grid))
    wanted = {} if previous is None else {group: _commonest(previous[after == group]) for group in shared}
    chosen: dict[int, int] = {}
    used: Counter[int] = Counter()
    for group in shared:
        taken = {chosen[other] for other in touching.get(group, ()) if other in chosen}
        number = wanted.get(group, -1)
        if number < 0 or number in taken:
            free = [c for c in range(COLOURS) if c not in taken] or [_first_free(taken)]
            lab = palette_lab(max({COLOURS, *taken}) + 2)
            number = min(free, key=lambda c: (used[c] - 12 * _distance(lab, c, list(taken)), c))
        chosen[group] = int(number)
        used[int(number)] += 1
    return np.array([chosen.get(group, -1) for group in after.tolist()])


def patch_of_pixel(grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """int [H, W]: the patch every pixel lies in, for a size that need not be a multiple of the grid."""
    rows = np.arange(size[0]) * grid[0] // size[0]
    columns = np.arange(size[1]) * grid[1] // size[1]
    return rows[:, None] * grid[1] + columns[None, :]


def outline_mask(group: np.ndarray, thickness: int) -> np.ndarray:
    """bool [H, W]: the pixels at most `thickness` from a pixel of another group; `group` is int [H, W]."""
    height, width = group.shape
    padded = np.pad(group, thickness, mode="edge")
    steps = (0, thickness, 2 * thickness)
    moved = (padded[y : y + height, x : x + width] for y in steps for x in steps if (y, x) != (thickness, thickness))
    return np.any([group != other for other in moved], axis=0)


def palette(count: int) -> np.ndarray:
    """float [count, 3], sRGB in 0..1: vivid colours; the first ones are the same however many are asked for."""
    lab = palette_lab(count)
    to_lms = np.array([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]])
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def palette_lab(count: int) -> np.ndarray:
    """float [count, 3] in OKLab (Ottosson 2020): hues a golden angle apart, over three lightnesses."""
    index = np.arange(count)
    hue = np.deg2rad(250 + index * 137.508)
    lightness = np.array([0.66, 0.82, 0.52])[index % 3]
    chroma = np.array([0.19, 0.17, 0.19])[index % 3]
    return np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _checked(
    photo: np.ndarray, before: np.ndarray, after: np.ndarray, grid: tuple[int, int], pruned: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrays = {"before": np.asarray(before), "after": np.asarray(after), "pruned": np.asarray(pruned, dtype=bool)}
    _check(photo, grid, **arrays)
    return arrays["before"], arrays["after"], arrays["pruned"]


def _check(photo: np.ndarray, grid: tuple[int, int], **arrays: np.ndarray) -> None:
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
        raise DataError(f"photo is {photo.dtype} {list(photo.shape)}; give uint8 [H, W, 3]")
    if min(photo.shape[0] / grid[0], photo.shape[1] / grid[1]) < 1:
        raise DataError(f"a photo of {photo.shape[0]} x {photo.shape[1]} pixels has no room for grid={grid}; give a larger one")
    for name, array in arrays.items():
        if array.shape != (grid[0] * grid[1],):
            raise DataError(f"{name} has shape {list(array.shape)}, but grid={grid} has {grid[0] * grid[1]} patches")


def _mean_colours(canvas: np.ndarray, group: np.ndarray) -> np.ndarray:
    """float [number of groups + 1, 3]: the mean colour of every group's pixels; the last row is of dropped ones, number -1."""
    number = int(group.max(initial=-1)) + 1
    flat = np.where(group < 0, number, group).ravel()
    sums = np.stack([np.bincount(flat, canvas[..., channel].ravel(), number + 1) for channel in range(3)], axis=1)
    return sums / np.maximum(np.bincount(flat, minlength=number + 1), 1)[:, None]


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    if side * side != count:
        raise DataError(f"{count} patches form no square; give grid=(rows, columns)")
    return side, side


def _canvas(photo: np.ndarray) -> np.ndarray:
    height, width = photo.shape[:2]
    factor = -(-SHORT_SIDE // min(height, width))
    image = Image.fromarray(photo).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64)


def _joined_now(before: np.ndarray, after: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """bool [N0]: before this stage the patch belonged to another token than its host did.

    A group without a host (EViT's fused token) has joined now if its patches come from several tokens.
    """
    came_from = dict(zip(after[~pruned].tolist(), before[~pruned].tolist(), strict=True))
    for group in set(after.tolist()) - set(came_from):
        origins = set(before[after == group].tolist())
        came_from[group] = origins.pop() if len(origins) == 1 else None
    return np.array([came_from[now] != then for now, then in zip(after.tolist(), before.tolist(), strict=True)])


def _touching(groups: np.ndarray) -> dict[int, set[int]]:
    pairs = [
        (groups[:, :-1], groups[:, 1:]),
        (groups[:-1], groups[1:]),
        (groups[:-1, :-1], groups[1:, 1:]),
        (groups[:-1, 1:], groups[1:, :-1]),
    ]
    touching: dict[int, set[int]] = {}
    for left, right in pairs:
        for a, b in zip(left.ravel().tolist(), right.ravel().tolist(), strict=True):
            if a != b:
                touching.setdefault(a, set()).add(b)
                touching.setdefault(b, set()).add(a)
    return touching


def _commonest(numbers: np.ndarray) -> int:
    return Counter(numbers[numbers >= 0].tolist() or [-1]).most_common(1)[0][0]


def _first_free(taken: set[int]) -> int:
    return next(number for number in range(len(taken) + 1) if number not in taken)


def _distance(lab: np.ndarray, colour: int, others: list[int]) -> float:
    return float(np.linalg.norm(lab[others] - lab[colour], axis=1).min()) if others else 0.0


def _hatch(canvas: np.ndarray, dropped: np.ndarray, earlier: np.ndarray, cell: float) -> np.ndarray:
    height, width = dropped.shape
    period = max(5, round(cell / 3))
    diagonal = (np.arange(height)[:, None] + np.arange(width)[None, :]) % period < max(1, period / 4)
    dark = canvas * np.where(earlier, 0.18, 0.34)[..., None]
    dark = np.where(diagonal[..., None], dark * 0.5 + np.where(earlier, 34, 58)[..., None], dark)
    return np.where(dropped[..., None], dark, canvas)


def _outline(
    canvas: np.ndarray, after: np.ndarray, colours: np.ndarray, tint: np.ndarray, patch: np.ndarray, cell: float
) -> np.ndarray:
    """Every group drawn just inside its own border: shared groups in their colour, the others as a hairline."""
    group = after[patch]
    shared = (colours >= 0)[patch]
    thickness = max(1, round(cell / 12))
    hairline = outline_mask(group, 1)
    canvas = np.where((hairline & ~shared)[..., None], canvas * 0.72, canvas)
    band = outline_mask(group, thickness + 1) & shared
    canvas = np.where(band[..., None], tint[patch], canvas)
    return np.where((hairline & shared)[..., None], tint[patch] * 0.25, canvas)


def _dot(canvas: np.ndarray, patch: np.ndarray, host: int, grid: tuple[int, int], colour: np.ndarray, radius: float) -> None:
    height, width = patch.shape
    centre_y, centre_x = (host // grid[1] + 0.5) * height / grid[0], (host % grid[1] + 0.5) * width / grid[1]
    reach = int(radius) + 2
    top, left = max(0, int(centre_y) - reach), max(0, int(centre_x) - reach)
    view = canvas[top : int(centre_y) + reach + 1, left : int(centre_x) + reach + 1]
    y, x = np.mgrid[top : top + view.shape[0], left : left + view.shape[1]]
    away = np.hypot(y + 0.5 - centre_y, x + 0.5 - centre_x)
    for size, fill in ((radius + 1, np.zeros(3)), (radius, np.full(3, 255.0)), (radius * 0.58, colour)):
        cover = np.clip(size - away + 0.5, 0, 1)[..., None]
        view[:] = view * (1 - cover) + fill * cover


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _legend_parts(stages: Sequence[StageGroups], style: Style) -> list[tuple[str, str]]:
    if not stages:
        return []
    if style == "mean":
        parts = [("mean", "a region: the patches that are one token, in their mean colour (regions apart may be one token)")]
    else:
        parts = [("photo", "reserved: the photograph itself")]
        parts += _legend_of_outlines(stages)
    if any((stage.after < 0).any() for stage in stages):
        parts.append(("hatch", "dropped, without a host"))
    return parts


def _legend_of_outlines(stages: Sequence[StageGroups]) -> list[tuple[str, str]]:
    parts = []
    if any(stage.hosted and not stage.extra for stage in stages):
        parts.append(("dot", "a host"))
    if any(stage.hosted for stage in stages):
        parts.append(("wash", "one colour: pruned patches squeezed into one token (paler: at an earlier stage)"))
    return parts


def _flow(parts: list[tuple[str, str]], font: Any, size: int, width: int) -> list[list[tuple[str, str]]]:
    rows: list[list[tuple[str, str]]] = []
    room = 0.0
    for part in parts:
        need = size * 2.9 + font.getlength(part[1])
        if not rows or need > room:
            rows.append([])
            room = width
        rows[-1].append(part)
        room -= need
    return rows


def _draw_legend(page: Image.Image, parts: list[tuple[str, str]], corner: tuple[int, int], size: int, font: Any) -> None:
    pen = ImageDraw.Draw(page)
    x, y = corner
    tint = np.array([palette(1)[0] * 255])
    for kind, words in parts:
        swatch = np.full((size, size, 3), 190.0)
        whole = np.zeros((size, size), dtype=int)
        if kind == "mean":
            swatch[_edge(size, 1)] *= 0.6
        elif kind == "wash":
            swatch = swatch * 0.4 + tint[0] * 0.6
            swatch[_edge(size, 2)] = tint[0]
        elif kind == "hatch":
            swatch = _hatch(swatch, whole == 0, whole > 0, size)
        elif kind == "dot":
            _dot(swatch, whole, 0, (1, 1), tint[0], radius=size * 0.3)
        page.paste(Image.fromarray(np.rint(swatch).astype(np.uint8)), (x, y + 2))
        pen.text((x + round(size * 1.4), y), words, fill=FAINT, font=font)
        x += round(size * 2.9 + font.getlength(words))


def _edge(size: int, thickness: int) -> np.ndarray:
    inner = size - 2 * thickness
    return np.pad(np.zeros((inner, inner), dtype=bool), thickness, constant_values=True)

"""Drawing what a reducer does to one photograph, in the photograph's own proportions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from squeezevit.core.attach import reduce_, restore_
from squeezevit.core.macs import macs
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import share_weights
from squeezevit.core.trace import trace
from squeezevit.errors import ConfigError, UnsupportedError
from squeezevit.reducers.catalog import label_of
from squeezevit.report import Panel, StageGroups, panels, stages_from_trace
from squeezevit.report.overlay import STYLES, Style, columns_for, frames, sheet

LONGEST, WIDEST = 1200, 4800  # pixels of the longer side of a panel, and of all in a row
LONGEST_FRAME = 640  # and of a frame, of which a file holds many
MILLISECONDS = 1400  # that a frame stays; the last one stays twice as long
ANIMATED = (".gif", ".webp")
_SHARES = {1 / 4: "a quarter", 1 / 3: "a third", 1 / 2: "half", 2 / 3: "two thirds", 3 / 4: "three quarters"}


@dataclass(frozen=True)
class Drawing:
    """A picture of all stages, its parts, a title in words, the patch grid (rows, columns), and a caption per stage."""

    picture: Any
    panels: list[Panel]
    title: str
    grid: tuple[int, int]
    captions: list[str]


@torch.inference_mode()
def draw(model: nn.Module, reducer: Reducer, photo: Any, image_size: int, style: Style = "mean") -> Drawing:
    """Run a PIL photograph through a copy of a timm ViT set up for its proportions, and draw each stage.

    image_size: pixels of the shorter side, rounded to whole patches. style: as in `squeezevit.report.overlay`. The model itself is
    not changed; the copy shares its weights. Raises UnsupportedError where the model's grid cannot be set, and ConfigError on an
    unknown style.
    """
    check_style(style)
    if not hasattr(model, "set_input_size") or not hasattr(model, "patch_embed"):
        raise UnsupportedError(
            f"the grid of {type(model).__name__} cannot be set for a photograph; show takes timm's VisionTransformer"
        )
    net: Any = share_weights(model).eval()
    heads = net._modules.get("token_reducer")  # learned ones rank as they learned to
    restore_(net)
    patch = net.patch_embed.patch_size
    scale = image_size / min(photo.size)
    rows, columns = (max(1, round(side * scale / p)) for side, p in zip(reversed(photo.size), patch, strict=True))
    size = (rows * patch[0], columns * patch[1])
    net.set_input_size(img_size=size)
    whole = macs(net, size)
    if heads is not None:
        net.token_reducer = heads
    reduce_(net, reducer)
    with trace(net) as t:
        net(normalise(photo, size, *_mean_std(net)))
    stages = stages_from_trace(t)
    shown, longest = photo.copy(), min(LONGEST, WIDEST // columns_for(len(stages) + 1))
    shown.thumbnail((longest, longest))
    drawn = panels(np.asarray(shown), stages, (rows, columns), style)
    title = in_words(reducer, stages, whole / macs(net, size))
    picture = sheet(drawn, stages, style=style, title=title)
    return Drawing(picture, drawn, title, (rows, columns), [stage.caption for stage in stages])


def in_words(reducer: Reducer, stages: Sequence[StageGroups], fewer: float) -> str:
    """For example `eTPS, half of the tokens at each of 3 stages, 2.1 x fewer multiply-adds`, from what was counted.

    fewer: the unreduced model's multiply-adds as a multiple of the reduced one's.
    """
    if fewer >= 1.095:
        cost = f"{fewer:.1f} x fewer multiply-adds"
    else:
        cost = f"{100 * (1 - 1 / fewer):.0f} % fewer multiply-adds" if fewer > 1.005 else "as many multiply-adds"
    return ", ".join(part for part in (label_of(reducer), _course(stages), cost) if part)


def animate(drawing: Drawing, file: Path) -> None:
    """Write the photograph and its stages as a GIF or WebP that goes on forever. Raises ConfigError on another ending."""
    check_animation(file)
    shown = frames(drawing.panels, drawing.title, LONGEST_FRAME)
    times = [MILLISECONDS] * (len(shown) - 1) + [2 * MILLISECONDS]
    common: dict[str, Any] = {"save_all": True, "append_images": shown[1:], "duration": times, "loop": 0}
    if file.suffix.lower() == ".webp":
        shown[0].save(file, quality=88, **common)
    else:
        shown[0].save(file, **common)


def check_style(style: str) -> None:
    """Raises ConfigError where there is no such style."""
    if style not in STYLES:
        raise ConfigError(f"style {style!r} is not known; choose from {', '.join(STYLES)}")


def check_animation(file: Path) -> None:
    """Raises ConfigError where `animate` has no format for a file's name."""
    if file.suffix.lower() not in ANIMATED:
        raise ConfigError(f"--animate {file} ends in neither of {', '.join(ANIMATED)}; choose a name that does")


def _course(stages: Sequence[StageGroups]) -> str:
    """How tokens fall: by one share where all stages have it, to a token, otherwise from what to what."""
    if not stages:
        return ""
    counts = [(stage.reserved + stage.removed, stage.reserved) for stage in stages]
    (n, first), where = counts[0], "one stage" if len(stages) == 1 else f"each of {len(stages)} stages"
    nearest = dict(sorted(_SHARES.items(), key=lambda known: abs(known[0] - first / n)))
    for share, words in (*nearest.items(), (first / n, f"{100 * first / n:.0f} %")):
        if all(abs(k - share * n) <= 1 for n, k in counts):
            return f"{words} of the tokens at {where}"
    return f"from {n} to {counts[-1][1] + stages[-1].extra} tokens in {len(stages)} stages"


def normalise(photo: Any, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """A PIL image as a model wants it: [1, 3, height, width]."""
    pixels = np.asarray(photo.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)).copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _mean_std(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)
    return config["mean"], config["std"]

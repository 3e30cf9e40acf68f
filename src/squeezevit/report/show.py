"""Drawing what a reducer does to one photograph, in the photograph's own proportions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from squeezevit.core.attach import reduce_, restore_
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import share_weights
from squeezevit.core.trace import trace
from squeezevit.errors import UnsupportedError
from squeezevit.report import figure, stages_from_trace

LONGEST = 1200  # pixels of the longer side of a panel


@dataclass(frozen=True)
class Drawing:
    """A picture of all stages, the patch grid (rows, columns), and a caption per stage."""

    picture: Any
    grid: tuple[int, int]
    captions: list[str]


@torch.inference_mode()
def draw(model: nn.Module, reducer: Reducer, photo: Any, image_size: int) -> Drawing:
    """Run a PIL photograph through a copy of a timm ViT set up for its proportions, and draw each stage.

    image_size: pixels of the shorter side, rounded to whole patches. The model itself is not changed; the copy shares its weights.
    Raises UnsupportedError where the model's grid cannot be set.
    """
    if not hasattr(model, "set_input_size") or not hasattr(model, "patch_embed"):
        raise UnsupportedError(
            f"the grid of {type(model).__name__} cannot be set for a photograph; show takes timm's VisionTransformer"
        )
    net: Any = restore_(share_weights(model)).eval()
    patch = net.patch_embed.patch_size
    scale = image_size / min(photo.size)
    rows, columns = (max(1, round(side * scale / p)) for side, p in zip(reversed(photo.size), patch, strict=True))
    size = (rows * patch[0], columns * patch[1])
    net.set_input_size(img_size=size)
    reduce_(net, reducer)
    with trace(net) as t:
        net(normalise(photo, size, *_mean_std(net)))
    stages = stages_from_trace(t)
    shown = photo.copy()
    shown.thumbnail((LONGEST, LONGEST))
    picture = figure(np.asarray(shown), stages, (rows, columns), title=f"{reducer}")
    return Drawing(picture, (rows, columns), [stage.caption for stage in stages])


def normalise(photo: Any, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """A PIL image as a model wants it: [1, 3, height, width]."""
    pixels = np.asarray(photo.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)).copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _mean_std(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)
    return config["mean"], config["std"]

"""Drawing which patches each image token of a squeezed prompt stands for, over the photograph."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from squeezevit.core.reducer import Reducer
from squeezevit.core.trace import Trace, trace
from squeezevit.errors import ConfigError, DataError
from squeezevit.reducers.catalog import label_of
from squeezevit.report.overlay import StageGroups, Style, panels, sheet, stages_from_trace
from squeezevit.report.show import Drawing
from squeezevit.vlm import VLM, ImageTokens


class PromptGroups(StageGroups):
    """The groups that a prompt's image tokens are, as the last stage of an image."""

    @property
    def caption(self) -> str:
        """For example `prompt: 16 image tokens, 48 pruned`."""
        return f"prompt: {self.reserved} image tokens, {self.removed} {'pruned' if self.hosted else 'dropped'}"


def draw_prompt(
    photo: np.ndarray, image: ImageTokens, grid: tuple[int, int] | None = None, tower: Trace | None = None, index: int = 0
) -> Image.Image:
    """The photograph, and beside it the groups that the image tokens of a prompt stand for.

    photo: uint8 [H, W, 3], as the image was cropped for the model. image: one of `prompt.images`. grid: (rows, columns) of its N
    features; may be left out where the prompt tells its lines. tower: the trace of a tower that was itself reduced, whose stages
    come first, where each feature is one of its patches; index: the image's number in that trace. Raises DataError where the
    features are not one grid, as those of several tiles with separators.
    """
    stages = [] if tower is None else stages_from_trace(tower, index)
    n, marks = len(image.groups), int(image.separators.sum())
    if stages and len(stages[-1].after) != n:
        raise DataError(f"the tower was traced on {len(stages[-1].after)} patches, and the image has {n} features; leave out tower")
    grid = grid or _grid(image)
    if marks or (grid is not None and grid[0] * grid[1] != n):
        raise DataError(f"the image has {n} features, {marks} of them separators, which are not grid={grid}; draw another image")
    stages = [*stages, _last(image, stages[-1].after if stages else np.arange(n))]
    return sheet(panels(photo, stages, grid), stages)


@torch.inference_mode()
def draw_vlm(vlm: VLM, processor: Any, photo: Image.Image, question: str, style: Style = "mean") -> Drawing:
    """What a vision-language model's language model gets of one photograph, after the stages of its tower where that is reduced.

    processor: the model's own, of transformers. Raises DataError where the processor cuts the photograph into several images, and
    ConfigError where the prompt that it makes has none.
    """
    inputs = asked(processor, photo, question)
    reducer: Reducer | None = next((m.squeezevit_state.reducer for m in vlm.model.modules() if "squeezevit_state" in vars(m)), None)
    if reducer is None:
        prompt, towers = vlm.squeeze(inputs), []
    else:
        with trace(vlm.model) as t:
            prompt = vlm.squeeze(inputs)
        towers = stages_from_trace(t)
    (image, *others), grid = prompt.images, _grid(prompt.images[0])
    if others or image.separators.any() or grid is None:
        raise DataError(
            f"the processor makes {len(prompt.images)} images with {int(image.separators.sum())} separators of the photograph, "
            "which are not one grid to draw; choose a model whose processor does not cut images into tiles"
        )
    seen = np.asarray(_as_seen(inputs, processor, photo))
    drawn = panels(seen, towers, None, style) if towers else []
    before = towers[-1].after if towers and len(towers[-1].after) == len(image.groups) else np.arange(len(image.groups))
    last = _last(image, before)
    drawn += panels(seen, [last], grid, style)[1 if towers else 0 :]
    left, whole = prompt["input_ids"].shape[1], prompt.ids.shape[1]
    inside = "" if reducer is None else f"{label_of(reducer)} in the tower, "
    title = f"{inside}{len(image.kept)} of {len(image.groups)} image tokens in the prompt, {left} tokens instead of {whole}"
    captions = [panel.caption for panel in drawn[1:]]
    return Drawing(sheet(drawn, [*towers, last], style=style, title=title), drawn, title, grid, captions)


def asked(processor: Any, photo: Image.Image, question: str) -> Any:
    """A processor's output for one photograph and one question, by its chat template where it has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": photo}, {"type": "text", "text": question}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template([{"role": "user", "content": content}], **options)
    mark = getattr(processor, "image_token", None)
    if not isinstance(mark, str):
        raise ConfigError(
            f"{type(processor).__name__} has neither a chat template nor an image token, so a prompt cannot be written; use a "
            "model whose processor has one"
        )
    return processor(images=photo, text=f"{mark} {question}", return_tensors="pt")


def _grid(image: ImageTokens) -> tuple[int, int] | None:
    """Rows and columns of an image without separators, where the prompt tells them."""
    n = len(image.groups)
    return (n // image.columns, image.columns) if image.columns and n % image.columns == 0 else None


def _last(image: ImageTokens, before: np.ndarray) -> PromptGroups:
    groups, kept, n = image.groups.cpu().numpy(), image.kept.cpu().numpy(), len(image.groups)
    return PromptGroups(-1, before, groups, ~np.isin(np.arange(n), kept), len(kept), n - len(kept), bool((groups >= 0).all()))


def _as_seen(inputs: Any, processor: Any, photo: Image.Image) -> Image.Image:
    """The photograph as it was cropped for the model, where that can be told, and else as it is."""
    pixels, how = inputs.get("pixel_values"), getattr(processor, "image_processor", processor)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or len(pixels) != 1:
        return photo.convert("RGB")
    mean, std = (torch.tensor(getattr(how, name, None) or [0.5] * 3)[:, None, None] for name in ("image_mean", "image_std"))
    colours = ((pixels[0].float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(colours.permute(1, 2, 0).numpy())

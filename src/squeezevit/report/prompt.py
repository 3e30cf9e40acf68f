"""Drawing which patches each image token of a squeezed prompt stands for, over the photograph."""

import numpy as np
from PIL import Image

from squeezevit.core.trace import Trace
from squeezevit.errors import DataError
from squeezevit.report.overlay import StageGroups, figure, stages_from_trace
from squeezevit.vlm import ImageTokens


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
    features; may be left out where they form a square. tower: the trace of a tower that was itself reduced, whose stages come
    first, where each feature is one of its patches; index: the image's number in that trace. Raises DataError where the features
    are not one grid, as those of several tiles with separators.
    """
    stages = [] if tower is None else stages_from_trace(tower, index)
    n, marks = len(image.groups), int(image.separators.sum())
    if marks or (grid is not None and grid[0] * grid[1] != n):
        raise DataError(f"the image has {n} features, {marks} of them separators, which are not grid={grid}; draw another image")
    if stages and len(stages[-1].after) != n:
        raise DataError(f"the tower was traced on {len(stages[-1].after)} patches, and the image has {n} features; leave out tower")
    groups, kept = image.groups.cpu().numpy(), image.kept.cpu().numpy()
    before = stages[-1].after if stages else np.arange(n)
    hosted = bool((groups >= 0).all())
    last = PromptGroups(-1, before, groups, ~np.isin(np.arange(n), kept), len(kept), n - len(kept), hosted)
    return figure(photo, [*stages, last], grid)

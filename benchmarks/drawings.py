"""The pictures of docs/training-free.md that need a model: why.py computes, this draws."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from squeezevit.data import elpv

DOCS = Path(__file__).parents[1] / "docs"
TITLES = ("photograph", "class attention", "what it keeps", "redundancy: unlike all\nthat get more attention", "what it keeps")


def draw_rankings(images: Tensor, rankings: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
    """Photographs, both rankings (scores [N] and the kept [K]), and what each keeps at once: docs/why.jpg."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (elpv.MEAN, elpv.STD))
    figure, axes = plt.subplots(len(images), len(TITLES), figsize=(10, 2.15 * len(images)), layout="constrained")
    for row, image, ranked in zip(axes, images, rankings, strict=True):
        photo = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        side = photo.shape[0] // 14
        row[0].imshow(photo)
        for k, (scores, kept) in enumerate(ranked):
            shown = np.zeros(side * side)
            shown[kept.numpy()] = 1
            mask = np.kron(shown.reshape(side, side), np.ones((14, 14)))[..., None]
            row[1 + 2 * k].imshow(scores.argsort().argsort().reshape(side, side).numpy(), cmap="viridis")
            row[2 + 2 * k].imshow(photo * mask + (1 - mask) * (0.25 * photo + 0.6))
        for axis in row:
            axis.set_axis_off()
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=9)
    figure.savefig(DOCS / "why.jpg", dpi=130, pil_kwargs={"quality": 88})


def draw_likeness(cosines: dict[str, np.ndarray]) -> None:
    """How like their hosts the pruned tokens are: docs/why.svg."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for (name, values), style in zip(cosines.items(), ("--", "-", ":"), strict=True):
        axis.plot(np.sort(values), np.linspace(0, 100, len(values)), style, label=f"pruned by {name}", linewidth=2)
    axis.set(xlabel="cosine of a pruned token with its host", ylabel="% of pruned tokens below", xlim=(0, 1), ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(DOCS / "why.svg")

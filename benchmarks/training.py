"""One recipe for every reducer, as finetune.py measures it: whole batches are augmented on the device, every image once an epoch.

The losses are those of `squeezevit.train`. Its loop is not used: that one reads photographs from folders through timm's
augmentations, leaves out what does not fill a batch and saves checkpoints, which would be another recipe than the one measured.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from squeezevit.core.attach import retune_
from squeezevit.core.reducer import Reducer
from squeezevit.core.running import autocast
from squeezevit.train.objective import LossWeights, Objective
from tasks import Pictures


@dataclass(frozen=True)
class Recipe:
    """The same for every reducer; AdamW, cosine to 0 after a tenth of warm-up, gradients clipped to norm 1."""

    dense_epochs: int = 15
    epochs: int = 10
    anneal_epochs: float = 3  # reducers that really drop begin at keep = 1
    batch_size: int = 64
    dense_lr: float = 5e-5
    lr: float = 3e-5
    head_lr: float = 1e-3  # of classifier and score heads that start from nothing
    weight_decay: float = 0.05
    smoothing: float = 0.1
    keep_ratio: float = 2.0  # weight of the loss that holds learned heads to their ratio; the papers' (of trainings 100 x as long)
    precision: str = "bf16"  # or "fp32", which a processor without bfloat16 computes sooner

    def objective(self, teacher: nn.Module | None) -> Objective:
        return Objective(nn.CrossEntropyLoss(label_smoothing=self.smoothing), LossWeights(keep_ratio=self.keep_ratio), teacher)

    def optimizer(self, model: nn.Module, first: bool) -> torch.optim.Optimizer:
        """What starts from nothing learns faster: the classifier in the first training, score heads in the second."""
        fresh, lr = ("head.", self.dense_lr) if first else ("token_reducer.", self.lr)
        named = list(model.named_parameters())
        groups = [
            {"params": [p for n, p in named if n.startswith(fresh)], "lr": self.head_lr},
            {"params": [p for n, p in named if not n.startswith(fresh)], "lr": lr},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=self.weight_decay)


def warm_cosine(optimizer: torch.optim.Optimizer, total: int, warm: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Up linearly over `warm` steps, down to 0 along a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: (i + 1) / warm if i < warm else (1 + math.cos(math.pi * (i - warm) / (total - warm))) / 2
    )


def train(
    model: nn.Module, reducer: Reducer, pictures: Pictures, index: np.ndarray, recipe: Recipe, teacher: nn.Module | None, seed: int
) -> dict[str, object]:
    """Fine-tune in place; returns the last epoch's mean losses and kept ratios, and the seconds of a step.

    Without a teacher this is the first training, of the unreduced model.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(index) / recipe.batch_size)
    total = per_epoch * (recipe.dense_epochs if teacher is None else recipe.epochs)
    anneal = max(int(recipe.anneal_epochs * per_epoch), 1)
    optimizer, objective = recipe.optimizer(model, teacher is None), recipe.objective(teacher)
    schedule = warm_cosine(optimizer, total, total // 10)
    model.train()
    began, sums, kept = time.perf_counter(), Counter[str](), []
    for step in range(total):
        if step % per_epoch == 0:
            order, sums, kept = torch.from_numpy(index)[torch.randperm(len(index), generator=generator)], Counter(), []
        if teacher is not None:
            retune_(model, reducer.annealed(min(step / anneal, 1.0)))
        chosen = order[step % per_epoch * recipe.batch_size :][: recipe.batch_size]
        images = pictures.batch(chosen, generator)
        with autocast(pictures.device, recipe.precision):
            losses = objective(model, images, pictures.labels[chosen.to(pictures.device)])
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        sums.update({name: value / per_epoch for name, value in losses.parts.items()})
        if losses.kept:
            kept.append(torch.stack(losses.kept))
    retune_(model, reducer)
    return {
        "losses": {name: float(value) for name, value in sums.items()},
        "kept": torch.stack(kept).mean(dim=0).tolist() if kept else [],
        "seconds_per_step": (time.perf_counter() - began) / total,
    }


@torch.no_grad()
def logits(model: nn.Module, pictures: Pictures, index: np.ndarray) -> Tensor:
    model.eval()
    return torch.cat([model(batch).float().cpu() for batch in pictures.batches(index, 128)])

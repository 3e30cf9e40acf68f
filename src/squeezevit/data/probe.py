"""What a reduction costs where nobody trains: a linear probe on the unreduced model's features scores the reduced model's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from squeezevit.core.running import Progress
from squeezevit.data import elpv

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)


def silent(what: str, done: int, total: int) -> None:
    """The progress that nobody watches."""


@dataclass(frozen=True)
class Probe:
    """A linear probe on features, and the images it is tested on: their labels, and the unreduced model's features of them."""

    predict: Callable[[np.ndarray], np.ndarray]
    features: np.ndarray  # [n, C], unreduced
    labels: np.ndarray  # [n]
    strength: float  # C of the logistic regression

    def hits(self, features: np.ndarray) -> np.ndarray:
        """Which images these features get right: bool [n]."""
        return self.predict(features) == self.labels


def load_images(paths: Sequence[Path], image_size: int, batch_size: int, progress: Progress = silent) -> list[Tensor]:
    """The photographs in batches, read once: [[B, 3, S, S], ...]."""
    starts = range(0, len(paths), batch_size)
    batches = []
    for i in starts:
        batches.append(elpv.load_batch(paths[i : i + batch_size], image_size))
        progress("reading photographs", len(batches), len(starts))
    return batches


@torch.inference_mode()
def extract(model: nn.Module, batches: Sequence[Tensor], progress: Progress = silent, what: str = "features") -> np.ndarray:
    """What the model says of each image, [n, C]: features, of a model without a classifier."""
    features = []
    for batch in batches:
        features.append(model(batch))
        progress(what, len(features), len(batches))
    return torch.cat(features).numpy()


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    seed: int | None = 0,
    folds: int = 5,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Logistic regression on standardised features of the unreduced model, its strength chosen on the training part alone.

    features [n, C] and labels [n]: to fit on. seed: of the folds' shuffling, None for folds in the order given.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = StratifiedKFold(folds, shuffle=seed is not None, random_state=seed)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    search = GridSearchCV(pipeline, {"logisticregression__C": list(strengths)}, cv=parts)
    search.fit(features, labels)
    return Probe(search.predict, test_features, test_labels, search.best_params_["logisticregression__C"])


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of each row of one with that of the other: [n, C], [n, C] -> [n]."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))

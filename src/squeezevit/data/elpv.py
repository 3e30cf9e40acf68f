"""ELPV: 2,624 electroluminescence photographs of solar cells with the probability of a defect, from `elpv-dataset`.

Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021. The photographs are licensed CC BY-NC-SA 4.0: name the source
beside pictures drawn from them, and keep them out of commercial work.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from squeezevit.data.folder import read_image
from squeezevit.errors import ConfigError, DataError, MissingExtraError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def load_elpv() -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Paths [n], defect probabilities [n] in [0, 1] and cell types [n] ("mono" or "poly"); opens no photograph.

    Raises MissingExtraError without `elpv-dataset`, DataError where its list of labels is missing or spoilt.

    >>> paths, probabilities, types = load_elpv()  # doctest: +SKIP
    >>> len(paths), is_defective(probabilities).sum()  # doctest: +SKIP
    (2624, 821)
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError('the solar cells come from elpv-dataset: run `pip install "squeezevit[demo]"`')
    table = Path(spec.submodule_search_locations[0]) / "data" / "labels.csv"
    try:
        rows = [line.split() for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        names, probabilities, types = zip(*rows, strict=True)
        return [table.parent / name for name in names], np.array(probabilities, dtype=np.float64), np.array(types)
    except (OSError, ValueError) as error:
        raise DataError(f"{table} cannot be used ({error}): run `pip install --force-reinstall elpv-dataset`") from error


def is_defective(probabilities: np.ndarray) -> np.ndarray:
    """The label, bool [n]: a defect probability above 0.5."""
    return probabilities > 0.5


def split(probabilities: np.ndarray, n_train: int, n_test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint indices to fit on and to score on, ascending, each with the labels in the proportions of the whole.

    The same arguments give the same photographs on every machine and NumPy: `RandomState`'s stream is frozen,
    `Generator`'s is not. Cells of one solar module may fall on both sides: the package does not tell modules apart.

    Raises ConfigError where a part is below 2 or there are too few photographs of a label.
    """
    if min(n_train, n_test) < 2:
        raise ConfigError(f"n_train={n_train}, n_test={n_test}: each part needs at least 2 photographs, one of each label")
    labels = is_defective(np.asarray(probabilities))
    random = np.random.RandomState(seed)
    parts: tuple[list, list] = ([], [])
    for label in (False, True):
        members = random.permutation(np.flatnonzero(labels == label))
        first, second = (_share(n, labels.mean(), label) for n in (n_train, n_test))
        if first + second > len(members):
            raise ConfigError(
                f"n_train={n_train}, n_test={n_test} need {first + second} photographs of "
                f"{'defective' if label else 'functional'} cells, there are {len(members)}: ask for fewer"
            )
        parts[0].append(members[:first])
        parts[1].append(members[first : first + second])
    return np.sort(np.concatenate(parts[0])), np.sort(np.concatenate(parts[1]))


def load_batch(paths: Sequence[Path], image_size: int) -> Tensor:
    """Photographs as DINOv2 wants them, float32 [B, 3, S, S]: RGB, bicubic with antialiasing, ImageNet's mean and std.

    Raises DataError naming a photograph that cannot be read.
    """
    pixels = np.stack([_square(path, image_size) for path in paths])  # [B, S, S, 3]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    return images.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None]).contiguous()


def _share(n: int, positive: float, label: bool) -> int:
    """How many of `n` carry `label`, at least one of each."""
    positives = min(max(round(n * positive), 1), n - 1)
    return positives if label else n - positives


def _square(path: Path, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(read_image(path).resize((size, size), Image.Resampling.BICUBIC))

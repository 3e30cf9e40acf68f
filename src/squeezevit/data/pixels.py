"""From a photograph to the numbers a model takes, with NumPy and Pillow alone, so that a model means the same wherever it runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from squeezevit.errors import ConfigError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")  # Pillow's names, in lower case


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph is resized, cut and scaled.

    resize: pixels of the shorter side, or height and width where the proportions are given up. crop: height and width of the middle
    that is cut out, which is what the model takes. mean, std: of the channels red, green and blue, of values from 0 to 1. upright:
    whether photographs are first turned as their EXIF data say. Raises ConfigError on what cannot be meant.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    upright: bool = True

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "mean", "std"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)
        if not all(isinstance(s, int) and s > 0 for s in (*sides, *self.crop)) or len(sides) != 2 or len(self.crop) != 2:
            raise ConfigError(f"resize={self.resize!r}, crop={self.crop!r} are no sizes; give pixels, as 256 and (224, 224)")
        if any(s < c for s, c in zip(sides, self.crop, strict=True)):
            raise ConfigError(f"resize={self.resize!r} leaves less than crop={self.crop!r}; resize to at least as many pixels")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation={self.interpolation!r} is not known; choose one of {', '.join(INTERPOLATIONS)}")
        numbers = all(isinstance(v, int | float) for v in (*self.mean, *self.std))
        if len(self.mean) != 3 or len(self.std) != 3 or not numbers or min(self.std) <= 0:
            raise ConfigError(f"mean={self.mean!r}, std={self.std!r}: give three numbers each, for red, green and blue")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Raises ConfigError where fields are missing or unknown."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{dict(values)} describes no preprocessing of this version ({error})") from error

    def __call__(self, image: Any) -> np.ndarray:
        """A decoded RGB PIL image -> float32 [3, H, W], to the last bit what timm's evaluation transform gives.

        >>> Preprocessing(256, (224, 224))(Image.open("photo.jpg").convert("RGB")).shape  # doctest: +SKIP
        (3, 224, 224)
        """
        return self.scaled(self.cut(image))

    def cut(self, image: Any) -> np.ndarray:
        """A decoded RGB PIL image -> uint8 [3, H, W], resized and cut: a quarter of the bytes, for those who send it on."""
        from PIL import Image

        image = image.resize(self._resized(*image.size), getattr(Image.Resampling, self.interpolation.upper()))
        height, width = self.crop
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)

    def scaled(self, pixels: np.ndarray) -> np.ndarray:
        """What `cut` gave, one image or many, uint8 [..., 3, H, W] -> float32 of the same shape."""
        mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize

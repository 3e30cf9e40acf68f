"""Scores from the language model's own attention: how much the words of the prompt look at each of its other tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squeezevit.errors import ConfigError, UnsupportedError
from squeezevit.vlm.host import HOOK, Image, encoder_names

LAYER = 2  # 0-based, of those with attention, or the last of a shorter model (FastV, Chen et al. 2024)


class _Enough(Exception):
    """Leaves the forward once the layer has attended."""


class Asked:
    """Attention that the words give, in an early layer, to all tokens of the whole prompt.

    The layers up to that one run once on the whole prompt, with their plain ("eager") attention, whose weights, [B, H, T, T], are
    there for a moment. inputs: the whole prompt, with its mask, and its positions where they are not counted one by one.
    """

    def __init__(self, model: Any, base: nn.Module, inputs: Mapping[str, Any], encoded: Mapping[str, Any]) -> None:
        self.model, self.name = model, type(base).__name__
        self.inputs = {name: value for name, value in inputs.items() if name not in encoder_names(base) and name != "labels"}
        self.inputs[HOOK] = dict(encoded)
        self.mask: Tensor = inputs["attention_mask"].bool()

    def scores(self, placeholders: Tensor, images: list[Image]) -> list[Tensor]:
        """Mean attention over heads, summed over the words, for each feature of each image: [N] float32.

        placeholders: [B, T] bool, all tokens that stand for features. Raises ConfigError where no word comes after an image.
        """
        words = self.mask & ~placeholders
        for image in images:
            if not words[image.row, int(image.places[-1]) :].any():
                raise ConfigError(
                    f'scores="question": no word comes after {image.modality} {image.number} of the prompt, so none looks at it; '
                    'put the question behind the images, or use scores="even"'
                )
        weights = self._weights().float().mean(dim=1)  # [B, T, T], of the heads
        received = (weights * words[:, :, None]).sum(dim=1)
        return [received[image.row, image.places] for image in images]

    @torch.no_grad()
    def _weights(self) -> Tensor:
        """[B, H, T, T]."""
        decoder = self.model.get_decoder()
        attending = [layer.self_attn for layer in getattr(decoder, "layers", ()) if hasattr(layer, "self_attn")]
        if not attending:
            raise self._refusal("has no layers with self_attn")
        found: list[Any] = []

        def leave(module: nn.Module, args: object, out: Any) -> None:
            found.append(out[1] if isinstance(out, tuple) and len(out) > 1 else None)
            raise _Enough

        config, own = decoder.config, decoder.config._attn_implementation
        handle = attending[min(LAYER, len(attending) - 1)].register_forward_hook(leave)
        try:
            config._attn_implementation = "eager"
            self.model(**self.inputs, use_cache=False)
        except _Enough:
            pass
        finally:
            config._attn_implementation = own
            handle.remove()
        if not found or not isinstance(found[0], Tensor):
            raise self._refusal("does not tell its attention weights")
        return found[0]

    def _refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(f'scores="question": the language model of {self.name} {why}; use scores="even" or "redundancy"')

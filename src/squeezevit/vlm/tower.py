"""Scores from the attention of the vision tower's last block."""

from typing import Any

from torch import Tensor

from squeezevit.core import ops
from squeezevit.core.cut import attention, description_of
from squeezevit.errors import UnsupportedError


class Watch:
    """Records what goes into the last block of a model's vision tower while it is open.

    Raises UnsupportedError for towers that SqueezeViT does not know, or that are reduced themselves.
    """

    def __init__(self, base: Any) -> None:
        if any("squeezevit_state" in vars(m) for m in base.modules()):
            raise UnsupportedError(f'scores="tower": the tower of {type(base).__name__} is itself reduced; {_REMEDY}')
        try:
            self.about = description_of(base)
        except UnsupportedError as error:
            raise UnsupportedError(f'scores="tower" needs the attention of a tower that is known: {error}; {_REMEDY}') from error
        self.name = type(base).__name__
        self.block: Any = self.about.blocks[-1]
        self.seen: tuple[Tensor, dict[str, Any]] | None = None

    def __enter__(self) -> "Watch":
        self._handle = self.block.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _record(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = (args[0] if args else kwargs["hidden_states"], kwargs)

    def scores(self, counts: list[int]) -> list[Tensor]:
        """Attention that the class token gives to each image's features, or that they receive from all: [N] float32 for each count.

        A feature of several patches, a square of them, has their sum.
        """
        assert self.seen is not None
        x, kwargs = self.seen
        if kwargs.get("attention_mask") is not None:
            raise UnsupportedError(f'scores="tower": the tower of {self.name} hides padding of images from attention; {_REMEDY}')
        rotary = {"position_embeddings": kwargs["position_embeddings"]} if "position_embeddings" in kwargs else {}
        a = attention(self.block, x, **rotary)
        row = (
            ops.class_attention(a.query(1)[:, :, 0], a.key())
            if self.about.class_token
            else ops.received_attention(a.query(None), a.key())
        )
        rows = row[:, self.about.prefix :]
        if len(rows) != len(counts):
            raise UnsupportedError(
                f'scores="tower": {self.name} has {len(rows)} images in its tower for {len(counts)} in the prompt; {_REMEDY}'
            )
        return [self._pooled(r, n) for r, n in zip(rows, counts, strict=True)]

    def _pooled(self, row: Tensor, n: int) -> Tensor:
        side, new = round(len(row) ** 0.5), round(n**0.5)
        if len(row) == n:
            return row
        if side**2 != len(row) or new**2 != n or side % new:
            raise UnsupportedError(
                f'scores="tower": {self.name} makes {n} features of {len(row)} patches, which are not squares of them; {_REMEDY}'
            )
        step = side // new
        return row.view(new, step, new, step).sum(dim=(1, 3)).flatten()


_REMEDY = 'use scores="even" or "redundancy", which ask for no attention, or a function of your own'

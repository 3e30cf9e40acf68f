"""A vision-language model whose `generate` and `forward` take the processor's plain output and see fewer image tokens."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from squeezevit.errors import ConfigError
from squeezevit.vlm import host
from squeezevit.vlm.groups import Budget
from squeezevit.vlm.prompt import Places, Prompt, Scores, check_choices, squeeze_prompt

_TURN = "squeezevit_turn"  # where a cache says what prompt it holds
_NEW_IMAGE = (
    "a new image cannot be added to a cache that is in use, as the cache counts other places than the prompt; begin anew with the "
    "whole conversation and without the cache"
)


class _Turn(NamedTuple):
    """What a cache holds: the conversation as the user has it, and as the model saw it."""

    prompt: Prompt
    told: Tensor  # [B, T + new], the original prompt and what was generated


class VLM(nn.Module):
    """A vision-language model of transformers with fewer image tokens; all else is the model's own.

    `generate` takes what the model's own takes and returns what that returns: sequences begin with the original tokens, so that
    `out[:, n:]` is what was generated. `max_length` and `min_length` count the original prompt. `forward` returns logits of the
    shorter prompt, [B, T', V], and the loss where there are labels. A prompt without images is passed on. The settings are those
    of `squeeze_prompt`, which is called anew each time; the model itself is not changed, and is `vlm.model`.

    A conversation may go on with the cache of an earlier turn (`return_dict_in_generate=True`, then `cache=out.cache`) as long as
    it shows nothing new: give all tokens from the beginning. New images on an old cache, beams and several sequences are refused.
    Raises ConfigError and UnsupportedError as `squeeze_prompt` does.

    >>> vlm = VLM(model, keep=0.25)  # doctest: +SKIP
    >>> vlm.generate(**processor(images=photo, text=text, return_tensors="pt"), max_new_tokens=20)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float | None = None,
        *,
        tokens: int | None = None,
        fuse: bool = True,
        scores: Scores = "even",
        places: Places = "original",
    ) -> None:
        super().__init__()
        Budget(0.5 if keep is None and tokens is None else keep, tokens)
        check_choices(scores, places)
        host.base_of(model)
        self.model: Any = model
        self.settings: dict[str, Any] = {"keep": keep, "tokens": tokens, "fuse": fuse, "scores": scores, "places": places}

    def __getattr__(self, name: str) -> Any:
        """What the wrapper has not (config, device, generation_config), the model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def squeeze(self, inputs: Mapping[str, Any]) -> Prompt:
        """`squeeze_prompt` with the settings of this wrapper: for a look at what became of the images."""
        return squeeze_prompt(self.model, inputs, **self.settings)

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own output for the shorter prompt: logits [B, T', V], and the loss where there are labels [B, T]."""
        kwargs |= {} if labels is None else {"labels": labels}
        if len(args) == 1 and isinstance(args[0], Tensor):
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        cache = _cache_in(kwargs)
        if not host.shown(host.base_of(self.model), kwargs):
            turn = getattr(cache, _TURN, None)
            return self.model(*args, **(kwargs if turn is None else _behind(turn, cache, kwargs)))
        if cache is not None and cache.get_seq_length():
            raise ConfigError(_NEW_IMAGE)
        prompt = self.squeeze(kwargs)
        out = self.model(*args, **prompt)
        if isinstance(out, Mapping):
            _write_down(_cache_in(out), prompt, prompt.ids)
        return out

    @torch.no_grad()
    def generate(self, inputs: Tensor | Prompt | None = None, **kwargs: Any) -> Any:
        """As the model's own. inputs: input_ids [B, T], or a prompt from `squeeze`, whose images are then not encoded again."""
        if isinstance(inputs, Tensor):
            kwargs["input_ids"] = inputs
        cache = _cache_in(kwargs)
        if cache is not None and cache.get_seq_length():
            return self._go_on(cache, kwargs, inputs)
        if isinstance(inputs, Prompt):
            return self._run(inputs, {**inputs, **kwargs}, cache)
        if not host.shown(host.base_of(self.model), kwargs):
            return self.model.generate(**kwargs)
        prompt = self.squeeze(kwargs)
        return self._run(prompt, dict(prompt), cache)

    def _run(self, prompt: Prompt, options: dict[str, Any], cache: Any) -> Any:
        """Generate, put the original tokens in front again, and write onto the cache what it holds."""
        out = self.model.generate(**self._lengths(options, prompt))
        sequences = out if isinstance(out, Tensor) else out.sequences
        copies = len(sequences) // len(prompt.ids)
        told = torch.cat([prompt.ids.repeat_interleave(copies, dim=0), sequences[:, prompt["input_ids"].shape[1] :]], dim=1)
        if not isinstance(out, Tensor):
            out.sequences, cache = told, _cache_in(out)
        _write_down(cache, prompt, told)
        return told if isinstance(out, Tensor) else out

    def _lengths(self, options: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
        """With lengths that count the prompt made shorter by what left it."""
        gone = prompt.ids.shape[1] - prompt["input_ids"].shape[1]
        own = options.get("generation_config")
        config = copy(own or self.model.generation_config)
        for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = options.get(name, getattr(config, name, None))
            if length and options.get(new, getattr(config, new, None)) is None:
                if own is None or name in options:
                    options[name] = max(length - gone, 0)
                else:
                    setattr(config, name, max(length - gone, 0))
        return options if own is None else {**options, "generation_config": config}

    def _go_on(self, cache: Any, kwargs: dict[str, Any], inputs: object) -> Any:
        """A later turn on one cache: what the earlier ones left out is left out of the conversation again."""
        if host.shown(host.base_of(self.model), kwargs) or isinstance(inputs, Prompt):
            raise ConfigError(_NEW_IMAGE)
        turn: _Turn | None = getattr(cache, _TURN, None)
        if turn is None:
            return self.model.generate(**kwargs)
        _require_same(kwargs.get("input_ids"), turn, cache.get_seq_length())
        begun, mask = turn.prompt.ids.shape[1], kwargs.get("attention_mask")
        prompt = _longer(turn.prompt, kwargs["input_ids"][:, begun:], None if mask is None else mask[:, begun:])
        return self._run(prompt, {**kwargs, **prompt}, cache)


def _write_down(cache: Any, prompt: Prompt, told: Tensor) -> None:
    """On a cache, what it holds."""
    if cache is not None:
        held = {name: value for name, value in prompt.items() if name in _KEPT}
        setattr(cache, _TURN, _Turn(replace(prompt, inputs=held), told))


def _behind(turn: _Turn, cache: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What is given for the next tokens, [B, new], with their positions and mask behind the shorter prompt in the cache."""
    ids, prompt = given.get("input_ids"), turn.prompt
    if not isinstance(ids, Tensor):
        return given
    held = ids.new_zeros(len(ids), cache.get_seq_length() - prompt["input_ids"].shape[1])  # whatever was said since
    new, mask = torch.cat([held, ids], dim=1), given.get("attention_mask")
    longer = _longer(prompt, new, None if mask is None else mask[:, -new.shape[1] :])
    places = {"position_ids": longer["position_ids"][..., -ids.shape[1] :]} if "position_ids" in longer else {}
    return {**places, **given, "attention_mask": longer["attention_mask"]}


def _cache_in(found: Mapping[str, Any]) -> Any:
    """By its name, or by the one that it had in transformers before."""
    return next((found[name] for name in ("cache", "past_key_values") if name in found), None)


def _longer(prompt: Prompt, new: Tensor, mask: Tensor | None) -> Prompt:
    """The prompt with the text that a conversation has after it, [B, more], and its mask."""
    attended = torch.ones_like(new) if mask is None else mask
    ends = {"input_ids": new, "attention_mask": attended}
    out = {"attention_mask": torch.ones_like(prompt["input_ids"]), **prompt}
    for name, value in out.items():
        if name == "position_ids":
            end = value[..., -1:] + attended.cumsum(dim=1)
        else:
            end = ends.get(name, torch.zeros_like(new)).to(value)
        out[name] = torch.cat([value, end], dim=-1)
    return Prompt(out, torch.cat([prompt.ids.to(new), new], dim=1), torch.cat([prompt.kept, attended.bool()], dim=1), prompt.images)


_KEPT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")  # what later turns need of it


def _require_same(ids: object, turn: _Turn, length: int) -> None:
    """The conversation must begin with what the cache holds."""
    n = turn.prompt.ids.shape[1] + length - turn.prompt["input_ids"].shape[1]
    if len(turn.told) != len(turn.prompt.ids):
        raise ConfigError(
            f"the cache is of {len(turn.told)} sequences for {len(turn.prompt.ids)} prompts, from beams or num_return_sequences; "
            "go on without it"
        )
    if not isinstance(ids, Tensor) or ids.shape[1] <= n or not torch.equal(ids[:, :n], turn.told[:, :n].to(ids)):
        found = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ConfigError(
            f"the conversation, input_ids {found}, does not begin with the {n} tokens that are in the cache; give out.sequences "
            "with the new turn's tokens behind them, or go on without the cache"
        )

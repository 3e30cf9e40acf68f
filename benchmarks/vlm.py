"""What fewer image tokens save in a vision-language model: prefill time, cache memory, tokens a second, against keep.

    python benchmarks/vlm.py [--layers 2 --device cuda]        # benchmarks/results/vlm.json

Qwen2.5-VL in the width of its 3B model (2048 channels, 16 heads with 2 for keys, MLP 11008) with random weights, cut to few layers
and a small vocabulary; the vision tower is cut to one block, and its time is told apart from that of squeezing. Time depends on
shapes alone. Best and median of alternating rounds in one run. `predicted` is the share of prefill's multiply-adds by arithmetic:
projections and MLP by the token, attention by its square. `of_text` is prefill beside that of the same model on as many words,
which nobody squeezed: what the arithmetic misses there, it misses by the machine's matrix products and not by the prompt.
"""

from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import squeezevit as sv
from squeezevit.bench.timing import alternate
from workshop import RESULTS, Sheet, timing_arguments

WIDTH, HEADS, KEYS, MLP, WORDS = 2048, 16, 2, 11008, 8192
IMAGE, BEGIN, END = 100, 102, 103
KEEPS = (1.0, 0.5, 0.25, 0.1)


def build(layers: int, device: str) -> Any:
    text = {
        "hidden_size": WIDTH, "intermediate_size": MLP, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
        "num_hidden_layers": layers, "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    tower = {"depth": 1, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": WIDTH}
    marks = {"image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
    config = Qwen2_5_VLConfig(vision_config={**tower, "fullatt_block_indexes": [0]}, text_config=text, **marks)
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).to(device).eval()


def processed(side: int, words: int, device: str) -> dict[str, Tensor]:
    """An image of side x side tokens in a text of so many words."""
    text = torch.arange(200, 200 + words)
    ids = torch.cat([text[: words // 2], torch.tensor([BEGIN, *[IMAGE] * side**2, END]), text[words // 2 :]])[None]
    patches = (2 * side) ** 2
    pixels = torch.randn(patches, 3 * 2 * 14**2, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).long()}
    inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]])}
    return {name: value.to(device) for name, value in inputs.items()}


def multiply_adds(layers: int, tokens: int) -> int:
    """Of prefill, for one text, with the logits of its last token."""
    d = WIDTH // HEADS
    by_token = WIDTH * (2 * WIDTH + 2 * KEYS * d) + 3 * WIDTH * MLP
    return layers * (tokens * by_token + 2 * tokens**2 * WIDTH) + WIDTH * WORDS


def prefill(model: Any, prompt: Any) -> Any:
    return model(**prompt, use_cache=True, logits_to_keep=1)


def text_of(prompt: Any) -> dict[str, Tensor]:
    """Words alone, as many as the prompt has tokens."""
    return {"input_ids": torch.arange(200, 200 + prompt["input_ids"].shape[1], device=prompt["input_ids"].device)[None]}


class Writer:
    """Writes words one by one behind a prompt, each time from where the prompt ends."""

    def __init__(self, model: Any, prompt: Any, words: int) -> None:
        self.model, self.words = model, words
        self.cache = prefill(model, prompt).cache
        self.word = prompt["input_ids"][:, -1:]

    def __call__(self) -> None:
        for _ in range(self.words):
            self.model(input_ids=self.word, cache=self.cache, use_cache=True)
        self.cache.crop(-self.words)


def encoding_once_(base: Any) -> None:
    """Let the encoder give what it gave first: what is timed afterwards is the squeezing alone."""
    first: list[Any] = []
    encode = base.get_image_features

    @wraps(encode)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not first:
            first.append(encode(*args, **kwargs))
        return first[0]

    base.get_image_features = again


def cache_bytes(cache: Any) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


@torch.inference_mode()
def main() -> None:
    parser = timing_arguments(__doc__, batch_size=1, rounds=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--side", type=int, default=24, help="image tokens a side")
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--new", type=int, default=4, help="tokens to write")
    parser.add_argument("--json", type=Path, default=RESULTS / "vlm.json")
    args = parser.parse_args()
    model, inputs = build(args.layers, args.device), processed(args.side, args.words, args.device)
    inputs = {name: torch.cat([value] * args.batch_size) for name, value in inputs.items()}
    cases = {(keep, fuse): {"keep": keep, "fuse": fuse} for keep in KEEPS for fuse in (True, False) if fuse or keep < 1}
    prompts = {case: sv.squeeze_prompt(model, inputs, **options) for case, options in cases.items()}
    shown = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    timed: dict[Any, Any] = {("encode",): partial(model.model.get_image_features, **shown, return_dict=True)}
    encoding_once_(model.model)
    for case, options in cases.items():
        timed["squeeze", *case] = partial(sv.squeeze_prompt, model, inputs, **options)
        timed["prefill", *case] = partial(prefill, model, prompts[case])
        timed["text", *case] = partial(prefill, model, text_of(prompts[case]))
        timed["write", *case] = Writer(model, prompts[case], args.new)
    timings = alternate(timed, args.rounds, device=args.device)
    settings = {"layers": args.layers, "of_layers": 36, "image_tokens": args.side**2, "words": args.words, "new_tokens": args.new}
    sheet = Sheet(args.json, args.device, batch_size=args.batch_size, rounds=args.rounds, **settings)
    dense, whole = (1.0, True), multiply_adds(args.layers, inputs["input_ids"].shape[1])
    for keep, fuse in cases:
        case, prompt = (keep, fuse), prompts[keep, fuse]
        tokens = prompt["input_ids"].shape[1]
        predicted = multiply_adds(args.layers, tokens) / whole
        share, best = (of(("prefill", *case), ("prefill", *dense)) for of in (timings.ratio, timings.best_ratio))
        text_share, text_best = (of(("prefill", *case), ("text", *case)) for of in (timings.ratio, timings.best_ratio))
        squeezing, writing = (timings.median((what, *case)) for what in ("squeeze", "write"))
        squeezing_best, writing_best = (timings.best((what, *case)) for what in ("squeeze", "write"))
        row = {
            "keep": keep, "what": "squeeze" if fuse else "prune", "tokens": tokens, "image_tokens": len(prompt.images[0].kept),
            "prefill_seconds": timings.median(("prefill", *case)), "prefill_seconds_best": timings.best(("prefill", *case)),
            "prefill_share": share, "prefill_share_best": best, "predicted": predicted,
            "of_predicted": share / predicted, "of_predicted_best": best / predicted,
            "of_text": text_share, "of_text_best": text_best,
            "squeeze_seconds": squeezing, "squeeze_seconds_best": squeezing_best, "encode_seconds": timings.median(("encode",)),
            "cache_bytes": cache_bytes(prefill(model, prompt).cache),
            "tokens_per_second": args.new / writing, "tokens_per_second_best": args.new / writing_best,
        }  # fmt: skip
        text = f"{row['what']} keep {keep}: {tokens} tokens, prefill {share:.3f} (best {best:.3f}, predicted {predicted:.3f}), "
        text += f"{text_share:.3f} (best {text_best:.3f}) of as many words, "
        text += f"squeezing {1e3 * squeezing_best:.1f} ms, {row['tokens_per_second']:.2f} tokens/s, "
        sheet.add(row, f"{text}cache {row['cache_bytes'] / 2**20:.2f} MiB")
    sheet.save()


if __name__ == "__main__":
    main()

"""Tower and prompt of a vision-language model reduced with one budget: time to the first token, beside either end alone.

    python benchmarks/vlm_both.py [--device cuda]        # benchmarks/results/vlm_both.json

LLaVA with a vision tower of CLIP ViT-L/14 at 336 pixels (width 1024, 577 tokens) and a language model 2048 wide, MLP 5504, both
with random weights and cut to few layers; one image of 576 tokens in 32 words. Timed is all from pixels to the logits of the first
new token: encoding, squeezing, prefill. Time depends on shapes alone. Best and median of alternating rounds in one run.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import squeezevit as sv
from squeezevit.bench.timing import alternate
from squeezevit.core.running import share_weights
from workshop import RESULTS, Sheet, timing_arguments

IMAGE, N, WORDS = 100, 576, 32
ENDS = ("neither", "tower", "prompt", "both")


def build(tower_layers: int, layers: int, device: str) -> Any:
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": tower_layers, "image_size": 336, "patch_size": 14}
    text = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": layers, "vocab_size": 8192, "pad_token_id": 0}
    towers = {
        "vision_config": CLIPVisionConfig(**tower, num_attention_heads=16),
        "text_config": LlamaConfig(**text, num_attention_heads=16),
    }
    torch.manual_seed(0)
    config = LlavaConfig(**towers, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).to(device).eval()


def processed(device: str) -> dict[str, Tensor]:
    """An image between words."""
    text = torch.arange(200, 200 + WORDS)
    ids = torch.cat([text[: WORDS // 2], torch.full((N,), IMAGE), text[WORDS // 2 :]])[None]
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "pixel_values": pixels.to(device)}


def reduced(model: Any, ends: str, keep: float) -> sv.VLM:
    """A copy that shares the weights."""
    copy = share_weights(model)
    if ends in ("tower", "both"):
        vlm = sv.reduce_vlm_(copy, keep)
        return vlm if ends == "both" else sv.VLM(copy, keep=1.0)
    return sv.VLM(copy, keep=keep if ends == "prompt" else 1.0)


@torch.inference_mode()
def main() -> None:
    parser = timing_arguments(__doc__, batch_size=1, rounds=5)
    parser.add_argument("--tower-layers", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--json", type=Path, default=RESULTS / "vlm_both.json")
    args = parser.parse_args()
    model, inputs = build(args.tower_layers, args.layers, args.device), processed(args.device)
    cases = [("neither", 1.0), *((ends, keep) for keep in (0.5, 0.25) for ends in ENDS[1:])]
    timed = {case: partial(reduced(model, *case), **inputs, logits_to_keep=1) for case in cases}
    timings = alternate(timed, args.rounds, device=args.device)
    sheet = Sheet(args.json, args.device, rounds=args.rounds, tower_layers=args.tower_layers, layers=args.layers, image_tokens=N)
    for ends, keep in cases:
        case, dense = (ends, keep), cases[0]
        row = {
            "ends": ends, "keep": keep, "seconds": timings.median(case), "seconds_best": timings.best(case),
            "of_dense": timings.ratio(case, dense), "of_dense_best": timings.best_ratio(case, dense),
        }  # fmt: skip
        sheet.add(
            row,
            f"{ends:8} keep {keep}: {row['seconds_best']:.3f} s, {row['of_dense']:.3f} (best {row['of_dense_best']:.3f}) of dense",
        )
    sheet.save()


if __name__ == "__main__":
    main()

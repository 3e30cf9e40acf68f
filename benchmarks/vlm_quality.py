"""How near a vision-language model stays to itself with fewer image tokens: scores, chance and pooling at equal budgets.

    python benchmarks/vlm_quality.py [--features FILE]        # benchmarks/results/vlm_quality.json

No pretrained vision-language model is used. The image features are real (DINOv2 ViT-S/14 on photographs of solar cells). Projector
and language model are small and trained here, on all tokens, to answer questions about mosaics of four cells: how many are
defective, and whether a certain one is. Judged are answers on mosaics of other cells: accuracy, and the divergence of the answer's
distribution from the unreduced model's. Nothing is trained on fewer tokens.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import squeezevit as sv
from squeezevit.core.cut import attention, description_of
from squeezevit.data import dinov2, elpv
from workshop import RESULTS, Sheet, arguments, say, standard_error

CELL, SIDE, PATCHES = 84, 2, 12  # pixels of a cell's side, cells of a mosaic's, patches of a mosaic's
N = PATCHES**2
IMAGE, WORDS = 31, 32  # the token that waits for image features, and how many there are
QUESTIONS = 1 + SIDE**2  # how many are defective; whether cell 0, 1, 2 or 3 is
COUNT, NO = 10, 20  # the first answer of either kind
POOLS = {72: (2, 1), 36: (2, 2), 16: (3, 3), 9: (4, 4)}  # a budget, and the pooling that meets it


class Given(nn.Module):
    """A vision tower whose images are features already."""

    def forward(self, pixel_values: Tensor, **ignored: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,))


@torch.inference_mode()
def features(model: nn.Module, cells: Tensor, defective: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Mosaics of cells, half of them defective by chance: patch features [B, N, 384], class attention [B, N], labels [B, 4]."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [defective.eq(label).nonzero()[:, 0] for label in (False, True)]
    seen: list[Tensor] = []
    block = description_of(model).blocks[-1]
    handle = block.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    for start in range(0, count, 16):
        labels = torch.rand(min(16, count - start), SIDE**2, generator=generator) < 0.5
        draws = torch.rand(labels.shape, generator=generator)
        index = torch.where(labels, *(kind[(draws * len(kind)).long()] for kind in reversed(kinds)))
        mosaic = cells[index].unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, 3, H, W)
        tokens = model.forward_features(mosaic)[:, 1:]
        a = attention(block, seen.pop())
        yield tokens, sv.ops.class_attention(a.query(1)[:, :, 0], a.key())[:, 1:], labels
    handle.remove()


def prepared(file: Path, train: int, test: int) -> dict[str, Tensor]:
    """Features and labels of both halves, of disjoint cells; read where they were written before."""
    if not file.is_file():
        paths, probabilities, _ = elpv.load_elpv()
        sure = np.flatnonzero((probabilities == 0) | (probabilities == 1))
        sure = np.random.RandomState(0).permutation(sure)
        model, found = dinov2.dinov2_vit_small(CELL * SIDE), {}
        for name, count, part in (("train", train, sure[len(sure) // 4 :]), ("test", test, sure[: len(sure) // 4])):
            cells = elpv.load_batch([paths[i] for i in part], CELL)
            defective = torch.from_numpy(probabilities[part] == 1)
            columns = zip(*features(model, cells, defective, count, seed=len(name)), strict=True)
            for key, column in zip(("x", "attention", "labels"), columns, strict=True):
                found[f"{name}_{key}"] = torch.cat(column).numpy()
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **found)
    return {name: torch.from_numpy(value) for name, value in np.load(file).items()}


def build(width: int, layers: int) -> Any:
    text = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=4, num_hidden_layers=layers, vocab_size=WORDS,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tower = Dinov2Config(hidden_size=384, num_hidden_layers=1, num_attention_heads=6, image_size=CELL * SIDE, patch_size=14)
    options = {"image_token_index": IMAGE, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, **options))
    model.model.vision_tower = Given()
    return model


def prompts(x: Tensor, question: Tensor) -> dict[str, Tensor]:
    """One question for each image: [B, 1 + N + 1] tokens, of which the last is the question."""
    ids = torch.full((len(x), N + 2), IMAGE)
    ids[:, 0], ids[:, -1] = 1, 3 + question
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": x}


def answers(labels: Tensor, question: Tensor) -> Tensor:
    """The token that answers: [B, 4] bool and [B] -> [B]."""
    one = labels.gather(1, (question - 1).clamp(min=0)[:, None])[:, 0].long()
    return torch.where(question == 0, COUNT + labels.sum(dim=1), NO + one)


def train_(model: Any, data: dict[str, Tensor], steps: int, batch: int = 16) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=steps)
    generator, began = torch.Generator().manual_seed(1), time.time()
    model.train()
    for step in range(steps):
        index = torch.randint(len(data["train_x"]), (batch,), generator=generator)
        question = torch.randint(QUESTIONS, (batch,), generator=generator)
        logits = model(**prompts(data["train_x"][index], question), logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, answers(data["train_labels"][index], question))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            say(f"step {step + 1}: loss {loss.item():.3f}, {time.time() - began:.0f} s")
    model.eval()


def pooled(model: Any, inputs: dict[str, Tensor], budget: int, places: str) -> dict[str, Any]:
    """The prompt with image features averaged over rectangles of the grid; a place is then the mean of its members'."""
    step = POOLS[budget]
    out = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    grid = torch.stack(list(out.pooler_output)).transpose(1, 2).unflatten(2, (PATCHES, PATCHES))
    out.pooler_output = list(F.avg_pool2d(grid, step).flatten(2).transpose(1, 2))
    keep = torch.tensor([True, *[i < budget for i in range(N)], True])
    line = F.avg_pool2d(torch.arange(N).float().view(1, PATCHES, PATCHES), step).flatten().round().long() + 1
    positions = {"position_ids": torch.cat([torch.tensor([0]), line, torch.tensor([N + 1])]).expand(len(grid), -1)}
    cut = {name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}
    return {**cut, "mm_encoder_outputs": {"image": out}, **(positions if places == "original" else {})}


def reduced(model: Any, method: str, inputs: dict[str, Tensor], weight: Tensor, budget: int, places: str) -> Any:
    """What the model is given by one method; weight: the class attention, [B, N]."""
    name, _, what = method.partition(" by ")
    if name == "pool":
        return pooled(model, inputs, budget, places)
    scores = {
        "even": "even",
        "redundancy": "redundancy",
        "question": "question",
        "attention": lambda x, image: weight[image.number],
        "chance": lambda x, image: torch.rand(len(x), generator=torch.Generator().manual_seed(image.number)),
    }[what]
    return sv.squeeze_prompt(model, inputs, tokens=budget, fuse=name == "squeeze", scores=scores, places=places)


SCORES = ("even", "redundancy", "attention", "question", "chance")
METHODS = (*(f"{how} by {what}" for what in SCORES for how in ("squeeze", "prune")), "pool")


@torch.inference_mode()
def judge(model: Any, data: dict[str, Tensor], method: str, budget: int, places: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all answers, [questions, mosaics, words], and which are right, [questions, mosaics]."""
    told, right = [], []
    for q in range(QUESTIONS):
        parts = []
        for x, weight in zip(data["test_x"].split(100), data["test_attention"].split(100), strict=True):
            inputs = prompts(x, torch.full((len(x),), q))
            prompt = inputs if method == "unreduced" else reduced(model, method, inputs, weight, budget, places)
            parts.append(model(**prompt, logits_to_keep=1).logits[:, -1].log_softmax(dim=-1))
        told.append(torch.cat(parts))
        right.append(told[-1].argmax(dim=-1) == answers(data["test_labels"], torch.full((len(told[-1]),), q)))
    return torch.stack(told), torch.stack(right)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--features", type=Path, default=Path(__file__).parent / "data" / "mosaics.npz")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--json", type=Path, default=RESULTS / "vlm_quality.json")
    args = parser.parse_args()
    data = prepared(args.features, args.train, args.test)
    model = build(128, 2)
    train_(model, data, args.steps)
    settings = {"mosaics": [len(data["train_x"]), len(data["test_x"])], "steps": args.steps, "image_tokens": N}
    sheet = Sheet(args.json, **settings)
    dense, _ = judge(model, data, "unreduced", N, "compact")
    for budget, places, method in [
        (N, "compact", "unreduced"),
        *((b, p, m) for b in POOLS for p in ("compact", "original") for m in METHODS),
    ]:
        told, good = judge(model, data, method, budget, places)
        divergence = (dense.exp() * (dense - told)).sum(dim=-1).mean(dim=0).numpy()  # a mosaic's mean over its questions
        accuracy = good.float().mean(dim=0).numpy()
        row = {
            "what": method, "tokens": budget, "places": places,
            "accuracy": float(accuracy.mean()), "accuracy_se": standard_error(accuracy),
            "counts_right": float(good[0].float().mean()), "cells_right": float(good[1:].float().mean()),
            "kl": float(divergence.mean()), "kl_se": standard_error(divergence),
            "same_answer": float((told.argmax(dim=-1) == dense.argmax(dim=-1)).float().mean()),
        }  # fmt: skip
        text = f"{budget:3} tokens, {places:8} {method:22} accuracy {row['accuracy']:.3f} (counts {row['counts_right']:.3f}) "
        sheet.add(row, text + f"KL {row['kl']:.3f} ± {row['kl_se']:.3f}, same answer {row['same_answer']:.3f}")
    sheet.save()


if __name__ == "__main__":
    main()

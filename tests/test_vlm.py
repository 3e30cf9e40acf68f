"""Vision-language models with fewer image tokens: equal where nothing leaves, and to an oracle that masks where something does."""

import json
import math
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
import transformers as hf
from tokenizers import Tokenizer
from torch import Tensor, nn

import squeezevit as sv
import vlm_zoo
from squeezevit.cli import main
from squeezevit.errors import ConfigError, DataError, UnsupportedError
from squeezevit.report import prompt as drawing
from squeezevit.report.overlay import panels
from squeezevit.vlm import Image, Prompt
from squeezevit.vlm.groups import even
from squeezevit.vlm.host import columns
from squeezevit.vlm.wrapper import _cache_in
from vlm_zoo import BEGIN, END, HOSTS, IMAGE, VIDEO

ROWS = ((7,), (8, 9))  # images of two texts
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
BEAMS = {"num_beams": 3, "num_return_sequences": 2}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MROPE = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "glm4v")
every_host = pytest.mark.parametrize("name", HOSTS)
PRUNE: dict[str, Any] = {"keep": 0.5, "fuse": False, "places": "original"}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of transformers about itself


@cache
def host(name: str) -> Any:
    return vlm_zoo.model(name)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def attended(prompt: Any, x: Tensor) -> list[Tensor]:
    return [row[mask.bool()] for row, mask in zip(x, prompt["attention_mask"], strict=True)]


def masked(name: str, inputs: dict[str, Tensor], prompt: Prompt) -> dict[str, Tensor]:
    """The oracle's prompt: whole, at its own positions, with the image tokens that are to leave hidden from attention."""
    stays = (inputs["input_ids"] != IMAGE) & (inputs["input_ids"] != VIDEO)
    for image in prompt.images:
        for k in image.kept.tolist():
            stays[image.row, int(image.places[k])] = True
    mask = inputs["attention_mask"]
    line = (mask.cumsum(dim=1) - 1).clamp(min=0)
    positions = line  # as the others count
    if name in MROPE:
        known = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        grids = {n: inputs[n] for n in known if n in inputs}
        positions, _ = host(name).model.get_rope_index(inputs["input_ids"], attention_mask=mask, **grids)
        positions = torch.cat([torch.arange(mask.shape[1]).expand_as(line)[None], positions])
    return {**inputs, "attention_mask": mask * stays, "position_ids": positions}


def groups_of(prompt: Prompt) -> list[list[int]]:
    return [image.groups.tolist() for image in prompt.images]


# nothing leaves


@every_host
def test_with_all_tokens_logits_and_generated_tokens_are_bit_equal(name):
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    assert torch.equal(model(**sv.squeeze_prompt(model, inputs, 1.0)).logits, model(**inputs).logits)
    vlm = sv.VLM(model, keep=1.0)
    for options in ({}, BEAMS, {"use_cache": False}):
        assert torch.equal(vlm.generate(**inputs, **GREEDY, **options), model.generate(**inputs, **GREEDY, **options)), options
    sampled = []
    for sampler in (model, vlm):
        torch.manual_seed(0)
        sampled.append(sampler.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2))
    assert torch.equal(*sampled)


# what leaves is as if it had been masked


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name, kind in HOSTS.items() if kind.plain])
def test_pruned_is_masked(name, side):
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS, side)
    prompt = sv.squeeze_prompt(model, inputs, **PRUNE)
    assert [len(i.kept) for i in prompt.images] == [
        math.ceil(int((~i.separators).sum()) / 2) + int(i.separators.sum()) for i in prompt.images
    ]
    oracle = masked(name, inputs, prompt)
    whole, short = model(**oracle).logits, model(**prompt).logits
    for a, b in zip(attended(oracle, whole), attended(prompt, short), strict=True):
        torch.testing.assert_close(b, a, **CLOSE)
    assert torch.equal(prompt.kept, oracle["attention_mask"].bool())
    pads = prompt["attention_mask"][0] == 0
    assert pads.any() and pads[0 if side == "left" else -1]


@pytest.mark.parametrize("name", [*MROPE, "llava", "gemma3"])
def test_generated_tokens_stand_where_they_stand_behind_the_whole_prompt(name):
    """The oracle writes word by word behind the whole, masked prompt, without a cache."""
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    oracle, n = masked(name, inputs, sv.squeeze_prompt(model, inputs, **PRUNE)), inputs["input_ids"].shape[1]
    image = model.config.image_token_id  # random models would say it, and then show nothing for it
    for _ in range(GREEDY["max_new_tokens"]):
        logits = model(**oracle).logits[:, -1]
        word = logits.index_fill(1, torch.tensor([image]), -torch.inf).argmax(dim=-1, keepdim=True)
        last = oracle["position_ids"][..., -1:]
        oracle["position_ids"] = torch.cat([oracle["position_ids"], last + 1], dim=-1)
        ends = {"input_ids": word, "attention_mask": torch.ones_like(word)}
        types = HOSTS[name].types
        ends |= {types: torch.zeros_like(word)} if types else {}
        oracle |= {key: torch.cat([oracle[key], end], dim=1) for key, end in ends.items()}
    for options in ({}, {"use_cache": False}):
        options = {**GREEDY, **options, "eos_token_id": None, "suppress_tokens": [image]}
        out = sv.VLM(model, **PRUNE).generate(**inputs, **options)
        assert torch.equal(out, oracle["input_ids"]), options
    assert out.shape[1] == n + 4


@pytest.mark.parametrize("name", MROPE)
def test_words_decoded_one_by_one_go_on_at_the_right_positions(name):
    """By `forward` with a cache and no positions given, as hosts count on from what they keep of the prompt."""
    model, inputs = host(name), vlm_zoo.prompt(name)
    prompt = sv.squeeze_prompt(model, inputs, keep=0.5)
    whole = prompt["position_ids"]
    first = model(**prompt, use_cache=True)
    word = torch.tensor([[33]])
    told = model(input_ids=word, cache=first.cache).logits
    again = model(**prompt, use_cache=True)
    explicit = model(input_ids=word, cache=again.cache, position_ids=whole[..., -1:] + 1).logits
    torch.testing.assert_close(told, explicit, **CLOSE)
    stale = model(**prompt, use_cache=True).cache
    model.model.rope_deltas = model.model.rope_deltas + 3
    assert not torch.allclose(model(input_ids=word, cache=stale).logits, explicit, **CLOSE)


def test_a_host_that_is_told_no_kinds_of_tokens_counts_them_one_by_one():
    model, inputs = host("qwen2.5-vl"), vlm_zoo.prompt("qwen2.5-vl")
    del inputs["mm_token_type_ids"]
    prompt = sv.squeeze_prompt(model, inputs, keep=1.0)
    assert "position_ids" not in prompt and torch.equal(model(**prompt).logits, model(**inputs).logits)


def test_positions_of_one_s_own_are_cut():
    model, inputs = host("llava"), vlm_zoo.prompt("llava", ROWS)
    line = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    own = sv.squeeze_prompt(model, {**inputs, "position_ids": line}, keep=0.5)
    assert torch.equal(own["position_ids"], sv.squeeze_prompt(model, inputs, keep=0.5, places="original")["position_ids"])
    assert torch.equal(own["position_ids"], sv.squeeze_prompt(model, inputs, keep=0.5)["position_ids"])
    assert "position_ids" not in sv.squeeze_prompt(model, inputs, keep=0.5, places="compact")


# who else is in the batch, or in the text


@every_host
def test_batch_mates_do_not_matter(name):
    model = host(name)
    together = sv.squeeze_prompt(model, vlm_zoo.prompt(name, ROWS), keep=0.4)
    alone = [vlm_zoo.prompt(name, [row]) for row in ROWS]
    for b, one in enumerate(alone):
        one["input_ids"][0, [2, -2]] = torch.tensor([6 + b, 9 + b])  # words that say the row's number
    logits = attended(together, model(**together).logits)
    images = []
    for b, one in enumerate(alone):
        prompt = sv.squeeze_prompt(model, one, keep=0.4)
        images += groups_of(prompt)
        torch.testing.assert_close(model(**prompt).logits[0], logits[b], rtol=1e-4, atol=2e-5)
    assert images == groups_of(together)


@every_host
def test_a_second_image_changes_nothing_about_the_first(name):
    model = host(name)
    one, two, other = (sv.squeeze_prompt(model, vlm_zoo.prompt(name, [row]), keep=0.4) for row in ((7,), (7, 8), (7, 9)))
    assert groups_of(one)[0] == groups_of(two)[0] == groups_of(other)[0]
    assert groups_of(two)[1] != groups_of(other)[1]
    features = [torch.cat(list(p["mm_encoder_outputs"]["image"].pooler_output)) for p in (one, two)]
    left = len(one.images[0].kept)
    torch.testing.assert_close(features[1].reshape(-1, 32)[:left], features[0].reshape(-1, 32)[:left], **CLOSE)


# what is squeezed, and the account of it


def fused(x: np.ndarray, groups: list[int], kept: list[int]) -> np.ndarray:
    """Equation 4, token by token."""
    out = []
    for j, own in enumerate(kept):
        total, weight = math.e * x[own], math.e
        for i in [i for i, g in enumerate(groups) if g == j and i != own]:
            w = math.exp(x[i] @ x[own] / np.linalg.norm(x[i]) / np.linalg.norm(x[own]))
            total, weight = total + w * x[i], weight + w
        out.append(total / weight)
    return np.array(out)


@pytest.mark.parametrize("name", ["llava", "llava-next", "idefics3", "qwen3-vl", "internvl"])
def test_features_are_squeezed_as_the_paper_says(name):
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    prompt = sv.squeeze_prompt(model, inputs, keep=0.3)
    takes = ("pixel_values", "image_sizes", "image_grid_thw")
    dense = model.model.get_image_features(**{n: inputs[n] for n in takes if n in inputs}, return_dict=True)
    n = HOSTS[name].tokens
    squeezed, whole = (torch.cat(list(out.pooler_output)).reshape(-1, 32) for out in (prompt["mm_encoder_outputs"]["image"], dense))
    start = 0
    for i, image in enumerate(prompt.images):
        x = whole[i * n : (i + 1) * n].double().numpy()
        expected = fused(x, image.groups.tolist(), image.kept.tolist())
        np.testing.assert_allclose(squeezed[start : start + len(expected)].numpy(), expected, atol=1e-5)
        similar = (x @ x.T) / np.outer(*[np.linalg.norm(x, axis=1)] * 2)
        similar[:, image.separators.numpy()] = -2  # which take nothing in
        for token in set(range(n)) - set(image.kept.tolist()):
            best = similar[token, image.kept].max()
            assert similar[token, image.kept[image.groups[token]]] >= best - 1e-6
        start += len(expected)
    assert start == len(squeezed)


def test_deeper_features_have_the_same_groups():
    model, inputs = host("qwen3-vl"), vlm_zoo.prompt("qwen3-vl", ROWS)
    prompt = sv.squeeze_prompt(model, inputs, keep=0.3)
    dense = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    deep = prompt["mm_encoder_outputs"]["image"].deepstack_features
    assert len(deep) == 2
    for level, whole in zip(deep, dense.deepstack_features, strict=True):
        for image, features, x, own in zip(prompt.images, level, whole, dense.pooler_output, strict=True):
            for j, members in enumerate(map(image.members, range(len(image.kept)))):
                host_of = int(image.kept[j])
                weights = torch.cosine_similarity(own[members], own[host_of][None], dim=-1).exp()
                expected = (weights[:, None] * x[members]).sum(dim=0) / weights.sum()  # a token's cosine with itself is 1
                torch.testing.assert_close(features[j], expected, **CLOSE)


@every_host
def test_every_original_token_is_accounted_for(name):
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    prompt, dropped = (sv.squeeze_prompt(model, inputs, keep=0.3, fuse=fuse) for fuse in (True, False))
    assert torch.equal(prompt.ids, inputs["input_ids"]) and len(prompt.images) == 3
    for image, pruned in zip(prompt.images, dropped.images, strict=True):
        n = HOSTS[name].tokens
        assert len(image.places) == n == int(image.sizes.sum()) and image.modality == "image"
        assert image.groups[image.kept].tolist() == list(range(len(image.kept)))
        assert (prompt.ids[image.row, image.places] == IMAGE).all()
        assert image.kept.tolist() == pruned.kept.tolist() and int((pruned.groups < 0).sum()) == n - len(pruned.kept)
        assert image.scores[image.kept].min() >= image.scores[pruned.groups < 0].max() or image.separators.any()
    ids = attended(prompt, prompt["input_ids"])
    for b, row in enumerate(ids):
        assert row.tolist() == prompt.ids[b][prompt.kept[b]].tolist()
        assert row[row != IMAGE].tolist() == [t for t in inputs["input_ids"][b].tolist() if t not in (IMAGE, 0)]


@pytest.mark.parametrize("name", ["llava-next", "onevision"])
def test_line_ends_stay(name):
    model = host(name)
    prompt = sv.squeeze_prompt(model, vlm_zoo.prompt(name), tokens=10)
    (image,) = prompt.images
    ends = [64 + 17 * line + 16 for line in range(16)]
    assert image.separators.nonzero()[:, 0].tolist() == ends
    assert len(image.kept) == 26 and set(ends) <= set(image.kept.tolist())
    assert (image.sizes[torch.isin(image.kept, torch.tensor(ends))] == 1).all()
    features = prompt["mm_encoder_outputs"]["image"].pooler_output[0]
    assert (features == model.model.image_newline).all(dim=-1).sum() == 16


def test_rows_that_become_of_different_lengths_get_a_mask():
    """Of equal length and without padding before: one image and many words, two images and few."""
    model, inputs = host("aya"), vlm_zoo.prompt("aya", ROWS)
    image = [BEGIN, *[IMAGE] * 16, END]
    inputs["input_ids"] = torch.tensor([[1, *image, *range(30, 50)], [1, *image, *image, 30, 31]])
    del inputs["attention_mask"]
    prompt = sv.squeeze_prompt(model, inputs, keep=0.25)
    assert prompt["attention_mask"].sum(dim=1).tolist() == [27, 15]
    for b, numbers in enumerate(ROWS):
        one = {"input_ids": inputs["input_ids"][b : b + 1], **vlm_zoo.plain([numbers])}
        alone = model(**sv.squeeze_prompt(model, one, keep=0.25)).logits[0]
        torch.testing.assert_close(attended(prompt, model(**prompt).logits)[b], alone, rtol=1e-4, atol=2e-5)


# shapes of images, rows of one image, videos


def test_images_of_different_sizes():
    model = host("qwen2.5-vl")
    inputs = {
        "input_ids": torch.tensor([[1, BEGIN, *[IMAGE] * 16, END, 5, BEGIN, *[IMAGE] * 8, END, 6]]),
        "pixel_values": vlm_zoo.noise((96, 294), [3])[0],
        "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 8]]),
    }
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"]), "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}
    prompt = sv.squeeze_prompt(model, inputs, **PRUNE)
    assert [len(image.kept) for image in prompt.images] == [8, 4]
    assert [len(image.kept) for image in sv.squeeze_prompt(model, inputs, tokens=10).images] == [10, 8]
    oracle = masked("qwen2.5-vl", inputs, prompt)
    torch.testing.assert_close(model(**prompt).logits[0], attended(oracle, model(**oracle).logits)[0], **CLOSE)


def test_an_image_in_several_lines_is_one_image():
    """Pixtral has a token between the lines of an image, which stays; the tokens of all lines compete."""
    model, inputs = host("pixtral"), vlm_zoo.prompt("pixtral")
    lines = [token for line in range(8) for token in (*[IMAGE] * 8, 104 if line < 7 else END)]
    ids = torch.tensor([[1, 5, *lines, 8, 9]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompt = sv.squeeze_prompt(model, inputs, **PRUNE)
    (image,) = prompt.images
    assert len(image.kept) == 32 and int((prompt["input_ids"] == 104).sum()) == 7
    assert len(set((image.kept // 8).bincount(minlength=8).tolist())) > 1
    oracle = masked("pixtral", inputs, prompt)
    torch.testing.assert_close(model(**prompt).logits[0], attended(oracle, model(**oracle).logits)[0], **CLOSE)


def video(name: str) -> dict[str, Tensor]:
    """One video of 32 tokens, or 33 with its end; GLM-4V and Qwen3-VL have marks between its two frames."""
    if name == "onevision":
        ids = torch.tensor([[1, 5, *[VIDEO] * 33, 8, 9]])
        return {"input_ids": ids, "pixel_values_videos": vlm_zoo.noise((2, 3, 56, 56), [4])}
    token = IMAGE if name == "glm4v" else VIDEO
    frame = [token] * 16
    ids = torch.tensor([[1, BEGIN, *frame, *([END, 40, BEGIN] if name in ("qwen3-vl", "glm4v") else []), *frame, END, 8, 9]])
    grid = torch.tensor([[2, 8, 8]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == token).long(),
        "pixel_values_videos": vlm_zoo.noise((128, 294), [4])[0],
        "video_grid_thw": grid,
    }


@pytest.mark.parametrize("name", ["onevision", *MROPE])
def test_videos(name):
    model, inputs = host(name), video(name)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert torch.equal(model(**sv.squeeze_prompt(model, inputs, 1.0)).logits, model(**inputs).logits)
    assert torch.equal(sv.VLM(model, 1.0).generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    prompt = sv.squeeze_prompt(model, inputs, **PRUNE)
    (image,) = prompt.images
    assert image.modality == "video" and len(image.kept) == 16 + int(image.separators.sum())
    oracle = masked(name, inputs, prompt)
    torch.testing.assert_close(model(**prompt).logits[0], attended(oracle, model(**oracle).logits)[0], **CLOSE)


def test_images_and_videos_in_one_prompt():
    model, shown, inputs = host("qwen3-vl"), video("qwen3-vl"), vlm_zoo.prompt("qwen3-vl")
    both = {name: torch.cat([inputs[name], shown[name]], dim=1) for name in ("input_ids", "mm_token_type_ids")}
    both |= {name: value for x in (inputs, shown) for name, value in x.items() if name not in (*both, "attention_mask")}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    numbers = []
    sv.squeeze_prompt(model, both, scores=lambda x, image: numbers.append((image.number, image.modality)) or x[:, 0])
    assert numbers == [(0, "image"), (1, "video")]
    prompt = sv.squeeze_prompt(model, both, **PRUNE)
    assert [(image.modality, len(image.kept)) for image in prompt.images] == [("image", 8), ("video", 16)]
    oracle = masked("qwen3-vl", both, prompt)
    torch.testing.assert_close(model(**prompt).logits[0], attended(oracle, model(**oracle).logits)[0], **CLOSE)


# generate


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3-vl", "idefics3", "internvl"])
def test_generate_returns_what_it_returns_unreduced(name):
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    vlm, n = sv.VLM(model, keep=0.3), inputs["input_ids"].shape[1]
    prompt = vlm.squeeze(inputs)
    out = vlm.generate(**inputs, **GREEDY)
    assert torch.equal(out[:, :n], inputs["input_ids"])
    assert torch.equal(out[:, n:], model.generate(**prompt, **GREEDY)[:, prompt["input_ids"].shape[1] :])
    assert torch.equal(vlm.generate(**inputs, **GREEDY, use_cache=False), out)
    beams = vlm.generate(**inputs, **GREEDY, **BEAMS)
    assert beams.shape[0] == 4 and torch.equal(beams[:, :n], inputs["input_ids"].repeat_interleave(2, dim=0))
    told = vlm.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(told.sequences, out) and len(told.scores) == out.shape[1] - n
    assert told.cache.get_seq_length() == prompt["input_ids"].shape[1] + out.shape[1] - n - 1


def test_a_prompt_may_be_used_again():
    model, inputs = host("idefics3"), vlm_zoo.prompt("idefics3", ROWS)
    vlm = sv.VLM(model, keep=0.5)
    prompt = vlm.squeeze(inputs)
    outs = [vlm.generate(prompt, **GREEDY, **options) for options in ({}, BEAMS, {}, BEAMS)]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


def test_a_tower_of_one_s_own():
    """What it returns has no field for the projected features, which the model then writes beside the fields."""

    class Tower(nn.Module):
        def forward(self, pixel_values: Tensor, **ignored: Any) -> Any:
            x = pixel_values[:, :, ::7, ::7].flatten(2).transpose(1, 2).repeat(1, 1, 16)  # [B, 64, 48]
            return hf.modeling_outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(x, x))

    model, inputs = vlm_zoo.model("llava-siglip"), vlm_zoo.prompt("llava-siglip", ROWS)
    model.model.vision_tower = Tower()
    assert torch.equal(sv.VLM(model, 1.0).generate(**inputs, **GREEDY, **BEAMS), model.generate(**inputs, **GREEDY, **BEAMS))
    assert sv.VLM(model, 0.5).generate(**inputs, **GREEDY).shape[0] == 2


def test_lengths_count_the_original_prompt():
    model, inputs = host("llava"), vlm_zoo.prompt("llava")
    n, vlm = inputs["input_ids"].shape[1], sv.VLM(model, keep=0.3)
    greedy = {"do_sample": False, "eos_token_id": None}
    assert vlm.generate(**inputs, max_length=n + 3, **greedy).shape[1] == n + 3
    config = hf.GenerationConfig(max_length=n + 2, do_sample=False)
    assert vlm.generate(**inputs, generation_config=config).shape[1] == n + 2
    assert config.max_length == n + 2
    assert vlm.generate(inputs["input_ids"], pixel_values=inputs["pixel_values"], max_new_tokens=2, **greedy).shape[1] == n + 2


@pytest.mark.parametrize("places", ["compact", "original"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2.5-vl", "glm4v", "mistral3"])
def test_a_conversation_goes_on_with_its_cache(name, places):
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    vlm = sv.VLM(model, keep=0.4, places=places)
    options = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    out, told = vlm.generate(**inputs, **options), inputs
    for turn in range(2):
        more = torch.tensor([[30 + turn, 31, 32], [34, 35 + turn, 36]])
        told = {**told, "input_ids": torch.cat([out.sequences, more], dim=1)}
        longer = told["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        for key in {"attention_mask", HOSTS[name].types} - {""}:
            told[key] = torch.cat([inputs[key], torch.full((2, longer), int(key == "attention_mask"))], dim=1)
        text = {key: told[key] for key in ("input_ids", "attention_mask")}
        out = vlm.generate(**text, cache=out.cache, **options)
        anew = vlm.generate(**told, **options)
        assert torch.equal(out.sequences, anew.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(anew.logits), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("places", ["compact", "original"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2.5-vl", "glm4v", "mistral3", "idefics3"])
def test_a_loop_of_one_s_own_says_what_generate_says(name, places):
    """By `forward`, a word at a time with the cache of the last; the shorter row is padded."""
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    vlm, n = sv.VLM(model, keep=0.4, places=places), inputs["input_ids"].shape[1]
    options = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    expected = vlm.generate(**inputs, **options)
    out, logits = vlm(**inputs, use_cache=True), []
    for step in range(GREEDY["max_new_tokens"]):
        logits.append(out.logits[:, -1])
        word = expected.sequences[:, n + step, None]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, step + 1, dtype=torch.long)], dim=1)
        out = vlm(word, cache=_cache_in(out), **({"attention_mask": mask} if step % 2 else {}))
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-5)
    with pytest.raises(ConfigError, match="a new image cannot be added to a cache that is in use"):
        vlm(**inputs, cache=_cache_in(out))


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_a_turn_s_own_padding_is_respected(name):
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    vlm, options = sv.VLM(model, keep=0.4), {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    out = vlm.generate(**inputs, **options)
    told = {**inputs, "input_ids": torch.cat([out.sequences, torch.tensor([[30, 31, 32], [0, 0, 36]])], dim=1)}
    new = torch.tensor([[1] * 7, [1] * 4 + [0, 0, 1]])
    told["attention_mask"] = torch.cat([inputs["attention_mask"], new], dim=1)
    if types := HOSTS[name].types:
        told[types] = torch.cat([inputs[types], torch.zeros_like(new)], dim=1)
    later = vlm.generate(**{key: told[key] for key in ("input_ids", "attention_mask")}, cache=out.cache, **options)
    anew = vlm.generate(**told, **options)
    assert torch.equal(later.sequences, anew.sequences)
    torch.testing.assert_close(torch.stack(later.logits), torch.stack(anew.logits), rtol=1e-4, atol=2e-5)


def test_conversations_that_cannot_go_on_are_refused():
    model, inputs = host("llava"), vlm_zoo.prompt("llava")
    vlm, options = sv.VLM(model, keep=0.4), {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    out = vlm.generate(**inputs, **options)
    more = torch.cat([out.sequences, torch.tensor([[30]])], dim=1)
    with pytest.raises(ConfigError, match="a new image cannot be added to a cache that is in use"):
        vlm.generate(**inputs, cache=out.cache)
    with pytest.raises(ConfigError, match=r"does not begin with the \d+ tokens that are in the cache"):
        vlm.generate(input_ids=more + 1, cache=out.cache)
    with pytest.raises(ConfigError, match="does not begin with"):
        vlm.generate(input_ids=torch.tensor([[30]]), cache=out.cache)
    with pytest.raises(ConfigError, match="2 sequences for 1 prompts, from beams"):
        vlm.generate(input_ids=more, cache=vlm.generate(**inputs, **options, **BEAMS).cache)


def test_text_alone_is_passed_on():
    model, ids = host("llava"), torch.tensor([[1, 5, 6, 7]])
    vlm = sv.VLM(model)
    options = {**GREEDY, "eos_token_id": None}
    assert torch.equal(vlm(input_ids=ids).logits, model(input_ids=ids).logits)
    out = vlm.generate(input_ids=ids, **options, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(input_ids=ids, **options))
    more = torch.cat([out.sequences, torch.tensor([[9]])], dim=1)
    assert torch.equal(vlm.generate(input_ids=more, cache=out.cache, **options), model.generate(input_ids=more, **options))


def test_the_wrapper_is_the_model_otherwise():
    model = host("llava")
    vlm = sv.VLM(model)
    assert vlm.config is model.config and vlm.generation_config is model.generation_config and vlm.can_generate()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = vlm.no_such_thing
    inputs = vlm_zoo.prompt("llava")
    assert torch.equal(vlm(**inputs).logits, model(**sv.squeeze_prompt(model, inputs)).logits)


# training


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen3-vl", "gemma3"])
def test_the_loss_is_the_masked_one(name, side):
    """Labels of words; a label right behind an image is predicted from its last token, which may have left."""
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS, side)
    ids = inputs["input_ids"]
    labels = torch.where((ids < 9) | (ids > 99), -100, ids)
    prompt = sv.squeeze_prompt(model, {**inputs, "labels": labels}, **PRUNE)
    oracle = masked(name, inputs, prompt)
    torch.testing.assert_close(model(**prompt).loss, model(**oracle, labels=labels).loss, **CLOSE)
    for given, cut in zip(labels, prompt["labels"], strict=True):
        assert given[given != -100].tolist() == cut[cut != -100].tolist() != []


def test_gradients_reach_projector_and_tower():
    model, inputs = vlm_zoo.model("llava"), vlm_zoo.prompt("llava")
    with torch.enable_grad():
        sv.VLM(model, keep=0.3)(**inputs, labels=inputs["input_ids"].where(inputs["input_ids"] != IMAGE, -100)).loss.backward()
    for weight in (model.model.multi_modal_projector.linear_1.weight, model.model.vision_tower.embeddings.patch_embedding.weight):
        assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_adapters_around_the_model():
    peft = pytest.importorskip("peft")
    model, inputs = vlm_zoo.model("llava"), vlm_zoo.prompt("llava", ROWS)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    vlm = sv.VLM(adapted, keep=0.5)
    logits = vlm(**inputs).logits
    assert torch.equal(logits, adapted(**sv.squeeze_prompt(adapted, inputs, 0.5)).logits)
    assert torch.equal(sv.VLM(adapted, 1.0).generate(**inputs, **GREEDY), adapted.generate(**inputs, **GREEDY))
    with adapted.disable_adapter():
        assert not torch.allclose(vlm(**inputs).logits, logits)


# scores


def test_scores_of_one_s_own():
    """By likeness to the question, as an example: a function sees each image's features, and where they stand in which text."""
    model, inputs = host("qwen2-vl"), vlm_zoo.prompt("qwen2-vl", ROWS)
    seen = []

    def asked_for(features, image):
        seen.append((image.number, image.row, len(image.places)))
        words = image.ids[image.ids < IMAGE]
        return features @ model.get_input_embeddings()(words).mean(dim=0)

    prompt = sv.squeeze_prompt(model, inputs, keep=0.25, scores=asked_for)
    assert seen == [(0, 0, 16), (1, 1, 16), (2, 1, 16)]
    for image in prompt.images:
        assert set(image.kept.tolist()) == set(image.scores.topk(4).indices.tolist())


@pytest.mark.parametrize(("name", "step"), [("llava", 1), ("llava-siglip", 1), ("gemma3", 2), ("internvl", 2), ("idefics3", 2)])
def test_scores_by_the_tower_s_attention(name, step):
    """The class token's row, or the mean over all queries, of what the last block's attention really is; summed over squares."""
    model = vlm_zoo.model(name)
    model.set_attn_implementation("eager")
    inputs = vlm_zoo.prompt(name, ((7,),))
    watched: list[Tensor] = []
    base = model.model
    tower = getattr(base, "vision_tower", None) or base.vision_model
    (last,) = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == 4][-1:]
    attention = next(m for n, m in last[-1].named_modules() if n in ("self_attn", "attention"))
    handle = attention.register_forward_hook(lambda module, args, out: watched.append(out[1]))
    prompt = sv.squeeze_prompt(model, inputs, keep=0.25, scores="tower")
    handle.remove()
    weights = watched[-1][0].mean(dim=0)  # [T, T]
    prefix = weights.shape[0] - 64
    row = (weights[0] if prefix else weights.mean(dim=0))[prefix:]
    expected = row.view(8 // step, step, 8 // step, step).sum(dim=(1, 3)).flatten()
    torch.testing.assert_close(prompt.images[0].scores, expected, **CLOSE)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (12, 12), (6, 16), (24, 24)])
@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_even_tokens_lie_evenly(rows, columns, share):
    """No window of the grid has more or fewer than its share by much; chance is off by more."""
    n = rows * columns
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    scores = even(x, torch.zeros(n, dtype=torch.bool), columns)
    assert len(scores.unique()) == n

    def worst(scores: torch.Tensor) -> float:
        k = round(share * n)
        kept = torch.zeros(n).scatter(0, scores.topk(k).indices, 1.0).view(1, 1, rows, columns)
        windows = torch.nn.functional.avg_pool2d(kept, (rows // 2, columns // 2), stride=1) * (n // 4)
        return float((windows - k / 4).abs().max())

    chance = sum(worst(torch.rand(n, generator=torch.Generator().manual_seed(i))) for i in range(10)) / 10
    assert worst(scores) < 0.9 * chance


def test_lines_of_an_image_are_told_by_what_the_host_says():
    """Positions in width, marks at lines' ends, tokens of the text between lines, a square; or nothing does."""

    def image(places: list[int]) -> Image:
        return Image(0, "image", 0, torch.tensor(places), torch.zeros(99, dtype=torch.long))

    def none(n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.bool)

    across = torch.arange(99)[None] % 5
    assert columns(image([*range(5, 25)]), none(20), across) == 5
    marked = torch.tensor([i % 7 == 6 for i in range(21)])
    assert columns(image([*range(21)]), marked, None) == 6
    assert columns(image([i + i // 4 for i in range(12)]), none(12), None) == 4
    assert columns(image([*range(16)]), none(16), None) == 4
    assert columns(image([*range(15)]), none(15), None) is None
    assert columns(image([*range(4)]), ~none(4), None) is None


@pytest.mark.parametrize(("name", "width"), [("llava", 8), ("qwen2-vl", 4), ("mistral3", 4)])
def test_hosts_keep_tokens_all_over_the_image(name, width):
    """Half of the tokens are half of each line's, one more or less."""
    (image, *_) = sv.squeeze_prompt(host(name), vlm_zoo.prompt(name), keep=0.5).images
    kept = torch.bincount(image.kept // width, minlength=len(image.groups) // width)
    assert kept.min() >= width // 2 - 1 and kept.max() <= width // 2 + 1


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_redundancy_is_the_likeness_to_a_more_unusual_token(name):
    """Token by token: 1 - the highest cosine with one that is less like the mean of all."""
    model, inputs = host(name), vlm_zoo.prompt(name)
    takes = {n: inputs[n] for n in ("pixel_values", "image_grid_thw") if n in inputs}
    x = torch.cat(list(model.model.get_image_features(**takes, return_dict=True).pooler_output)).double().numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    usual = unit @ x.mean(axis=0)
    expected = [
        1 - max((float(unit[i] @ unit[j]) for j in range(len(x)) if usual[j] < usual[i]), default=-1) for i in range(len(x))
    ]
    scores = sv.squeeze_prompt(model, inputs, keep=0.5, scores="redundancy").images[0].scores
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("scores", ["even", "redundancy"])
def test_twins_leave_first(scores):
    """Of pairs of twins one each stays, and takes the other in."""
    model, inputs = host("llava"), vlm_zoo.prompt("llava")
    twins = {}

    def doubled(*args, **kwargs):
        out = twins["encode"](*args, **kwargs)
        out.pooler_output = [torch.cat([x[:32], x[:32]]) for x in out.pooler_output]
        return out

    twins["encode"] = model.model.get_image_features
    doubled.__signature__ = __import__("inspect").signature(twins["encode"])
    model.model.get_image_features = doubled
    try:
        (image,) = sv.squeeze_prompt(model, inputs, keep=0.5, scores=scores).images
    finally:
        del model.model.get_image_features
    assert sorted(k % 32 for k in image.kept.tolist()) == list(range(32))
    assert image.groups[:32].tolist() == image.groups[32:].tolist()


@every_host
def test_scores_by_the_question_are_attention_of_the_language_model(name):
    """The oracle asks transformers itself for the attention of the whole prompt."""
    model, inputs = host(name), vlm_zoo.prompt(name, ROWS)
    asked = sv.squeeze_prompt(model, inputs, keep=0.5, scores="question")
    before = model.config.get_text_config()._attn_implementation
    seen: list[Tensor] = []
    layer = [x for x in model.get_decoder().layers if hasattr(x, "self_attn")][-1]  # of two: the one that is meant
    handle = layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    model.set_attn_implementation("eager")
    try:
        model(**inputs)
    finally:
        handle.remove()
        model.set_attn_implementation(before)
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    for image in asked.images:
        received = seen[0][image.row].mean(dim=0)[words[image.row]].sum(dim=0)[image.places]
        torch.testing.assert_close(image.scores, received, rtol=1e-5, atol=1e-6)
    assert model.config.get_text_config()._attn_implementation == before
    other = {**inputs, "input_ids": torch.where(inputs["input_ids"] == 8, 77, inputs["input_ids"])}
    scores = sv.squeeze_prompt(model, other, keep=0.5, scores="question").images[0].scores
    assert not torch.equal(scores, asked.images[0].scores)  # another question, other scores


def test_a_question_must_come_after_the_image():
    model, inputs = host("llava"), vlm_zoo.prompt("llava")
    n = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    cut = {**inputs, "input_ids": inputs["input_ids"][:, :n], "attention_mask": inputs["attention_mask"][:, :n]}
    with bad("no word comes after image 0 of the prompt"):
        sv.squeeze_prompt(model, cut, scores="question")


# both ends


@pytest.mark.parametrize("reducer", [sv.ETPS(keep=0.5, at=(1, 2)), sv.ToMe(r=8)], ids=["etps", "tome"])
def test_both_ends(reducer):
    """The tower makes 64 patches fewer tokens and puts them out on the full grid; the prompt makes one of all that are alike."""
    model = vlm_zoo.model("llava-siglip")
    inputs = vlm_zoo.prompt("llava-siglip", ROWS)
    tower = model.model.vision_tower
    sv.reduce_(tower, reducer, grid=True)
    with sv.trace(tower) as t:
        prompt = sv.squeeze_prompt(model, inputs)
    left = t.stages[-1].n_out
    with sv.trace(tower) as t:
        prompt = sv.squeeze_prompt(model, inputs, tokens=left)
    assert left < 33 and prompt["input_ids"].shape[1] == inputs["input_ids"].shape[1] - 2 * (64 - left)
    for patches, image in zip(t.groups, prompt.images, strict=True):
        assert len({*zip(patches.tolist(), image.groups.tolist(), strict=True)}) == left  # the same parts
    whole = model(**inputs).logits
    text = model(**prompt).logits
    assert text.shape[1] < whole.shape[1] and text.isfinite().all()
    assert sv.VLM(model, tokens=8).generate(**inputs, **GREEDY).shape[0] == 2
    sv.restore_(tower)


@pytest.mark.parametrize("name", [name for name in HOSTS if not name.startswith(("qwen", "glm", "mistral", "pixtral"))])
def test_one_budget_for_both_ends(name):
    model, inputs = vlm_zoo.model(name), vlm_zoo.prompt(name)
    dense = model(**inputs).logits
    vlm = sv.reduce_vlm_(model, keep=0.25)
    with sv.trace(model.base_model) as t:
        prompt = vlm.squeeze(inputs)
    n0, left = t.stages[0].n, t.stages[-1].n_out
    assert len(t.stages) == 4 and n0 / 4 <= left <= n0 / 4 + 3  # each stage rounds up
    for image in prompt.images:
        n = int((~image.separators).sum())
        assert len(image.kept) == math.ceil(n / 4) + int(image.separators.sum())
    assert vlm.generate(**inputs, **GREEDY, min_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4
    sv.restore_(model.base_model)
    assert torch.equal(model(**inputs).logits, dense)


def test_both_ends_keep_all_where_the_budget_is_all():
    model, inputs = vlm_zoo.model("llava"), vlm_zoo.prompt("llava", ROWS)
    dense = model(**inputs).logits
    assert torch.equal(sv.reduce_vlm_(model, keep=1.0)(**inputs).logits, dense)


def test_one_budget_is_refused_before_the_tower_is_reduced():
    model = host("llava")
    for match, options in {
        "tokens=9: both ends share one budget": {"tokens": 9},
        "'tome' has no keep ratio": {"method": "tome"},
        'scores="tower": the tower is itself reduced': {"scores": "tower"},
        "keep=2 is not a share": {"keep": 2},
        "keep=None and tokens=None: give one of them": {"keep": None},
        "take at='quarters', as the method 'training-free'": {"method": "class-token"},
        "scores='loud' is unknown": {"scores": "loud"},
    }.items():
        with bad(match):
            sv.reduce_vlm_(model, **options)
    assert not any("squeezevit_state" in vars(m) for m in model.modules())
    with bad("0 vision towers that SqueezeViT knows", UnsupportedError):
        sv.reduce_vlm_(host("qwen2-vl"))


# what it looks like


def test_a_prompt_is_drawn(monkeypatch):
    """The figure gets the photograph, the tower's stages and, last, the prompt's groups."""
    model, inputs = vlm_zoo.model("llava-siglip"), vlm_zoo.prompt("llava-siglip", ROWS)
    sv.reduce_(model.model.vision_tower, sv.ETPS(keep=0.5, at=(1, 2)), grid=True)
    with sv.trace(model.model.vision_tower) as t:
        prompt = sv.squeeze_prompt(model, inputs, tokens=9)
    photo = np.full((64, 64, 3), 99, dtype=np.uint8)
    drawn = []
    monkeypatch.setattr(drawing, "panels", lambda *args: drawn.append(args) or panels(*args))
    picture = drawing.draw_prompt(photo, prompt.images[2], tower=t, index=2)
    ((_, stages, _),) = drawn
    assert [stage.caption for stage in stages] == [
        "block 1: 32 reserved, 32 pruned", "block 2: 16 reserved, 16 pruned", "prompt: 9 image tokens, 55 pruned",
    ]  # fmt: skip
    assert stages[-1].after.tolist() == prompt.images[2].groups.tolist() and stages[-1].before.tolist() == stages[1].after.tolist()
    assert np.flatnonzero(~stages[-1].pruned).tolist() == prompt.images[2].kept.tolist()
    assert picture.size[0] > 4 * picture.size[1] / 3 and len(picture.getcolors(10**6)) > 20
    dropped = sv.squeeze_prompt(model, inputs, tokens=9, fuse=False).images[0]
    drawing.draw_prompt(photo, dropped, (8, 8))
    assert drawn[-1][1][-1].caption == "prompt: 9 image tokens, 55 dropped"
    with bad("64 features, 0 of them separators, which are not grid=", DataError):
        drawing.draw_prompt(photo, dropped, (4, 8))
    with bad("64 patches, and the image has 16 features", DataError):
        drawing.draw_prompt(photo, sv.squeeze_prompt(host("gemma3"), vlm_zoo.prompt("gemma3")).images[0], tower=t)
    with bad("336 features, 16 of them separators", DataError):
        drawing.draw_prompt(photo, sv.squeeze_prompt(host("llava-next"), vlm_zoo.prompt("llava-next")).images[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vision-language model with its processor, as a hub has them."""
    path = tmp_path_factory.mktemp("llava")
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "what", "is", "there", "?"]
    tokenizer = Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], pad_token="<pad>")
    pixels = hf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    made = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    hf.LlavaProcessor(pixels, fast, **made).save_pretrained(path)
    config = {"vision_config": hf.CLIPVisionConfig(**vlm_zoo.TOWER), "text_config": hf.LlamaConfig(**vlm_zoo.WIDE)}
    hf.LlavaForConditionalGeneration(hf.LlavaConfig(**config, image_token_index=4)).save_pretrained(path)
    PIL.Image.effect_noise((90, 70), 90).convert("RGB").save(path / "photo.png")
    return path


def shown(capsys, *argv: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in ("show", *argv)])
    said = capsys.readouterr()
    return int(stop.value.code or 0), " ".join((said.out + said.err).split())


@pytest.mark.parametrize(("method", "count"), [((), 1), (("--method", "etps"), 4)])
def test_show_draws_a_prompt(method, count, folder, tmp_path, capsys):
    model = ("--model", f"hf:{folder}", "--pretrained", "--question", "what is there ?", "--keep", 0.25)
    photo, moving = folder / "photo.png", tmp_path / "steps.gif"
    code, said = shown(capsys, photo, *model, *method, "--out", tmp_path, "--json", tmp_path / "s.json", "--animate", moving)
    assert code == 0, said
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert row["grid"] == [8, 8] and len(row["stages"]) == count and row["stages"][-1] == "prompt: 16 image tokens, 48 pruned"
    inside = "eTPS in the tower, " if method else ""
    assert row["title"] == inside + "16 of 64 image tokens in the prompt, 20 tokens instead of 68"
    with PIL.Image.open(row["file"]) as drawing, PIL.Image.open(moving) as frames:
        assert drawing.width > 800 and len(drawing.convert("RGB").getcolors(10**6)) > 20 and frames.n_frames == count + 1


def test_what_show_cannot_ask_is_refused(folder, capsys):
    asked = (folder / "photo.png", "--question", "what ?")
    for argv, message in {
        ("--model", "vit_tiny_patch16_224"): "name it, as --model hf:NAME, not vit_tiny_patch16_224",
        ("--model", f"hf:{folder}", "--macs", 0.5, "--at", "1"): "leave --at, --macs out",
        ("--model", f"hf:{folder}", "--keep", "0.5,0.2"): "a prompt has one share of its image tokens; give one number",
        ("--model", f"hf:{folder / 'no'}"): "cannot be built",
    }.items():
        code, said = shown(capsys, *asked, *argv)
        assert code == 2 and message in said, said


# bad input


def bad(match: str, error: type[Exception] = ConfigError) -> Any:
    return pytest.raises(error, match=match)


def test_budgets_out_of_range():
    model, inputs = host("llava"), vlm_zoo.prompt("llava")
    for keep in (0, -1, 1.5, float("nan"), "half", True):
        with bad("keep=.* is not a share of an image's tokens"):
            sv.squeeze_prompt(model, inputs, keep)
    for tokens in (0, -3, 2.5, True):
        with bad("tokens=.* is not a number of tokens an image"):
            sv.squeeze_prompt(model, inputs, tokens=tokens)
        with bad("tokens=.* is not a number of tokens an image"):
            sv.VLM(model, tokens=tokens)
    with bad("keep=0.5 and tokens=5: give one of them"):
        sv.squeeze_prompt(model, inputs, 0.5, tokens=5)
    with bad("scores='attention' is unknown"):
        sv.squeeze_prompt(model, inputs, scores="attention")
    with bad("places='new' is unknown"):
        sv.squeeze_prompt(model, inputs, places="new")


def test_prompts_that_cannot_be_squeezed():
    model, inputs = host("llava"), vlm_zoo.prompt("llava")
    prompt = sv.squeeze_prompt(model, inputs)
    with bad("there is no image in the prompt: it has input_ids"):
        sv.squeeze_prompt(model, {"input_ids": inputs["input_ids"]})
    with bad(r"Prompt\(1 images, 64 -> 32 image tokens.* is squeezed already"):
        sv.squeeze_prompt(model, prompt)
    with bad("has mm_encoder_outputs, which is encoded or squeezed already"):
        sv.squeeze_prompt(model, dict(prompt))
    with bad("has both pixel_values and mm_encoder_outputs"):
        sv.squeeze_prompt(model, {**prompt, "pixel_values": inputs["pixel_values"]})
    with bad("has inputs_embeds"):
        sv.squeeze_prompt(model, {**inputs, "inputs_embeds": torch.zeros(1, 3, 32)})
    with bad(r"input_ids is \[74\]; give \[B, T\]"):
        sv.squeeze_prompt(model, {**inputs, "input_ids": torch.zeros(74).long()})
    with bad(r"attention_mask is \[1, 3\]"):
        sv.squeeze_prompt(model, {**inputs, "attention_mask": torch.ones(1, 3)})
    with bad(r"made 64 image features, but the prompt has 63 places for them \(token 100\)", DataError):
        sv.squeeze_prompt(model, {**inputs, "input_ids": inputs["input_ids"].clone().index_fill_(1, torch.tensor([4]), 9)})


def test_scores_that_rank_nothing():
    model, inputs = host("llava"), vlm_zoo.prompt("llava")
    for scores, match in (
        (lambda x, image: x, r"returned \[64, 32\] for image 0; return one number for each of its 64 features"),
        (lambda x, image: 3, "returned int for image 0"),
        (lambda x, image: x[:, 0] * math.nan, r"returned \[64\], NaN among them"),
    ):
        with bad(match):
            sv.squeeze_prompt(model, inputs, scores=scores)


def test_models_that_cannot_be_given_features(monkeypatch):
    text = hf.LlamaForCausalLM(hf.LlamaConfig(**vlm_zoo.WIDE))
    for use in (lambda: sv.squeeze_prompt(text, {"input_ids": torch.ones(1, 3).long()}), lambda: sv.VLM(text)):
        with bad("LlamaForCausalLM has neither get_image_features nor get_video_features: it sees no images", UnsupportedError):
            use()
    model, inputs = vlm_zoo.model("llava"), vlm_zoo.prompt("llava")
    old = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids=None, **kwargs: old(self, input_ids=input_ids, **kwargs))
    with bad(
        "LlavaForConditionalGeneration takes no mm_encoder_outputs .transformers 5.*use transformers 5.18 or later",
        UnsupportedError,
    ):
        sv.squeeze_prompt(model, inputs)


def test_models_that_always_ask_for_pixels():
    tower = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 56}
    former = {"num_hidden_layers": 1, "encoder_hidden_size": 48}
    config = hf.Blip2Config(vision_config=tower, qformer_config=former, text_config=hf.OPTConfig(num_hidden_layers=1))
    with torch.device("meta"), bad("Blip2ForConditionalGeneration asks for pixel_values even where", UnsupportedError):
        sv.VLM(hf.Blip2ForConditionalGeneration(config))


def test_towers_without_scores():
    for name, match in (
        ("qwen2.5-vl", "needs the attention of a tower that is known: Qwen2_5_VLModel has 0"),
        ("llava-next", "LlavaNextModel has 15 images in its tower for 3 in the prompt"),
    ):
        with bad(match, UnsupportedError):
            sv.squeeze_prompt(host(name), vlm_zoo.prompt(name, ROWS), scores="tower")
    model = vlm_zoo.model("llava")
    sv.reduce_(model.model.vision_tower, sv.ETPS(keep=0.5, at=(1,)), grid=True)
    with bad("the tower of LlavaModel is itself reduced", UnsupportedError):
        sv.squeeze_prompt(model, vlm_zoo.prompt("llava"), scores="tower")


def test_deeper_features_of_an_unknown_kind():
    model, inputs = vlm_zoo.model("qwen3-vl"), vlm_zoo.prompt("qwen3-vl")
    encode = model.model.get_image_features

    def odd(pixel_values, image_grid_thw=None, **kwargs):
        out = encode(pixel_values, image_grid_thw, **kwargs)
        out.deepstack_features = [torch.zeros(3, 32)]
        return out

    model.model.get_image_features = odd
    with bad(r"features of deeper layers come as \[3, 32\] for images of \[16\] tokens", UnsupportedError):
        sv.squeeze_prompt(model, inputs)

"""Tiny vision-language models of transformers with random weights, and prompts as their processors make them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import zoo

IMAGE, VIDEO, BEGIN, END = 100, 101, 102, 103  # tokens
SIDE, PATCH = 56, 7
TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
TOWER |= {"image_size": SIDE, "patch_size": PATCH}
HEADLESS = {**TOWER, "vision_use_head": False}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
TEXT |= {"vocab_size": 128, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**TEXT, "head_dim": 8}
ANY = [[56, 112], [112, 56], [112, 112]]
GRID = {"depth": 4, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def llava(tower: Any, text: Any, **options: Any) -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, **options)
    )


def llava_clip() -> Any:
    return llava(hf.CLIPVisionConfig(**TOWER), hf.LlamaConfig(**WIDE))


def llava_siglip() -> Any:
    options = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    return llava(hf.SiglipVisionConfig(**TOWER), hf.LlamaConfig(**WIDE), **options)


def pixtral() -> Any:
    options = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    return llava(hf.PixtralVisionConfig(**TOWER, head_dim=12), hf.MistralConfig(**WIDE), **options)


def vipllava() -> Any:
    towers = {"vision_config": hf.CLIPVisionConfig(**TOWER), "text_config": hf.LlamaConfig(**WIDE)}
    return hf.VipLlavaForConditionalGeneration(
        hf.VipLlavaConfig(**towers, image_token_index=IMAGE, vision_feature_layers=[-2, -3, -4])
    )


def llava_next() -> Any:
    towers = {"vision_config": hf.CLIPVisionConfig(**TOWER), "text_config": hf.LlamaConfig(**WIDE)}
    return hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(**towers, image_token_index=IMAGE, image_grid_pinpoints=ANY))


def onevision() -> Any:
    towers = {"vision_config": hf.SiglipVisionConfig(**HEADLESS), "text_config": hf.Qwen2Config(**TEXT)}
    marks = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return hf.LlavaOnevisionForConditionalGeneration(hf.LlavaOnevisionConfig(**towers, **marks, image_grid_pinpoints=ANY))


def gemma3() -> Any:
    towers = {"vision_config": hf.SiglipVisionConfig(**HEADLESS).to_dict()}
    towers["text_config"] = hf.Gemma3TextConfig(**WIDE, sliding_window=64)
    marks = {"image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(**towers, **marks, mm_tokens_per_image=16))


def paligemma() -> Any:
    towers = {"vision_config": hf.SiglipVisionConfig(**HEADLESS, projection_dim=32), "text_config": hf.GemmaConfig(**WIDE)}
    return hf.PaliGemmaForConditionalGeneration(hf.PaliGemmaConfig(**towers, image_token_index=IMAGE, projection_dim=32))


def deepseek() -> Any:
    towers = {"vision_config": hf.SiglipVisionConfig(**HEADLESS), "text_config": hf.LlamaConfig(**WIDE)}
    return hf.DeepseekVLForConditionalGeneration(hf.DeepseekVLConfig(**towers, image_token_id=IMAGE))


def aya() -> Any:
    towers = {"vision_config": hf.SiglipVisionConfig(**HEADLESS), "text_config": hf.Cohere2Config(**TEXT, sliding_window=64)}
    return hf.AyaVisionForConditionalGeneration(hf.AyaVisionConfig(**towers, image_token_index=IMAGE, downsample_factor=2))


def cohere2() -> Any:
    towers = {"vision_config": hf.SiglipVisionConfig(**HEADLESS), "text_config": hf.Cohere2Config(**TEXT, sliding_window=64)}
    options = {"image_token_id": IMAGE, "downsample_factor": 2, "alignment_intermediate_size": 64}
    return hf.Cohere2VisionForConditionalGeneration(hf.Cohere2VisionConfig(**towers, **options))


def janus() -> Any:
    towers = {"vision_config": {**TOWER, "projection_dim": 32}, "text_config": hf.LlamaConfig(**WIDE)}
    return hf.JanusForConditionalGeneration(hf.JanusConfig(**towers, image_token_id=IMAGE))


def lfm2() -> Any:
    sizes = {name: value for name, value in TOWER.items() if name != "image_size"}
    text = hf.Lfm2Config(**TEXT, layer_types=["full_attention", "conv"], tie_word_embeddings=False)
    towers = {"vision_config": hf.Siglip2VisionConfig(**sizes, num_patches=64), "text_config": text}
    return hf.Lfm2VlForConditionalGeneration(hf.Lfm2VlConfig(**towers, image_token_id=IMAGE, downsample_factor=2))


def internvl() -> Any:
    tower = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    config = hf.InternVLConfig(vision_config=tower, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5)
    return hf.InternVLForConditionalGeneration(config)


def smolvlm() -> Any:
    towers = {"vision_config": TOWER, "text_config": hf.LlamaConfig(**WIDE)}
    return hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(**towers, image_token_id=IMAGE, scale_factor=2))


def idefics3() -> Any:
    towers = {"vision_config": TOWER, "text_config": hf.LlamaConfig(**WIDE)}
    return hf.Idefics3ForConditionalGeneration(hf.Idefics3Config(**towers, image_token_id=IMAGE, scale_factor=2))


def mistral3() -> Any:
    towers = {"vision_config": hf.PixtralVisionConfig(**TOWER, head_dim=12), "text_config": hf.MistralConfig(**WIDE)}
    options = {"image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1}
    return hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(**towers, **options))


def qwen2() -> Any:
    tower = {**GRID, "embed_dim": 48, "hidden_size": 32, "mlp_ratio": 2}
    marks = {**MARKS, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
    config = hf.Qwen2VLConfig(vision_config=tower, text_config={**TEXT, "rope_parameters": ROPE}, **marks)
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5() -> Any:
    tower = {**GRID, "hidden_size": 48, "out_hidden_size": 32, "intermediate_size": 64}
    tower |= {"window_size": 28, "fullatt_block_indexes": [1, 3]}
    marks = {**MARKS, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
    config = hf.Qwen2_5_VLConfig(vision_config=tower, text_config={**TEXT, "rope_parameters": ROPE}, **marks)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3() -> Any:
    tower = {**GRID, "hidden_size": 48, "out_hidden_size": 32, "intermediate_size": 64}
    tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    marks = {**MARKS, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
    config = hf.Qwen3VLConfig(vision_config=tower, text_config={**WIDE, "rope_parameters": ROPE}, **marks)
    return hf.Qwen3VLForConditionalGeneration(config)


def glm4v() -> Any:
    tower = {**GRID, "hidden_size": 48, "out_hidden_size": 32, "intermediate_size": 64, "image_size": SIDE}
    text = {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
    marks = {**MARKS, "image_start_token_id": BEGIN, "image_end_token_id": END}
    return hf.Glm4vForConditionalGeneration(hf.Glm4vConfig(vision_config=tower, text_config=text, **marks))


def noise(shape: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """One random tensor for each number, the same wherever the number is: [len(numbers), *shape]."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(n)) for n in numbers])


def plain(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    return {"pixel_values": noise((3, SIDE, SIDE), flat(rows))}


def sized(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    return {**plain(rows), "image_sizes": torch.tensor([[SIDE, SIDE]] * len(flat(rows)))}


def tiled(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    images = noise((5, 3, SIDE, SIDE), flat(rows))
    return {"pixel_values": images, "image_sizes": torch.tensor([[2 * SIDE, 2 * SIDE]] * len(images))}


def patches(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    images = noise((64, 3 * PATCH**2), flat(rows))
    shapes = torch.tensor([[8, 8]] * len(images))
    return {"pixel_values": images, "spatial_shapes": shapes, "pixel_attention_mask": torch.ones(len(images), 64).long()}


def gridded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    images = noise((64, 2 * 3 * PATCH**2), flat(rows))
    return {"pixel_values": images.flatten(0, 1), "image_grid_thw": torch.tensor([[1, 8, 8]] * len(images))}


def by_row(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows with fewer images than others have empty ones behind theirs."""
    out = torch.zeros(len(rows), max(map(len, rows)), 3, SIDE, SIDE)
    for b, row in enumerate(rows):
        out[b, : len(row)] = noise((3, SIDE, SIDE), row) if row else out[b, :0]
    return {"pixel_values": out}


def flat(rows: Sequence[Sequence[int]]) -> list[int]:
    return [number for row in rows for number in row]


@dataclass(frozen=True)
class Host:
    build: Callable[[], Any]
    pixels: Callable[[Sequence[Sequence[int]]], dict[str, Tensor]]
    tokens: int  # of an image
    types: str = ""  # what its processor calls token types
    plain: bool = True  # whether a masked token is as good as none


HOSTS = {
    "llava": Host(llava_clip, plain, 64),
    "llava-siglip": Host(llava_siglip, plain, 64),
    "vipllava": Host(vipllava, plain, 64),
    "gemma3": Host(gemma3, plain, 16, "token_type_ids"),
    "paligemma": Host(paligemma, plain, 64, "token_type_ids"),
    "aya": Host(aya, plain, 16),
    "cohere2-vision": Host(cohere2, plain, 16),
    "janus": Host(janus, plain, 64),
    "deepseek-vl": Host(deepseek, plain, 64),
    "llava-next": Host(llava_next, tiled, 64 + 16 * 17),
    "onevision": Host(onevision, tiled, 64 + 16 * 17),
    "lfm2-vl": Host(lfm2, patches, 16, plain=False),  # a convolution sees its neighbours, masked or not
    "qwen2-vl": Host(qwen2, gridded, 16, "mm_token_type_ids"),
    "qwen2.5-vl": Host(qwen2_5, gridded, 16, "mm_token_type_ids"),
    "qwen3-vl": Host(qwen3, gridded, 16, "mm_token_type_ids"),
    "glm4v": Host(glm4v, gridded, 16, "mm_token_type_ids"),
    "internvl": Host(internvl, plain, 16),
    "smolvlm": Host(smolvlm, by_row, 16),
    "idefics3": Host(idefics3, by_row, 16),
    "mistral3": Host(mistral3, sized, 16),
    "pixtral": Host(pixtral, sized, 64),
}


def model(name: str) -> Any:
    return zoo.randomize(HOSTS[name].build()).eval()


def prompt(name: str, rows: Sequence[Sequence[int]] = ((7,),), side: str = "left") -> dict[str, Tensor]:
    """What a processor returns for rows of text with these images, each between two marks; shorter rows are padded."""
    host = HOSTS[name]
    texts = []
    for b, row in enumerate(rows):
        ids = [1, 5, 6 + b]
        for number in row:
            ids += [BEGIN, *[IMAGE] * host.tokens, END, 20 + number % 50]
        texts.append(torch.tensor([*ids, 8, 9 + b, 10]))
    longest = max(map(len, texts))
    ends = [(longest - len(t), 0) if side == "left" else (0, longest - len(t)) for t in texts]
    ids, mask = (
        torch.stack([torch.nn.functional.pad(of(t), end) for t, end in zip(texts, ends, strict=True)])
        for of in (lambda t: t, torch.ones_like)
    )
    types = {host.types: (ids == IMAGE).long()} if host.types else {}
    return {"input_ids": ids, "attention_mask": mask, **types, **host.pixels(rows)}

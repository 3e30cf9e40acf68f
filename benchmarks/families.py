"""Overhead of a reducer over the limit (tokens merely sliced), in every family at ViT-S size.

    python benchmarks/families.py --rounds 9        # benchmarks/results/families.json

Random weights: time depends on shapes alone. 224 pixels, patches of 16, 12 blocks of 384 channels and 6 heads.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import squeezevit as sv
from squeezevit.bench.run import measure
from workshop import RESULTS, Sheet, overhead, timing_arguments

HF = {
    "image_size": 224, "patch_size": 16, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "intermediate_size": 1536,
}  # fmt: skip
REDUCERS = (sv.ETPS(keep=0.7), sv.ETPS(keep=0.5), sv.ETPS(keep=0.5, mass=True))


def timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def huggingface(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**HF, **options))


def torchvision() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(224, 16, 12, 6, 384, 1536)


def open_clip() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(224, 16, 384, 12, 6, 4.0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm VisionTransformer": lambda: timm("vit_small_patch16_224"),
    "timm Eva (DINOv3)": lambda: timm("vit_small_patch16_dinov3"),
    "transformers ViT": lambda: huggingface("ViTModel", "ViTConfig"),
    "transformers DINOv2": lambda: huggingface("Dinov2Model", "Dinov2Config"),
    "transformers DINOv3": lambda: huggingface("DINOv3ViTModel", "DINOv3ViTConfig"),
    "transformers CLIP": lambda: huggingface("CLIPVisionModel", "CLIPVisionConfig"),
    "transformers SigLIP": lambda: huggingface("SiglipVisionModel", "SiglipVisionConfig"),
    "torchvision VisionTransformer": torchvision,
    "open_clip VisionTransformer": open_clip,
    "timm BEiT": lambda: timm("beit_base_patch16_224", embed_dim=384, num_heads=6),
    "timm RelPos": lambda: timm("vit_relpos_small_patch16_224"),
    "transformers BEiT": lambda: huggingface("BeitModel", "BeitConfig", use_relative_position_bias=True),
    "transformers Data2Vec": lambda: huggingface(
        "Data2VecVisionModel", "Data2VecVisionConfig", use_shared_relative_position_bias=True
    ),
    "transformers AIMv2": lambda: huggingface("Aimv2VisionModel", "Aimv2VisionConfig"),
    "transformers InternVL": lambda: huggingface("InternVLVisionModel", "InternVLVisionConfig"),
}


def main() -> None:
    parser = timing_arguments(__doc__, batch_size=16)
    parser.add_argument("--models", nargs="*", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--json", type=Path, default=RESULTS / "families.json")
    args = parser.parse_args()
    setting = {"batch_size": args.batch_size, "rounds": args.rounds, "precision": args.precision}
    sheet = Sheet(args.json, args.device, **setting)
    for name in args.models:
        model = MODELS[name]().to(args.device)
        for speed in measure(model, REDUCERS, args.batch_size, 224, args.rounds, args.precision):
            text = f"{name}: {speed.reducer} speed-up {speed.speedup_best:.2f}{overhead(speed)}"
            sheet.add({"model": name, **asdict(speed)}, text)
        sheet.save()


if __name__ == "__main__":
    main()

"""What is supported, of which versions, and what is refused and why; needs none of the libraries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile

_WINDOWS = "it attends within windows of the grid, which reduced tokens do not fill"


@dataclass(frozen=True)
class Family:
    """A library. Versions from `since` on and below `before` are tested; others may work, and warn."""

    library: str  # as imported
    distribution: str  # as installed
    since: str
    before: str
    models: tuple[str, ...]  # classes
    refused: Mapping[str, str] = field(default_factory=dict)  # class: why
    kept: str = ""  # options of the models that are respected

    @property
    def installed(self) -> str | None:
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Why classes are refused, and which."""
        out: dict[str, list[str]] = {}
        for name, why in self.refused.items():
            out.setdefault(why, []).append(name)
        return out

    @property
    def tested(self) -> bool:
        """Whether the installed version is one that was tested."""
        return self.installed is not None and _numbers(self.since) <= _numbers(self.installed) < _numbers(self.before)


def _numbers(text: str) -> tuple[int, ...]:
    """(1, 0, 31) of "1.0.31" and of "1.0.31.dev0"."""
    return tuple(map(int, takewhile(str.isdigit, text.replace("+", ".").split("."))))


TOWERS = {  # of Hugging Face: prefix tokens without registers
    "ViTModel": 1,
    "DeiTModel": 2,
    "ViTMAEModel": 1,
    "ViTMSNModel": 1,
    "IJepaModel": 0,
    "Dinov2Model": 1,
    "Dinov2WithRegistersModel": 1,
    "DINOv3ViTModel": 1,
    "CLIPVisionModel": 1,
    "SiglipVisionModel": 0,
    "Siglip2VisionModel": 0,
    "Aimv2VisionModel": 0,
    "BeitModel": 1,
    "Data2VecVisionModel": 1,
    "AltCLIPVisionModel": 1,
    "ASTModel": 2,
    "BlipVisionModel": 1,
    "Blip2VisionModel": 1,
    "ChineseCLIPVisionModel": 1,
    "CLIPSegVisionModel": 1,
    "DPTModel": 1,
    "GitVisionTransformer": 1,
    "Idefics2VisionTransformer": 0,
    "Idefics3VisionTransformer": 0,
    "InstructBlipVisionModel": 1,
    "InstructBlipVideoVisionModel": 1,
    "InternVLVisionModel": 1,
    "JanusVisionModel": 0,
    "Kosmos2VisionTransformer": 1,
    "MetaClip2VisionModel": 1,
    "OwlViTVisionTransformer": 1,
    "Owlv2VisionTransformer": 1,
    "PixioModel": 0,
    "Sapiens2Model": 1,
    "SmolVLMVisionTransformer": 0,
    "Tipsv2VisionModel": 1,
    "VideoMAEModel": 0,
    "VivitModel": 1,
}
BACKBONES = {  # of Hugging Face: what runs the blocks in them, and puts out what left each
    "Dinov2Backbone": "encoder",
    "Dinov2WithRegistersBackbone": "encoder",
    "DINOv3ViTBackbone": "model",
    "PixioBackbone": "pixio",
    "BeitBackbone": "beit",
    "Sapiens2Backbone": "model",
    "Tipsv2VisionBackbone": "encoder",
}
ANY_COUNT = (  # of Hugging Face: what is around a tower and takes any number of tokens from it
    *(f"{name}ForImageClassification" for name in ("ViT", "DeiT", "ViTMSN", "IJepa", "Dinov2", "Dinov2WithRegisters")),
    *(f"{name}ForImageClassification" for name in ("CLIP", "Siglip", "MetaClip2")),
    "DeiTForImageClassificationWithTeacher", "ASTForAudioClassification",
    "BeitForImageClassification", "Data2VecVisionForImageClassification",
    *(f"{name}ForVideoClassification" for name in ("VideoMAE", "Vivit")),
    *(f"{name}ForConditionalGeneration" for name in ("Blip", "Blip2")),
    *(f"{name}Model" for name in ("CLIP", "Siglip", "Siglip2", "MetaClip2", "AltCLIP", "ChineseCLIP", "CLIPSeg", "OwlViT")),
    *(f"{name}VisionModelWithProjection" for name in ("CLIP", "MetaClip2")),
    *(f"{name}VisionModel" for name in ("OwlViT", "Owlv2", "Kosmos2", "Git")),
    "Owlv2Model", "VisionTextDualEncoderModel",
    *(f"{name}{what}" for name in ("Llava", "PaliGemma") for what in ("Model", "ForConditionalGeneration")),
)  # fmt: skip
TABLE = (
    Family(
        "timm",
        "timm",
        "1.0.20",
        "1.1",
        (
            "VisionTransformer",
            "VisionTransformerDistilled",
            "Eva",
            "NaFlexVit",
            "Beit",
            "VisionTransformerRelPos",
            "Qwen3VitEncoder",
            "Qwen3VitClassifier",
        ),
        {
            "VisionTransformerSAM": _WINDOWS,
            "SwinTransformer": _WINDOWS,
            "SwinTransformerV2": _WINDOWS,
        },
        "plain, residual-post-norm and post-norm blocks, LayerScale, q/k-norm, gated attention, registers, rotary embeddings "
        "(axial, mixed, DINOv3's), relative positions, SwiGLU, `features_only=True` with `grid=True`, NaFlexVit on images of one "
        "size, Qwen3's towers with `grid=True`, all poolings ('prr' without mass); parallel blocks are refused where a stage is",
    ),
    Family(
        "transformers",
        "transformers",
        "5.18",
        "5.25",
        (*TOWERS, *BACKBONES),
        {"SwinModel": _WINDOWS},
        "alone, under their own heads (classification, CLIPModel, SiglipModel) and, with `grid=True`, inside whatever lays their "
        "tokens out or counts them (depth, segmentation, detection, vision-language models); timm's models inside TimmWrapper and "
        "TimmBackbone; sdpa and eager attention; images of variable size without padding",
    ),
    Family("torchvision", "torchvision", "0.21", "0.30", ("VisionTransformer",), {"SwinTransformer": _WINDOWS}),
    Family(
        "open_clip",
        "open_clip_torch",
        "3.3",
        "3.4",
        ("VisionTransformer", "TimmModel"),
        {"ModifiedResNet": "it has no tokens"},
        "alone and inside CLIP, CustomTextCLIP and CoCa; pooling by class token, average or attention",
    ),
)


def listing() -> tuple[Family, ...]:
    """The libraries that SqueezeViT knows, installed or not; `sv.families()`.

    >>> [f.library for f in listing()]
    ['timm', 'transformers', 'torchvision', 'open_clip']
    """
    return TABLE


def as_markdown() -> str:
    """The listing as a table for the docs."""
    lines = ["| library | versions tested | models | refused |", "|---|---|---|---|"]
    for f in TABLE:
        models = ", ".join(f"`{m}`" for m in f.models) + (f" ({f.kept})" if f.kept else "")
        refused = "; ".join(f"{', '.join(f'`{n}`' for n in names)}: {why}" for why, names in f.reasons.items())
        lines.append(f"| {f.library} | {f.since} to below {f.before} | {models} | {refused} |")
    return "\n".join(lines) + "\n"


def refusal(model: object) -> str | None:
    """Why models of this class, or of one it derives from, are refused; None where nothing is known of them."""
    for c in type(model).__mro__:
        for family in TABLE:
            if c.__name__ in family.refused and c.__module__.split(".")[0] == family.library:
                return f"{c.__name__}: {family.refused[c.__name__]}"
    return None


def untested(library: str) -> str | None:
    """A warning where the installed version is not one that was tested."""
    family = next(f for f in TABLE if f.library == library)
    if family.tested:
        return None
    return (
        f"{library} {family.installed} is not among the versions that SqueezeViT was tested with, {family.since} to below "
        f"{family.before}; blocks are proved when they are reduced all the same"
    )

